"""What a directory of stages says about itself: plain facts, read from files that the stages and evaluations wrote.

Standard library and stagekit.checkpoint only, so that a page about fifty stages is there in a second. Whatever is
missing is None or empty; a file that is there and damaged is an error that names it.
"""

import heapq
import json
import math
import re
import shlex
from datetime import datetime, timezone
from pathlib import Path, PurePath

from stagekit.checkpoint import STAGE_FILE, absolute, fingerprint
from stagekit.report_evaluations import attach_evaluations, pick_questions
from stagekit.report_reading import number, part, read_object, read_rows, text

METHODS = ("pt", "sft", "rm", "ppo", "dpo", "orpo", "grpo")  # in the order in which people name them
ASIDE = re.compile(r"(.+)\.\d+$")  # a run that a later one moved out of its way
WHOLE = ("full", "merged", "bitsandbytes", "extended")  # ways of tuning that leave a model, not an adapter
LONGEST_HEADER = 100_000_000  # bytes, as the format has it
NUM_SAMPLES = 3  # answers from training that are kept, from its beginning and from its end
# What is drawn of a training: (key, names in the log, which with eval_ before them are the held-out ones, methods).
CURVES = (
    ("loss", ("loss",), ("pt", "sft", "rm", "dpo", "orpo")),
    ("accuracy", ("rewards/accuracies", "accuracy"), ("rm", "dpo", "orpo")),
    ("margin", ("rewards/margins", "margin"), ("rm", "dpo", "orpo")),
    ("score", ("score", "reward"), ("ppo", "grpo")),
    ("kl", ("kl",), ("ppo", "grpo")),
    ("length", ("length", "completions/mean_length"), ("ppo", "grpo")),
    ("stopped", ("stopped",), ("ppo", "grpo")),
    ("entropy", ("entropy",), ("ppo", "grpo")),
)
COUNTS = ("tokens", "pairs", "prompts", "samples")  # among the metrics of a stage: over how many it measured


# -- finding stages --------------------------------------------------------------------------------------------------


def walk(root: Path) -> list[Path]:
    """All directories below and with root in which stages may stand: no checkpoints, no logs, nothing hidden."""
    found, seen, waiting = [], set(), [root]
    while waiting:
        path = waiting.pop()
        if path.resolve() in seen:  # a link that leads in a circle
            continue
        seen.add(path.resolve())
        found.append(path)
        inside = sorted(item for item in path.iterdir() if item.is_dir())
        waiting += [item for item in reversed(inside) if not item.name.startswith(("checkpoint-", "."))]
    return found


def find_stages(directories: list[Path]) -> dict[Path, dict]:
    """{directory: stage.json} of the stages among directories.

    A run that was moved aside (sft.1 beside sft) counts only if a stage that counts came from it.

    Raises:
        ValueError: a stage.json is damaged or of a later format.
    """
    records = {path: read_object(path / STAGE_FILE, True) for path in directories if (path / STAGE_FILE).is_file()}
    kept = {path: record for path, record in records.items() if not _is_aside(path)}
    while True:
        there = {mark_of(record) for record in kept.values()}
        wanted = {part(record, "parent").get("fingerprint") for record in kept.values()} - there
        more = {path: record for path, record in records.items() if mark_of(record) in wanted}
        if not more:
            return {path: record for path, record in records.items() if path in kept}
        kept |= more


def mark_of(record: dict) -> str:
    """The fingerprint of a stage, as those that came from it recorded it."""
    return fingerprint(part(record, "files"))


def _is_aside(path):
    match = ASIDE.fullmatch(path.name)
    return bool(match) and path.with_name(match[1]).is_dir()


def order(stages: list[dict]) -> list[dict]:
    """Sort stages so that each stands behind what it came from; beside that by method, then by age."""
    waiting = {stage["id"]: _origins(stage) - {stage["id"]} for stage in stages}
    known = set(waiting)
    by_id = {stage["id"]: stage for stage in stages}

    def key(name):
        stage = by_id[name]
        place = METHODS.index(stage["method"]) if stage["method"] in METHODS else len(METHODS)
        return place, stage["created"] or "", name

    ready = [key(name) for name, origins in waiting.items() if not origins & known]
    heapq.heapify(ready)
    done = []
    while ready:
        name = heapq.heappop(ready)[-1]
        done.append(name)
        for other, origins in waiting.items():
            if name in origins and other not in done and not (origins & known) - set(done):
                heapq.heappush(ready, key(other))
    rest = sorted(known - set(done), key=key)  # only damaged files lead in a circle
    return [by_id[name] for name in [*done, *rest]]


def _origins(stage):
    parent = (stage["parent"] or {}).get("id")
    return {parent, *(feed["id"] for feed in stage["feeds"])} - {None}


# -- who came from whom ----------------------------------------------------------------------------------------------


def find_parent(path: Path, record: dict, records: dict[Path, dict], names: dict[Path, str]) -> dict | None:
    """Say what a stage continued: by the fingerprint it recorded, or else by the path.

    Returns:
        {"id": of the parent or None where it is not in the report, "path", "method", "changed": it was trained anew
        since then}; None for a stage that began with a base model.
    """
    parent = part(record, "parent")
    if not parent:
        return None
    place = Path(absolute(str(parent.get("path")), path)).resolve()
    same = [other for other in records if mark_of(records[other]) == parent.get("fingerprint")]
    there = [other for other in records if other.resolve() == place]
    found = next(iter([*(other for other in same if other in there), *same, *there]), None)
    return {
        "id": None if found is None else names[found],
        "path": parent.get("path"),
        "method": parent.get("stage"),
        "changed": found is not None and found not in same,
    }


def find_feeds(path: Path, record: dict, records: dict[Path, dict], names: dict[Path, str]) -> list[dict]:
    """Say which reward models had a part in a stage.

    Returns:
        [{"id": None where it is not in the report, "path", "how": "scores" what the policy writes, or "answers" that
        it learnt from were chosen by it}]
    """
    given = [(part(record, "arguments").get("reward_model_path"), "scores")]
    files = part(part(record, "data"), "train").get("files")
    samples = path.parent / "samples"  # of a round, see scripts/run_rounds.sh
    if record.get("stage") != "rm" and any(PurePath(str(file)).parent.name == samples.name for file in files or ()):
        summary = read_object(samples / "summary.json")
        given.append((part(part(summary, "reward"), "model").get("name_or_path"), "answers"))
    feeds = []
    for name, how in given:
        if text(name):
            found = _find_by_path(name, path, [other for other in records if records[other].get("stage") == "rm"])
            feeds.append({"id": None if found is None else names[found], "path": name, "how": how})
    return feeds


def _find_by_path(name, path, candidates):
    """The directory that a command meant by a path, which was relative to wherever it was started."""
    parts = tuple(part for part in PurePath(name).parts if part not in (".", ".."))
    tests = (
        lambda other: other.resolve() == Path(name).resolve(),
        lambda other: other.resolve().parts[-len(parts) :] == parts,
        lambda other: other.resolve() == (path.parent / parts[-1]).resolve(),
    )
    return next((other for test in tests for other in candidates if parts and test(other)), None)


def find_roots(stages: list[dict], evaluations: list[dict]) -> list[dict]:
    """Where chains begin: base models that are no stage, and parents that stand outside of the directory.

    Sets every stage's "origin": the id of its parent, of such a root, or None of a model that was built from nothing.

    Args:
        stages: all of them.
        evaluations: results that are of no stage.

    Returns:
        [{"id", "label", "kind": "base" or "outside", "method", "base", "eval"}]
    """
    roots: dict[str, dict] = {}
    for stage in stages:
        parent, base = stage["parent"], stage["base"]
        if parent and parent["id"]:
            stage["origin"] = parent["id"]
            continue
        if parent:
            root = {"id": f"outside:{parent['path']}", "label": PurePath(str(parent["path"])).name, "kind": "outside"}
        elif base["own"]:
            stage["origin"] = None
            continue
        else:
            label = base["name"].rpartition("/")[2]
            root = {"id": f"base:{base['fingerprint'] or base['name']}", "label": label, "kind": "base"}
        stage["origin"] = root["id"]
        method = str(parent["method"]) if parent else "base"
        roots.setdefault(root["id"], {**root, "method": method, "base": base, "eval": None})
    for found in evaluations:
        for root in roots.values():
            if root["kind"] == "base" and found["fingerprints"] == [root["base"]["fingerprint"], None]:
                root["eval"] = root["eval"] or found
    return list(roots.values())


def describe_base(path: Path, record: dict) -> dict:
    """Which weights a stage's chain began with.

    Returns:
        {"name", "path", "own": the stage is its own base, "fingerprint", "revision", "parameters": None where its
        files are not here, "stand_in": it is the toolkit's own starter}
    """
    base = part(record, "base_model")
    name = str(base.get("name_or_path") or "?")
    place = Path(absolute(name, path))
    own = name == "."
    stage = record if own else read_object(place / STAGE_FILE)
    return {
        "name": place.resolve().name if name.startswith((".", "/")) else name,
        "own": own,
        "path": str(place) if name.startswith(".") else name,
        "fingerprint": base.get("fingerprint"),
        "revision": base.get("revision"),
        "parameters": count_parameters(place),
        "stand_in": "build_starter_model" in str(stage.get("command")),
    }


def count_parameters(directory: Path) -> int | None:
    """Count the parameters in a directory's .safetensors by their headers; None without any, or with damaged ones."""
    total = 0
    for path in sorted(directory.glob("model*.safetensors")) if directory.is_dir() else ():
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            try:
                header = json.loads(stream.read(min(size, LONGEST_HEADER)))
                total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
            except (ValueError, TypeError, KeyError, AttributeError):
                return None
    return total or None


# -- one stage -------------------------------------------------------------------------------------------------------


def describe_stage(path: Path, record: dict, name: str) -> dict:
    """All that a stage's own files say, but for its place in the chain."""
    method = str(record.get("stage") or "?")
    history = read_object(path / "trainer_state.json").get("log_history")
    return {
        "id": name,
        "label": name.upper() if name == method else name,
        "directory": str(path),
        "method": method,
        "created": text(record.get("created")),
        "command": text(record.get("command")),
        "seed": record.get("seed"),
        "fingerprint": mark_of(record),
        "base": describe_base(path, record),
        **{key: part(record, key) for key in ("tuning", "template", "arguments", "versions", "hardware")},
        "data": {split: _ledger(part(part(record, "data"), split)) for split in ("train", "validation")},
        "checks": {key: _check(part(part(record, "checks"), key)) for key in part(record, "checks")},
        "own": own_measures(part(record, "metrics")),
        "memory": {key: number(part(record, "memory").get(key)) for key in ("predicted_bytes", "measured_bytes")},
        "seconds": number(record.get("seconds")),
        "curves": read_curves(history if isinstance(history, list) else [], method),
        "samples": pick_samples(read_rows(path / "samples.jsonl")),
        "measure": None,
        "eval": None,
    }


def _check(outcome):
    passed = outcome.get("passed")
    return {
        "passed": passed if isinstance(passed, bool) else None,
        **{key: outcome.get(key) for key in ("value", "limit")},
    }


def _ledger(found):
    """What became of the rows of a split, None where nothing was recorded."""
    if not found:
        return None
    counts = {name: number(found.get(name)) for name in ("read", "used", "truncated", "samples", "packed_rows")}
    groups = {
        name: {key: count for key, value in part(found, name).items() if (count := number(value)) is not None}
        for name in ("dropped", "repaired", "turns", "pairs", "tokens")
    }
    files = found.get("files")
    return {**counts, **groups, "files": [str(file) for file in files] if isinstance(files, list) else []}


def own_measures(metrics: dict) -> list[dict]:
    """What a stage measured on its own held-out rows before and after training.

    Returns:
        [{"metric", "before", "after": {"value", and "low", "high" where it has an interval} or None, "n"}]
    """
    before, after = part(metrics, "before"), part(metrics, "after")
    names = [name for name in after if number(after[name]) is not None and name not in COUNTS]
    counts = [number(after.get(name)) for name in COUNTS if number(after.get(name)) is not None]
    return [
        {
            "metric": name,
            "before": with_interval(before, name),
            "after": with_interval(after, name),
            "n": counts[0] if counts else None,
        }
        for name in names
        if not name.endswith(("_low", "_high"))
    ]


def with_interval(values: dict, name: str) -> dict | None:
    """{"value", "low", "high"} of a metric whose interval stands beside it as NAME_low and NAME_high."""
    if number(values.get(name)) is None:
        return None
    stem = name[: -len("accuracies")] + "accuracy" if name.endswith("accuracies") else name
    bounds = {end: number(values.get(f"{stem}_{end}")) for end in ("low", "high")}
    return {"value": values[name], **({} if None in bounds.values() else bounds)}


def read_curves(history: list, method: str) -> list[dict]:
    """What the log says, step by step.

    Returns:
        [{"key", "train": [(step, value)], "held_out": [{"step", "value", maybe "low", "high"}]}], only those with
        points; last the scores of generated answers, if those were measured while training.
    """
    entries = [entry for entry in history if isinstance(entry, dict) and number(entry.get("step")) is not None]
    shown = [(key, names) for key, names, methods in CURVES if method in methods or method not in METHODS]
    generated = {name for entry in entries for name in entry if name.startswith("eval_") and _is_overlap(name)}
    shown += [(name.removeprefix("eval_"), (name.removeprefix("eval_"),)) for name in sorted(generated)]
    curves = []
    for key, names in shown:
        name = next((name for name in names if any(name in entry for entry in entries)), None)
        # a name may be logged in training and another on held-out rows: GRPO's reward and eval_score
        held = next((held for held in names if any(f"eval_{held}" in entry for entry in entries)), None)
        train = [(entry["step"], entry[name]) for entry in entries if name and number(entry.get(name)) is not None]
        held_out = {
            entry["step"]: {"step": entry["step"], **found}
            for entry in entries
            if held and (found := with_interval(entry, f"eval_{held}"))
        }
        if train or held_out:
            curves.append({"key": key, "train": train, "held_out": list(held_out.values())})
    return curves


def _is_overlap(name):
    return any(kind in name.lower() for kind in ("bleu", "rouge")) and not name.endswith(("_low", "_high"))


def pick_samples(rows: list[dict]) -> dict:
    """Answers sampled while training: from its beginning and from its end.

    Returns:
        {"first", "last": [{"step", "prompt", "answer", "score"}]}, empty without any.
    """
    rows = [row for row in rows if text(row.get("prompt")) is not None and text(row.get("answer")) is not None]
    if not rows:
        return {}
    steps = [number(row.get("step")) or 0 for row in rows]
    found = {}
    for name, step in (("first", min(steps)), ("last", max(steps))):
        here = [row for row, own in zip(rows, steps, strict=True) if own == step][:NUM_SAMPLES]
        found[name] = [{key: row.get(key) for key in ("step", "prompt", "answer", "score")} for row in here]
    return found if min(steps) < max(steps) else {"last": found["last"]}


def measure_command(flag: str, model: str, output_dir: str, reward: str | None) -> str:
    """The command that would measure a model on the shipped held-out sets."""
    words = ["python", "eval_benchmark.py", flag, model, "--data_file", "data/eval", "--output_dir", output_dir]
    return shlex.join([*words, *(["--reward_model", reward] if reward else [])])


# -- all -------------------------------------------------------------------------------------------------------------


def collect(directory: str | Path, num_questions: int) -> dict:
    """Read everything below a directory.

    Args:
        directory: such as outputs.
        num_questions: questions whose answers are shown.

    Returns:
        {"directory", "created", "roots", "stages", "left_out", "questions"}: the stages in the order in which one came
        from another; left_out are runs that were moved aside.

    Raises:
        FileNotFoundError: no such directory, or no stage in it.
        ValueError: a file is damaged; it is named.
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; the stages write below outputs/")
    directories = walk(root)
    records = find_stages(directories)
    if not records:
        raise FileNotFoundError(
            f"{directory}: no stage in there (a directory with {STAGE_FILE}); see sh scripts/run_sft.sh"
        )
    names = {path: _name(path, root) for path in records}
    stages = [describe_stage(path, record, names[path]) for path, record in records.items()]
    for stage, (path, record) in zip(stages, records.items(), strict=True):
        stage["parent"] = find_parent(path, record, records, names)
        stage["feeds"] = find_feeds(path, record, records, names)
    roots = find_roots(stages, attach_evaluations(stages, records, directories))
    reward = next((stage["directory"] for stage in stages if stage["method"] == "rm"), None)
    for stage in stages:
        whole = stage["tuning"].get("method") in WHOLE
        flag, scorer = "--base_model" if whole else "--lora_model", None if stage["method"] == "rm" else reward
        stage["measure"] = measure_command(flag, stage["directory"], f"{stage['directory']}/eval", scorer)
    for place in roots:
        own = (place["base"]["path"], f"{root}/base/eval")
        place["measure"] = measure_command("--base_model", *own, reward) if place["kind"] == "base" else None
    questions = pick_questions([*roots, *stages], num_questions)
    for place in [*roots, *stages]:
        (place["eval"] or {}).pop("rows", None)
    return {
        "directory": str(directory),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "roots": roots,
        "stages": order(stages),
        "left_out": [
            _name(path, root) for path in directories if (path / STAGE_FILE).is_file() and path not in records
        ],
        "questions": questions,
    }


def _name(path, root):
    name = path.relative_to(root).as_posix()
    return path.resolve().name if name == "." else name
