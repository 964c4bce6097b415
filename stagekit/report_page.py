"""The report as one HTML page that needs nothing else: no network, and scripts only for comfort.

Everything that comes from files is text and is escaped; the one script is known to the page's own policy by its hash,
so that no other could run. The page holds both languages, and a stylesheet shows one of them.
"""

import base64
import functools
import hashlib
import math
import re
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from stagekit import charts
from stagekit.report_findings import tasks_of, write_lead
from stagekit.report_text import (
    CHECKS,
    CURVES,
    KINDS,
    MEASURES,
    METHODS,
    NOTHING,
    OWN,
    both,
    show,
    show_bytes,
    show_parameters,
    show_seconds,
)

HERE = Path(__file__).parent
MAX_COLUMNS = 14  # of a table that can be taken in at a glance
LONGEST = 3000  # characters of an answer on the page
SMALL = 100_000_000  # parameters below which a model is called small
COLOURS = {*METHODS} - {"merge", "quantize", "extend_vocabulary"}  # methods that the stylesheet has a colour for


def render(facts: dict, language: str, command: str, json_name: str) -> str:
    """Write the page.

    Args:
        facts: what report_findings.judge returned.
        language: "en", "zh", or "auto" for the browser's (English without scripts).
        command: that made it.
        json_name: file beside it that holds the facts.
    """
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    view = View(facts)
    return _template().render(
        facts=facts,
        view=view,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        language=language,
        titles=[f"{title} · {facts['directory']}" for title in both("title")],
        command=command,
        json_name=json_name,
        t=t,
        pair=pair,
        show=show,
        NOTHING=NOTHING,
        MEASURES=MEASURES,
        CHECKS=CHECKS,
        METHODS=METHODS,
        LONGEST=LONGEST,
        words_of=words_of,
    )


@functools.cache
def _template():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


# -- texts -----------------------------------------------------------------------------------------------------------


def pair(texts: tuple[str, str] | str) -> Markup:
    """A text in both languages, of which the page shows one; alone where it is the same in both."""
    if isinstance(texts, str) or texts[0] == texts[1]:
        return escape(texts if isinstance(texts, str) else texts[0])
    return Markup('<span class="en" lang="en">{}</span><span class="zh" lang="zh-CN">{}</span>').format(*texts)


def t(key: str, **values: object) -> Markup:
    """A text of report_text.TEXT in both languages, filled in; what is filled in is escaped."""
    return pair(both(key, **values))


def method_name(method: str) -> tuple[str, str]:
    return METHODS.get(method, (method, method))


def colour(method: str) -> str:
    """The class that gives a stage its colour, the same everywhere."""
    return f"m-{method}" if method in COLOURS else "m-other"


class View:
    """What the template shows, made of the facts; one method for each part of the page."""

    def __init__(self, facts: dict):
        self.facts, self.stages = facts, facts["stages"]
        self.places = [*facts["roots"], *self.stages]
        self.by_id = {place["id"]: place for place in self.places}
        slugs = [re.sub(r"[^a-z0-9]+", "-", stage["id"].lower()).strip("-") for stage in self.stages]
        self.anchors = {
            stage["id"]: f"stage-{slug}" if slugs.count(slug) == 1 and slug else f"stage-{slug}-{number}"
            for number, (stage, slug) in enumerate(zip(self.stages, slugs, strict=True))
        }

    # -- head --

    def lead(self) -> list[tuple[str, Markup]]:
        """The findings with their kinds, stages and numbers marked."""

        def wrap(kind, text):
            return Markup('<b class="{}">{}</b>').format(kind, text)

        found = []
        for one in write_lead(self.facts["changes"], wrap):
            texts = Markup(pair((one["en"], one["zh"])))
            for name in ("BLEU-4", "ROUGE-L"):  # a line must not end within them
                texts = texts.replace(name, Markup('<span class="keep">{}</span>').format(name))
            found.append((one["kind"], texts))
        return found

    def bases(self) -> list[dict]:
        """The base models, and what has to be said about small ones."""
        found = []
        for base in self.facts["summary"]["bases"]:
            count, note = base["parameters"], None
            values = {"base": base["name"], "count": show_parameters(count)}
            if base["stand_in"]:
                note = t("stand_in" if count else "stand_in_unknown", **values)
            elif count and count < SMALL:
                note = t("small_base", **values)
            found.append({**base, "size": values["count"] if count else None, "note": note})
        return found

    def hardware(self) -> list[Markup]:
        """What the stages ran on, a text for each machine."""
        found = []
        for machine in self.facts["summary"]["hardware"]:
            device = machine.get("device", "?")
            parts = [escape("CPU" if device == "cpu" else device)]
            if machine.get("processes", "1") != "1":
                parts.append(t("processes", count=machine["processes"]))
            elif device == "cpu" and "cpu_cores" in machine:
                parts.append(t("cores", count=machine["cpu_cores"]))
            parts += [escape(machine["precision"])] if "precision" in machine else []
            found.append(Markup(" · ").join(parts))
        return found

    def total_time(self) -> Markup:
        return pair(show_seconds(self.facts["summary"]["seconds"]))

    # -- chain --

    def chain(self) -> Markup:
        """The chain as a picture."""
        nodes, edges = [], []
        for place in self.places:
            if "checks" in place:
                passed = sum(check["passed"] is True for check in place["checks"].values())
                mark = f"{passed}/{len(place['checks'])} ✓" if place["checks"] else None
                time, tuning = show_seconds(place["seconds"]), self.tuning(place)
                facts = tuple(f"{own} · {took}" for own, took in zip(tuning, time, strict=True))
                lines, href = [method_name(place["method"]), facts], f"#{self.anchors[place['id']]}"
            else:
                count = place["base"]["parameters"]
                size = both("parameters", count=show_parameters(count)) if count else ("", "")
                lines = [method_name(place["method"]), size if place["kind"] == "base" else both("outside")]
                mark = href = None
            kind = f"{colour(place['method'])} {place.get('kind', 'stage')}"
            nodes.append(
                {"id": place["id"], "title": place["label"], "lines": lines, "mark": mark, "kind": kind, "href": href}
            )
            edges += [(place["origin"], place["id"], "parent")] if place.get("origin") else []
            edges += [(feed["id"], place["id"], "feed") for feed in place.get("feeds", ()) if feed["id"]]
        return Markup(charts.chain(nodes, edges, both("chain")))

    def tuning(self, stage: dict) -> tuple[str, str]:
        """How a stage trained: "LoRA r 32", or all weights."""
        found = stage["tuning"]
        method = str(found.get("method") or "")
        if method == "full":
            return both("full_weights")
        if "rank" in found:
            name = {"lora": "LoRA", "qlora": "QLoRA"}.get(method, method)
            name = "DoRA" if found.get("use_dora") else name
            return (f"{name} r {found['rank']}",) * 2
        return (method or NOTHING,) * 2

    def origin(self, stage: dict) -> Markup:
        """From what a stage came, in words."""
        parts = []
        if stage["origin"]:
            parts.append(t("from", stage=self.by_id[stage["origin"]]["label"]))
        else:
            parts.append(t("from_scratch"))
        for feed in stage["feeds"]:
            name = self.by_id[feed["id"]]["label"] if feed["id"] else feed["path"]
            parts.append(t("scored_by" if feed["how"] == "scores" else "chosen_by", stage=name))
        return Markup(", ").join(parts)

    def tree(self) -> list[dict]:
        """The chain as nested rows, for narrow windows: {"place", "depth"}."""
        children: dict = {}
        for place in self.places:
            children.setdefault(place.get("origin"), []).append(place)
        rows, seen = [], set()

        def visit(place, depth):
            if place["id"] not in seen:
                seen.add(place["id"])
                rows.append({"place": place, "depth": depth})
                for child in children.get(place["id"], ()):
                    visit(child, depth + 1)

        for place in children.get(None, []) + self.places:
            visit(place, 0)
        return rows

    # -- measures --

    def brought(self) -> list[dict]:
        """For every stage, what got better, worse, or was not shown to differ, and why where nothing can be said."""
        rows = []
        for stage in self.stages:
            changes = [change for change in self.facts["changes"] if change["stage"] == stage["id"]]
            groups = {
                outcome: [self._change(change) for change in changes if change["outcome"] == outcome]
                for outcome in ("better", "worse", "changed", "same")
            }
            notes = [] if changes else [self._why_nothing(stage), *_own_only(stage)]
            rows.append({"stage": stage, **groups, "notes": notes})
        return rows

    def _change(self, change):
        title = own_title(change["metric"]) if change.get("own") else MEASURES[change["metric"]][0]
        if change["file"]:
            title = tuple(f"{name} ({change['file']})" for name in title)
        ends = [show(change[end]["value"], change["kind"]) for end in ("before", "after")]
        against = None
        if change.get("own"):
            against = t("own_rows")
        elif change["metric"] == "pair_accuracy":
            against, ends[0] = t("chance" if change["outcome"] == "better" else "not_chance"), None
        return {"title": title, "before": ends[0], "after": ends[1], "against": against}

    def _why_nothing(self, stage):
        if not stage["eval"] or stage["eval"]["stale"]:
            return t("not_measured")
        origin = self.by_id.get(stage["origin"])
        if origin and tasks_of(origin):
            return t("measured_otherwise", stage=origin["label"])
        return t("origin_not_measured", stage=origin["label"]) if origin else t("first_measured")

    def tables(self) -> list[dict]:
        """The measures of all stages, in tables of at most MAX_COLUMNS that do not part a file.

        Returns:
            [{"groups": [{"file", "num", "span"}], "columns", "rows": [{"place", "cells"}], "first": pixels for names}]
        """
        groups: dict[str, list] = {}
        for column in self.facts["measures"]:
            groups.setdefault(column["file"], []).append(column)
        packs: list[list] = []
        tables = math.ceil(len(self.facts["measures"]) / MAX_COLUMNS)
        most = math.ceil(len(self.facts["measures"]) / max(1, tables))  # so that they are about as wide
        for group in groups.values():
            if not packs or sum(map(len, packs[-1])) + len(group) > max(most, len(group)):
                packs.append([])
            packs[-1].append(group)
        return [self._table(pack) for pack in packs]

    def _table(self, pack):
        columns = [column for group in pack for column in group]
        axes = []
        for column in columns:
            fair = [cell for cell in column["cells"].values() if cell["comparable"]]
            axes.append(charts.scale([cell[end] for cell in fair for end in ("value", "low", "high") if end in cell]))
        places = [place for place in self.places if "checks" in place or place["eval"]]
        rows = [
            {
                "place": place,
                "cells": [self._cell(place, *item) for item in zip(columns, axes, strict=True)],
            }
            for place in places
        ]
        groups = [{"file": group[0]["file"], "num": self._num(group[0]), "span": len(group)} for group in pack]
        longest = max(len(place["label"]) for place in places)
        return {"groups": groups, "columns": columns, "rows": rows, "first": 104 if longest < 10 else 150}

    def _num(self, column):
        """Rows of a file, as those who are compared measured it."""
        fair = (self.by_id[name] for name, cell in column["cells"].items() if cell["comparable"])
        return next((tasks_of(place)[column["file"]].get("num") for place in fair), None)

    def _cell(self, place, column, axis):
        cell = column["cells"].get(place["id"])
        if cell is None:
            writes = place["method"] != "rm"
            return {"missing": "applies" if writes != (column["task"] == "pairs") else "does_not_apply"}
        origin = column["cells"].get(cell["origin"]) if cell["origin"] else None
        drawn = Markup(charts.interval(cell, origin, axis)) if cell["comparable"] else None
        bounds = [show(cell[end], column["kind"]).strip("+%") for end in ("low", "high") if end in cell]
        return {
            **{"missing": None, "value": show(cell["value"], column["kind"]), "bounds": bounds, "drawn": drawn},
            **{key: cell[key] for key in ("outcome", "comparable")},
            "best": column["best"] == place["id"],
        }

    def has_apart(self) -> bool:
        return not all(cell["comparable"] for column in self.facts["measures"] for cell in column["cells"].values())

    def no_leaks(self) -> bool:
        """True when every stage knows that it has seen none of the held-out rows."""
        return all(task.get("seen_in_training") == 0 for place in self.places for task in tasks_of(place).values())

    def metrics(self) -> list[str]:
        """All the measures that anybody has, as their definitions are listed."""
        found = {metric for place in self.places for task in tasks_of(place).values() for metric in task["metrics"]}
        return [metric for metric in MEASURES if metric in found]

    def sources(self) -> list[dict]:
        """Where the numbers come from: a row for each file, as the stages measured it."""
        found: dict[str, dict] = {}
        for place in self.places:
            for name, task in tasks_of(place).items():
                row = found.setdefault(
                    name, {"file": name, "task": task.get("task"), "marks": {}, "signatures": {}, "seen": {}}
                )
                row["marks"].setdefault((task.get("data_file"), task.get("sha256"), task.get("num")), []).append(
                    place["label"]
                )
                row["seen"].setdefault(task.get("seen_in_training"), []).append(place["label"])
                for metric in task["metrics"].values():
                    row["signatures"] |= {metric["signature"]: None} if "signature" in metric else {}
        return list(found.values())

    def numbers(self) -> list[dict]:
        """Every number of every evaluation: {"place", "file", "group", "metric", "value", "bounds", "n"}."""
        rows = []
        for place in self.places:
            for name, task in tasks_of(place).items():
                parts = [(None, task["metrics"])]
                parts += [*task["by_subject"].items(), *task["by_kind"].items()]
                for group, metrics in parts:
                    for metric, one in metrics.items() if isinstance(metrics, dict) else ():
                        rows.append({"place": place, "file": name, "group": group, **_number(metric, one)})
        return rows

    def own(self) -> list[dict]:
        """What every stage measured of itself: {"stage", "measures": [{"title", "before", "after", "n"}]}."""
        rows = []
        for stage in self.stages:
            measures = [_own_row(measure) for measure in stage["own"]]
            rows += [{"stage": stage, "measures": measures}] if measures else []
        return rows

    # -- stages --

    def curves(self, stage: dict) -> list[Markup]:
        """The pictures of a stage's training, each with its title."""
        drawn = []
        for one in stage["curves"]:
            key = "pair_loss" if one["key"] == "loss" and stage["method"] in ("rm", "dpo") else one["key"]
            title = CURVES.get(key, (one["key"],) * 2)
            share = KINDS.get(one["key"]) == "share"

            def text(value, share=share):
                return show(value, "share") if share else show(value)

            names = (both("training"), both("held_out"))
            svg = charts.curve(one["train"], one["held_out"], colour(stage["method"]), title, names, text, share)
            drawn.append({"title": pair(title), "svg": Markup(svg)})
        return drawn

    def when(self, created: str | None) -> str:
        """A time as people read it; what is no time stays as it is."""
        match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d)?(\.\d+)?(Z|\+00:00)", created or "")
        return f"{match[1]} {match[2]} UTC" if match else created or NOTHING

    def took(self, stage: dict) -> Markup:
        return pair(show_seconds(stage["seconds"]))

    def turned(self, stage: dict) -> Markup | None:
        """Say where the held-out loss was lowest, if it rose again."""
        points = next((one["held_out"] for one in stage["curves"] if one["key"] == "loss"), [])
        if len(points) < 3:
            return None
        lowest, last = min(points, key=lambda point: point["value"]), points[-1]
        if last["value"] < 1.005 * lowest["value"]:
            return None
        return t("turned", step=f"{lowest['step']:,}", low=show(lowest["value"]), last=show(last["value"]))

    # -- checks, data, cost, commands --

    def check_names(self) -> list[str]:
        """All the checks that any stage made, the known ones in their order."""
        made = dict.fromkeys(name for stage in self.stages for name in stage["checks"])
        return [name for name in CHECKS if name in made] + [name for name in made if name not in CHECKS]

    def ledgers(self) -> list[dict]:
        """The account of rows of every stage and split."""
        rows = []
        for stage in self.stages:
            for split, ledger in stage["data"].items():
                if ledger:
                    whole = ledger["read"] or 1
                    lost = sum(ledger["dropped"].values())
                    kept = (ledger["used"] or 0) / whole
                    drawn = Markup(charts.bar([(kept, "used"), (lost / whole, "dropped")]))
                    first = not rows or rows[-1]["stage"] is not stage
                    rows.append({"stage": stage, "split": split, **ledger, "lost": lost, "bar": drawn, "first": first})
        return rows

    def costs(self) -> list[dict]:
        """Memory and time of every stage, as numbers and on common scales."""
        bytes_of = [stage["memory"] for stage in self.stages]
        highest = max([value for memory in bytes_of for value in memory.values() if value] or [1])
        slowest = max([stage["seconds"] or 0 for stage in self.stages]) or 1
        rows = []
        for stage, memory in zip(self.stages, bytes_of, strict=True):
            predicted, measured = memory["predicted_bytes"] or None, memory["measured_bytes"] or None
            spent = stage["eval"]["seconds"] if stage["eval"] else None
            rows.append(
                {
                    "stage": stage,
                    "predicted": show_bytes(predicted),
                    "measured": show_bytes(measured),
                    "memory": Markup(charts.dumbbell(predicted, measured, highest)),
                    "seconds": pair(show_seconds(stage["seconds"])),
                    "bar": Markup(charts.bar([((stage["seconds"] or 0) / slowest, "time")])),
                    "measuring": t("measuring", time=show_seconds(spent)) if spent else None,
                }
            )
        return rows

    def on_cpu(self) -> bool:
        return any(stage["hardware"].get("device") == "cpu" for stage in self.stages)

    def versions(self) -> dict:
        """{"same": {name: version} of all stages, "differ": {name: {version: [stages]}}}."""
        found: dict[str, dict] = {}
        for stage in self.stages:
            for name, version in stage["versions"].items():
                found.setdefault(name, {}).setdefault(str(version), []).append(stage["label"])
        same = {name: next(iter(versions)) for name, versions in found.items() if len(versions) == 1}
        return {"same": same, "differ": {name: found[name] for name in found if name not in same}}

    def missing(self) -> list[dict]:
        """Stages, and base models that they came from, that were not measured."""
        bases = [root for root in self.facts["roots"] if root["kind"] == "base"]
        return [place for place in [*bases, *self.stages] if not place["eval"] or place["eval"]["stale"]]

    def warnings(self) -> list[Markup]:
        return [t(**warning) for warning in self.facts["warnings"]]

    colour = staticmethod(colour)


def own_title(metric: str) -> tuple[str, str]:
    return OWN.get(metric, (metric, metric))


def _own_only(stage):
    """What a stage measured of itself without an interval: the first of it, as a remark."""
    for measure in stage["own"]:
        if measure["metric"] != "loss" and measure["before"] and "low" not in measure["after"]:
            ends = {end: show(measure[end]["value"]) for end in ("before", "after")}
            return [t("own_only", measure=own_title(measure["metric"]), **ends)]
    return []


def words_of(command: str) -> list[str]:
    """A command cut before each flag, so that a flag stays with its value where the line breaks."""
    return [word + " " for word in re.split(r" (?=--)", command)]


def _own_row(measure):
    kind = "share" if KINDS.get(measure["metric"]) == "share" else "number"
    ends = {}
    for end in ("before", "after"):
        one = measure[end]
        bounds = [show(one[bound], kind) for bound in ("low", "high") if bound in one] if one else []
        ends[end] = {"value": show(one["value"], kind) if one else NOTHING, "bounds": bounds}
    return {"title": own_title(measure["metric"]), **ends, "n": measure["n"]}


def _number(metric, one):
    kind = KINDS.get(metric, "number")
    values = [one.get(key) if isinstance(one, dict) else None for key in ("value", "low", "high", "n")]
    shown = [show(value, kind) if isinstance(value, (int, float)) else NOTHING for value in values[:3]]
    title = MEASURES[metric][0] if metric in MEASURES else (metric, metric)
    return {
        "title": title,
        "value": shown[0],
        "bounds": [text for text in shown[1:] if text != NOTHING],
        "n": values[3],
    }
