"""What eval_benchmark.py measured: of which stage, with the intervals its rows support, and what all were asked."""

import json
import math
import re
from pathlib import Path

from stagekit.report_reading import number, part, read_object, read_rows, text

CHINESE = re.compile("[\u3400-\u9fff]")
MIN_ROWS = 10  # for an interval from rows


def read_evaluation(path: Path) -> dict | None:
    """Read the results.json of eval_benchmark.py in a directory, and the rows that are needed; None without one.

    Raises:
        ValueError: one of the files is damaged.
    """
    results = read_object(path / "results.json", True)
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
            rows = read_rows(path / f"{name}.jsonl") if task.get("task") in ("text", "questions") else []
            metrics = {key: part(task["metrics"], key) for key in part(task, "metrics")}
            found["tasks"][name] = {
                **{key: text(task.get(key)) for key in ("task", "data_file", "sha256")},
                **{key: number(task.get(key)) for key in ("num", "seen_in_training")},
                "metrics": add_intervals(metrics, rows),
                **{key: part(task, key) for key in ("by_subject", "by_kind")},
            }
            found["rows"][name] = rows if task.get("task") == "questions" else []
    return found


def add_intervals(metrics: dict[str, dict], rows: list[dict]) -> dict[str, dict]:
    """Give means and perplexities that came without an interval the one that their rows support.

    The normal approximation, 1.96 standard errors, over at least MIN_ROWS rows. A perplexity is exp(nats / units), a
    ratio of two sums over texts; its standard error is Cochran's for ratios (Sampling Techniques, 1977, eq. 6.13).

    Args:
        metrics: {name: {"value", "n", maybe "low", "high"}}.
        rows: of the file that eval_benchmark.py wrote beside the results.
    """
    columns = {"answer_tokens": ("new_tokens", None), "reward": ("reward", None)}
    columns |= {"perplexity": ("nll", "tokens"), "perplexity_per_byte": ("nll", "bytes")}
    found = {}
    for name, metric in metrics.items():
        found[name] = {
            key: metric[key] for key in ("value", "low", "high", "n") if number(metric.get(key)) is not None
        }
        found[name] |= {"signature": metric["signature"]} if text(metric.get("signature")) else {}
        top, bottom = columns.get(name, (None, None))
        pairs = [(number(row.get(top)), number(row.get(bottom)) if bottom else 1) for row in rows if top]
        pairs = [pair for pair in pairs if None not in pair]
        if "low" not in found[name] and len(pairs) >= MIN_ROWS and sum(units for _, units in pairs) > 0:
            centre, half = ratio_interval(pairs)
            if bottom:
                bounds = math.exp(min(700, centre - half)), math.exp(min(700, centre + half))
            else:
                bounds = centre - half, centre + half
            found[name] |= {"low": bounds[0], "high": bounds[1], "from_rows": len(pairs)}
    return found


def ratio_interval(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """(sum of the first / sum of the second, 1.96 standard errors of it)."""
    count, units = len(pairs), sum(pair[1] for pair in pairs)
    ratio = sum(pair[0] for pair in pairs) / units
    squares = sum((top - ratio * bottom) ** 2 for top, bottom in pairs)
    return ratio, 1.96 * math.sqrt(count / (count - 1) * squares) / units


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
    reward = row.get("reward") if number(row.get("reward")) is not None else row.get("score")
    return {
        **{"text": row["prediction"], "finish_reason": text(row.get("finish_reason"))},
        **{"new_tokens": number(row.get("new_tokens")), "reward": number(reward)},
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
    return [row for pair in _zip_longest(*picked) for row in pair]


def _zip_longest(first, second):
    for place in range(max(len(first), len(second))):
        yield [rows[place] for rows in (first, second) if place < len(rows)]
