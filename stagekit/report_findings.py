"""What the numbers of a report support: which stage changed which measure, and sentences that claim no more.

A change is claimed only where two 95 % intervals do not overlap, of the same measure on the same file under the same
settings. That is stricter than a test at 5 %; what overlaps is not shown to differ, which is not the same as equal.
"""

from collections.abc import Callable

from stagekit.report_text import KINDS, both, kind_of, show
from stagekit.report_text import MEASURES as NAMES

# (task, metric, which direction is better), in the order of the columns
MEASURES = (
    ("text", "perplexity", "lower"),
    ("questions", "bleu4", "higher"),
    ("questions", "rougeL", "higher"),
    ("questions", "reward", "higher"),
    ("questions", "stop_rate", "higher"),
    ("questions", "answer_tokens", None),
    ("questions", "repetition", "lower"),
    ("choice", "accuracy_loglikelihood", "higher"),
    ("choice", "accuracy_generation", "higher"),
    ("verifiable", "accuracy", "higher"),
    ("safety", "safe", "higher"),
    ("pairs", "pair_accuracy", "higher"),
)
# Of what a stage measured of itself, higher being better; only these become sentences, for they have intervals.
OWN = ("accuracy", "rewards/accuracies", "score")
# Settings that decide what a task finds. The reward model decides the reward alone.
GENERATING = ("max_new_tokens", "temperature", "repetition_penalty", "system_prompt", "num_shots", "shots_file")
ALWAYS = ("max_samples", "load_in_4bit", "load_in_8bit")
SETTINGS = {
    "text": ("max_length", "stride", *ALWAYS),
    "pairs": ALWAYS,
    **{task: (*GENERATING, *ALWAYS) for task in ("choice", "questions", "safety", "verifiable")},
}
# What a stage is for: the first of these that it changed is told first.
AIMS = {
    "pt": ("perplexity",),
    "sft": ("rougeL", "bleu4", "stop_rate", "perplexity"),
    "rm": ("pair_accuracy", "accuracy"),
    "ppo": ("reward", "score"),
    "dpo": ("reward", "rewards/accuracies"),
    "orpo": ("reward", "rougeL", "accuracy"),
    "grpo": ("accuracy", "accuracy_generation", "score"),
}
CHOICE = ("accuracy_loglikelihood", "accuracy_generation")  # two ways to read one answer
IN_THE_LEAD = 3  # clauses of a sentence; more are counted


def compare(before: dict, after: dict, better: str | None) -> str | None:
    """Say what two values with intervals show: "better", "worse", "changed" (neither is better), "same"; else None.

    Args:
        before, after: {"value", "low", "high"}; without an interval nothing can be said.
        better: "higher", "lower", or None.
    """
    if any(end not in side for side in (before, after) for end in ("low", "high")):
        return None
    if after["low"] <= before["high"] and before["low"] <= after["high"]:
        return "same"
    if better is None:
        return "changed"
    return "better" if (after["low"] > before["high"]) == (better == "higher") else "worse"


def judge(facts: dict) -> dict:
    """Add to what report.collect returned all that follows from it.

    Returns:
        the facts, with "summary", "findings", "changes", "measures" and "warnings"; they are what report.json holds.
    """
    stages = facts["stages"]
    columns, warnings = build_columns([*facts["roots"], *stages])
    changes = find_changes(stages, columns)
    return {
        **{name: facts[name] for name in ("directory", "created", "left_out")},
        "summary": summarize(stages),
        "findings": write_lead(changes),
        "changes": changes,
        "warnings": [*warn_about_stages(stages), *warnings],
        "measures": columns,
        **{name: facts[name] for name in ("roots", "stages", "questions")},
    }


def summarize(stages: list[dict]) -> dict:
    """The few numbers at the head: stages, checks, seconds, hardware, base models."""
    checks = [check["passed"] for stage in stages for check in stage["checks"].values()]
    seconds = [stage["seconds"] for stage in stages if stage["seconds"] is not None]
    bases = {base["fingerprint"] or base["name"]: base for base in (stage["base"] for stage in reversed(stages))}
    return {
        "stages": len(stages),
        "checks_passed": checks.count(True),
        "checks_total": len(checks),
        "seconds": sum(seconds) if seconds else None,
        "hardware": [dict(pairs) for pairs in dict.fromkeys(_hardware(stage) for stage in stages) if pairs],
        "bases": list(bases.values())[::-1],
    }


def _hardware(stage):
    given = stage["hardware"]
    return tuple(
        (name, str(given[name])) for name in ("device", "processes", "cpu_cores", "precision") if name in given
    )


# -- columns ---------------------------------------------------------------------------------------------------------


def build_columns(places: list[dict]) -> tuple[list[dict], list[dict]]:
    """Put the measures of all stages side by side.

    Args:
        places: measured roots and stages, in order; each with "id", "method", "origin" and "eval".

    Returns:
        (columns, warnings). A column: {"key", "file", "task", "metric", "better", "kind", "n", "signature", "best",
        "cells": {id: {"value", "low", "high", "n", "comparable", "outcome": see compare, against its origin}}}. A
        warning: {"key" of report_text.TEXT, and what it is filled with}.
    """
    columns, warnings = [], []
    files = {name: str(task.get("task")) for place in places for name, task in tasks_of(place).items()}
    for task, metric, better in MEASURES:
        for file in (name for name, own in files.items() if own == task):
            column = {"key": f"{file}/{metric}", "file": file, "task": task, "metric": metric}
            column |= {"better": better, "kind": KINDS[metric], "cells": _cells(places, file, task, metric)}
            if column["cells"]:
                columns.append(_judge(column, places))
    for file, task in files.items():
        warnings += _differences(places, file, task)
    return columns, warnings


def tasks_of(place: dict) -> dict[str, dict]:
    """{file: task} of a place that was measured as it is now."""
    return place["eval"]["tasks"] if place["eval"] and not place["eval"]["stale"] else {}


def _cells(places, file, task, metric):
    """{id: cell} of the places that have the measure; comparable are those measured as most of them are."""
    having = [place for place in places if "value" in tasks_of(place).get(file, {}).get("metrics", {}).get(metric, {})]
    own = {place["id"]: conditions(place, file, task, metric) for place in having}
    usual = _usual(own)
    return {
        place["id"]: {
            **tasks_of(place)[file]["metrics"][metric],
            "comparable": not _unlike(own[place["id"]], usual),
        }
        for place in having
    }


def _usual(conditions):
    """The conditions that agree with the most others."""
    every = list(conditions.values())
    return max(every, key=lambda one: sum(not _unlike(one, other) for other in every), default={})


def _unlike(one, other):
    """Names of what differs, among what both have."""
    return [name for name, value in one.items() if name in other and other[name] != value]


def conditions(place: dict, file: str, task: str, metric: str | None = None) -> dict:
    """All that must agree before two stages' numbers may be compared; what nobody wrote down is left out."""
    found = tasks_of(place)[file]
    names = SETTINGS.get(task, ()) + (("reward_model",) if metric == "reward" else ())
    given = place["eval"]["settings"]
    names += ("seed",) if given.get("max_samples") else ()  # it draws them
    settings = {name: given[name] for name in names if name in given}
    if settings.get("reward_model") and given.get("reward_fingerprints"):
        settings["reward_model"] = given["reward_fingerprints"]  # what stands at a path changes
    return {"sha256": found.get("sha256"), "num": found.get("num"), **settings}


def _judge(column, places):
    """Say of every cell what it shows against the stage it came from, and which is the best."""
    cells, origins = column["cells"], {place["id"]: place.get("origin") for place in places}
    for name, cell in cells.items():
        origin = cells.get(origins[name])
        fair = origin is not None and origin["comparable"] and cell["comparable"]
        cell["outcome"] = compare(origin, cell, column["better"]) if fair else None
        cell["origin"] = origins[name] if fair else None
    fair = {name: cell["value"] for name, cell in cells.items() if cell["comparable"]}
    column["best"] = None
    if column["better"] and fair:
        top = (max if column["better"] == "higher" else min)(fair, key=fair.get)
        column["best"] = top if cells[top]["outcome"] == "better" else None
    signatures = {cell["signature"] for cell in cells.values() if cell.get("signature")}
    return {**column, "signature": " · ".join(sorted(signatures)) or None}


def _differences(places, file, task):
    """Warnings about a file: measured in another version, on other rows, with other settings, or seen in training."""
    having = [place for place in places if file in tasks_of(place)]
    every = {place["id"]: conditions(place, file, task, "reward" if task == "questions" else None) for place in having}
    usual, warnings = _usual(every), []
    for place in having:
        own, found = every[place["id"]], tasks_of(place)[file]
        base, differ = {"file": file, "stage": place["label"]}, _unlike(every[place["id"]], usual)
        if "sha256" in differ:
            warnings.append({"key": "warn_files", **base})
        elif "num" in differ:
            warnings.append({"key": "warn_num", **base, "own": own["num"], "other": usual["num"]})
        elif differ:
            warnings.append({"key": "warn_settings", **base, "settings": ", ".join(differ)})
        if found.get("seen_in_training"):
            warnings.append({"key": "warn_leak", **base, "seen": found["seen_in_training"], "num": found.get("num")})
    return warnings


def warn_about_stages(stages: list[dict]) -> list[dict]:
    """Warnings about the stages themselves, in the form of build_columns."""
    warnings = []
    for stage in stages:
        if (stage["parent"] or {}).get("changed"):
            warnings.append({"key": "warn_parent", "stage": stage["label"], "parent": stage["parent"]["id"]})
        if stage["eval"] and stage["eval"]["stale"]:
            warnings.append({"key": "warn_stale", "stage": stage["label"]})
        for name, check in stage["checks"].items():
            if check["passed"] is not True:
                key = "warn_failed" if check["passed"] is False else "warn_skipped"
                warnings.append({"key": key, "stage": stage["label"], "check": name})
    return warnings


# -- changes ---------------------------------------------------------------------------------------------------------


def find_changes(stages: list[dict], columns: list[dict]) -> list[dict]:
    """List what every stage changed, or was not shown to change, against what it came from.

    What training measured of itself counts for a stage that no evaluation compares.

    Returns:
        [{"stage", "label", "method", "against": id or None for chance and its own beginning, "metric", "file", "kind",
        "before", "after", "outcome"}]; the stages in their order.
    """
    several = {column["metric"] for column in columns if sum(column["metric"] == c["metric"] for c in columns) > 1}
    changes = []
    for stage in stages:
        mine = []
        for column in columns:
            cell = column["cells"].get(stage["id"])
            common = {
                "stage": stage["id"],
                "label": stage["label"],
                "method": stage["method"],
                "metric": column["metric"],
                "kind": column["kind"],
            }
            common["file"] = column["file"] if column["metric"] in several else None
            if column["metric"] == "pair_accuracy" and cell and "low" in cell:
                outcome = "better" if cell["low"] > 0.5 else "worse" if cell["high"] < 0.5 else "same"
                mine.append({**common, "against": None, "before": {"value": 0.5}, "after": cell, "outcome": outcome})
            elif cell and cell["outcome"]:
                before = column["cells"][cell["origin"]]
                mine.append({**common, "against": cell["origin"], "before": before, "after": cell})
                mine[-1]["outcome"] = cell["outcome"]
        changes += mine or _own_changes(stage)
    return changes


def _own_changes(stage):
    own = {measure["metric"]: measure for measure in stage["own"]}
    found = []
    for metric in OWN:
        measure = own.get(metric)
        if measure and measure["before"] and (outcome := compare(measure["before"], measure["after"], "higher")):
            common = {
                "stage": stage["id"],
                "label": stage["label"],
                "method": stage["method"],
                "metric": metric,
                "kind": KINDS[metric],
                "file": None,
            }
            ends = {name: measure[name] for name in ("before", "after")}
            found.append({**common, "against": None, **ends, "outcome": outcome, "own": True})
    return found


# -- sentences -------------------------------------------------------------------------------------------------------


def write_lead(changes: list[dict], wrap: Callable[[str, str], str] = lambda kind, text: text) -> list[dict]:
    """Write the two or three sentences at the head of the page.

    Args:
        changes: what find_changes returned.
        wrap: (kind, text) -> text, to mark what is a "name" of a stage or a "number".

    Returns:
        [{"kind": "gains", "costs", "unchanged", "none" or "same", "en", "zh"}]
    """
    if not changes:
        return [_sentence("lead_none", "none")]
    found = []
    gains = _first_of_each([change for change in changes if change["outcome"] == "better"])
    costs = _first_of_each([change for change in changes if change["outcome"] == "worse"])
    for kind, some in (("gains", gains), ("costs", costs)):
        if some:
            clauses = [clause(change, wrap) for change in some[:IN_THE_LEAD]]
            if len(some) > IN_THE_LEAD:
                clauses.append(both("and_more", count=len(some) - IN_THE_LEAD))
            found.append(_sentence(kind if gains else "gains", kind, clauses=_join(clauses)))
    if not found:
        return [_sentence("lead_same", "same")]
    still = _unchanged(changes)
    if still:
        found.append(_sentence("unchanged", "unchanged", measures=_join(still, ("or", "或"))))
    return found


def _sentence(key, kind, **values):
    return dict(zip(("kind", "en", "zh"), (kind, *both(key, **values)), strict=True))


def _first_of_each(changes):
    """The change of every stage that is nearest to what the stage is for."""

    def rank(change):
        aims = AIMS.get(change["method"], ())
        return aims.index(change["metric"]) if change["metric"] in aims else len(aims)

    first = {}
    for change in sorted(changes, key=rank):
        first.setdefault(change["stage"], change)
    return [first[name] for name in dict.fromkeys(change["stage"] for change in changes)]


def clause(change: dict, wrap: Callable[[str, str], str] = lambda kind, text: text) -> tuple[str, str]:
    """What a stage changed, in English and Chinese, without a full stop."""
    ends = {name: wrap("number", show(change[name]["value"], change["kind"])) for name in ("before", "after")}
    stage = wrap("name", change["label"])
    if change["metric"] == "pair_accuracy":
        return both("finding_chance", stage=stage, after=ends["after"])
    rises = change["after"]["value"] > change["before"]["value"]
    key = "finding_raised" if rises else "finding_lowered"
    return both(key, stage=stage, measure=name_of(change), **ends)


def name_of(change: dict) -> tuple[str, str]:
    """A measure as sentences call it, with its file where several files have it."""
    name = measure_name(change)
    return both("finding_on", measure=name, file=change["file"]) if change["file"] else name


def measure_name(change: dict) -> tuple[str, str]:
    if change.get("own"):
        return both("own_score") if change["metric"] == "score" else both("own_accuracy")
    return NAMES[change["metric"]][1]


def _unchanged(changes):
    """Names of what was compared and what no stage changed in any file; both ways to answer a choice are one.

    A reward model's pairs were compared with chance, and with no earlier stage.
    """
    outcomes = {}
    for change in changes:
        if not change.get("own") and change["metric"] != "pair_accuracy":
            outcomes.setdefault(change["metric"], set()).add(change["outcome"])
    still = [metric for metric, found in outcomes.items() if found == {"same"}]
    names = [NAMES[metric][1] for metric in still if metric not in CHOICE]
    choice = [metric for metric in CHOICE if metric in still]
    if choice:
        names.insert(0, both("choice_both") if len(choice) == len(CHOICE) else NAMES[choice[0]][1])
    return names


def _join(pairs, last=("and", "以及")):
    """Clauses or names as a list within a sentence."""
    english, chinese = zip(*pairs, strict=True)
    marked = kind_of(english)
    chinese = marked("、" if last[1] == "或" else "；").join(chinese)
    if len(english) == 1:
        return english[0], chinese
    comma = "," if len(english) > 2 else ""
    return marked(", ").join(english[:-1]) + marked(f"{comma} {last[0]} ") + english[-1], chinese
