"""Measure answers against references: BLEU-1..4, ROUGE-1/2/L, exact match, Distinct-1/2, length ratio.

Reads   the output file of inference.py, or any .jsonl, .csv or .tsv file with a prediction and a reference in a row,
        or two files whose rows belong together, such as two .txt files with an answer in a line (also .gz)
Writes  a line for every number: score, 95 % interval, and a signature that says how it was made

    python eval_metrics.py predictions.jsonl
    python eval_metrics.py --predictions answers.txt --references references.txt --tokenization zh-char,zh-word
    python eval_metrics.py --compare outputs/sft.jsonl outputs/dpo.jsonl

Tokenizations. BLEU and ROUGE of Chinese say nothing until it is said what a token is:
    mixed       a Chinese character, sign or full-width form each; everything else by word, as en-word (default).
                The tokens of sacrebleu's `zh`
    mixed-word  as mixed, but Chinese by jieba's words
    zh-char     every character but white space, letters and digits too: 5mg is three. sacrebleu's `char`
    zh-word     jieba's words; English and numbers as jieba cuts them
    en-word     words and punctuation by the rules of mteval-v13a, for text without Chinese. sacrebleu's `13a`
Case and full-width forms are kept unless --lowercase or --nfkc is given; both stand in the signature.

Levels. `corpus` adds the counts of all answers up before dividing (the BLEU that papers on translation report);
`mean` is the average of each answer's own score. Everything but length_ratio is on a scale of 0 to 100.

As a module: score_pairs, compare_pairs and llamafactory_scores take lists of texts. Nothing here imports the project.
"""

import argparse
import csv
import difflib
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import traceback
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import NamedTuple

import numpy as np

VERSION = "1"  # of the definitions: a change that moves any number raises it
TOKENIZATIONS = ("mixed", "mixed-word", "zh-char", "zh-word", "en-word")
USES_JIEBA = ("mixed-word", "zh-word", "llamafactory-word")
SMOOTHINGS = ("none", "method1", "method2", "method3", "exp")
LEVELS = ("corpus", "mean")
PREDICTION_KEYS = ("prediction", "predict")  # inference.py's, and LLaMA-Factory's
REFERENCE_KEYS = ("reference", "label")
CHUNK_SIZE = 256  # pairs that a process counts at once: enough to outweigh sending them there
NAMED_ROWS = 10


# -- command line ----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line and name the nearest known flag."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            nearest = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            self.error(f"unknown {'flag' if unknown[0].startswith('-') else 'argument'} {unknown[0]}{hint}")
        return parsed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="eval_metrics.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    what = parser.add_argument_group("what is measured (one of the first three)")
    what.add_argument(
        "prediction_file", nargs="?", help="file with predictions and references, such as inference.py's"
    )
    what.add_argument("--predictions", help="file with predictions, where the references stand in another")
    what.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two files with answers to the same questions: is B better than A? (paired bootstrap)",
    )
    what.add_argument("--references", help="file with references, row by row beside --predictions")
    what.add_argument("--prediction_column", help="key or column of predictions; default: prediction, else predict")
    what.add_argument("--reference_column", help="key or column of references; default: reference, else label")
    how = parser.add_argument_group("how")
    how.add_argument("--tokenization", help=f"one or more of {', '.join(TOKENIZATIONS)}, with commas; default: mixed")
    how.add_argument(
        "--smoothing",
        choices=SMOOTHINGS,
        help="what BLEU does where no n-gram matches. method1 to method3: nltk's (Chen & Cherry 2014), where an "
        "answer too short for an n-gram has one that misses; exp: sacrebleu's, where it has none. Default: method3",
    )
    how.add_argument(
        "--rouge_ngrams",
        choices=("set", "count"),
        help="set: an n-gram counts once however often it stands there, as in rouge-chinese (default); count: as "
        "often as it is in both, as in Lin 2004 and rouge-score. ROUGE-L is the same",
    )
    how.add_argument("--lowercase", action="store_true", help="fold case before comparing")
    how.add_argument(
        "--nfkc", action="store_true", help="fold full-width and other compatibility forms (Unicode NFKC)"
    )
    how.add_argument(
        "--compatible",
        choices=("llamafactory",),
        help="numbers comparable with those LLaMA-Factory reports: mean BLEU-4 (method3) over characters, white space "
        "included; mean ROUGE F of rouge-chinese over jieba's words; each answer's score rounded to 4 digits",
    )
    how.add_argument("--bootstrap", type=int, default=1000, help="resamples for the intervals, default 1000; 0: none")
    how.add_argument("--seed", type=int, default=42, help="of the resamples, default 42")
    how.add_argument(
        "--check",
        type=int,
        default=20,
        help="pairs that nltk and rouge-chinese compute as well; the run stops where they differ; default 20",
    )
    how.add_argument("--num_workers", type=int, default=usable_cores(), help="processes, default: one a core")
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    out.add_argument("--per_sample", metavar="FILE", help="write every row's own scores to this .jsonl file")
    out.add_argument("--worst", type=int, default=3, help="show that many answers of lowest ROUGE-L, default 3")
    out.add_argument("--debug", action="store_true", help="show tracebacks (also STAGEKIT_DEBUG=1)")
    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args, parser):
    given = [name for name in ("prediction_file", "predictions", "compare") if getattr(args, name)]
    if len(given) != 1:
        parser.error("give one of: a file of predictions and references, --predictions, --compare A B")
    if args.predictions and not args.references:
        parser.error("--predictions needs --references; a file that holds both is given without a flag")
    if args.references and args.compare:
        parser.error("--compare reads predictions and references from the same files; leave --references out")
    if args.per_sample and args.compare:
        parser.error("--per_sample is for one file of predictions, not for --compare")
    inputs = [os.path.abspath(path) for path in (args.prediction_file, args.predictions, args.references) if path]
    if args.per_sample and os.path.abspath(args.per_sample) in inputs:
        parser.error(f"--per_sample {args.per_sample} would replace a file that is read; name another")
    if args.compare and not args.bootstrap:
        parser.error("--compare needs resamples; leave --bootstrap 0 out")
    for name, least in (("bootstrap", 0), ("check", 0), ("worst", 0), ("num_workers", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} must be at least {least}")
    for name in ("tokenization", "smoothing", "rouge_ngrams", "lowercase", "nfkc"):
        if args.compatible and getattr(args, name):
            parser.error(f"--compatible {args.compatible} fixes all definitions; leave --{name} out")
    args.tokenization = [name.strip() for name in (args.tokenization or "mixed").split(",")]
    for name in args.tokenization:
        if name not in TOKENIZATIONS:
            parser.error(f"--tokenization {name!r} is unknown; known: {', '.join(TOKENIZATIONS)}")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(args: argparse.Namespace) -> None:
    """Read and count the pairs, score them, print."""
    if args.compatible:
        ways = [LLAMAFACTORY]
    else:
        smoothing, rouge_ngrams = args.smoothing or "method3", args.rouge_ngrams or "set"
        names = dict.fromkeys(args.tokenization)
        ways = [Settings(name, smoothing, rouge_ngrams, args.lowercase, args.nfkc) for name in names]
    if args.compare:
        measured = [measure_file(path, None, ways, args) for path in args.compare]
        found = compare_files(*measured, ways, args)
        print(json.dumps(found, ensure_ascii=False, indent=2) if args.json else comparison_text(found))
    else:
        measured = measure_file(args.prediction_file or args.predictions, args.references, ways, args)
        found = score_file(measured, ways, args)
        print(json.dumps(found, ensure_ascii=False, indent=2) if args.json else report_text(found))


# -- reading ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A prediction and its reference, with where they stand; the reference is None where there is none."""

    origin: str
    prediction: str
    reference: str | None
    index: object = None
    finish_reason: str | None = None


def read_rows(
    path: str, references: str | None = None, prediction_column: str | None = None, reference_column: str | None = None
) -> Iterator[Row]:
    """Read predictions with their references, one at a time.

    Args:
        path: .jsonl, .csv or .tsv with both in a row; with `references` also any other file, an answer a line.
        references: file whose rows stand beside those of `path`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row that cannot be read, as file:line; or the two files differ in length.
    """
    keys = (prediction_column,) if prediction_column else PREDICTION_KEYS
    reference_keys = (reference_column,) if reference_column else REFERENCE_KEYS
    if references is None:
        for origin, record in read_records(path):
            if isinstance(record, str):
                raise ValueError(f"{path} holds one text a line; name the other file: --predictions, --references")
            prediction = pick(record, keys, origin, "--prediction_column")
            reference = pick(record, reference_keys, origin, "--reference_column", optional=True)
            yield Row(origin, prediction, reference, record.get("index"), record.get("finish_reason"))
        return
    ended = object()
    pairs = itertools.zip_longest(read_records(path), read_records(references), fillvalue=ended)
    for number, (left, right) in enumerate(pairs):
        if left is ended or right is ended:
            longer, shorter = (references, path) if left is ended else (path, references)
            raise ValueError(f"{shorter} ends after {number} rows and {longer} goes on; rows must belong together")
        prediction = pick(left[1], keys, left[0], "--prediction_column")
        reference = pick(right[1], (*reference_keys, *keys), right[0], "--reference_column", optional=True)
        yield Row(left[0], prediction, reference, number)


def read_records(path: str) -> Iterator[tuple[str, dict | str]]:
    """Yield ("file:line", record): a dict of a .jsonl, .csv or .tsv file, a string of any other."""
    name = path.removesuffix(".gz")
    with (gzip.open if name != path else open)(path, "rb") as file:
        if name.endswith((".csv", ".tsv")):
            yield from _read_table(path, file, "\t" if name.endswith(".tsv") else ",")
            return
        for line, text in enumerate(_decoded(path, file), 1):
            if not name.endswith((".jsonl", ".json")):
                yield f"{path}:{line}", text.rstrip("\r\n")
            elif text.strip():
                yield f"{path}:{line}", _parsed(text, f"{path}:{line}")


def _decoded(path, file):
    for line, raw in enumerate(file, 1):
        try:
            yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason})") from None


def _parsed(text, origin):
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{origin}: no JSON ({error}); expected one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{origin}: expected one JSON object a line, got {type(record).__name__}")
    return record


def _read_table(path, file, delimiter):
    reader = csv.reader(_decoded(path, file), delimiter=delimiter, strict=True)
    header = None
    try:
        for fields in reader:
            origin = f"{path}:{reader.line_num}"
            if header is None:
                header = fields
            elif fields and len(fields) != len(header):
                raise ValueError(f"{origin}: {len(fields)} fields, and the header has {len(header)}")
            elif fields:
                yield origin, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None


def pick(record: dict | str, keys: tuple[str, ...], origin: str, flag: str, optional: bool = False) -> str | None:
    """Return the text under the first of the keys that a record has; a record that is a text is that text.

    Raises:
        ValueError: none of the keys is there (unless optional), or what stands there is no string.
    """
    if isinstance(record, str):
        return record
    key = next((key for key in keys if key in record), None)
    value = None if key is None else record[key]
    if value is None and optional:
        return None
    if key is None:
        raise ValueError(f"{origin}: no {' or '.join(keys)}; there is {', '.join(record)}: name one with {flag}")
    if not isinstance(value, str):
        raise ValueError(f"{origin}: {key!r} must be a string, got {json.dumps(value, ensure_ascii=False)[:60]}")
    return value


# -- tokens ----------------------------------------------------------------------------------------------------------

# What sacrebleu's `zh` takes for a token by itself: ideographs, full-width forms, and the signs of U+2001-2A6D, where
# Chinese quotation marks, dashes, units and arrows stand; here without white space, and with the ideographs from
# U+20000 on, which it leaves with their neighbours.
_SINGLE = (
    "\u200b-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2a6d\u2e80-\u2fdf\u2ff0-\u2fff\u3001-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u4db5\u4e00-\u9fbb"
    "\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
)
_RUNS = re.compile(f"([^{_SINGLE}]+)")
# mteval-v13a: ASCII punctuation is a token by itself; . and , are unless between two digits; - is after a digit.
_PUNCTUATION = re.compile(r"([!-&(-+/:-@\[-`{-~])")
_STOP_AFTER_TEXT = re.compile(r"([^0-9])([.,])")
_STOP_BEFORE_TEXT = re.compile(r"([.,])([^0-9])")
_DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def tokenize(text: str, tokenization: str = "mixed", lowercase: bool = False, nfkc: bool = False) -> list[str]:
    """Split a text into tokens; the module's docstring says what each tokenization takes for one.

    Raises:
        ValueError: no such tokenization.
    """
    text = unicodedata.normalize("NFKC", text) if nfkc else text
    text = text.lower() if lowercase else text
    if tokenization == "mixed":
        return _split_by_script(text, list)
    if tokenization == "mixed-word":
        return _split_by_script(text, cut_words)
    if tokenization == "zh-char":
        return list("".join(text.split()))
    if tokenization == "zh-word":
        return [word for word in cut_words(text) if not word.isspace()]
    if tokenization == "en-word":
        text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
        for entity, character in _ENTITIES if "&" in text else ():
            text = text.replace(entity, character)
        return _words(f" {text} ")
    if tokenization == "llamafactory-char":
        return list(text)
    if tokenization == "llamafactory-word":
        return _words_of_rouge_chinese(" ".join(cut_words(text)))
    raise ValueError(f"tokenization {tokenization!r} is unknown; known: {', '.join(TOKENIZATIONS)}")


def _words(text):
    text = _PUNCTUATION.sub(r" \1 ", text)
    if "." in text or "," in text:
        text = _STOP_BEFORE_TEXT.sub(r" \1 \2", _STOP_AFTER_TEXT.sub(r"\1 \2 ", text))
    return (_DASH_AFTER_DIGIT.sub(r"\1 \2 ", text) if "-" in text else text).split()


def _split_by_script(text, cut):
    """Chinese by `cut`, everything between by word; a . or , beside Chinese stands beside a space."""
    tokens, parts = [], _RUNS.split(text.strip())
    for place in range(0, len(parts), 2):
        tokens.extend(cut(parts[place]))
        if place + 1 < len(parts):
            before, after = bool(parts[place]), bool(parts[place + 2])
            tokens.extend(_words(" " * before + parts[place + 1] + " " * after))
    return tokens


# jieba cuts every run of these characters by itself, and what stands between them into single characters.
_JIEBA_RUNS = re.compile(r"([\u4e00-\u9fd5a-zA-Z0-9+#&._%\-]+)")


def cut_words(text: str) -> list[str]:
    """Cut a text into the words of `jieba.lcut(text)`, white space included, in half of its time."""
    words = []
    for place, part in enumerate(_JIEBA_RUNS.split(text)):
        if place % 2:
            _cut_run(part, words)
        elif part:
            words.extend(part if len(part) == 1 else load_jieba().lcut(part))
    return words


def _cut_run(run, words):
    """Append the words of the likeliest path through jieba's dictionary; single characters in a row go to its HMM.

    The weight of a path is the sum of the logarithms of its words' frequencies, from the end of the run; of equal ones
    the longer word is taken.
    """
    jieba, length = load_jieba(), len(run)
    frequency_of, log, log_total = jieba.dt.FREQ.get, math.log, math.log(jieba.dt.total)
    weights, ends = [0.0] * (length + 1), [0] * length
    for start in range(length - 1, -1, -1):
        end = start + 1
        frequency = frequency_of(run[start])
        best, best_end = log(frequency or 1) - log_total + weights[end], end
        while frequency is not None and end < length:  # None: no word begins like this
            end += 1
            frequency = frequency_of(run[start:end])
            if frequency:
                weight = log(frequency) - log_total + weights[end]
                if weight >= best:
                    best, best_end = weight, end
        weights[start], ends[start] = best, best_end
    start = single = 0
    while start < length:
        end = ends[start]
        if end - start > 1:
            words.extend(_cut_singles(run[single:start]))
            words.append(run[start:end])
            single = end
        start = end
    words.extend(_cut_singles(run[single:]))


@functools.lru_cache(2**16)
def _cut_singles(text):
    jieba = load_jieba()
    if len(text) < 2 or jieba.dt.FREQ.get(text):
        return tuple(text)
    return tuple(jieba.finalseg.cut(text))


@functools.cache
def load_jieba():
    """Import jieba and load its dictionary."""
    import jieba

    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
    return jieba


def _words_of_rouge_chinese(text):
    """What rouge-chinese makes of a text of words: a blank between two sentence ends or line ends is an empty word."""
    from rouge_chinese import Rouge

    sentences = [" ".join(sentence.split()) for sentence in Rouge().cut_sent(text) if sentence]
    words = [word for sentence in sentences for word in sentence.split(" ")]
    return words if any(words) else []


# -- counts of a pair ------------------------------------------------------------------------------------------------

# Everything below follows from these numbers of each pair, so texts are read once and need not stay in memory.
# match: n-grams in both, each as often as in both; shared, types: the same of distinct n-grams.
COUNTS = (
    *("match1", "match2", "match3", "match4", "length", "reference_length", "shared1", "types1", "reference_types1"),
    *("shared2", "types2", "reference_types2", "lcs", "exact"),
)
_PLACE = {name: place for place, name in enumerate(COUNTS)}


def count_pair(prediction: list[str], reference: list[str]) -> dict[str, int]:
    """Count what a prediction and its reference share.

    Args:
        prediction: tokens.
        reference: tokens.

    Returns:
        What COUNTS names, all but `exact`.
    """
    found = {"length": len(prediction), "reference_length": len(reference), "match3": 0, "match4": 0}
    shared = {None}
    for n in range(1, 5):
        if n > 2 and not shared:
            break
        ours, theirs = ngrams(prediction, n), ngrams(reference, n)
        types, reference_types = set(ours), set(theirs)
        shared = types & reference_types
        found[f"match{n}"] = len(shared)
        if len(types) < len(ours) and len(reference_types) < len(theirs):  # else each is in both at most once
            times, reference_times = Counter(ours), Counter(theirs)
            found[f"match{n}"] = sum(min(times[gram], reference_times[gram]) for gram in shared)
        if n < 3:
            found[f"shared{n}"], found[f"types{n}"] = len(shared), len(types)
            found[f"reference_types{n}"] = len(reference_types)
    found["lcs"] = longest_common_subsequence(prediction, reference)
    return found


def ngrams(tokens: list[str], n: int) -> list:
    """All n-grams of a text, in order; of n = 1 the tokens themselves."""
    return tokens if n == 1 else list(zip(*(tokens[start:] for start in range(n)), strict=False))


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence, a row of the table at a time as bits of one integer.

    Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    places = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    everywhere = (1 << len(first)) - 1
    row = everywhere  # a 0 is a place where the length grows by one
    for token in second:
        if token in places:
            hits = row & places[token]
            row = (row + hits | row - hits) & everywhere
    return len(first) - row.bit_count()


# -- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """All that decides a number, but for its level; what the signature says."""

    tokenization: str = "mixed"
    smoothing: str = "method3"
    rouge_ngrams: str = "set"
    lowercase: bool = False
    nfkc: bool = False

    def tokenizations(self) -> tuple[str, ...]:
        """The tokenizations whose counts the scores need."""
        return ("llamafactory-char", "llamafactory-word") if self is LLAMAFACTORY else (self.tokenization,)

    def signature(self, metric: str, level: str) -> str:
        """Name everything that decides a number of this metric; what is off is not named."""
        jieba = self.tokenizations()[-1] in USES_JIEBA and metric not in ("exact_match", "bleu-4")
        if self is LLAMAFACTORY:
            how = ["char", "smooth:method3"] if metric == "bleu-4" else ["zh-word", "ngrams:set", "f1"]
            how = ["llamafactory", *how, "round:4"]
        else:
            how = [self.tokenization, *["lower"] * self.lowercase, *["nfkc"] * self.nfkc]
            how += [f"smooth:{self.smoothing}"] * metric.startswith("bleu")
            how += [f"ngrams:{self.rouge_ngrams}"] * (metric in ("rouge1", "rouge2"))
            how += ["f1"] * metric.startswith("rouge")
            how = ["strip", *how[1:]] if metric == "exact_match" else how
        return "|".join([metric, *how, level, *[f"jieba:{metadata.version('jieba')}"] * jieba, f"v{VERSION}"])


LLAMAFACTORY = Settings("llamafactory")
METRICS = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge1", "rouge2", "rougeL")
_MEANS = (*METRICS, "exact_match", "distinct1", "distinct2")
_NUM_BLEU, _NUM_ROUGE = 10, 9


def bleu_terms(counts: np.ndarray, smoothing: str) -> np.ndarray:
    """What BLEU adds up over answers before it divides.

    Args:
        counts: (num_pairs, len(COUNTS)).
        smoothing: with "exp", an answer shorter than n tokens has no n-grams, as in Papineni et al. 2002 and
            sacrebleu; else it has one, as in nltk.

    Returns:
        (num_pairs, 10): matches for n = 1..4, n-grams of the prediction for n = 1..4, the two lengths.
    """
    length = counts[:, _PLACE["length"], None]
    totals = np.maximum(length - np.arange(4), 0 if smoothing == "exp" else 1)
    return np.hstack([counts[:, :4], totals, counts[:, 4:6]]).astype(float)


def bleu(terms: np.ndarray, smoothing: str) -> np.ndarray:
    """Compute BLEU-1..4 with uniform weights, Eq. of section 2.3 of Papineni et al. 2002, times 100.

    Smoothing is Chen & Cherry 2014: method1 counts 0.1 for no match, method2 adds one to both sides for n > 1, method3
    (and exp) counts 1/2, 1/4, … for the first, second, … n without a match. No matching token at all scores 0.

    Args:
        terms: (..., 10) of bleu_terms: of one answer, or added up over a corpus.

    Returns:
        (..., 4).
    """
    matches, totals, length, reference_length = terms[..., :4], terms[..., 4:8], terms[..., 8], terms[..., 9]
    missed = matches == 0
    if smoothing == "method1":
        matches = np.where(missed, 0.1, matches)
    elif smoothing == "method2":
        added = np.array([0, 1, 1, 1])
        matches, totals = matches + added, totals + added
    elif smoothing in ("method3", "exp"):
        matches = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), matches)
    elif smoothing != "none":
        raise ValueError(f"smoothing {smoothing!r} is unknown; known: {', '.join(SMOOTHINGS)}")
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(totals > 0, np.log(matches / totals), -np.inf)
        penalty = np.where(length > 0, np.minimum(1 - reference_length / length, 0), -np.inf)
    scores = np.exp(penalty[..., None] + np.cumsum(logs, axis=-1) / np.arange(1, 5))
    return 100 * np.where(missed[..., :1], 0.0, scores)


def rouge_terms(counts: np.ndarray, rouge_ngrams: str) -> np.ndarray:
    """What ROUGE-1, ROUGE-2 and ROUGE-L need: (num_pairs, 9), thrice overlap, size of prediction, of reference."""
    if rouge_ngrams == "set":
        pieces = counts[:, _PLACE["shared1"] : _PLACE["lcs"]]
    elif rouge_ngrams == "count":
        unigrams, bigrams = counts[:, [0, 4, 5]], counts[:, [1, 4, 5]]
        pieces = np.hstack([unigrams, np.maximum(bigrams - [0, 1, 1], 0)])
    else:
        raise ValueError(f"rouge_ngrams {rouge_ngrams!r} is unknown; known: set, count")
    return np.hstack([pieces, counts[:, [_PLACE["lcs"], 4, 5]]]).astype(float)


def rouge(terms: np.ndarray, rouge_ngrams: str) -> np.ndarray:
    """Compute F1 of ROUGE-1, ROUGE-2 (n-grams) and ROUGE-L (longest common subsequence of the whole text), times 100.

    Lin 2004 with beta = 1: 2PR / (P + R). With "set" the divisor is P + R + 1e-8, as in rouge-chinese, so that equal
    texts score 99.9999995.

    Args:
        terms: (..., 9) of rouge_terms: of one answer, or added up over a corpus.

    Returns:
        (..., 3).
    """
    terms = terms.reshape(*terms.shape[:-1], 3, 3)
    overlap, ours, theirs = terms[..., 0], np.maximum(terms[..., 1], 1), np.maximum(terms[..., 2], 1)
    precision, recall = overlap / ours, overlap / theirs
    divisor = precision + recall + (1e-8 if rouge_ngrams == "set" else 0)
    return 100 * 2 * precision * recall / np.where(overlap > 0, divisor, 1)


def score_terms(counts: dict[str, np.ndarray], settings: Settings) -> np.ndarray:
    """All columns whose sums over answers give the scores, at both levels.

    Args:
        counts: by tokenization, (num_pairs, len(COUNTS)).

    Returns:
        (num_pairs, columns); the last columns are each answer's own scores, 0 to 100.
    """
    if settings is LLAMAFACTORY:
        characters, words = (counts[name] for name in settings.tokenizations())
        own = bleu(bleu_terms(characters, "method3"), "method3")[:, 3:], rouge(rouge_terms(words, "set"), "set")
        return np.array([[round(score, 4) for score in scores] for scores in np.hstack(own).tolist()]).reshape(-1, 4)
    mine = counts[settings.tokenization]
    for_bleu, for_rouge = bleu_terms(mine, settings.smoothing), rouge_terms(mine, settings.rouge_ngrams)
    types = mine[:, [_PLACE["types1"], _PLACE["types2"]]]
    own = [bleu(for_bleu, settings.smoothing), rouge(for_rouge, settings.rouge_ngrams), 100 * mine[:, -1:]]
    distinct = 100 * types / np.maximum(mine[:, 4:5], 1)
    return np.hstack([for_bleu, for_rouge, *own, distinct])


def finish_scores(sums: np.ndarray, num_pairs: int, settings: Settings) -> dict[tuple[str, str], np.ndarray]:
    """Turn columns of score_terms, added up over answers, into scores.

    Args:
        sums: (..., columns).

    Returns:
        {(level, metric): (...)}.
    """
    if settings is LLAMAFACTORY:
        names = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
        return {("mean", name): sums[..., place] / num_pairs for place, name in enumerate(names)}
    for_bleu, for_rouge = sums[..., :_NUM_BLEU], sums[..., _NUM_BLEU : _NUM_BLEU + _NUM_ROUGE]
    pooled = np.concatenate([bleu(for_bleu, settings.smoothing), rouge(for_rouge, settings.rouge_ngrams)], axis=-1)
    found = {("corpus", name): pooled[..., place] for place, name in enumerate(METRICS)}
    with np.errstate(divide="ignore", invalid="ignore"):
        found["corpus", "length_ratio"] = sums[..., 8] / sums[..., 9]
    means = sums[..., _NUM_BLEU + _NUM_ROUGE :] / num_pairs
    return {**found, **{("mean", name): means[..., place] for place, name in enumerate(_MEANS)}}


def resample_sums(terms: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Add columns up over answers drawn with replacement (bootstrap; Koehn 2004 for translation).

    Resample b takes the rows `rng.integers(n, size=n)`, the b-th such draw of `numpy.random.default_rng(seed)`.

    Args:
        terms: (num_pairs, columns).

    Returns:
        (num_resamples, columns).
    """
    rng, num_pairs = np.random.default_rng(seed), len(terms)
    sums = np.empty((num_resamples, terms.shape[1]))
    batch = max(1, min(64, 2**21 // num_pairs))  # 16 MiB of weights
    for start in range(0, num_resamples, batch):
        rows = range(start, min(start + batch, num_resamples))
        draws = (np.bincount(rng.integers(num_pairs, size=num_pairs), minlength=num_pairs) for _ in rows)
        sums[rows.start : rows.stop] = np.stack([*draws]).astype(float) @ terms
    return sums


def summarize(terms: np.ndarray, distinct, settings: Settings, num_resamples: int, seed: int) -> dict:
    """Score a corpus with its 95 % bootstrap intervals.

    Args:
        terms: (num_pairs, columns) of score_terms.
        distinct: the corpus' Distinct-1 and Distinct-2; they have no interval, as a resample, which repeats answers,
            is less diverse than the sample.

    Returns:
        {level: {metric: {"score", "low", "high", "signature"}}}; low and high are None without resamples.
    """
    num_pairs = len(terms)
    scores = finish_scores(terms.sum(0), num_pairs, settings)
    sums = resample_sums(terms, num_resamples, seed)
    spread = finish_scores(sums, num_pairs, settings) if num_resamples else {}
    found = {level: {} for level in LEVELS if any(level == key[0] for key in scores)}
    for (level, metric), score in scores.items():
        low, high = np.percentile(spread[level, metric], [2.5, 97.5]) if spread else (math.nan, math.nan)
        found[level][metric] = _entry(score, low, high, settings.signature(metric, level))
    for metric, score in distinct.items():
        found["corpus"][metric] = _entry(score, math.nan, math.nan, settings.signature(metric, "corpus"))
    return found


def _entry(score, low, high, signature):
    score, low, high = (float(number) if math.isfinite(number) else None for number in (score, low, high))
    return {"score": score, "low": low, "high": high, "signature": signature}


def compare_terms(first: np.ndarray, second: np.ndarray, settings: Settings, num_resamples: int, seed: int) -> dict:
    """Compare two systems' answers to the same questions by paired bootstrap (Koehn 2004).

    Both are scored on the same resamples. p is two-sided: twice the share of resamples, one added, in which the
    difference does not have the sign it has on all answers; 1 where there is no difference.

    Args:
        first: (num_pairs, columns) of score_terms.
        second: of the other system, the same rows.

    Returns:
        {level: {metric: {"first", "second", "difference", "low", "high", "p", "signature"}}}, difference is second -
        first, low and high its 95 % interval.
    """
    num_pairs, width = first.shape
    scores = [finish_scores(terms.sum(0), num_pairs, settings) for terms in (first, second)]
    sums = resample_sums(np.hstack([first, second]), num_resamples, seed)
    spread = [finish_scores(part, num_pairs, settings) for part in (sums[:, :width], sums[:, width:])]
    found = {level: {} for level in LEVELS if any(level == key[0] for key in scores[0])}
    for (level, metric), score in scores[0].items():
        other = scores[1][level, metric]
        differences = spread[1][level, metric] - spread[0][level, metric]
        against = differences <= 0 if other > score else differences >= 0
        chance = min(1.0, 2 * (1 + against.sum()) / (1 + num_resamples))
        low, high = np.percentile(differences, [2.5, 97.5])
        numbers = {"first": score, "second": other, "difference": other - score, "low": low, "high": high, "p": chance}
        numbers = {name: float(number) if math.isfinite(number) else None for name, number in numbers.items()}
        found[level][metric] = {**numbers, "signature": settings.signature(metric, level)}
    return found


# -- counting many pairs ---------------------------------------------------------------------------------------------


@dataclass
class Distinct:
    """The distinct 1- and 2-grams of many predictions, as 64-bit hashes, and the number of tokens.

    Two of ten million n-grams share a hash with a chance of one in 400,000.
    """

    hashes: tuple[list, list] = field(default_factory=lambda: ([], []))
    num_tokens: int = 0

    def add(self, hashes: list[np.ndarray], num_tokens: int) -> None:
        for kept, new in zip(self.hashes, hashes, strict=True):
            kept.append(new)
            if len(kept) > 1 and sum(map(len, kept[1:])) > max(len(kept[0]), 2**20):
                kept[:] = [np.unique(np.concatenate(kept))]
        self.num_tokens += num_tokens

    def scores(self) -> dict[str, float]:
        """Distinct-1 and Distinct-2: distinct n-grams by tokens (both by tokens: arXiv:1510.03055), times 100."""
        sizes = [len(np.unique(np.concatenate(kept))) if kept else 0 for kept in self.hashes]
        return {f"distinct{n}": 100 * size / max(self.num_tokens, 1) for n, size in enumerate(sizes, 1)}


def count_chunk(pairs: list[tuple[str, str]], names: tuple[str, ...], lowercase: bool, nfkc: bool) -> dict:
    """Count every pair of a chunk.

    Returns:
        {tokenization: (counts (num_pairs, len(COUNTS)), [hashes of distinct 1-grams, of 2-grams])}.
    """
    found = {}
    for name in names:
        rows, grams = [], (set(), set())
        for prediction, reference in pairs:
            tokens = tokenize(prediction, name, lowercase, nfkc)
            counts = count_pair(tokens, tokenize(reference, name, lowercase, nfkc))
            counts["exact"] = int(_folded(prediction, lowercase, nfkc) == _folded(reference, lowercase, nfkc))
            rows.append([counts[column] for column in COUNTS])
            if not name.startswith(LLAMAFACTORY.tokenization):  # which has no Distinct
                grams[0].update(tokens)
                grams[1].update(ngrams(tokens, 2))
        grams = grams[0], map(" ".join, grams[1])
        found[name] = np.array(rows, dtype=np.int64).reshape(-1, len(COUNTS)), [_hashes(kind) for kind in grams]
    return found


def _folded(text, lowercase, nfkc):
    text = unicodedata.normalize("NFKC", text) if nfkc else text
    return (text.lower() if lowercase else text).strip()


def _hashes(grams):
    digests = b"".join(
        hashlib.blake2b(gram.encode("utf-8", "surrogatepass"), digest_size=8).digest() for gram in grams
    )
    return np.unique(np.frombuffer(digests, dtype=np.uint64))


def count_all(
    rows: Iterable, names: tuple[str, ...], lowercase: bool, nfkc: bool, num_workers: int
) -> Iterator[tuple[list, dict]]:
    """Count pairs chunk by chunk, in order, in several processes; few chunks are in memory at a time.

    Args:
        rows: with .prediction and .reference; those whose reference is None are passed on and not counted.

    Yields:
        (rows of a chunk, count_chunk of those with a reference).
    """
    rows = iter(rows)
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK_SIZE)), [])
    work = functools.partial(count_chunk, names=names, lowercase=lowercase, nfkc=nfkc)
    first = list(itertools.islice(chunks, 8))
    chunks = itertools.chain(first, chunks)
    if num_workers == 1 or len(first) < 8:  # starting a process costs as much as some chunks
        for chunk in chunks:
            yield chunk, work(_pairs(chunk))
        return
    context = multiprocessing.get_context("spawn")  # a forked process may inherit a lock that nobody opens
    with ProcessPoolExecutor(num_workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        waiting = deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(work, _pairs(chunk))))
            if len(waiting) > 3 * num_workers:
                chunk, counted = waiting.popleft()
                yield chunk, counted.result()
        for chunk, counted in waiting:
            yield chunk, counted.result()


def _pairs(rows):
    return [(row.prediction, row.reference) for row in rows if row.reference is not None]


def score_pairs(
    predictions: list[str],
    references: list[str],
    tokenization: str = "mixed",
    *,
    smoothing: str = "method3",
    rouge_ngrams: str = "set",
    lowercase: bool = False,
    nfkc: bool = False,
    num_resamples: int = 1000,
    seed: int = 42,
    num_workers: int = 1,
) -> dict:
    """Score predictions against references.

    Args:
        predictions: one text a pair.
        references: as many.
        tokenization: one of TOKENIZATIONS.
        smoothing: of BLEU, one of SMOOTHINGS.
        rouge_ngrams: "set" (rouge-chinese) or "count" (Lin 2004).
        num_resamples: of the bootstrap; 0 for none.
        num_workers: processes; above 1 the calling script needs `if __name__ == "__main__"`.

    Returns:
        {"num_pairs": …, "corpus": {metric: {"score", "low", "high", "signature"}}, "mean": {…}}; metrics are bleu1..4,
        rouge1, rouge2, rougeL, distinct1, distinct2 at both levels, length_ratio (corpus), exact_match (mean); 0 to
        100, but for the ratio.

    Raises:
        ValueError: the lists differ in length or are empty, or a name is unknown.
    """
    settings = Settings(tokenization, smoothing, rouge_ngrams, lowercase, nfkc)
    counts, distinct = _count_lists(predictions, references, settings, num_workers)
    terms = score_terms(counts, settings)
    scores = summarize(terms, distinct[tokenization].scores(), settings, num_resamples, seed)
    return {"num_pairs": len(terms), **scores}


def compare_pairs(
    first: list[str],
    second: list[str],
    references: list[str],
    tokenization: str = "mixed",
    *,
    smoothing: str = "method3",
    rouge_ngrams: str = "set",
    lowercase: bool = False,
    nfkc: bool = False,
    num_resamples: int = 1000,
    seed: int = 42,
    num_workers: int = 1,
) -> dict:
    """Compare two lists of answers to the same questions; arguments as in score_pairs, result as in compare_terms."""
    settings = Settings(tokenization, smoothing, rouge_ngrams, lowercase, nfkc)
    both = [_count_lists(predictions, references, settings, num_workers)[0] for predictions in (first, second)]
    terms = [score_terms(counts, settings) for counts in both]
    return {"num_pairs": len(references), **compare_terms(*terms, settings, num_resamples, seed)}


def llamafactory_scores(
    predictions: list[str], references: list[str], *, num_resamples: int = 1000, seed: int = 42, num_workers: int = 1
) -> dict:
    """Score as LLaMA-Factory does; {"num_pairs": …, "mean": {"bleu-4", "rouge-1", "rouge-2", "rouge-l"}}.

    BLEU-4 with smoothing method3 over characters, white space included; F of rouge-chinese over jieba's words, 0 where
    a text has no word; each answer's score times 100, rounded to 4 digits, then averaged.
    """
    counts, _ = _count_lists(predictions, references, LLAMAFACTORY, num_workers)
    terms = score_terms(counts, LLAMAFACTORY)
    return {"num_pairs": len(terms), **summarize(terms, {}, LLAMAFACTORY, num_resamples, seed)}


def _count_lists(predictions, references, settings, num_workers):
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references; expected as many, above 0")
    rows = (Row("", *pair) for pair in zip(predictions, references, strict=True))
    names = settings.tokenizations()
    pieces, distinct = {name: [] for name in names}, {name: Distinct() for name in names}
    for _, counted in count_all(rows, names, settings.lowercase, settings.nfkc, num_workers):
        for name, (counts, hashes) in counted.items():
            pieces[name].append(counts)
            distinct[name].add(hashes, int(counts[:, _PLACE["length"]].sum()))
    return {name: np.concatenate(parts) for name, parts in pieces.items()}, distinct


# -- files -----------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What is kept of a file: numbers of every pair, and the texts of a few."""

    path: str
    num_rows: int = 0
    without_reference: list[str] = field(default_factory=list)
    num_without_reference: int = 0
    empty_predictions: list[str] = field(default_factory=list)
    num_empty_predictions: int = 0
    empty_references: list[str] = field(default_factory=list)
    num_empty_references: int = 0
    finish_reasons: Counter = field(default_factory=Counter)
    counts: dict[str, list] = field(default_factory=dict)
    distinct: dict[str, Distinct] = field(default_factory=dict)
    reference_hashes: list[int] = field(default_factory=list)
    worst: list[tuple[float, Row]] = field(default_factory=list)
    probes: list[Row] = field(default_factory=list)

    def note(self, kind: str, origin: str) -> None:
        """Count a row of a kind, and name it if it is among the first."""
        number = getattr(self, f"num_{kind}")
        setattr(self, f"num_{kind}", number + 1)
        if number < NAMED_ROWS:
            getattr(self, kind).append(origin)


def measure_file(path: str, references: str | None, ways: list[Settings], args: argparse.Namespace) -> Measured:
    """Count every pair of a file in one pass; write --per_sample on the way.

    Raises:
        ValueError: a row cannot be read, or no row has a reference.
    """
    measured = Measured(path)
    names = tuple(dict.fromkeys(name for way in ways for name in way.tokenizations()))
    rows = _noted(read_rows(path, references, args.prediction_column, args.reference_column), measured, args)
    measured.counts, measured.distinct = {name: [] for name in names}, {name: Distinct() for name in names}
    with _whole_file(args.per_sample) as output:
        for chunk, counted in count_all(rows, names, ways[0].lowercase, ways[0].nfkc, args.num_workers):
            for name, (counts, hashes) in counted.items():
                measured.counts[name].append(counts)
                measured.distinct[name].add(hashes, int(counts[:, _PLACE["length"]].sum()))
            own = [_own_scores({name: piece[0] for name, piece in counted.items()}, way) for way in ways]
            _keep_worst(measured, chunk, own[0], args.worst)
            if output:
                output.writelines(_sample_lines(chunk, own, ways))
    if measured.num_rows == measured.num_without_reference:
        raise ValueError(
            f"{path}: none of {measured.num_rows} rows has a reference "
            f"({args.reference_column or ' or '.join(REFERENCE_KEYS)}); name its column with --reference_column, or "
            f"another file with --references"
        )
    measured.counts = {name: np.concatenate(pieces) for name, pieces in measured.counts.items()}
    check_against_libraries(measured.probes, ways)
    return measured


def _noted(rows, measured, args):
    """Pass rows on; count them, keep what is said about them, and show the progress."""
    from tqdm import tqdm

    chance, total = random.Random(args.seed), _num_lines(measured.path)
    for row in tqdm(rows, desc=measured.path, total=total, unit=" rows", mininterval=1, delay=2, disable=None):
        measured.num_rows += 1
        if args.compare:
            reference = "" if row.reference is None else f"={row.reference}"
            measured.reference_hashes.append(_hashes([reference]).item())
        if row.finish_reason is not None:
            measured.finish_reasons[str(row.finish_reason)] += 1
        if not row.prediction.strip():
            measured.note("empty_predictions", row.origin)
        if row.reference is None:
            measured.note("without_reference", row.origin)
        else:
            if not row.reference.strip():
                measured.note("empty_references", row.origin)
            seen = measured.num_rows - measured.num_without_reference
            place = chance.randrange(seen)  # reservoir sampling: every pair with the same chance
            if len(measured.probes) < args.check:
                measured.probes.append(row)
            elif place < args.check:
                measured.probes[place] = row
        yield row


def _num_lines(path):
    """Lines of a file, for the progress bar; None where they are not the rows, or can be read only once."""
    if not os.path.isfile(path) or path.endswith((".gz", ".csv", ".tsv")):
        return None
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def _own_scores(counts, settings):
    """Each answer's own scores: {metric: (num_pairs,)}."""
    terms = score_terms(counts, settings)
    return {metric: values for (level, metric), values in finish_scores(terms, 1, settings).items() if level == "mean"}


def _keep_worst(measured, rows, own, number):
    scores = own.get("rougeL", own.get("rouge-l")).tolist()
    scored = [row for row in rows if row.reference is not None]
    new = zip(scores, scored, strict=True)
    measured.worst = heapq.nsmallest(number, itertools.chain(measured.worst, new), key=lambda item: item[0])


def _sample_lines(rows, own, ways):
    """A line of JSON for every row, with null scores where there is no reference."""
    place = 0
    for row in rows:
        line = {"index": row.index, "origin": row.origin, "scores": None}
        if row.reference is not None:
            line["scores"] = {
                way.signature(metric, "mean"): float(values[place])
                for way, metrics in zip(ways, own, strict=True)
                for metric, values in metrics.items()
            }
            place += 1
        yield json.dumps(line, ensure_ascii=False) + "\n"


class _whole_file:
    """A file to write that appears under its name when all is written; None where there is no name."""

    def __init__(self, path):
        self.path, self.file = path, None

    def __enter__(self):
        if self.path:
            self.file = open(f"{self.path}.tmp", "w", encoding="utf-8")
        return self.file

    def __exit__(self, kind, error, trace):
        if self.path:
            self.file.close()
            os.remove(f"{self.path}.tmp") if kind else os.replace(f"{self.path}.tmp", self.path)


def check_against_libraries(rows: list[Row], ways: list[Settings]) -> None:
    """Let jieba, nltk and rouge-chinese themselves cut and score some pairs too.

    Raises:
        ValueError: they come to other numbers.
    """
    for way, row in itertools.product(ways, rows):
        if not way.smoothing.startswith("method") or way.rouge_ngrams != "set":  # not theirs; the counts are the same
            way = replace(way, smoothing="method3", rouge_ngrams="set")
        counted = count_chunk([(row.prediction, row.reference)], way.tokenizations(), way.lowercase, way.nfkc)
        own = _own_scores({name: piece[0] for name, piece in counted.items()}, way)
        names = ("bleu-4", "rouge-1", "rouge-2", "rouge-l") if way is LLAMAFACTORY else ("bleu4", *METRICS[4:])
        found = [float(own[name][0]) for name in names]
        expected = library_scores(row.prediction, row.reference, way)
        if not np.allclose(found, expected, rtol=0, atol=1e-4 if way is LLAMAFACTORY else 1e-6):
            raise ValueError(
                f"{row.origin}: {', '.join(names)} are {found} here and {expected} by nltk and rouge-chinese "
                f"({way.tokenization}); please report this row, and go on with --check 0"
            )


def library_scores(prediction: str, reference: str, settings: Settings) -> list[float]:
    """Let nltk and rouge-chinese score a pair: BLEU-4, ROUGE-1, ROUGE-2, ROUGE-L, times 100."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge, rouge_score

    names, texts = settings.tokenizations(), (prediction, reference)
    for text in texts if names[-1] in USES_JIEBA else ():
        if cut_words(text) != load_jieba().lcut(text):
            raise ValueError(f"{text!r} is cut into other words than jieba's; please report it")
    ours, theirs = (tokenize(text, names[0], settings.lowercase, settings.nfkc) for text in texts)
    found = [sentence_bleu([theirs], ours, smoothing_function=getattr(SmoothingFunction(), settings.smoothing))]
    if settings is LLAMAFACTORY:
        ours, theirs = (" ".join(load_jieba().lcut(text)) for text in texts)
        scores = Rouge().get_scores(ours, theirs)[0].values() if ours.split() and theirs.split() else [{"f": 0}] * 3
    elif ours and theirs:
        ours, theirs = [" ".join(ours)], [" ".join(theirs)]
        scores = [rouge_score.rouge_n(ours, theirs, 1), rouge_score.rouge_n(ours, theirs, 2)]
        scores.append(rouge_score.rouge_l_summary_level(ours, theirs))
    else:
        scores = [{"f": 0}] * 3
    return [100 * float(score) for score in (*found, *(score["f"] for score in scores))]


def score_file(measured: Measured, ways: list[Settings], args: argparse.Namespace) -> dict:
    """Score what measure_file counted; the object that --json prints."""
    found = describe(measured, args)
    for way in ways:
        distinct = {} if way is LLAMAFACTORY else measured.distinct[way.tokenization].scores()
        terms = score_terms(measured.counts, way)
        found["scores"][way.tokenization] = summarize(terms, distinct, way, args.bootstrap, args.seed)
    found["worst"] = [
        {"score": score, "origin": row.origin, "prediction": row.prediction, "reference": row.reference}
        for score, row in measured.worst
    ]
    return found


def describe(measured: Measured, args: argparse.Namespace) -> dict:
    """What was read, in numbers, with the first rows of each kind by file and line."""
    kinds = ("without_reference", "empty_predictions", "empty_references")
    return {
        "file": measured.path,
        "num_rows": measured.num_rows,
        "num_pairs": measured.num_rows - measured.num_without_reference,
        **{kind: {"count": getattr(measured, f"num_{kind}"), "first": getattr(measured, kind)} for kind in kinds},
        "finish_reasons": dict(measured.finish_reasons),
        "bootstrap": {"resamples": args.bootstrap, "seed": args.seed},
        "pairs_checked_with_nltk_and_rouge_chinese": len(measured.probes),
        "scores": {},
    }


def compare_files(first: Measured, second: Measured, ways: list[Settings], args: argparse.Namespace) -> dict:
    """Compare what measure_file counted of two files; the object that --json prints.

    Raises:
        ValueError: the references are not the same, row by row.
    """
    if first.num_rows != second.num_rows:
        raise ValueError(
            f"{first.path} has {first.num_rows} rows, {second.path} {second.num_rows}; --compare needs answers to the "
            f"same questions in the same order"
        )
    for number, pair in enumerate(zip(first.reference_hashes, second.reference_hashes, strict=True), 1):
        if pair[0] != pair[1]:
            raise ValueError(
                f"row {number} has another reference in {first.path} than in {second.path}; --compare needs answers "
                f"to the same questions in the same order"
            )
    found = {"first": describe(first, args), "second": describe(second, args), "scores": {}}
    for way in ways:
        terms = [score_terms(measured.counts, way) for measured in (first, second)]
        found["scores"][way.tokenization] = compare_terms(*terms, way, args.bootstrap, args.seed)
    for side in ("first", "second"):
        del found[side]["scores"]
    return found


# -- report ----------------------------------------------------------------------------------------------------------


def description_text(found: dict) -> list[str]:
    """The lines about a file that stand before its scores."""
    lines = [f"{found['file']}: {found['num_rows']:,} rows, {found['num_pairs']:,} pairs scored"]
    says = {
        "without_reference": "without a reference, not scored",
        "empty_predictions": "with an empty prediction, which scores 0",
        "empty_references": "with an empty reference, which scores 0",
    }
    for kind, text in says.items():
        count, first = found[kind]["count"], found[kind]["first"]
        if count:
            more = ", …" if count > len(first) else ""
            lines.append(f"  {count:,} {text}: {', '.join(first)}{more}")
    if found["finish_reasons"]:
        lines.append("  finish_reason: " + ", ".join(f"{name} {n:,}" for name, n in found["finish_reasons"].items()))
    return lines


def report_text(found: dict) -> str:
    """The table for one file, and its worst answers."""
    lines = description_text(found)
    if found["bootstrap"]["resamples"]:
        resamples, seed = found["bootstrap"]["resamples"], found["bootstrap"]["seed"]
        lines.append(f"  intervals: 95 % of {resamples:,} bootstrap resamples, seed {seed}")
    checked = found["pairs_checked_with_nltk_and_rouge_chinese"]
    if checked:
        lines.append(f"  checked: {checked} pairs scored by nltk and rouge-chinese as well, with equal results")
    lines += ["", f"{'score':>8}  {'95 % interval':^17}  signature"]
    for scores in found["scores"].values():
        for entry in (entry for level in scores.values() for entry in level.values()):
            digits = 3 if entry["signature"].startswith("length_ratio") else 2
            interval = "" if entry["low"] is None else f"{entry['low']:.{digits}f} – {entry['high']:.{digits}f}"
            score = "none" if entry["score"] is None else f"{entry['score']:.{digits}f}"
            lines.append(f"{score:>8}  {interval:^17}  {entry['signature']}")
    if found["worst"]:
        lines += ["", "lowest ROUGE-L:"]
    for item in found["worst"]:
        lines.append(f"{item['score']:8.2f}  {item['origin']}")
        lines += [f"          {name + ':':<11} {_shortened(item[name])}" for name in ("prediction", "reference")]
    return "\n".join(lines)


def _shortened(text, limit=90):
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def comparison_text(found: dict) -> str:
    """The table for two files."""
    lines = ["A: " + "\n".join(description_text(found["first"])), "B: " + "\n".join(description_text(found["second"]))]
    resamples, seed = found["first"]["bootstrap"]["resamples"], found["first"]["bootstrap"]["seed"]
    lines.append(f"difference with its 95 % interval, and two-sided p: {resamples:,} paired resamples, seed {seed}")
    lines += ["", f"{'A':>8}{'B':>8}{'B - A':>8}  {'95 % interval':^17}  {'p':>6}  signature"]
    for scores in found["scores"].values():
        for entry in (entry for level in scores.values() for entry in level.values()):
            if None in entry.values():
                continue
            digits = 3 if entry["signature"].startswith("length_ratio") else 2
            numbers = "".join(f"{entry[name]:>8.{digits}f}" for name in ("first", "second"))
            numbers += f"{entry['difference']:>+8.{digits}f}"
            interval = f"{entry['low']:+.{digits}f} – {entry['high']:+.{digits}f}"
            lines.append(f"{numbers}  {interval:^17}  {entry['p']:6.3f}  {entry['signature']}")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # a model can write half a surrogate pair
    try:
        main(arguments)
    except (ValueError, OSError) as problem:
        if arguments.debug or os.environ.get("STAGEKIT_DEBUG"):
            traceback.print_exc()
        print(f"eval_metrics.py: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
