"""tools.report: the facts it reads, what it claims and what not, and the page, also in a real browser.

The browser is a Chromium that is found here (CHROMIUM=path names one). Without any those tests are skipped, unless
REQUIRE_CHROMIUM=1 says that they must run.
"""

import ast
import base64
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT

from eval_benchmark import LABELS
from stagekit import charts, report_text
from stagekit.checkpoint import stage_fingerprint
from stagekit.report import collect
from stagekit.report_findings import compare, judge, write_lead
from stagekit.report_page import render
from stagekit.report_text import KINDS, TEXT, both, show, show_bytes, show_parameters, show_seconds
from tools import report

BASE = {"name_or_path": "Qwen/Qwen3-0.6B-Base", "revision": None, "fingerprint": "sha256:base"}
SETTINGS = {"max_new_tokens": 64, "temperature": 0.0, "num_shots": 0, "max_samples": None, "seed": 42, "batch_size": 8}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_stage(directory, method, parent=None, files=None, **more):
    """Write a stage.json by hand; `parent` is the directory of another stage."""
    recorded = None
    if parent is not None:
        record = json.loads((parent / "stage.json").read_text(encoding="utf-8"))
        path = os.path.relpath(parent, directory)
        recorded = {"path": path, "stage": record["stage"], "fingerprint": stage_fingerprint(record)}
    stage = {
        "format": 1,
        "stage": method,
        "created": "2026-11-21T10:00:00+00:00",
        "command": f"{method}.py --output_dir {directory.name}",
        "seed": 42,
        "base_model": BASE,
        "parent": recorded,
        "tuning": {"method": "lora", "rank": 8, "continued": parent is not None},
        "template": {"name": "chatml", "sha256": "00"},
        "arguments": {},
        "versions": {"torch": "2.13.0"},
        "hardware": {"device": "cpu", "processes": 1, "cpu_cores": 2, "precision": "fp32"},
        "data": {
            "train": {"read": 12, "used": 10, "dropped": {"too long": 2}, "truncated": 3, "tokens": {"used": 99}}
        },
        "checks": {"finite": {"passed": True, "value": "all", "limit": "finite"}},
        "metrics": {},
        "memory": {"predicted_bytes": 2**30, "measured_bytes": 2**29},
        "seconds": 60.0,
        "files": files or {"adapter_model.safetensors": directory.name},
    }
    write_json(directory / "stage.json", {**stage, **more})
    return directory


def metric(value, low=None, high=None, n=100):
    return {"value": value, "n": n, **({} if low is None else {"low": low, "high": high})}


def write_evaluation(directory, measured, rows=None, settings=SETTINGS, stage=None, **more):
    """Write the results.json of eval_benchmark.py: measured is {file: (task, metrics, maybe more)}."""
    stage = directory.parent if stage is None else stage
    record = json.loads((stage / "stage.json").read_text(encoding="utf-8")) if stage else {}
    marks = [BASE["fingerprint"], stage_fingerprint(record) if stage else None]
    whole = {
        name: {
            "task": task[0],
            "data_file": f"data/eval/{name}.jsonl",
            "sha256": "f" * 64,
            "num": 100,
            "metrics": task[1],
        }
        | {"seen_in_training": 0, **(task[2] if len(task) > 2 else {})}
        for name, task in measured.items()
    }
    results = {
        "format": 1,
        "created": "2026-11-21T11:00:00+00:00",
        "command": "eval_benchmark.py",
        "settings": settings,
    }
    results |= {"model": {"fingerprints": marks}, "versions": {}, "seconds": 5.0, "tasks": whole, "skipped": {}}
    write_json(directory / "results.json", {**results, **more})
    for name, lines in (rows or {}).items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def questions(rouge, **more):
    return {"questions": ("questions", {"rougeL": metric(*rouge), **more})}


@pytest.fixture
def outputs(tmp_path):
    return tmp_path / "outputs"


@pytest.fixture
def chain(outputs):
    """pt -> sft -> rm, ppo: the four stages of the classic way."""
    pt = write_stage(outputs / "pt", "pt")
    sft = write_stage(outputs / "sft", "sft", pt)
    write_stage(outputs / "rm", "rm", sft)
    write_stage(outputs / "ppo", "ppo", sft, arguments={"reward_model_path": "outputs/rm"})
    return outputs


def facts_of(outputs, num_questions=5):
    return judge(collect(outputs, num_questions))


def stages_of(outputs):
    return {stage["id"]: stage for stage in collect(outputs, 0)["stages"]}


def page_of(facts, language="en"):
    return render(facts, language, "python -m tools.report outputs", "report.json")


def column_of(facts, key):
    return next(column for column in facts["measures"] if column["key"] == key)


# -- who came from whom ----------------------------------------------------------------------------------------------


def test_stages_are_found_at_any_depth_and_stand_behind_what_they_came_from(chain):
    write_stage(chain / "rounds/1/policy", "dpo", chain / "sft")
    write_stage(chain / "rounds/2/policy", "dpo", chain / "rounds/1/policy")
    write_json(chain / "sft/checkpoint-100/stage.json", {"format": 1, "stage": "sft"})
    found = stages_of(chain)
    assert list(found) == ["pt", "sft", "rm", "ppo", "rounds/1/policy", "rounds/2/policy"]
    assert [stage["origin"] for stage in found.values()] == [
        *("base:sha256:base", "pt", "sft", "sft", "sft", "rounds/1/policy"),
    ]
    assert [found[name]["label"] for name in ("pt", "rounds/1/policy")] == ["PT", "rounds/1/policy"]


def test_a_run_that_was_moved_aside_is_left_out_unless_something_came_from_it(chain):
    shutil.copytree(chain / "ppo", chain / "ppo.1")
    assert set(stages_of(chain)) == {"pt", "sft", "rm", "ppo"}
    assert collect(chain, 0)["left_out"] == ["ppo.1"]
    (chain / "sft").rename(chain / "sft.1")
    write_stage(chain / "sft", "sft", chain / "pt", files={"adapter_model.safetensors": "trained anew"})
    found = stages_of(chain)
    assert set(found) == {"pt", "sft", "sft.1", "rm", "ppo"}
    assert found["rm"]["origin"] == found["ppo"]["origin"] == "sft.1"
    assert found["rm"]["parent"]["changed"] is False


def test_a_directory_whose_name_ends_in_a_number_is_no_run_that_was_moved_aside(outputs):
    write_stage(outputs / "qwen2.5", "sft")
    assert list(stages_of(outputs)) == ["qwen2.5"]


def test_a_parent_that_was_trained_anew_since_then_is_warned_of(chain):
    write_stage(chain / "sft", "sft", chain / "pt", files={"adapter_model.safetensors": "trained anew"})
    facts = facts_of(chain)
    warnings = [warning for warning in facts["warnings"] if warning["key"] == "warn_parent"]
    assert warnings == [{"key": "warn_parent", "stage": name, "parent": "sft"} for name in ("RM", "PPO")]


def test_a_parent_outside_of_the_directory_is_shown_as_such(chain):
    (root,) = collect(chain / "ppo", 0)["roots"]
    assert (root["kind"], root["label"], root["method"]) == ("outside", "sft", "sft")


@pytest.mark.parametrize("given", ["outputs/rm", "./outputs/rm/", "{root}/rm", "/gone/elsewhere/rm"])
def test_the_reward_model_of_ppo_is_found_however_its_path_was_written(chain, given):
    arguments = {"reward_model_path": given.format(root=chain)}
    write_stage(chain / "ppo", "ppo", chain / "sft", arguments=arguments)
    (feed,) = stages_of(chain)["ppo"]["feeds"]
    assert (feed["id"], feed["how"]) == ("rm", "scores")


def test_a_reward_model_that_is_not_there_is_named_and_not_drawn(chain):
    write_stage(chain / "ppo", "ppo", chain / "sft", arguments={"reward_model_path": "org/reward-7b"})
    assert stages_of(chain)["ppo"]["feeds"] == [{"id": None, "path": "org/reward-7b", "how": "scores"}]
    assert "scored by org/reward-7b" in page_of(facts_of(chain))


def test_a_round_learns_from_answers_that_a_reward_model_chose(chain):
    data = {"train": {"read": 1, "used": 1, "files": ["outputs/rounds/1/samples/preferences.jsonl"]}}
    policy = write_stage(chain / "rounds/1/policy", "dpo", chain / "sft", data=data)
    summary = {"reward": {"model": {"name_or_path": "outputs/rm", "fingerprints": []}}}
    write_json(policy.parent / "samples/summary.json", summary)
    assert stages_of(chain)["rounds/1/policy"]["feeds"] == [{"id": "rm", "path": "outputs/rm", "how": "answers"}]


def test_links_that_lead_in_a_circle_are_walked_once(chain):
    (chain / "sft" / "again").symlink_to(chain)
    assert set(stages_of(chain)) == {"pt", "sft", "rm", "ppo"}


def test_parameters_are_counted_in_the_headers_of_the_weights(outputs):
    starter = {"name_or_path": ".", "fingerprint": "sha256:s"}
    command = "python -m tools.build_starter_model "
    path = write_stage(outputs / "starter", "pt", base_model=starter, command=command, tuning={"method": "full"})
    header = {"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}, "__metadata__": {"format": "pt"}}
    header["b"] = {"dtype": "F32", "shape": [5], "data_offsets": [48, 68]}
    encoded = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(68))
    (stage,) = collect(outputs, 0)["stages"]
    assert stage["base"]["parameters"] == 3 * 4 + 5
    assert stage["base"]["stand_in"] is True and stage["origin"] is None
    assert "starter is a stand-in: a toy of 0.0 M parameters" in page_of(facts_of(outputs))
    for damaged in (b"\xff" * 20, b"", (2).to_bytes(8, "little") + b"[]"):
        (path / "model.safetensors").write_bytes(damaged)
        assert collect(outputs, 0)["stages"][0]["base"]["parameters"] is None
    assert "starter is a stand-in: a toy that this toolkit builds" in page_of(facts_of(outputs))


# -- measures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "better", "expected"),
    [
        (metric(1, 0.5, 1.5), metric(3, 2.5, 3.5), "higher", "better"),
        (metric(3, 2.5, 3.5), metric(1, 0.5, 1.5), "higher", "worse"),
        (metric(1, 0.5, 1.5), metric(3, 2.5, 3.5), "lower", "worse"),
        (metric(3, 2.5, 3.5), metric(1, 0.5, 1.5), "lower", "better"),
        (metric(1, 0.5, 1.5), metric(3, 2.5, 3.5), None, "changed"),
        (metric(1, 0.5, 2.5), metric(3, 2.5, 3.5), "higher", "same"),  # they touch
        (metric(1, 0.5, 2.6), metric(3, 2.5, 3.5), "lower", "same"),
        (metric(1), metric(3, 2.5, 3.5), "higher", None),
        (metric(1, 0.5, 1.5), metric(3), "higher", None),
    ],
)
def test_a_change_needs_two_intervals_that_do_not_overlap(before, after, better, expected):
    assert compare(before, after, better) == expected


def test_values_and_marks_of_the_table(chain):
    write_evaluation(chain / "pt/eval", questions((8, 7, 9)))
    write_evaluation(chain / "sft/eval", questions((12, 11, 13)))
    write_evaluation(chain / "ppo/eval", questions((14, 12.5, 15.5)))
    column = column_of(facts_of(chain), "questions/rougeL")
    assert {name: cell["value"] for name, cell in column["cells"].items()} == {"pt": 8, "sft": 12, "ppo": 14}
    assert {name: cell["outcome"] for name, cell in column["cells"].items()} == {
        **{"pt": None, "sft": "better", "ppo": "same"}
    }
    assert column["best"] is None, "the highest value overlaps with what it came from"


def test_the_best_is_marked_where_it_stands_apart_from_its_origin(chain):
    write_evaluation(chain / "sft/eval", questions((12, 11, 13)))
    write_evaluation(chain / "ppo/eval", questions((16, 15, 17)))
    column = column_of(facts_of(chain), "questions/rougeL")
    assert column["best"] == "ppo"
    assert re.search(r'<td class="better best">\s*<span class="value">16.0<', page_of(facts_of(chain)))


def test_the_first_stage_is_never_the_best_for_it_came_from_nothing_that_was_measured(chain):
    write_evaluation(chain / "pt/eval", questions((20, 19, 21)))
    write_evaluation(chain / "sft/eval", questions((12, 11, 13)))
    assert column_of(facts_of(chain), "questions/rougeL")["best"] is None


def test_a_base_model_that_was_measured_is_what_its_first_stage_is_compared_with(outputs):
    write_stage(outputs / "sft", "sft")
    write_evaluation(outputs / "sft/eval", questions((12, 11, 13)))
    write_evaluation(outputs / "base/eval", questions((5, 4, 6)), stage=False)
    facts = facts_of(outputs)
    column = column_of(facts, "questions/rougeL")
    assert column["cells"]["sft"]["outcome"] == "better"
    assert facts["findings"][0]["en"] == "SFT raised ROUGE-L from 5.0 to 12.0."
    assert list(column["cells"]) == ["base:sha256:base", "sft"]


def test_results_that_stand_elsewhere_are_known_by_the_fingerprint_of_their_model(chain):
    write_evaluation(chain.parent / "outputs/measured/one", questions((12, 11, 13)), stage=chain / "sft")
    assert list(column_of(facts_of(chain), "questions/rougeL")["cells"]) == ["sft"]


@pytest.mark.parametrize(
    ("task", "settings", "key", "words"),
    [
        ({"sha256": "0" * 64}, {}, "warn_files", "another version of the file"),
        ({"num": 60}, {}, "warn_num", "60 rows, others on 100"),
        ({}, {"max_new_tokens": 8}, "warn_settings", "another max_new_tokens"),
        ({}, {"system_prompt": "Be kind.", "num_shots": 3}, "warn_settings", "another num_shots"),
    ],
    ids=["file", "rows", "length", "shots"],
)
def test_what_was_measured_otherwise_is_not_compared_and_warned_of(chain, task, settings, key, words):
    for name in ("pt", "sft"):
        write_evaluation(chain / name / "eval", questions((12, 11, 13)))
    rouge = {"rougeL": metric(30, 29, 31)}
    mine = {"questions": ("questions", rouge, task)}
    write_evaluation(chain / "ppo/eval", mine, settings={**SETTINGS, **settings})
    facts = facts_of(chain)
    column = column_of(facts, "questions/rougeL")
    assert (column["cells"]["ppo"]["comparable"], column["cells"]["ppo"]["outcome"]) == (False, None)
    assert column["best"] is None
    assert "measured otherwise than SFT, so not compared" in page_of(facts)
    (warning,) = facts["warnings"]
    assert (warning["key"], warning["stage"]) == (key, "PPO")
    assert words in page_of(facts)


def test_a_batch_size_or_a_seed_that_draws_nothing_changes_no_number(chain):
    write_evaluation(chain / "pt/eval", questions((8, 7, 9)))
    other = {**SETTINGS, "batch_size": 1, "seed": 7}
    write_evaluation(chain / "sft/eval", questions((12, 11, 13)), settings=other)
    assert column_of(facts_of(chain), "questions/rougeL")["cells"]["sft"]["outcome"] == "better"
    for name, settings in (("pt", SETTINGS), ("sft", other)):
        tasks = questions((8, 7, 9) if name == "pt" else (12, 11, 13))
        write_evaluation(chain / name / "eval", tasks, settings={**settings, "max_samples": 50})
    assert column_of(facts_of(chain), "questions/rougeL")["cells"]["sft"]["outcome"] is None, (
        "the seed drew other rows"
    )


def test_another_reward_model_spoils_the_reward_alone(chain):
    for name, reward in (("sft", "outputs/rm"), ("ppo", "outputs/rm2")):
        tasks = questions((12, 11, 13), reward=metric(1 if name == "sft" else 5, 0, 1.5 if name == "sft" else 6))
        write_evaluation(chain / name / "eval", tasks, settings={**SETTINGS, "reward_model": reward})
    facts = facts_of(chain)
    assert column_of(facts, "questions/rougeL")["cells"]["ppo"]["outcome"] == "same"
    assert column_of(facts, "questions/reward")["cells"]["ppo"]["outcome"] is None
    assert [warning["settings"] for warning in facts["warnings"]] == ["reward_model"]


@pytest.mark.parametrize(
    ("marks", "outcome"), [(("sha256:a", "sha256:a"), "better"), (("sha256:a", "sha256:b"), None)]
)
def test_a_reward_model_is_known_by_its_fingerprint_and_not_by_its_path(chain, marks, outcome):
    for name, mark, path in zip(
        ("sft", "ppo"), marks, ("rm", "rm" if marks[0] != marks[1] else "/moved/rm"), strict=True
    ):
        tasks = questions((12, 11, 13), reward=metric(1 if name == "sft" else 5, 0, 1.5 if name == "sft" else 6))
        tasks["questions"][1]["reward"]["low"] = tasks["questions"][1]["reward"]["value"] - 0.5
        settings = {**SETTINGS, "reward_model": path, "reward_fingerprints": ["sha256:base", mark]}
        write_evaluation(chain / name / "eval", tasks, settings=settings)
    facts = facts_of(chain)
    assert column_of(facts, "questions/reward")["cells"]["ppo"]["outcome"] == outcome
    assert [warning["settings"] for warning in facts["warnings"]] == ([] if outcome else ["reward_model"])


def test_rows_that_training_has_seen_are_told(chain):
    write_evaluation(
        chain / "sft/eval", {"mine": ("choice", {"accuracy_generation": metric(1)}, {"seen_in_training": 7})}
    )
    facts = facts_of(chain)
    assert {"key": "warn_leak", "file": "mine", "stage": "SFT", "seen": 7, "num": 100} in facts["warnings"]
    assert "SFT has seen 7 of 100 rows in training" in page_of(facts)
    assert both("no_leaks")[0] not in page_of(facts)


def test_an_evaluation_of_an_earlier_training_is_not_used(chain):
    write_evaluation(chain / "ppo/eval", questions((12, 11, 13)))
    write_stage(chain / "ppo", "ppo", chain / "sft", files={"adapter_model.safetensors": "trained anew"})
    facts = facts_of(chain)
    assert facts["measures"] == []
    assert {"key": "warn_stale", "stage": "PPO"} in facts["warnings"]
    assert any("--lora_model" in stage["measure"] for stage in facts["stages"] if stage["id"] == "ppo")


def test_the_command_that_measures_what_is_missing_is_shown(chain):
    write_evaluation(chain / "sft/eval", questions((12, 11, 13)))
    page = page_of(facts_of(chain))
    model = f"{chain}/ppo --data_file data/eval --output_dir {chain}/ppo/eval --reward_model {chain}/rm"
    checked = Checker(page)
    commands = checked.texts["span"]
    assert f"python eval_benchmark.py --lora_model {model}" in commands
    assert f"--base_model Qwen/Qwen3-0.6B-Base --data_file data/eval --output_dir {chain}/base/eval" in commands
    assert f"--lora_model {chain}/sft" not in commands


def test_a_mean_without_an_interval_is_shown_and_not_compared(chain):
    rows = [row(place, f"{place}?", new_tokens=place) for place in range(12)]
    for name, length in (("sft", 5.5), ("ppo", 50.5)):
        tasks = questions((12, 11, 13), answer_tokens=metric(length))
        write_evaluation(chain / name / "eval", tasks, {"questions": rows})
    cell = column_of(facts_of(chain), "questions/answer_tokens")["cells"]["ppo"]
    assert (cell["value"], "low" in cell, cell["outcome"]) == (50.5, False, None)
    assert "no interval" in page_of(facts_of(chain))


# -- what is claimed -------------------------------------------------------------------------------------------------


def sentences(facts):
    return {finding["kind"]: finding["en"] for finding in facts["findings"]}


def test_overlapping_intervals_are_no_finding(chain):
    write_evaluation(chain / "sft/eval", questions((12, 11, 13)))
    write_evaluation(chain / "ppo/eval", questions((13.5, 12.5, 14.5)))
    assert sentences(facts_of(chain)) == {"same": TEXT["lead_same"][0]}
    assert facts_of(chain)["findings"][0]["zh"] == TEXT["lead_same"][1]


def test_gains_costs_and_what_stayed_are_told_in_that_order(chain):
    for name, rouge, reward, choice in (
        ("sft", (12, 11, 13), (2, 1.5, 2.5), (0.25, 0.2, 0.3)),
        ("ppo", (8, 7, 9), (4, 3.5, 4.5), (0.27, 0.22, 0.32)),
    ):
        tasks = questions(rouge, reward=metric(*reward))
        tasks["exam"] = ("choice", {"accuracy_loglikelihood": metric(*choice)})
        write_evaluation(chain / name / "eval", tasks)
    findings = facts_of(chain)["findings"]
    assert [finding["kind"] for finding in findings] == ["gains", "costs", "unchanged"]
    assert [finding["en"] for finding in findings] == [
        "PPO raised the reward model's score from +2.00 to +4.00.",
        "At a cost: PPO lowered ROUGE-L from 12.0 to 8.0.",
        "No stage changed choice accuracy by log-likelihood beyond its 95% interval.",
    ]
    assert [finding["zh"] for finding in findings] == [
        "PPO 把奖励模型打分从 +2.00 提高到 +4.00。",
        "代价是：PPO 把ROUGE-L从 12.0 降到 8.0。",
        "没有任何阶段让选择题准确率（按似然）的变化超出 95% 区间。",
    ]


def test_a_stage_is_told_by_what_it_is_for_and_no_sentence_grows_too_long(outputs):
    sft = write_stage(outputs / "sft", "sft")
    both_up = {"bleu4": metric(1, 0.5, 1.5), "reward": metric(1, 0.5, 1.5)}
    write_evaluation(sft / "eval", questions((10, 9, 11), **both_up))
    for name in ("a", "b", "c", "d"):
        write_stage(outputs / name, "dpo", sft)
        up = {"bleu4": metric(5, 4, 6), "reward": metric(5, 4, 6)}
        write_evaluation(outputs / name / "eval", questions((20, 19, 21), **up))
    text = sentences(facts_of(outputs))["gains"]
    score = "raised the reward model's score from +1.00 to +5.00"
    assert text == f"a {score}, b {score}, c {score}, and 1 more (see below)."


def test_a_measure_is_named_with_its_file_where_two_files_have_it(chain):
    for name, values in (("sft", (0.2, 0.1, 0.3)), ("ppo", (0.5, 0.4, 0.6))):
        exams = {exam: ("choice", {"accuracy_generation": metric(*values)}) for exam in ("cmb", "medqa")}
        write_evaluation(chain / name / "eval", exams)
    assert "choice accuracy by generation on cmb from 20.0% to 50.0%" in sentences(facts_of(chain))["gains"]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((0.7, 0.6, 0.8), "RM puts 70.0% of held-out pairs in the right order."), ((0.55, 0.45, 0.65), None)],
)
def test_a_reward_model_is_praised_only_above_chance(chain, interval, expected):
    write_evaluation(chain / "rm/eval", {"preferences": ("pairs", {"pair_accuracy": metric(*interval)})})
    assert sentences(facts_of(chain)).get("gains") == expected


def test_a_reward_model_that_is_not_above_chance_says_nothing_of_a_change(chain):
    write_evaluation(chain / "rm/eval", {"preferences": ("pairs", {"pair_accuracy": metric(0.55, 0.45, 0.65)})})
    write_evaluation(chain / "sft/eval", questions((12, 11, 13)))
    write_evaluation(chain / "ppo/eval", questions((16, 15, 17)))
    assert set(sentences(facts_of(chain))) == {"gains"}


def test_answers_and_pairs_that_a_stage_measured_of_itself_are_told_apart(chain):
    after = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "answer_accuracy": 0.25, "pairs": 64}
    before = {**after, "accuracy": 0.4, "accuracy_low": 0.3, "accuracy_high": 0.5, "answer_accuracy": 0.125}
    write_stage(chain / "orpo", "orpo", chain / "sft", metrics={"before": before, "after": after})
    facts = facts_of(chain)
    assert sentences(facts)["gains"].endswith("pairs in the right order from 40.0% to 90.0%.")
    page = page_of(facts)
    row = page[page.index("accuracy on verifiable questions") :]
    assert "pairs in the right order" in page and "25.0%" in row[: row.index("</tr>")]


def test_what_training_measured_of_itself_counts_where_nothing_else_was_measured(chain):
    metrics = {
        "before": {"accuracy": 0.4, "accuracy_low": 0.3, "accuracy_high": 0.5, "pairs": 64},
        "after": {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "pairs": 64, "by_length": [1]},
    }
    write_stage(chain / "rm", "rm", chain / "sft", metrics=metrics)
    loss = {"before": {"perplexity": 600.0, "tokens": 9}, "after": {"perplexity": 300.0, "tokens": 9}}
    write_stage(chain / "sft", "sft", chain / "pt", metrics=loss)
    facts = facts_of(chain)
    expected = "RM raised the share of its own held-out pairs in the right order from 40.0% to 90.0%."
    assert sentences(facts) == {"gains": expected}, "a perplexity without an interval is no finding"
    rm = next(stage for stage in facts["stages"] if stage["id"] == "rm")
    values = {"before": {"value": 0.4, "low": 0.3, "high": 0.5}, "after": {"value": 0.9, "low": 0.8, "high": 0.95}}
    assert rm["own"] == [{"metric": "accuracy", **values, "n": 64}]
    write_evaluation(chain / "rm/eval", {"preferences": ("pairs", {"pair_accuracy": metric(0.6, 0.4, 0.8)})})
    assert sentences(facts_of(chain)) == {"same": TEXT["lead_same"][0]}, "the common file comes first"


def test_nothing_is_claimed_where_nothing_was_measured(chain):
    assert sentences(facts_of(chain)) == {"none": TEXT["lead_none"][0]}


def test_checks_that_were_skipped_or_failed_are_warned_of(chain):
    checks = {
        "leakage": {"passed": None, "value": "skipped", "limit": ""},
        "finite": {"passed": False, "value": "nan"},
    }
    write_stage(chain / "ppo", "ppo", chain / "sft", checks=checks)
    facts = facts_of(chain)
    assert [warning["key"] for warning in facts["warnings"]] == ["warn_skipped", "warn_failed"]
    assert facts["summary"]["checks_passed"] == 3 and facts["summary"]["checks_total"] == 5


# -- courses, samples, questions -------------------------------------------------------------------------------------


def test_curves_hold_what_the_log_says_and_no_nan(outputs):
    history = [
        {"step": 0, "eval_score": 1.0, "eval_score_low": 0.5, "eval_score_high": 1.5, "eval_kl": 0.0},
        {"step": 5, "score": 2.0, "kl": 0.25, "loss": 0.1},
        {"step": 10, "score": float("nan"), "kl": 0.5, "loss": 0.1, "eval_rouge_l": 12.5},
        {"step": 10, "eval_score": 3.0, "eval_rouge_l": 12.5},
        {"loss": 1.0},
        "no entry",
    ]
    write_stage(outputs / "ppo", "ppo")
    write_json(outputs / "ppo/trainer_state.json", {"log_history": history})
    curves = {curve["key"]: curve for curve in collect(outputs, 0)["stages"][0]["curves"]}
    assert list(curves) == ["score", "kl", "rouge_l"], "the loss of PPO says nothing"
    assert curves["score"]["train"] == [(5, 2.0)]
    assert curves["score"]["held_out"] == [
        {"step": 0, "value": 1.0, "low": 0.5, "high": 1.5},
        {"step": 10, "value": 3.0},
    ]
    assert curves["rouge_l"] == {"key": "rouge_l", "train": [], "held_out": [{"step": 10, "value": 12.5}]}


def test_grpo_is_drawn_by_its_reward_in_training_and_its_score_on_held_out_prompts(outputs):
    history = [{"step": 0, "eval_score": 0.2}, {"step": 5, "reward": 0.3, "completions/mean_length": 40.0}]
    write_stage(outputs / "grpo", "grpo")
    write_json(outputs / "grpo/trainer_state.json", {"log_history": history})
    score, length = collect(outputs, 0)["stages"][0]["curves"]
    assert (score["train"], score["held_out"]) == ([(5, 0.3)], [{"step": 0, "value": 0.2}])
    assert (length["key"], length["train"]) == ("length", [(5, 40.0)])


def test_a_held_out_loss_that_rose_again_is_said(chain):
    history = [{"step": step, "eval_loss": loss} for step, loss in ((0, 6.5), (100, 6.0), (200, 6.2))]
    write_json(chain / "sft/trainer_state.json", {"log_history": history})
    assert "Held-out loss was lowest at step 100 (6.00) and rose to 6.20" in page_of(facts_of(chain))
    write_json(chain / "sft/trainer_state.json", {"log_history": history[:2] + [{"step": 200, "eval_loss": 5.9}]})
    assert "Held-out loss was lowest" not in page_of(facts_of(chain))


def test_samples_are_from_the_beginning_and_the_end_of_training(chain):
    rows = [{"step": step, "prompt": f"p{step}", "answer": "a", "score": 0.5} for step in (5, 5, 10, 15)]
    (chain / "ppo/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    samples = stages_of(chain)["ppo"]["samples"]
    assert [row["prompt"] for row in samples["first"]] == ["p5", "p5"]
    assert [row["prompt"] for row in samples["last"]] == ["p15"]


def row(index, asked, answer="Drink water.", **more):
    messages = [{"role": "user", "content": asked}]
    return {
        "index": index,
        "input": asked,
        "messages": messages,
        "prediction": answer,
        "finish_reason": "stop",
        **more,
    }


def test_the_same_questions_in_both_languages_are_picked_of_those_all_have_answered(chain):
    asked = [f"{word}{place}" for word in ("什么是发烧", "What is a fever ") for place in range(10)]
    seen = {"seen_in_training": True}
    sft = [row(place, text, **(seen if place == 0 else {})) for place, text in enumerate(asked)]
    ppo = [row(place, text) for place, text in enumerate(asked) if place != 1]
    for name, rows in (("sft", sft), ("ppo", ppo)):
        write_evaluation(chain / name / "eval", questions((12, 11, 13)), {"questions": rows})
    found = collect(chain, 5)["questions"]
    # of the Chinese ones 8 are left (one was seen, one is missing): places 0, 8/3, 16/3; of the English ones 0 and 5
    assert [question["question"] for question in found] == [asked[2], asked[10], asked[4], asked[15], asked[7]]
    assert all(set(question["answers"]) == {"sft", "ppo"} for question in found)
    assert [len(collect(chain, count)["questions"]) for count in (0, 1, 40)] == [0, 1, 19]


def test_a_question_that_came_after_others_says_so(chain):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    asked = row(0, "And then?", reference="Rest.", new_tokens=3, reward=1.5)
    asked["messages"] = turns + asked["messages"]
    write_evaluation(chain / "sft/eval", questions((12, 11, 13)), {"questions": [asked]})
    (question,) = collect(chain, 5)["questions"]
    assert (question["earlier_turns"], question["reference"], question["language"]) == (1, "Rest.", "en")
    answer = {"text": "Drink water.", "finish_reason": "stop", "new_tokens": 3, "reward": 1.5}
    assert question["answers"] == {"sft": answer}
    page = page_of(facts_of(chain))
    assert "after 1 earlier turns" in page and "RM score +1.50" in page


# -- what is missing or damaged --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("stage.json", '{"format": 1'),
        ("stage.json", "[]"),
        ("stage.json", '{"format": 2}'),
        ("trainer_state.json", "{]"),
        ("samples.jsonl", '{"step": 1}\n{"step"'),
        ("eval/results.json", "no"),
        ("eval/results.json", '{"format": 7, "tasks": {}}'),
        ("eval/questions.jsonl", "{}\n[]\n"),
    ],
)
def test_a_damaged_file_ends_with_one_line_that_names_it(chain, name, content):
    write_evaluation(chain / "ppo/eval", questions((12, 11, 13)))
    (chain / "ppo" / name).write_text(content, encoding="utf-8")
    command = [sys.executable, "-m", "tools.report", str(chain)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"report: error: {chain}/ppo/{name}:")
    assert not (chain / "report.html").exists()


@pytest.mark.parametrize("content", ['{"results": {}, "format": 9}', '{"acc": 0.5}', "[1, 2]"])
def test_results_of_other_programs_are_none_of_ours(chain, content):
    (chain / "harness").mkdir()
    (chain / "harness/results.json").write_text(content, encoding="utf-8")
    write_evaluation(chain / "sft/eval", questions((12, 11, 13)))
    assert list(column_of(facts_of(chain), "questions/rougeL")["cells"]) == ["sft"]


def test_the_line_of_a_damaged_row_is_named(chain):
    (chain / "ppo/samples.jsonl").write_text('{"step": 1}\n\n{"step"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"ppo/samples.jsonl:3: damaged"):
        collect(chain, 5)


def test_a_directory_without_stages_is_an_error_that_says_what_would_be_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no stage in there"):
        collect(tmp_path, 5)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        collect(tmp_path / "missing", 5)


def test_a_stage_of_which_nothing_else_is_known_has_a_page(outputs):
    write_json(outputs / "sft/stage.json", {"format": 1, "stage": "sft"})
    page = page_of(facts_of(outputs))
    assert TEXT["nothing_measured"][0] in page and TEXT["no_curves"][0] in page and TEXT["no_command"][0] in page


STAGE_KEYS = (
    *("stage", "created", "command", "seed", "base_model", "parent", "tuning", "template", "arguments", "versions"),
    *("hardware", "data", "checks", "metrics", "memory", "seconds", "files"),
)


@pytest.mark.parametrize("key", STAGE_KEYS)
@pytest.mark.parametrize("value", [None, [], ["x"], "x", 5, {"x": "y"}, {"x": {"y": None}}])
def test_a_value_of_a_strange_kind_stops_no_report(outputs, key, value):
    path = write_stage(outputs / "sft", "sft") / "stage.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), key: value})
    page_of(facts_of(outputs))


@pytest.mark.parametrize("value", [None, [], "x", 5, {"x": "y"}, {"x": {"metrics": {"y": 1}}}])
@pytest.mark.parametrize("key", ["model", "settings", "tasks", "skipped", "seconds", "created"])
def test_a_strange_value_in_results_stops_no_report(chain, key, value):
    write_evaluation(chain / "sft/eval", questions((12, 11, 13)), **{key: value})
    page_of(facts_of(chain))


# -- the page --------------------------------------------------------------------------------------------------------


class Checker(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects tags, texts by tag, and addresses."""

    VOID = {"meta", "link", "input", "br", "img"}

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.attributes, self.languages = [], [], {}, [], []
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        names = (dict(attrs).get("class") or "").split()
        self.languages += [name for name in names if name in ("en", "zh")]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> at {self.getpos()} closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.texts[tag] = self.texts.get(tag, "") + data


EVIL = "<script>alert(1)</script></style></title><img src=x onerror=alert(2)>&amp;\"'"


@pytest.fixture
def full(chain):
    """Every part of the page, with texts that want to be more than that."""
    hostile = chain / "<img src=y onerror=3>"
    metrics = {when: {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6} for when in ("before", "after")}
    write_stage(
        *(hostile, "dpo", chain / "sft"),
        command=EVIL,
        checks={EVIL: {"passed": True, "value": EVIL, "limit": EVIL}},
        data={"train": {"read": 3, "used": 1, "dropped": {EVIL: 2}, "files": [EVIL], "repaired": {EVIL: 1}}},
        metrics={**metrics, "after": {**metrics["after"], EVIL: 1.0}},
        versions={EVIL: EVIL},
        hardware={"device": EVIL},
        template={"name": EVIL},
        created=EVIL,
    )
    write_stage(chain / "other", EVIL, chain / "sft")
    history = [{"step": step, "loss": 2.0, "eval_loss": 1.0, f"eval_bleu{EVIL}": 1.0} for step in (0, 5)]
    for name in ("sft", "ppo", hostile.name):
        write_json(chain / name / "trainer_state.json", {"log_history": history})
        rows = [row(place, f"{EVIL} {place}?", EVIL, reference=EVIL, finish_reason=EVIL) for place in range(6)]
        best = name == hostile.name  # so that its name stands in the findings
        signed = {**(metric(32, 31, 33) if best else metric(12, 11, 13)), "signature": EVIL}
        tasks = {"questions": ("questions", {"rougeL": signed, EVIL: metric(1)}, {"data_file": EVIL})}
        tasks[f"e{EVIL.replace('/', '')}"] = (
            "choice",
            {"unparsed": metric(1), "accuracy_generation": metric(0.2, 0.1, 0.3)},
        )
        write_evaluation(chain / name / "eval", tasks, {"questions": rows})
    samples = [{"step": step, "prompt": EVIL, "answer": EVIL, "score": 1.0} for step in (1, 9)]
    (chain / "ppo/samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples), encoding="utf-8")
    return chain


def test_texts_of_data_and_models_stay_texts(full):
    page = Checker(page_of(facts_of(full)))
    assert page.tags.count("script") == 1 and page.tags.count("style") == 1
    assert page.tags[: page.tags.index("body")].count("title") == 1, "others are those of boxes in the chain"
    assert "img" not in page.tags
    assert page.texts["script"] == (ROOT / "stagekit/report.js").read_text(encoding="utf-8")
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.texts["p"].count(EVIL) >= 20, "answers and references are there, as they are"
    assert EVIL in page.texts["td"] and EVIL in page.texts["small"]


def test_no_other_script_than_its_own_could_run(full):
    page = page_of(facts_of(full))
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "unsafe-eval" not in policy and "script-src 'unsafe-inline'" not in policy


@pytest.mark.parametrize("tree", ["chain", "full"])
def test_the_page_is_well_formed_and_reaches_for_nothing_outside(tree, request):
    page = page_of(facts_of(request.getfixturevalue(tree)))
    checked = Checker(page)
    reaching = [value for _, name, value in checked.attributes if name in ("src", "href", "action", "data", "srcset")]
    assert all(value == "data:," or value.startswith("#") for value in reaching)
    ids = [value for _, name, value in checked.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in reaching if value.startswith("#")} <= set(ids), (
        "links within the page lead somewhere"
    )
    assert not re.search(r"url\(|@import|https?://|//cdn", checked.texts["style"] + checked.texts["script"])


def test_every_label_is_there_in_both_languages(full):
    checked = Checker(page_of(facts_of(full)))
    assert checked.languages.count("en") == checked.languages.count("zh") > 150
    paired = checked.languages[::2], checked.languages[1::2]
    assert set(paired[0]) == {"en"} and set(paired[1]) == {"zh"}, "each English text is followed by its Chinese one"


def test_every_text_has_both_languages_with_the_same_gaps():
    tables = [TEXT, report_text.METHODS, report_text.OWN, report_text.CURVES, report_text.CHECKS]
    pairs = [pair for table in tables for pair in table.values()]
    pairs += [pair for entry in report_text.MEASURES.values() for pair in entry]
    same = {"BLEU-4", "ROUGE-L"}
    for english, chinese in pairs:
        assert english and chinese and (english != chinese or english in same | {"n = {count}"})
        assert not re.search("[\u3400-\u9fff]", english)
        assert set(re.findall(r"{\w+}", english)) == set(re.findall(r"{\w+}", chinese))
        plain = re.sub(r"{\w+}", "", chinese)
        assert re.search("[\u3400-\u9fff]", plain) or plain in same | {"n = ", "Token", " token", "（）", "。"}


def test_every_text_is_used_and_every_text_that_is_used_exists():
    names = ("html", "js")
    sources = [*(ROOT / f"stagekit/report.{name}" for name in names), *(ROOT / "stagekit").glob("report_*.py")]
    used = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.name != "report_text.py")
    built = ("nav_", "theme_", "split_", "warn_")  # put together from parts
    sections = {f"{name}_about" for name in TEXT} | {"higher_better", "lower_better", "no_better"}
    unused = [key for key in TEXT if f'"{key}"' not in used and not key.startswith(built) and key not in sections]
    assert not unused
    assert set(re.findall(r'\bt\("(\w+)"(?! ~)', used)) <= set(TEXT)


def test_every_measure_is_shown_in_one_way():
    assert set(report_text.MEASURES) <= set(KINDS) and set(LABELS) <= set(KINDS)
    assert {kind for kind in KINDS.values()} == {"share", "tenth", "signed", "number"}


def test_the_checks_that_stages_make_are_all_explained():
    tree = ast.parse((ROOT / "stagekit/checks.py").read_text(encoding="utf-8"))
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "NAMES"
    ]
    assert set(names) <= set(report_text.CHECKS)


@pytest.mark.parametrize(
    ("language", "lang", "checked"), [("auto", "en", "en"), ("en", "en", "en"), ("zh", "zh-CN", "zh")]
)
def test_the_language_that_is_shown_first_can_be_chosen(chain, language, lang, checked):
    page = page_of(facts_of(chain), language)
    assert f'<html lang="{lang}" data-language="{language}"' in page
    assert re.findall(r'id="language-(\w+)" value="\w+" checked', page) == [checked]


def test_a_page_about_many_stages_with_long_answers_stays_small(outputs):
    parent = write_stage(outputs / "s0", "sft")
    history = [{"step": step, "loss": 1 / (step + 1), "eval_loss": 0.5} for step in range(5000)]
    for number in range(1, 8):
        write_stage(outputs / f"s{number}", "sft", parent)
        write_json(outputs / f"s{number}/trainer_state.json", {"log_history": history})
        rows = [row(place, f"Question {place}?", "word " * 20000) for place in range(5)]
        write_evaluation(outputs / f"s{number}/eval", questions((12, 11, 13)), {"questions": rows})
    page = page_of(facts_of(outputs))
    assert len(page.encode()) < 1_000_000
    assert "… 97000 more characters" in page


def test_facts_about_data_memory_time_and_commands_are_on_the_page(chain):
    page = page_of(facts_of(chain))
    for text in ("2: too long", "1.00 GiB", "512 MiB", "1 min 0 s", "4 min 0 s", "CPU · ", "fp32", "LoRA r 8"):
        assert text in page, text
    assert "<span>ppo.py </span><span>--output_dir ppo </span>" in page
    assert stage_fingerprint({"files": {"adapter_model.safetensors": "ppo"}}) in page


def test_marked_up_findings_escape_what_they_hold():
    from markupsafe import Markup

    change = {"stage": "<b>", "label": "<b>", "method": "sft", "metric": "rougeL", "kind": "tenth", "file": "<i>"}
    change |= {"before": metric(1, 0, 2), "after": metric(5, 4, 6), "outcome": "better", "against": "pt"}
    (found,) = write_lead(
        [change, {**change, "outcome": "same"}], lambda kind, text: Markup("<em>{}</em>").format(text)
    )
    assert found["en"] == "<em>&lt;b&gt;</em> raised ROUGE-L on &lt;i&gt; from <em>1.0</em> to <em>5.0</em>."


# -- pictures and numbers --------------------------------------------------------------------------------------------


def test_the_chain_has_a_column_for_each_generation_and_a_row_for_each_leaf():
    edges = [("pt", "sft", "parent"), ("sft", "rm", "parent"), ("sft", "ppo", "parent"), ("rm", "ppo", "feed")]
    edges += [("sft", "dpo", "parent")]
    found = charts.place_nodes(["pt", "sft", "rm", "ppo", "dpo"], edges)
    assert {name: column for name, (column, _) in found.items()} == {"pt": 0, "sft": 1, "rm": 2, "ppo": 3, "dpo": 2}
    assert {name: row for name, (_, row) in found.items()} == {"pt": 1, "sft": 1, "rm": 0, "ppo": 1, "dpo": 2}


def test_a_circle_of_damaged_parents_is_drawn_all_the_same():
    assert set(charts.place_nodes(["a", "b"], [("a", "b", "parent"), ("b", "a", "parent")])) == {"a", "b"}


def test_pictures_are_xml_and_escape_their_texts():
    node = {"id": "a", "title": EVIL, "lines": [(EVIL, EVIL)], "mark": EVIL, "kind": "m-sft", "href": '#"><b>'}
    drawn = ElementTree.fromstring(charts.chain([node], [], (EVIL, EVIL)))
    texts = [element.text for element in drawn.iter("text")]
    assert texts == [charts.shorten(EVIL), EVIL, EVIL, EVIL] and next(drawn.iter("title")).text == EVIL
    assert charts.shorten("rounds/11/policy") == "rounds/11/policy"
    assert charts.shorten("a-very-long-run/1/policy") == "…ong-run/1/policy"
    points = [{"step": 0, "value": 1.0, "low": 0.5, "high": 1.5}, {"step": 9, "value": 2.0}]
    drawn = charts.curve([(1, 1.0), (9, 3.0)], points, "m-sft", EVIL, ((EVIL, EVIL), (EVIL, EVIL)), str)
    assert len(list(ElementTree.fromstring(drawn).iter("circle"))) == 2


def test_a_curve_of_one_point_and_one_of_equal_points_can_be_drawn():
    for train, held_out in ([[(3, 1.0)], []], [[], [{"step": 0, "value": 0.0}]], [[(1, 2.0), (2, 2.0)], []]):
        ElementTree.fromstring(charts.curve(train, held_out, "", "", ("", ""), str))


def test_a_dot_stands_where_its_value_is_and_the_band_where_its_origin_was():
    axis = (0.0, 10.0, False)
    drawn = ElementTree.fromstring(charts.interval(metric(5, 4, 6), metric(2, 1, 3), axis))
    (dot,), (band,) = drawn.iter("circle"), drawn.iter("rect")
    assert dot.get("cx") == "50.0%" and (band.get("x"), band.get("width")) == ("10.0%", "20.0%")
    span = next(line for line in drawn.iter("line") if line.get("class") == "span")
    assert (span.get("x1"), span.get("x2")) == ("40.0%", "60.0%")
    assert charts.position(100, (10.0, 1000.0, True)) == pytest.approx(50), "by powers"
    assert (
        charts.scale([1.0, 100.0])[2] and not charts.scale([50.0, 100.0])[2] and charts.scale([3.0])[:2] == (2.7, 3.3)
    )


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1.0]
    assert charts.ticks(3.1, 8.9, 3) == [4, 6, 8]
    assert charts.tick_texts([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert charts.tick_texts([0, 0.5, 1], share=True) == ["0%", "50%", "100%"]
    assert charts.tick_texts([-1000, 0, 1000]) == ["−1,000", "0", "1,000"]


def test_a_long_line_is_thinned_to_means_and_keeps_its_end():
    assert charts.thin([(1, 1.0), (2, 3.0), (3, 5.0), (4, 7.0), (5, 0.0)], 3) == [(1.5, 2.0), (3.5, 6.0), (5, 0.0)]
    assert len(charts.thin([(step, 0.0) for step in range(10_000)])) <= charts.POINTS + 1


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (0.984375, "share", "98.4%"),
        (2.345, "signed", "+2.35"),
        (-2.345, "signed", "−2.35"),
        (303.93, "number", "304"),
        (13.57, "number", "13.6"),
        (6301.8, "number", "6,302"),
        (0.0629, "number", "0.063"),
        (0.00012, "number", "1.2e−04"),
        (0, "number", "0"),
        (13.57, "tenth", "13.6"),
        (14277, "count", "14,277"),
        (None, "share", "–"),
    ],
)
def test_numbers_as_people_read_them(value, kind, expected):
    assert show(value, kind) == expected


def test_durations_sizes_and_parameters_as_people_read_them():
    assert [show_seconds(value) for value in (4.23, 59.4, 61, 3725, None)] == [
        *(
            ("4.2 s", "4.2 秒"),
            ("59 s", "59 秒"),
            ("1 min 1 s", "1 分 1 秒"),
            ("1 h 2 min", "1 小时 2 分"),
            ("–", "–"),
        ),
    ]
    assert [show_bytes(value) for value in (5 * 2**20, 3 * 2**29, None)] == ["5 MiB", "1.50 GiB", "–"]
    assert [show_parameters(value) for value in (2_729_920, 7_000_000_000)] == ["2.7 M", "7.0 B"]


# -- the command -----------------------------------------------------------------------------------------------------


def run(*args):
    command = [sys.executable, "-m", "tools.report", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_the_page_and_the_facts_beside_it(chain, tmp_path):
    write_evaluation(chain / "pt/eval", questions((8, 7, 9)))
    write_evaluation(chain / "sft/eval", questions((12, 11, 13)))
    result = run(chain, "--output", tmp_path / "new/page.html", "--language", "zh", "--questions", "0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "SFT raised ROUGE-L from 8.0 to 12.0."
    facts = json.loads((tmp_path / "new/page.json").read_text(encoding="utf-8"))
    page = (tmp_path / "new/page.html").read_text(encoding="utf-8")
    assert [stage["id"] for stage in facts["stages"]] == ["pt", "sft", "rm", "ppo"]
    assert facts["measures"][0]["cells"]["sft"]["value"] == 12
    assert facts["summary"]["seconds"] == 240 and facts["questions"] == []
    command = f"python -m tools.report {chain} --output {tmp_path}/new/page.html --language zh --questions 0"
    assert command in Checker(page).texts["span"] and "page.json" in page
    assert not list((tmp_path / "new").glob("*.tmp"))


def test_the_page_stands_in_the_directory_by_default_and_is_no_part_of_it(chain):
    assert run(chain).returncode == 0
    first = json.loads((chain / "report.json").read_text(encoding="utf-8"))
    assert run(chain).returncode == 0
    second = json.loads((chain / "report.json").read_text(encoding="utf-8"))
    assert {**first, "created": ""} == {**second, "created": ""}
    assert (chain / "report.html").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--questions", "-1"], "--questions -1 must be 0 or more"),
        (["--output", "page.txt"], "--output page.txt must end in .html"),
        (["--language", "fr"], "invalid choice: 'fr'"),
        (["--outputs", "x.html"], "unknown flag --outputs; did you mean --output?"),
    ],
)
def test_a_wrong_flag_ends_with_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        report.parse_args(["outputs", *flags])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_report_needs_no_model_library():
    code = "import tools.report, stagekit.report, stagekit.report_findings, stagekit.report_page, sys; "
    code += "print(sorted({'torch', 'transformers', 'numpy', 'gradio'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


# -- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def visit(browser, full, tmp_path):
    """Open the page; returns a function (width, more options of the browser's context) -> page, with .noted."""
    path = tmp_path / "page.html"
    path.write_text(page_of(facts_of(full), "auto"), encoding="utf-8")
    contexts = []

    def open_page(width=1280, **options):
        still = {"reduced_motion": "reduce", "viewport": {"width": width, "height": 900}}
        context = browser.new_context(**{"locale": "en-US", **still, **options})
        contexts.append(context)
        page = context.new_page()
        page.noted = []
        page.on("console", lambda message: page.noted.append(message.text))
        page.on("pageerror", lambda error: page.noted.append(str(error)))
        page.on("dialog", lambda dialog: page.noted.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda asked: page.noted.append(asked.url) if asked.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_the_page_opens_without_errors_requests_or_a_foreign_script(visit):
    page = visit()
    assert page.noted == []
    assert page.title().startswith("What each stage brought · ")
    assert page.locator("h1").inner_text() == "What each stage brought"
    assert page.locator(".answer .said").first.inner_text() == EVIL


@pytest.mark.parametrize(
    ("locale", "heading"), [("zh-CN", "每个阶段带来了什么"), ("de-DE", "What each stage brought")]
)
def test_the_language_is_the_browsers_until_another_is_chosen(visit, locale, heading):
    page = visit(locale=locale)
    assert page.locator("h1").inner_text() == heading
    page.get_by_text("中文", exact=True).click()
    assert page.locator("h1").inner_text() == "每个阶段带来了什么"
    assert page.evaluate("document.documentElement.lang") == "zh-CN" and page.title().startswith("每个阶段")
    assert "The chain" not in page.locator("body").inner_text()
    page.reload()
    assert page.locator("h1").inner_text() == "每个阶段带来了什么", "the choice is remembered"
    page.get_by_text("EN", exact=True).click()
    assert "谁从谁而来" not in page.locator("body").inner_text()
    assert page.noted == []


def test_the_theme_is_the_systems_until_another_is_chosen(visit):
    light, dark = background(visit()), background(visit(color_scheme="dark"))
    assert light != dark
    page = visit(color_scheme="dark")
    page.get_by_text("Light", exact=True).click()
    assert background(page) == light
    page.get_by_text("Dark", exact=True).click()
    page.emulate_media(color_scheme="light")
    assert background(page) == dark
    assert page.noted == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_nothing_sticks_out_of_the_window(visit, width, locale):
    page = visit(width, locale=locale)
    for fold in page.locator("details").all():
        fold.evaluate("fold => { fold.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_is_whole_without_scripts(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("h1").inner_text() == "What each stage brought"
    page.get_by_text("中文", exact=True).click()
    assert page.locator("h1").inner_text() == "每个阶段带来了什么"


def test_a_tooltip_says_what_a_column_is_and_a_click_in_the_chain_leads_to_the_stage(visit):
    page = visit()
    heading = page.locator(".measures thead th", has_text="ROUGE-L")
    heading.scroll_into_view_if_needed()
    page.evaluate(
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )  # scrolling hides it
    heading.hover()
    page.locator("#tooltip", has_text="longest common subsequence").wait_for(state="visible", timeout=5000)
    page.locator("h2").first.hover()
    page.locator("#tooltip").wait_for(state="hidden", timeout=5000)
    page.locator("svg.chain a[href='#stage-ppo']").click()
    assert page.evaluate("location.hash") == "#stage-ppo"
    assert page.locator("#stage-ppo").is_visible()


def test_whole_answers_are_shown_on_demand(visit, full, tmp_path):
    rows = [row(0, "Long?", "word " * 300)]
    write_evaluation(full / "sft/eval", questions((12, 11, 13)), {"questions": rows})
    shutil.rmtree(full / "ppo/eval")
    shutil.rmtree(full / "<img src=y onerror=3>/eval")
    (tmp_path / "page.html").write_text(page_of(facts_of(full)), encoding="utf-8")
    page = visit()
    said = page.locator(".answer .said").first
    before = said.bounding_box()["height"]
    page.get_by_text("Show whole answers").first.click()
    assert said.bounding_box()["height"] > 2 * before
