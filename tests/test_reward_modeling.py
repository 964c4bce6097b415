"""Reward modelling: the loss by hand, whole runs, the chain before it, the saved head, the place where it scores."""

import copy
import importlib
import json
import logging
import math
import os
import random
import re
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, build_tokenizer, conversations, log_of, run_script, stage_of, write_jsonl
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from reward_modeling import RewardModelTrainer, bradley_terry_loss
from stagekit.arguments import StageTrainingArguments
from stagekit.checks import CheckError, Checks, score_position
from stagekit.pairs import PairCollator
from stagekit.trainers import add_settings

END = 2  # <|im_end|>, where an answer ends and is scored
WORDS = ("fever", "water", "rest", "body", "temperature", "drink", "raised", "多休息", "要及时就医", "持续高热")
SETTINGS = (
    *("--do_train", "--do_eval", "--max_length", "128", "--per_device_train_batch_size", "4", "--max_steps", "2"),
    *("--logging_steps", "1", "--learning_rate", "1e-2", "--report_to", "none", "--disable_tqdm", "True"),
)


def pairs(count, prefix="q", **fields):
    """Preferences that all differ: a better answer begins with advice; the rest, and the length, is chance."""
    chance = random.Random(prefix)

    def noise():
        return " ".join(chance.choices(WORDS, k=chance.randint(1, 8)))

    return [
        {
            "question": f"{prefix} {number}: what is a fever?",
            "chosen": f"Drink water. {noise()}",
            "rejected": f"tool_call {noise()}",
            **fields,
        }
        for number in range(count)
    ]


def prompt_of(question):
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@contextmanager
def own_process():
    """The surroundings of a fresh process; what a stage's main() does to them is undone."""
    environment, root = dict(os.environ), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "STAGEKIT_DEBUG"):
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        root.handlers[:] = handlers
        root.setLevel(level)


def run_main(stage, *flags):
    """Run a stage's main() in this process, without its pictures, which take longer than a tiny run.

    Returns the exit code.
    """
    with own_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("stagekit.run.draw_curves", lambda *args: None)
        patch.setattr("reward_modeling.draw_scores", lambda *args: None)
        patch.setattr("sys.argv", [f"{stage}.py", *map(str, flags)])
        try:
            importlib.import_module(stage).main()
        except SystemExit as end:
            return end.code
    return 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training and held-out pairs (an odd number, which two processes cannot share evenly), and a cache."""
    root = tmp_path_factory.mktemp("data")
    write_jsonl(root / "train" / "a.jsonl", pairs(40) + [ranking(number) for number in range(4)])
    write_jsonl(root / "held_out.jsonl", pairs(41, prefix="held out"))
    return root


def ranking(number, prefix="ranked"):
    """Three answers, best first: three pairs, which together count as much as one prompt."""
    answers = [f"Drink water {number}.", f"Water {number}.", f"tool_call {number}."]
    return {"question": f"{prefix} {number}?", "answers": answers}


def flags_for(data, model, output_dir, *flags):
    return (
        *("--model_name_or_path", model, "--train_file_dir", data / "train"),
        *("--validation_file_dir", data / "held_out.jsonl", "--output_dir", output_dir),
        *("--data_cache_dir", data / "cache", *SETTINGS, *flags),
    )


def train(data, model, output_dir, *flags):
    """Train a reward model in this process; return its stage.json."""
    assert run_main("reward_modeling", *flags_for(data, model, output_dir, *flags)) == 0
    return stage_of(output_dir)


def refusal(capsys, data, model, output_dir, *flags):
    """The line with which a run stops that must not go well."""
    capsys.readouterr()
    assert run_main("reward_modeling", *flags_for(data, model, output_dir, *flags)) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("reward_modeling.py: error: ")


def policy(directory):
    """The transformer below the head of a causal model with its adapter, loaded without this project's code."""
    stage = stage_of(directory)
    base = os.path.normpath(os.path.join(directory, stage["base_model"]["name_or_path"]))
    model = AutoModelForCausalLM.from_pretrained(base)
    for part in stage["base_model"].get("merged", []):
        model = PeftModel.from_pretrained(model, os.path.join(directory, part["path"])).merge_and_unload()
    return PeftModel.from_pretrained(model, directory).eval().get_base_model().model


def scores_by_hand(directory, base, rows):
    """Scores of both answers of plain preferences: text by hand, one at a time, transformers and PEFT alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(model, directory).eval().get_base_model()
    scores = {"chosen": [], "rejected": []}
    lengths = {"chosen": [], "rejected": []}
    for row in rows:
        prompt = tokenizer.encode(prompt_of(row["question"]))
        for side in scores:
            answer = tokenizer.encode(f"{row[side]}<|im_end|>")
            assert answer[-1] == END
            with torch.no_grad():
                hidden = model.model(torch.tensor([prompt + answer])).last_hidden_state[0, -1]
                scores[side].append(model.score(hidden).item())
            lengths[side].append(len(answer))
    return {side: np.array(found) for side, found in (scores | {f"{k}_length": v for k, v in lengths.items()}).items()}


# -- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_bradley_terry():
    losses = bradley_terry_loss(torch.tensor([2.0, 0.5, 1.0]), torch.tensor([0.5, 2.0, 1.0]), torch.zeros(3))
    # -log(sigmoid(1.5)) = log(1 + e^-1.5), -log(sigmoid(-1.5)) = that + 1.5, -log(1/2)
    assert_close(losses, torch.tensor([0.2014133, 1.7014133, 0.6931472]))
    far = bradley_terry_loss(torch.tensor([-200.0, 200.0]), torch.tensor([200.0, -200.0]), torch.zeros(2))
    assert_close(far, torch.tensor([400.0, 0.0]))  # no overflow


def test_a_margin_is_what_the_difference_must_exceed():
    """Eq. 2 of arXiv:2307.09288: -log(sigmoid(r_chosen - r_rejected - m))."""
    losses = bradley_terry_loss(torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5]), torch.tensor([1.0, 3.0]))
    assert_close(losses, torch.tensor([math.log1p(math.exp(-0.5)), math.log1p(math.exp(1.5))]))


def test_centring_punishes_the_sum_of_both_scores():
    """Section 2.2 of arXiv:2312.09244: the weighted square of the sum is added."""
    losses = bradley_terry_loss(torch.tensor([2.0, 1.0]), torch.tensor([0.5, -1.0]), torch.zeros(2), 0.1)
    assert_close(losses, torch.tensor([0.2014133 + 0.1 * 2.5**2, math.log1p(math.exp(-2.0))]))


@pytest.mark.parametrize("center", [None, 0.05])
def test_the_loss_is_that_of_trl(center):
    chosen, rejected, margins = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).unbind()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": __import__("collections").defaultdict(list)},
        _total_train_tokens=0,
    )
    logits = torch.cat([chosen, rejected]).unsqueeze(-1)
    theirs = RewardTrainer.compute_loss(trainer, lambda **inputs: SimpleNamespace(logits=logits), {"margin": margins})
    assert_close(bradley_terry_loss(chosen, rejected, margins, center).mean(), theirs)


# -- one step --------------------------------------------------------------------------------------------------------


def pair_columns(count, seed=0):
    """Pairs of random tokens; the first six are of two rankings, three each, the rest stand alone with a margin."""
    chance = random.Random(seed)

    def sequence(length):
        return [chance.randint(5, 300) for _ in range(length)] + [END]

    columns = {name: [] for name in ("chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels")}
    for _ in range(count):
        for side in ("chosen", "rejected"):
            ids = sequence(chance.randint(4, 20))
            columns[f"{side}_ids"].append(ids)
            columns[f"{side}_labels"].append([-100] * 3 + ids[3:])
    columns["weight"] = [1 / 3] * 6 + [1.0] * (count - 6)
    columns["margin"] = [0.0] * 6 + [0.5] * (count - 6)
    return columns


def score_model(directory):
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 3
    return model


def reward_trainer(model, columns, output_dir, size, **options):
    """A trainer with plain gradient descent and a global batch of eight pairs; it notes down the order of its rows."""
    settings = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": 8 // size,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    args = StageTrainingArguments(output_dir=str(output_dir), **{**settings, **options})
    add_settings(args, RewardConfig, max_length=None, disable_dropout=False)
    rows = []

    class Collator(PairCollator):
        def __call__(self, batch):
            rows.extend(batch)
            return super().__call__(batch)

    trainer = RewardModelTrainer(
        SimpleNamespace(checks=Checks(), chat=SimpleNamespace(stop_ids=[END])),
        SimpleNamespace(use_margin=True, center_rewards_coefficient=0.01),
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(columns),
        data_collator=Collator(3),
        processing_class=build_tokenizer(),
    )
    return trainer, rows


def loss_by_hand(model, rows):
    """Weighted mean over pairs, each sequence alone and unpadded, its score taken at its last token."""
    total = 0.0
    for row in rows:
        chosen, rejected = (
            model.score(model.model(torch.tensor([row[f"{side}_ids"]])).last_hidden_state[0, -1])[0]
            for side in ("chosen", "rejected")
        )
        loss = torch.log1p(torch.exp(-(chosen - rejected - row["margin"])))
        total = total + row["weight"] * (loss + 0.01 * (chosen + rejected) ** 2)
    return total / sum(row["weight"] for row in rows)


@pytest.mark.parametrize("size", [8, 2, 1])
def test_a_step_does_not_depend_on_the_split_of_the_batch(tiny_qwen3, tmp_path, size):
    """An epoch of 11 pairs: a batch of eight and one of three; six pairs of rankings weigh a third each."""
    model = score_model(tiny_qwen3)
    by_hand = copy.deepcopy(model)
    trainer, rows = reward_trainer(model, pair_columns(11), tmp_path, size)
    trainer.train()
    assert len(rows) == 11 and trainer.state.global_step == 2
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for number, part in enumerate((rows[:8], rows[8:])):
        loss = loss_by_hand(by_hand, part)
        by_hand.zero_grad()
        loss.backward()
        assert logged[number] == pytest.approx(loss.item(), rel=1e-5)
        with torch.no_grad():
            for parameter in by_hand.parameters():
                parameter -= 0.1 * parameter.grad
    for (name, parameter), wanted in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert_close(parameter, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_what_is_logged_are_means_over_the_prompts_of_the_global_batch(tiny_qwen3, tmp_path):
    model = score_model(tiny_qwen3)
    by_hand = copy.deepcopy(model)
    trainer, rows = reward_trainer(model, pair_columns(8), tmp_path, 2)
    trainer.train()
    weights = np.array([row["weight"] for row in rows])
    with torch.no_grad():
        chosen, rejected = (
            np.array(
                [by_hand.score(by_hand.model(torch.tensor([row[s]])).last_hidden_state[0, -1]).item() for row in rows]
            )
            for s in ("chosen_ids", "rejected_ids")
        )
    logged = trainer.state.log_history[0]
    assert logged["accuracy"] == pytest.approx((weights * (chosen > rejected)).sum() / weights.sum(), rel=1e-5)
    assert logged["margin"] == pytest.approx((weights * (chosen - rejected)).sum() / weights.sum(), rel=1e-4)
    assert logged["score"] == pytest.approx((weights * (chosen + rejected)).sum() / weights.sum(), rel=1e-4)


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(data, tiny_qwen3, tmp_path_factory):
    """A run of the script that learns the difference."""
    output_dir = tmp_path_factory.mktemp("learnt") / "rm"
    run_script("reward_modeling.py", *flags_for(data, tiny_qwen3, output_dir, "--max_steps", "40"))
    return output_dir


def test_held_out_accuracy_rises_clear_of_chance(learnt):
    metrics = stage_of(learnt)["metrics"]
    before, after = metrics["before"], metrics["after"]
    assert before["accuracy_low"] < 0.5 < before["accuracy_high"]  # a new head knows nothing
    assert after["accuracy"] > after["accuracy_low"] > 0.6 and after["loss"] < before["loss"]
    assert after["pairs"] == 41


def test_a_finished_reward_model_is_self_sufficient(learnt):
    assert {path.name for path in learnt.iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "stage.json", "scores.png", "curves.png", "train_results.json", "eval_results.json"),
        *("all_results.json", "trainer_state.json", "training_args.bin", "seen_prompts.npy", "checkpoint-40"),
    }
    assert (learnt / "scores.png").read_bytes().startswith(b"\x89PNG") and (learnt / "scores.png").stat().st_size > 5e3
    stage = stage_of(learnt)
    assert stage["stage"] == "rm" and stage["parent"] is None and stage["tuning"]["method"] == "lora"
    assert all(check["passed"] for check in stage["checks"].values())
    assert set(stage["checks"]) == {
        *("leakage", "loss_mask", "template_parity", "no_forged_turns", "memory", "score_position"),
        *("processes_share_gradients", "gradients_flow", "finite", "saved_is_loaded"),
    }
    assert stage["checks"]["score_position"]["value"].startswith(f"8 sequences scored at token {END},")
    ledger = stage["data"]["train"]
    assert (ledger["read"], ledger["used"], ledger["samples"]) == (44, 44, 52)
    assert ledger["pairs"] == {"from rankings": 12}


def test_the_metrics_are_those_of_scores_computed_by_hand(learnt, data, tiny_qwen3):
    rows = [json.loads(line) for line in (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    found = scores_by_hand(learnt, tiny_qwen3, rows)
    chosen, rejected = found["chosen"], found["rejected"]
    after = stage_of(learnt)["metrics"]["after"]
    rate = (chosen > rejected).mean()
    assert after["accuracy"] == pytest.approx(rate) and 0 < rate
    for limit in (after["accuracy_low"], after["accuracy_high"]):
        # Wilson's limits are the p at which the observed rate is 1.96 standard errors away.
        assert limit == 1.0 or (rate - limit) ** 2 == pytest.approx(1.959964**2 * limit * (1 - limit) / 41, rel=1e-4)
    assert after["loss"] == pytest.approx(np.log1p(np.exp(rejected - chosen)).mean(), rel=1e-4)
    assert after["margin"] == pytest.approx((chosen - rejected).mean(), rel=1e-4)
    assert after["score_chosen"] == pytest.approx(chosen.mean(), rel=1e-4, abs=1e-4)
    assert after["score_rejected"] == pytest.approx(rejected.mean(), rel=1e-4, abs=1e-4)
    ratio = found["chosen_length"] / found["rejected_length"]
    groups = {group["group"]: group for group in after["by_length"]}
    for name, inside in (
        ("better answer shorter", ratio < 0.9),
        ("about as long", (ratio >= 0.9) & (ratio <= 1.1)),
        ("better answer longer", ratio > 1.1),
    ):
        assert groups[name]["pairs"] == inside.sum() > 0
        assert groups[name]["accuracy"] == pytest.approx((chosen > rejected)[inside].mean())
    longer = (ratio > 1) + 0.5 * (ratio == 1)
    assert after["longer_is_better_accuracy"] == pytest.approx(longer.mean())
    assert sum(group["pairs"] for group in after["calibration"]) == 41
    confidence = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    sure = after["calibration"][-1]
    assert (sure["from"], sure["to"], sure["pairs"]) == (0.9, 1.0, (confidence >= 0.9).sum())
    assert sure["confidence"] == pytest.approx(confidence[confidence >= 0.9].mean(), rel=1e-4)


@pytest.fixture(scope="module")
def one_process(data, tiny_qwen3, tmp_path_factory):
    """The run the ones with two processes are compared with: a global batch of four pairs, without dropout."""
    output_dir = tmp_path_factory.mktemp("one") / "rm"
    flags = ("--lora_dropout", "0", "--max_steps", "4", "--learning_rate", "1e-3")
    train(
        *(data, tiny_qwen3, output_dir, *flags),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
    )
    return output_dir


@pytest.mark.parametrize(
    "deepspeed", [None, "scripts/zero2.json", "scripts/zero3.json"], ids=["torchrun", "zero2", "zero3"]
)
def test_two_processes_train_as_one_with_twice_the_accumulation(one_process, data, tiny_qwen3, tmp_path, deepspeed):
    flags = ["--lora_dropout", "0", "--max_steps", "4", "--learning_rate", "1e-3"]
    flags += ["--per_device_train_batch_size", "2", *(("--deepspeed", ROOT / deepspeed) if deepspeed else ())]
    run_script("reward_modeling.py", *flags_for(data, tiny_qwen3, tmp_path / "rm", *flags), processes=2)
    for key, tolerance in (("loss", 1e-5), ("accuracy", 1e-6), ("margin", 1e-4), ("grad_norm", 1e-3)):
        assert log_of(tmp_path / "rm", key) == pytest.approx(log_of(one_process, key), rel=tolerance, abs=1e-6), key
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "rm", one_process))
    assert set(ours) == set(theirs) and all(tensor.numel() for tensor in ours.values())
    assert [tensor.shape for name, tensor in ours.items() if ".score." in name] == [(1, 64)]
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 2e-5
    stage = stage_of(tmp_path / "rm")
    assert all(check["passed"] for check in stage["checks"].values())
    expected = "DEEPSPEED" if deepspeed else "MULTI_CPU"
    assert stage["checks"]["processes_share_gradients"]["value"] == f"2 process(es), {expected}"
    measured, wanted = (metrics["metrics"] for metrics in (stage, stage_of(one_process)))
    assert measured["after"]["pairs"] == 41  # the row that pads the last batch is not counted twice
    for when in ("before", "after"):
        for name in ("loss", "accuracy", "accuracy_low", "margin", "score_chosen"):
            assert measured[when][name] == pytest.approx(wanted[when][name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    "architecture, flags",
    [
        ("tiny_llama", ("--template_name", "chatml")),
        ("tiny_bloom", ("--template_name", "chatml")),
        ("tiny_qwen3", ("--use_peft", "False", "--learning_rate", "1e-4")),
        ("tiny_qwen3", ("--qlora", "True")),
        ("tiny_qwen3", ("--load_in_8bit", "True", "--use_rslora", "True")),
        ("tiny_qwen3", ("--use_dora", "True", "--activation_checkpointing", "True")),
        ("tiny_qwen3", ("--modules_to_save", "embed_tokens,lm_head")),
        ("tiny_qwen3", ("--bf16", "True", "--center_rewards_coefficient", "0.01")),
    ],
    ids=["llama", "bloom", "full", "qlora", "8bit", "dora_checkpointing", "tied_embeddings", "bf16_centred"],
)
def test_every_way_of_tuning_trains_a_head_that_is_saved(request, data, tmp_path, architecture, flags):
    if flags[0] in ("--qlora", "--load_in_8bit"):
        pytest.importorskip("bitsandbytes")
    stage = train(data, request.getfixturevalue(architecture), tmp_path / "rm", *flags)
    assert all(check["passed"] for check in stage["checks"].values()) and "score_position" in stage["checks"]
    methods = {"--use_peft": "full", "--qlora": "qlora", "--load_in_8bit": "qlora"}
    assert stage["tuning"]["method"] == methods.get(flags[0], "lora")
    weights = "model" if flags[0] == "--use_peft" else "adapter_model"
    saved = load_file(tmp_path / "rm" / f"{weights}.safetensors")
    (head,) = [name for name in saved if re.search(r"\bscore\b", name)]
    assert saved[head].shape == (1, 64) and saved[head].dtype == torch.float32
    assert not any("lm_head" in name for name in saved)
    assert any("embed_tokens" in name for name in saved) == (flags[0] in ("--modules_to_save", "--use_peft"))
    losses = log_of(tmp_path / "rm")
    assert losses[0] > 0 and all(map(math.isfinite, losses))


def test_the_head_itself_is_trained(data, tiny_qwen3, tmp_path):
    """Not only what lies below it: without a step it is the head that the seed gives."""
    heads = []
    for rate in ("0", "1e-2"):
        train(data, tiny_qwen3, tmp_path / rate, "--learning_rate", rate)
        saved = load_file(tmp_path / rate / "adapter_model.safetensors")
        heads.append(saved["base_model.model.score.weight"])
    assert (heads[0] - heads[1]).abs().max() > 1e-3


def test_a_run_that_is_resumed_ends_like_one_that_was_not_interrupted(data, tiny_qwen3, tmp_path):
    """Dropout and a decaying learning rate on: the state of everything must come back, not only the weights."""
    flags = ("--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3", "--lora_dropout", "0.2")
    whole = train(data, tiny_qwen3, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    resumed = train(data, tiny_qwen3, tmp_path / "cut", *flags, "--resume_from_checkpoint", "True")
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert log_of(tmp_path / "cut", "margin") == log_of(tmp_path / "whole", "margin")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed["metrics"] == whole["metrics"]


# -- the chain -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(data, tiny_qwen3, tmp_path_factory):
    """base, pt, and three ways of fine-tuning on it: continued, on pt merged, and with an embedding trained whole."""
    root = tmp_path_factory.mktemp("chain")
    shutil.copytree(tiny_qwen3, root / "base")
    write_jsonl(root / "texts.jsonl", [{"text": f"Document {n}. Rest and drink water."} for n in range(12)])
    write_jsonl(root / "chats.jsonl", conversations(12, prefix="chat"))
    fast = ("--do_train", "--max_steps", "2", "--learning_rate", "1e-2", "--report_to", "none", "--disable_tqdm=True")
    fast += ("--data_cache_dir", root / "cache")

    def stage(script, parent, name, *flags):
        texts = root / ("texts.jsonl" if script == "pretraining" else "chats.jsonl")
        given = ("--model_name_or_path", root / parent, "--train_file_dir", texts, "--output_dir", root / name)
        assert run_main(script, *fast, *given, *flags) == 0

    stage("pretraining", "base", "pt")
    stage("supervised_finetuning", "pt", "sft")
    stage("supervised_finetuning", "pt", "sft_on_merged", "--new_adapter", "True")
    stage("supervised_finetuning", "base", "sft_whole", "--modules_to_save", "embed_tokens,lm_head")
    return root


def hidden(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8, 9, 2]])).last_hidden_state


@pytest.mark.parametrize("parent", ["sft", "sft_on_merged", "sft_whole"])
@pytest.mark.parametrize("flags", [(), ("--new_adapter", "True")], ids=["continued", "merged"])
def test_training_starts_from_the_policy_of_fine_tuning(chain, data, tmp_path, parent, flags):
    """With a learning rate of 0 the saved reward model is the one training started from."""
    from stagekit.scoring import load_reward_model

    stage = train(data, chain / parent, tmp_path / "rm", "--learning_rate", "0", *flags)
    wanted, plain = hidden(policy(chain / parent)), hidden(AutoModelForCausalLM.from_pretrained(chain / "base").model)
    assert (wanted - plain).abs().max() > 1e-2
    found = hidden(load_reward_model(str(tmp_path / "rm"), only_cpu=True).model.get_base_model().model)
    assert_close(found, wanted, rtol=1e-4, atol=1e-4 if flags or parent == "sft_on_merged" else 1e-6)
    assert stage["tuning"]["continued"] is not bool(flags)
    assert stage["parent"]["stage"] == "sft" and stage["parent"]["path"] == str(chain / parent)
    merged = [os.path.basename(part["path"]) for part in stage["base_model"].get("merged", [])]
    assert merged == ["pt"] * (parent == "sft_on_merged") + [parent] * bool(flags)


def test_base_and_adapter_apart_start_the_same_reward_model(chain, data, tmp_path):
    train(data, chain / "sft", tmp_path / "one")
    train(data, chain / "base", tmp_path / "two", "--peft_path", chain / "sft")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before = load_file(chain / "sft" / "adapter_model.safetensors")
    assert set(ours) - set(before) == {"base_model.model.score.weight"} and set(before) < set(ours)


@pytest.mark.parametrize("flags", [(), ("--new_adapter", "True"), ("--use_peft", "False")])
def test_a_reward_model_is_trained_on_from_the_scores_it_gave(data, tiny_qwen3, tmp_path, flags):
    full = flags if flags[:1] == ("--use_peft",) else ()
    first = train(data, tiny_qwen3, tmp_path / "first", "--learning_rate", "1e-3", *full)
    second = train(data, tmp_path / "first", tmp_path / "second", *flags, "--skip_checks", "leakage")
    if flags[:1] == ("--new_adapter",):
        # its head begins where the merged one ended
        assert [part["path"] for part in second["base_model"]["merged"]] == ["../first"]
    for name in ("loss", "accuracy", "margin", "score_chosen", "score_rejected"):
        assert second["metrics"]["before"][name] == pytest.approx(first["metrics"]["after"][name], rel=1e-4, abs=1e-5)
    assert second["metrics"]["after"]["loss"] != second["metrics"]["before"]["loss"]


def test_a_parent_that_was_merged_must_not_change(chain, data, tmp_path, capsys):
    from stagekit.scoring import load_reward_model

    for name in ("base", "pt", "sft_on_merged"):
        shutil.copytree(chain / name, tmp_path / name)
    train(data, tmp_path / "sft_on_merged", tmp_path / "rm", "--new_adapter", "True")
    paths = [part["path"] for part in stage_of(tmp_path / "rm")["base_model"]["merged"]]
    assert paths == ["../pt", "../sft_on_merged"]
    load_reward_model(str(tmp_path / "rm"), only_cpu=True)
    for name in ("pt", "sft_on_merged"):
        path = tmp_path / name / "adapter_model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name}/adapter_model.safetensors: changed after the stage was saved"):
            load_reward_model(str(tmp_path / "rm"), only_cpu=True)
        line = refusal(capsys, data, tmp_path / "rm", tmp_path / "next")
        assert f"{name}/adapter_model.safetensors: changed after the stage was saved" in line
        path.write_bytes(whole)
    load_reward_model(str(tmp_path / "rm"), only_cpu=True)


def test_a_run_does_not_write_where_a_merged_adapter_stands(chain, data, tmp_path, capsys):
    for name in ("base", "pt", "sft_on_merged"):
        shutil.copytree(chain / name, tmp_path / name)
    before = (tmp_path / "pt" / "adapter_model.safetensors").read_bytes()
    line = refusal(capsys, data, tmp_path / "sft_on_merged", tmp_path / "pt", "--overwrite_output_dir", "True")
    assert "is what the run starts from" in line
    assert (tmp_path / "pt" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("flags", [("--qlora", "True"), ("--load_in_8bit", "True")])
def test_an_adapter_is_not_merged_into_a_quantised_base(chain, data, tmp_path, capsys, flags):
    line = refusal(capsys, data, chain / "sft", tmp_path / "rm", "--new_adapter", "True", *flags)
    assert line.startswith(f"{chain / 'sft'} must be merged into its base, which a 4-bit or 8-bit base and ZeRO-3 do")


# -- the saved head --------------------------------------------------------------------------------------------------


def delete_head(directory):
    change_file(directory, lambda tensors: tensors.pop("base_model.model.score.weight"))


def change_head(directory):
    change_file(directory, lambda tensors: tensors["base_model.model.score.weight"].view(-1)[7:8].add_(1e-3))


def change_file(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def name_no_head(directory):
    """As if the adapter were a writer's, which has no head to load."""
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "task_type": None, "modules_to_save": None}))


FAULTS = [
    (delete_head, "base_model.model.score.weight was trained but not saved (1 such tensors)"),
    (change_head, "what was saved differs from what was trained: base_model.model.score.weight by up to 0.001"),
    (name_no_head, ""),
]


@pytest.mark.parametrize("plant, message", FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_a_head_that_was_not_saved_as_trained_stops_the_run(
    data, tiny_qwen3, tmp_path, capsys, monkeypatch, plant, message
):
    save = RewardModelTrainer.save_model

    def save_badly(self, output_dir=None, _internal_call=False):
        save(self, output_dir, _internal_call)
        plant(tmp_path.__class__(output_dir or self.args.output_dir))

    monkeypatch.setattr(RewardModelTrainer, "save_model", save_badly)
    line = refusal(capsys, data, tiny_qwen3, tmp_path / "rm", "--save_strategy", "no")
    assert line.startswith(f"check saved_is_loaded failed: {message}")
    assert not (tmp_path / "rm" / "stage.json").exists()


def test_a_head_that_is_neither_trained_nor_saved_stops_the_run(data, tiny_qwen3, tmp_path, capsys, monkeypatch):
    """Every loading would then draw another head: the scores would mean nothing."""
    import stagekit.modeling

    describe = stagekit.modeling.lora_config

    def describe_badly(model, lora_args):
        config = describe(model, lora_args)
        config.task_type, config.modules_to_save = None, None  # with SEQ_CLS, PEFT adds the head by itself
        return config

    monkeypatch.setattr(stagekit.modeling, "lora_config", describe_badly)
    line = refusal(capsys, data, tiny_qwen3, tmp_path / "rm", "--target_modules", "q_proj,v_proj")
    assert line.startswith("check ") and "score" in line


# -- where the score is read -----------------------------------------------------------------------------------------


def scored_batch():
    """Rows of different lengths, each with the end-of-turn at its end, padded on the right with 3."""
    lengths, generator = (5, 9, 12, 7), torch.Generator().manual_seed(0)
    ids = torch.full((4, 12), 3)
    mask = torch.zeros(4, 12, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : length - 1] = torch.randint(5, 300, (length - 1,), generator=generator)
        ids[row, length - 1] = END
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("architecture", ["tiny_qwen3", "tiny_llama", "tiny_bloom"])
def test_a_score_at_the_end_of_turn_passes(request, architecture):
    value, limit = score_position(score_model(request.getfixturevalue(architecture)).eval(), scored_batch(), END)
    assert value.startswith("4 sequences scored at token 2, padding changes scores by ") and float(limit) <= 1e-3


def test_a_sequence_that_goes_on_behind_its_end_of_turn_is_found(tiny_qwen3):
    batch = scored_batch()
    batch["input_ids"][1, 9], batch["attention_mask"][1, 9] = 198, 1  # the newline that a template writes there
    with pytest.raises(CheckError, match="^1 of 4 sequences do not end with the end-of-turn token 2"):
        score_position(score_model(tiny_qwen3).eval(), batch, END)


def test_a_model_that_reads_its_score_at_padding_is_found(tiny_qwen3):
    model = score_model(tiny_qwen3).eval()
    model.config.pad_token_id = 4  # padded with 3, it takes the last of those for the end
    with pytest.raises(CheckError, match="the score of an answer changes by .* with the padding behind it"):
        score_position(model, scored_batch(), END)


def test_a_model_that_takes_the_end_of_turn_for_padding_is_found(tiny_qwen3):
    """It scores one token before the end, with padding and without: both agree, and both are wrong."""
    model, batch = score_model(tiny_qwen3).eval(), scored_batch()
    model.config.pad_token_id = END
    batch["input_ids"][batch["attention_mask"] == 0] = END
    with pytest.raises(CheckError, match="end-of-turn"):
        score_position(model, batch, END)


def test_a_newline_behind_the_end_of_turn_stops_the_run(data, tiny_qwen3, tmp_path, capsys, monkeypatch):
    import stagekit.run

    encode = stagekit.run.encode_preference

    def encode_badly(*args):
        found, left_out = encode(*args)
        for sample in (sample for pair in found for sample in (pair.chosen, pair.rejected)):
            sample.input_ids, sample.labels = [*sample.input_ids, 198], [*sample.labels, -100]
        return found, left_out

    monkeypatch.setattr(stagekit.run, "encode_preference", encode_badly)
    line = refusal(capsys, data, tiny_qwen3, tmp_path / "rm", "--data_cache_dir", tmp_path / "cache")
    assert line.startswith("check score_position failed: 8 of 8 sequences do not end with the end-of-turn token 2")
    assert not (tmp_path / "rm" / "stage.json").exists()


def test_a_tokenizer_that_pads_with_the_end_of_turn_can_be_used(data, tiny_qwen3, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    shutil.copytree(tiny_qwen3, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    stage = train(data, tmp_path / "model", tmp_path / "rm")
    assert stage["checks"]["score_position"]["passed"]


# -- data ------------------------------------------------------------------------------------------------------------


def test_pairs_that_cannot_be_compared_are_dropped_and_counted(data, tiny_qwen3, tmp_path):
    long = "Drink water and rest. " * 60
    rows = [
        *pairs(8),
        {"question": "same?", "chosen": "Rest.", "rejected": "Rest."},
        {"question": "same but for blanks?", "chosen": "Rest.", "rejected": " Rest. "},
        {"question": "too long?", "chosen": long, "rejected": "Rest."},
        {"question": "too long to be rejected?", "chosen": "Rest.", "rejected": long},
        {"question": "one of three too long?", "answers": ["Rest.", "Water.", long]},
        {"question": long + "a long question?", "chosen": "Rest.", "rejected": "tool_call"},
    ]
    write_jsonl(tmp_path / "train" / "a.jsonl", rows)
    shutil.copy(data / "held_out.jsonl", tmp_path / "held_out.jsonl")
    stage = train(tmp_path, tiny_qwen3, tmp_path / "rm")
    ledger = stage["data"]["train"]
    assert (ledger["read"], ledger["used"], ledger["samples"], ledger["truncated"]) == (14, 10, 10, 0)
    assert ledger["dropped"] == {"identical answers": 2, "answer does not fit the length limit": 2}
    assert ledger["pairs"] == {
        "from rankings": 1,
        "of rankings left out: answer does not fit the length limit": 2,
        "whose prompt lost its beginning": 1,
    }


def test_a_margin_of_the_data_is_used_unless_it_is_not_wanted(tiny_qwen3, tmp_path):
    """In training and in measuring; with a learning rate of 0 the saved scores are those of the one step, too."""
    rows, held_out = pairs(8, margin=1.5), pairs(9, prefix="held out", margin=0.5)
    write_jsonl(tmp_path / "train" / "a.jsonl", rows)
    write_jsonl(tmp_path / "held_out.jsonl", held_out)
    once = ("--learning_rate", "0", "--lora_dropout", "0", "--max_steps", "1", "--per_device_train_batch_size", "8")
    for use in ("True", "False"):
        stage = train(tmp_path, tiny_qwen3, tmp_path / use, *once, "--use_margin", use)
        for found, margin, part in (
            (log_of(tmp_path / use)[0], 1.5, rows),
            (stage["metrics"]["after"]["loss"], 0.5, held_out),
        ):
            scores = scores_by_hand(tmp_path / use, tiny_qwen3, part)
            difference = scores["chosen"] - scores["rejected"] - (margin if use == "True" else 0)
            assert found == pytest.approx(np.log1p(np.exp(-difference)).mean(), rel=1e-4)


def test_the_pairs_of_a_ranking_count_as_one_prompt(tiny_qwen3, tmp_path):
    """In training and in measuring: three pairs of one ranking weigh a third each, beside pairs that weigh one."""

    def rows_and_pairs(prefix):
        ranked, alone = ranking(5, prefix), pairs(2, prefix=prefix)
        best, middle, worst = ranked["answers"]
        sides = [(best, middle), (best, worst), (middle, worst)]
        found = [{"question": ranked["question"], "chosen": better, "rejected": worse} for better, worse in sides]
        return [ranked, *alone], [*found, *alone]

    (rows, compared), (held_out, measured) = rows_and_pairs("trained"), rows_and_pairs("held out")
    write_jsonl(tmp_path / "train" / "a.jsonl", rows)
    write_jsonl(tmp_path / "held_out.jsonl", held_out)
    once = ("--learning_rate", "0", "--lora_dropout", "0", "--max_steps", "1", "--per_device_train_batch_size", "8")
    after = train(tmp_path, tiny_qwen3, tmp_path / "rm", *once)["metrics"]["after"]
    weights = np.array([1 / 3, 1 / 3, 1 / 3, 1, 1])
    for found, part in ((log_of(tmp_path / "rm")[0], compared), (after["loss"], measured)):
        scores = scores_by_hand(tmp_path / "rm", tiny_qwen3, part)
        losses = np.log1p(np.exp(scores["rejected"] - scores["chosen"]))
        assert found == pytest.approx((losses * weights).sum() / 3, rel=1e-5)
        assert abs(losses.mean() - (losses * weights).sum() / 3) > 1e-4  # so that equal weights would show
    assert after["pairs"] == 5
    assert after["accuracy"] == pytest.approx((weights * (scores["chosen"] > scores["rejected"])).sum() / 3)


# -- what a user gets wrong ------------------------------------------------------------------------------------------


BAD_ROWS = {
    "a conversation": (
        conversations(1)[0],
        "this stage compares answers (fields 'chosen' and 'rejected', or ranked 'answers'), and this is a conv",
    ),
    "running text": ({"text": "words"}, "this stage compares answers"),
    "a margin in words": (
        {"question": "q?", "chosen": "Rest.", "rejected": "No.", "margin": "much"},
        "field 'margin' must be a number, got 'much'",
    ),
    "one answer": ({"question": "q?", "answers": ["Rest."]}, "field 'answers' needs at least two answers to compare"),
    "equal ranks": (
        {"question": "q?", "answers": ["Rest.", "Water."], "ranks": [1, 1]},
        "all answers of 'answers' have the same rank",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_data_that_cannot_be_compared_is_named_by_file_and_line(data, tiny_qwen3, tmp_path, capsys, name):
    row, message = BAD_ROWS[name]
    path = write_jsonl(tmp_path / "train" / "a.jsonl", [*pairs(2), row])
    shutil.copy(data / "held_out.jsonl", tmp_path / "held_out.jsonl")
    line = refusal(capsys, tmp_path, tiny_qwen3, tmp_path / "rm")
    assert line.startswith(f"{path}:3: {message}")
    assert not (tmp_path / "rm").exists()


def test_data_of_which_no_pair_is_left_is_refused(data, tiny_qwen3, tmp_path, capsys):
    path = write_jsonl(tmp_path / "train" / "a.jsonl", [{"question": "q?", "chosen": "Rest.", "rejected": "Rest."}])
    shutil.copy(data / "held_out.jsonl", tmp_path / "held_out.jsonl")
    line = refusal(capsys, tmp_path, tiny_qwen3, tmp_path / "rm")
    assert line == f"{path}: nothing is left to learn from (identical answers: 1)"


@pytest.mark.parametrize("stage", ["supervised_finetuning", "dpo_training"])
@pytest.mark.parametrize("flags", [(), ("--new_adapter", "True")], ids=["continued", "merged"])
def test_a_reward_model_is_not_taught_to_write(learnt, data, tmp_path, capsys, stage, flags):
    given = ("--model_name_or_path", learnt, "--output_dir", tmp_path / "out", "--skip_checks", "leakage")
    capsys.readouterr()
    code = run_main(stage, "--train_file_dir", data / "held_out.jsonl", "--do_train", *given, *flags)
    assert code == 2
    assert f"{learnt} is a reward model: it scores answers" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_reward_model_of_whole_weights_is_not_taught_to_write(data, tiny_qwen3, tmp_path, capsys):
    train(data, tiny_qwen3, tmp_path / "rm", "--use_peft", "False")
    given = ("--model_name_or_path", tmp_path / "rm", "--output_dir", tmp_path / "out", "--skip_checks", "leakage")
    capsys.readouterr()
    assert run_main("supervised_finetuning", "--train_file_dir", data / "held_out.jsonl", "--do_train", *given) == 2
    assert f"{tmp_path / 'rm'} is a reward model" in capsys.readouterr().err.splitlines()[-1]


def test_preview_shows_both_answers_and_trains_nothing(data, tiny_qwen3, tmp_path, capsys):
    assert run_main("reward_modeling", *flags_for(data, tiny_qwen3, tmp_path / "rm", "--preview", "2")) == 0
    shown = capsys.readouterr().out
    assert re.search(r"⟦Drink water\. .*<\|im_end\|>⟧", shown) and re.search(r"⟦tool_call .*<\|im_end\|>⟧", shown)
    assert not (tmp_path / "rm").exists()
