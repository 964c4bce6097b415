"""What eval_benchmark.py measured: of which stage, and what all were asked."""

import itertools
import json
import re
from pathlib import Path

from stagekit.report_reading import number, part, read_object, read_rows, text

CHINESE = re.compile("[\u3400-\u9fff]")


def read_evaluation(path: Path) -> dict | None:
    """Read the results.json of eval_benchmark.py in a directory, and the rows that are needed; None without one.

    Raises:
        ValueError: one of the files is damaged.
    """
    results = read_object(path / "results.json", True, "tasks")
    if not isinstance(results.get("tasks"), dict):
        return None
    fingerprints = part(results, "model").get("fingerprints")
    found = {
        "directory": str(path),
        **{key: text(results.get(key)) for key in ("created", "command")},
        "fingerprints": fingerprints if isinstance(fingerprints, list) else [],
        **{key: part(results, key) for key in ("settings", "versions", "skipped")},
        "seconds": number(results.get("seconds")),
        "stale": False,
        "tasks": {},
        "rows": {},
    }
    for name, task in results["tasks"].items():
        if isinstance(task, dict):
            metrics = {key: _metric(part(task["metrics"], key)) for key in part(task, "metrics")}
            found["tasks"][name] = {
                **{key: text(task.get(key)) for key in ("task", "data_file", "sha256")},
                **{key: number(task.get(key)) for key in ("num", "seen_in_training")},
                "metrics": metrics,
                **{key: part(task, key) for key in ("by_subject", "by_kind")},
            }
            found["rows"][name] = read_rows(path / f"{name}.jsonl") if task.get("task") == "questions" else []
    return found


def _metric(found):
    """What a report needs of a metric, as far as it is there."""
    numbers = {key: found[key] for key in ("value", "low", "high", "n") if number(found.get(key)) is not None}
    return {**numbers, **({"signature": found["signature"]} if text(found.get("signature")) else {})}


def attach_evaluations(stages: list[dict], records: dict[Path, dict], directories: list[Path]) -> list[dict]:
    """Give every stage what eval_benchmark.py measured of it; return the other results.

    A stage's own eval/ comes first; results elsewhere are known by the fingerprint of the model they measured.
    """
    by_path = dict(zip(records, stages, strict=True))
    elsewhere = []
    for path in directories:
        found = read_evaluation(path) if path not in by_path else None
        stage = by_path.get(path.parent) if path.name == "eval" else None
        if found and stage:
            known = [mark for mark in found["fingerprints"] if mark]
            stage["eval"] = {**found, "stale": bool(known) and stage["fingerprint"] not in known}
        elif found:
            elsewhere.append(found)
    left = []
    for found in elsewhere:
        mine = [stage for stage in stages if stage["fingerprint"] in found["fingerprints"] and not stage["eval"]]
        if mine:
            mine[0]["eval"] = found
        else:
            left.append(found)
    return left


def pick_questions(stages: list[dict], count: int) -> list[dict]:
    """Choose questions that as many stages as possible have answered, Chinese and English in turn.

    Returns:
        [{"question", "earlier_turns", "reference", "language", "answers": {stage id: {"text", "finish_reason",
        "new_tokens", "reward"}}}]
    """
    found: dict[tuple, dict] = {}
    for stage in stages:
        evaluation = stage["eval"]
        for row in sum(evaluation["rows"].values(), []) if evaluation and not evaluation["stale"] else ():
            asked = text(row.get("input"))
            if asked is None or text(row.get("prediction")) is None:
                continue
            messages = row.get("messages") if isinstance(row.get("messages"), list) else []
            key = (asked, json.dumps(messages, ensure_ascii=False, sort_keys=True))
            question = found.setdefault(key, _question(row, asked, messages))
            question["seen"] |= bool(row.get("seen_in_training"))
            question["answers"][stage["id"]] = _answer(row)
    most = max((len(question["answers"]) for question in found.values()), default=0)
    shared = [question for question in found.values() if len(question["answers"]) == most]
    unseen = [question for question in shared if not question["seen"]]
    return _spread(unseen if len(unseen) >= count else shared, count)


def _question(row, asked, messages):
    return {
        "question": asked,
        "earlier_turns": max(0, sum(isinstance(turn, dict) and turn.get("role") == "user" for turn in messages) - 1),
        "reference": text(row.get("reference")),
        "language": "zh" if CHINESE.search(asked) else "en",
        "seen": False,
        "answers": {},
    }


def _answer(row):
    return {
        **{"text": row["prediction"], "finish_reason": text(row.get("finish_reason"))},
        **{key: number(row.get(key)) for key in ("new_tokens", "reward")},
    }


def _spread(questions, count):
    """`count` questions, languages in turn, spread evenly over each language's part of the file."""
    parts = [[row for row in questions if row["language"] == language] for language in ("zh", "en")]
    wanted = [min(len(parts[0]), (count + 1) // 2), min(len(parts[1]), count // 2)]
    wanted[0] = min(len(parts[0]), count - wanted[1])
    wanted[1] = min(len(parts[1]), count - wanted[0])
    picked = [
        [rows[place * len(rows) // number] for place in range(number)]
        for rows, number in zip(parts, wanted, strict=True)
    ]
    return [row for pair in itertools.zip_longest(*picked) for row in pair if row]
