"""The data doctor: what is to be known about the rows of a stage before it trains on them. Nothing is trained.

`examine` looks at every row once, in several processes, and reduces it to a few numbers (`Facts`); collectors, one for
each section of the report, add them up. So memory grows by a few KB a row however long rows are (most of it what
finding duplicates takes), and rows may lie on disk.
"""

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from stagekit.contamination import Evaluations, Overlap
from stagekit.duplicates import NEAR, Repeats, Signature, digest, readable, sign
from stagekit.encoding import map_chunks
from stagekit.fitting import UNLIMITED, Fit
from stagekit.ledger import REFUSED, Ledger
from stagekit.pair_metrics import mean_interval, wilson_interval
from stagekit.personal_data import find_personal_data
from stagekit.records import Preference, Ranking, RowError
from stagekit.rows import Rows
from stagekit.seen_prompts import prompt_hash
from stagekit.texts import language_of, messages_of, texts_of

FORMAT = 1  # of what examine returns and --json writes; raise it when a key changes its meaning
NUM_SHOWN = 10  # rows named of each kind
MAX_FOUND = 1000  # personal data listed in the result
SENTENCE = 5  # words from which an answer has a language: "B" and "mL/h" have none
BOOK = 100_000  # tokens or characters from which one document of a .txt file may be several
LANGUAGES = ("zh", "en", "mixed", "other")


@dataclass(slots=True)
class Facts:
    """What is kept of one row while it is added up.

    Attributes:
        chars: characters of all its texts.
        prompt: seen_prompts.prompt_hash.
        digest, signature: of duplicates, over prompt and answers.
        language: see texts.language_of; switched: the answers are in the other of Chinese and English than the prompt.
        roles: messages by role.
        turns: messages of the user.
        tools: the row offers tools.
        reference: it has an answer (only a prompt may have none).
        pairs: for each pair of answers, the lengths of the better and of the worse one, and whether they are the same.
        personal: (kind, masked value) of what is likely to be personal, each once.
        runs: see contamination.Evaluations.known_runs.
        fits: without a limit, then at each limit; none without a tokenizer, or where the template refuses the row.
        refusal: why the chat template refuses it, or "".
    """

    chars: int
    prompt: int
    digest: bytes
    signature: Signature
    language: str
    switched: bool
    roles: Counter
    turns: int
    tools: bool
    reference: bool
    pairs: list[tuple[int, int, bool]]
    personal: list[tuple[str, str]]
    runs: list[str]
    fits: list[Fit] = field(default_factory=list)
    refusal: str = ""


def examine(
    rows: Rows,
    ledger: Ledger,
    stage: str,
    fit: Callable | None,
    count_tokens: Callable[[str], int],
    limits: list[int],
    evaluations: Evaluations | None = None,
    threshold: float = NEAR,
    num_workers: int | None = None,
) -> tuple[dict, list[tuple[int, str]]]:
    """Look at all rows of a stage.

    Args:
        rows: of reading.load_rows.
        ledger: their ledger.Ledger; what the stage would use and drop at the first limit is filled in.
        stage: "pt", "sft", "rm", "dpo", "orpo", "ppo" or "grpo".
        fit: what fitting.make_fitter returned, or None to count characters instead of tokens.
        count_tokens: length of an answer's text, in tokens or in characters.
        limits: in tokens; the first one is what the stage is meant to be run with.
        evaluations: what contamination.read_evaluations returned, or None.
        threshold: least similarity of near duplicates.
        num_workers: see encoding.map_chunks.

    Returns:
        (findings, refused): a dict for JSON with the keys that the docstring of tools/check_data.py explains; and the
        rows that the chat template refuses, as (index, why).
    """
    limits = limits if fit else []

    def look(part):
        return [facts_of(row.record, fit, limits, count_tokens, evaluations) for row in part]

    refused = []
    collectors = {
        "lengths": Lengths(),
        "limits": Limits(limits, ledger, rows),
        "duplicates": Duplicates(threshold),
        "overlap": Overlaps(evaluations) if evaluations else None,
        "languages": Languages(),
        "conversations": Conversations(),
        "pairs": Pairs() if stage in ("rm", "dpo", "orpo") else None,
        "personal_data": Personal(),
    }
    with tqdm(total=len(rows), desc="examining", unit="row", mininterval=0.5) as progress:
        for start, found in map_chunks(rows, look, num_workers):
            for index, facts in enumerate(found, start):
                if facts.refusal:
                    refused.append((index, facts.refusal))
                for collector in filter(None, collectors.values()):
                    collector.add(index, facts)
            progress.update(len(found))

    def name(index):
        return rows[index].origin

    result = {key: collector.result(name) if collector else None for key, collector in collectors.items()}
    return {"unit": "tokens" if fit else "characters", "ledger": ledger.to_dict(), **result}, refused


# -- one row ---------------------------------------------------------------------------------------------------------


def facts_of(record, fit, limits: list[int], count_tokens, evaluations: Evaluations | None) -> Facts:
    """Reduce a record to its Facts; arguments as in `examine`."""
    texts, messages = texts_of(record), messages_of(record)
    whole = "\n".join(texts)
    asked, answered = (
        language_of([message["content"] for message in messages if message["role"] == role], least)
        for role, least in (("user", 1), ("assistant", SENTENCE))
    )
    facts = Facts(
        chars=sum(map(len, texts)),
        prompt=prompt_hash(record),
        digest=digest(whole),
        signature=sign(whole),
        language=language_of(texts),
        switched={asked, answered} == {"zh", "en"},
        roles=Counter(message["role"] for message in messages),
        turns=sum(message["role"] == "user" for message in messages),
        tools=bool(getattr(record, "tools", None)),
        reference=not hasattr(record, "reference") or bool(record.reference.strip()),
        pairs=[_compare(pair, count_tokens) for pair in _pairs_of(record)],
        personal=list(dict.fromkeys((item.kind, item.masked) for text in texts for item in find_personal_data(text))),
        runs=evaluations.known_runs(texts) if evaluations else [],
    )
    if fit:
        try:
            facts.fits = _fits(fit, record, limits)
        except RowError as error:
            facts.refusal = str(error)
    return facts


def _fits(fit, record, limits):
    whole = fit(record, UNLIMITED)
    return [whole, *(whole if whole.longest <= limit else fit(record, limit) for limit in limits)]


def _pairs_of(record):
    if isinstance(record, Ranking):
        return record.pairs()
    return [record] if isinstance(record, Preference) else []


def _compare(pair, count_tokens):
    chosen, rejected = (
        sum(count_tokens(message["content"]) for message in answer if message["role"] == "assistant")
        for answer in (pair.chosen, pair.rejected)
    )
    return chosen, rejected, pair.chosen == pair.rejected


# -- sections --------------------------------------------------------------------------------------------------------
# Each has add(index, facts), and result(name) with a function from a row's index to "file:line".


class Lengths:
    """How long rows are: in tokens of their longest sample, else in characters."""

    def __init__(self):
        self.values = array("q")

    def add(self, index: int, facts: Facts) -> None:
        length = facts.fits[0].longest if facts.fits else 0 if facts.refusal else facts.chars
        if length:
            self.values.append(length)

    def result(self, name) -> dict:
        values = np.array(self.values, dtype=np.int64)
        if not len(values):
            return {"rows": 0, "bins": []}
        quantiles = {f"p{share}": int(np.percentile(values, share, method="higher")) for share in (50, 90, 99)}
        ends = {"min": int(values.min()), "max": int(values.max()), "mean": round(float(values.mean()), 1)}
        return {"rows": len(values), **ends, **quantiles, "bins": histogram(values)}


def histogram(values: np.ndarray) -> list[dict]:
    """Count lengths between the usual limits and half-way between them: …, 256, 384, 512, 768, 1024, …

    Args:
        values: (rows,), at least one, all positive.

    Returns:
        [{"from", "to", "rows"}], both ends included, from the shortest to the longest.
    """
    edges, power = [1], 16
    while edges[-1] <= values.max():
        edges += [power, power * 3 // 2]
        power *= 2
    counts, _ = np.histogram(values, bins=edges)
    bins = [
        {"from": low, "to": high - 1, "rows": int(rows)}
        for low, high, rows in zip(edges, edges[1:], counts, strict=False)
    ]
    filled = [place for place, item in enumerate(bins) if item["rows"]]
    return bins[filled[0] : filled[-1] + 1]


class Limits:
    """What the stage would make of the rows at each length limit; at the first one the ledger is filled in."""

    def __init__(self, limits: list[int], ledger: Ledger, rows: Rows):
        self.limits, self.ledger, self.rows = limits, ledger, rows
        self.counts = [Counter() for _ in limits]
        self.dropped = [Counter() for _ in limits]
        self.trained = 0

    def add(self, index: int, facts: Facts) -> None:
        if facts.refusal:
            self.rows.drop([self.rows.indices[index]], REFUSED)
        if facts.refusal or not facts.fits:
            return
        whole, *fits = facts.fits
        self.trained += whole.trained
        for count, dropped, fit in zip(self.counts, self.dropped, fits, strict=True):
            count.update(samples=fit.samples, tokens=fit.tokens, trained=fit.trained, truncated=fit.truncated)
            count.update(lost=fit.lost, learnt=fit.learnt, rows_truncated=bool(fit.truncated))
            count.update(rows_split=fit.samples > whole.samples, rows_shortened=fit.shortened)
            dropped.update([fit.dropped] if fit.dropped else [])
        if fits[0].dropped:
            self.rows.drop([self.rows.indices[index]], fits[0].dropped)

    def result(self, name) -> list[dict]:
        if self.limits:
            count, ledger = self.counts[0], self.ledger
            ledger.samples, ledger.truncated = count["samples"], count["truncated"]
            ledger.tokens.update(used=count["tokens"], trained=count["trained"])
            turns = {"trained": count["learnt"], "dropped": count["lost"]}
            turns["truncated"] = count["truncated"] if count["learnt"] else 0
            ledger.turns.update({kind: number for kind, number in turns.items() if number})
        self.rows.settle(self.ledger)
        return [
            {
                "max_length": limit,
                "samples": count["samples"],
                "tokens": count["tokens"],
                "rows_truncated": count["rows_truncated"],
                "rows_split": count["rows_split"],
                "rows_shortened": count["rows_shortened"],
                "rows_dropped": dropped.total(),
                "dropped": dict(dropped),
                "answers_lost": count["lost"],
                "learnt_tokens_lost": max(0, self.trained - count["trained"]),
                "learnt_tokens_lost_percentage": percentage(max(0, self.trained - count["trained"]), self.trained),
            }
            for limit, count, dropped in zip(self.limits, self.counts, self.dropped, strict=True)
        ]


class Duplicates:
    """Rows that repeat an earlier one: prompt and answer exactly, nearly, or the prompt with another answer."""

    def __init__(self, threshold: float):
        self.repeats, self.prompts = Repeats(threshold), {}
        self.kinds = {"exact": [], "near": [], "same_prompt": []}  # (row, earlier row), the first of them
        self.counts = Counter()

    def add(self, index: int, facts: Facts) -> None:
        found = self.repeats.find(facts.digest, facts.signature)
        earlier = self.prompts.setdefault(facts.prompt, index)
        if found:
            self._note("exact" if found[1] else "near", index, found[0])
        elif earlier != index:
            self._note("same_prompt", index, earlier)

    def _note(self, kind, index, earlier):
        self.counts[kind] += 1
        if len(self.kinds[kind]) < NUM_SHOWN:
            self.kinds[kind].append((index, earlier))

    def result(self, name) -> dict:
        found = {
            kind: {"rows": self.counts[kind], "first": [[name(index), name(earlier)] for index, earlier in examples]}
            for kind, examples in self.kinds.items()
        }
        return {"threshold": self.repeats.threshold, **found}


class Overlaps:
    """What rows share with evaluation data."""

    def __init__(self, evaluations: Evaluations):
        self.evaluations, self.overlap = evaluations, Overlap(evaluations)

    def add(self, index: int, facts: Facts) -> None:
        self.overlap.add(index, facts.prompt, facts.runs)

    def result(self, name) -> dict:
        overlap, known = self.overlap, self.evaluations
        seen = len(overlap.seen())
        most = sorted(overlap.shared.items(), key=lambda item: -item[1].share)[:NUM_SHOWN]
        return {
            "against": known.files,
            "against_rows": len(known.origins),
            "against_unreadable": len(known.rejected),
            "against_rows_seen": seen,
            "against_rows_seen_percentage": percentage(seen, len(known.origins)),
            "same_prompt": {
                "rows": len({index for index, _ in overlap.same}),
                "first": [[name(index), known.origins[row]] for index, row in overlap.same[:NUM_SHOWN]],
            },
            "shared_run": {
                "rows": overlap.rows_sharing,
                "against_rows": len(overlap.shared),
                "most": [
                    [name(best.index), known.origins[row], round(best.share, 4), readable(best.run)]
                    for row, best in most
                ],
            },
        }


class Languages:
    """Rows by language, and rows whose answer is in another one than the question."""

    def __init__(self):
        self.counts, self.switched, self.first = Counter(), 0, []

    def add(self, index: int, facts: Facts) -> None:
        self.counts[facts.language] += 1
        if facts.switched:
            self.switched += 1
            self.first += [index] if len(self.first) < NUM_SHOWN else []

    def result(self, name) -> dict:
        switched = {"rows": self.switched, "first": [name(index) for index in self.first]}
        return {**{language: self.counts[language] for language in LANGUAGES}, "switched": switched}


class Conversations:
    """Messages by role, rows by the number of the user's turns, rows with tools and with a system prompt."""

    def __init__(self):
        self.roles, self.turns, self.counts = Counter(), Counter(), Counter()

    def add(self, index: int, facts: Facts) -> None:
        self.roles.update(facts.roles)
        self.turns[facts.turns] += 1
        self.counts.update(tools=facts.tools, system=bool(facts.roles["system"]), no_reference=not facts.reference)

    def result(self, name) -> dict:
        return {
            "roles": dict(sorted(self.roles.items())),
            "rows_by_turns": {str(number): rows for number, rows in sorted(self.turns.items())},
            "rows_with_tools": self.counts["tools"],
            "rows_with_system": self.counts["system"],
            "rows_without_reference": self.counts["no_reference"],
        }


class Pairs:
    """Pairs of the same two answers, and what length has to do with being the better one.

    The pairs of a ranking share the weight of one row. Pairs of identical answers are not measured.
    """

    def __init__(self):
        self.count, self.identical, self.first = 0, 0, []
        self.longer, self.difference = array("d"), array("d")  # one number a row

    def add(self, index: int, facts: Facts) -> None:
        different = [(chosen, rejected) for chosen, rejected, same in facts.pairs if not same]
        self.count += len(facts.pairs)
        if len(different) < len(facts.pairs):
            self.identical += len(facts.pairs) - len(different)
            self.first += [index] if len(self.first) < NUM_SHOWN else []
        if different:
            longer = sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in different)
            self.longer.append(longer / len(different))
            self.difference.append(sum(chosen - rejected for chosen, rejected in different) / len(different))

    def result(self, name) -> dict:
        found = {"pairs": self.count, "identical": {"pairs": self.identical, "first": list(map(name, self.first))}}
        if not self.longer:
            return {**found, "chosen_is_longer": None, "difference": None}
        rows = len(self.longer)
        share, (low, high) = sum(self.longer) / rows, wilson_interval(sum(self.longer), rows)
        mean, below, above = mean_interval(np.array(self.difference))
        return {
            **found,
            "chosen_is_longer": {"share": share, "low": low, "high": high},
            "difference": {"mean": mean, "low": below, "high": above},
        }


class Personal:
    """What is likely to be personal data, by kind and by row; what a row holds several times counts once."""

    def __init__(self):
        self.kinds, self.rows, self.found = Counter(), 0, []

    def add(self, index: int, facts: Facts) -> None:
        self.rows += bool(facts.personal)
        self.kinds.update(kind for kind, _ in facts.personal)
        room = MAX_FOUND - len(self.found)
        self.found += [(index, kind, masked) for kind, masked in facts.personal[:room]]

    def result(self, name) -> dict:
        found = [{"origin": name(index), "kind": kind, "masked": masked} for index, kind, masked in self.found]
        return {"count": self.kinds.total(), "rows": self.rows, "kinds": dict(self.kinds), "found": found}


# -- verdict ---------------------------------------------------------------------------------------------------------

LENGTH_BIAS = 0.1  # how far from one half the share of longer better answers may be, in all of its interval
SWITCHED = 1.0  # percent of rows that may answer in another language: some tasks ask to translate


def judge(report: dict) -> list[str]:
    """What is to be looked at in a report, in words; [] where there is nothing to mend.

    Args:
        report: what `examine` returned, and "rejected" and "stage" beside it.
    """
    ledger, duplicates = report["ledger"], report["duplicates"]
    dropped = {reason: count for reason, count in ledger["dropped"].items() if reason != "unreadable"}
    found = [(report["rejected"]["rows"], "rows that cannot be read")]
    found += [(count, f"rows dropped: {reason}") for reason, count in sorted(dropped.items())]
    if report["limits"]:
        first = report["limits"][0]
        at = f"at {first['max_length']:,} tokens"
        found += [(first["rows_truncated"], f"rows that lose their end {at}")]
        found += [(first["answers_lost"], f"answers that do not fit at all {at}")]
    found += [(duplicates["exact"]["rows"], "exact duplicates"), (duplicates["near"]["rows"], "near duplicates")]
    if report["overlap"]:
        found += [(report["overlap"]["against_rows_seen"], "evaluation rows that stand in this data")]
    switched, rows = report["languages"]["switched"]["rows"], ledger["read"]
    found += [(switched * (100 * switched > SWITCHED * rows), "answers in another language than their question")]
    if report["stage"] == "grpo":
        found += [(report["conversations"]["rows_without_reference"], "rows without an answer to compare with")]
    if report["pairs"]:
        found += [(report["pairs"]["identical"]["pairs"], "pairs of identical answers")]
    found += [(report["personal_data"]["count"], "likely personal data")]
    texts = [f"{text} ({count:,})" for count, text in found if count]
    longer = report["pairs"] and report["pairs"]["chosen_is_longer"]
    if longer and (longer["low"] > 0.5 + LENGTH_BIAS or longer["high"] < 0.5 - LENGTH_BIAS):
        texts.append(f"length tells the better answer: it is the longer one in {longer['share']:.0%} of the rows")
    longest = report["lengths"].get("max") or 0
    if report["stage"] == "pt" and longest > BOOK and any(".txt" in file for file in ledger["files"]):
        hint = "where every line is a document, --txt_documents line"
        texts.append(f"a document of {longest:,} {report['unit']} ({hint})")
    return texts


def percentage(part: float, whole: float) -> float:
    """part of whole in percent, 0 of nothing."""
    return round(100 * part / whole, 4) if whole else 0.0
