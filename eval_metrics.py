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

As a module: score_pairs and compare_pairs take lists of texts. Nothing here imports the project.
"""

import argparse
import contextlib
import csv
import difflib
import gzip
import hashlib
import heapq
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import traceback
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

VERSION = "1"  # of the definitions: a change that moves any number raises it
TOKENIZATIONS = ("mixed", "mixed-word", "zh-char", "zh-word", "en-word")
USES_JIEBA = ("mixed-word", "zh-word", "llamafactory-word")
SMOOTHINGS = ("none", "method1", "method2", "method3", "exp")
ROUGE_NGRAMS = ("set", "count")
PREDICTION_KEYS = ("prediction", "predict")  # inference.py's, and LLaMA-Factory's
REFERENCE_KEYS = ("reference", "label")
MAX_CHECKED = 250_000  # characters of a prediction times those of its reference: rouge-chinese has a cell for each
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
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    what = parser.add_argument_group("what is measured (one of the first three)")
    what.add_argument("prediction_file", nargs="?", help="predictions and references, such as inference.py's file")
    what.add_argument("--predictions", help="file with predictions, where the references stand in another")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="answers to the same questions: is B better?")
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
        choices=ROUGE_NGRAMS,
        help="set: an n-gram counts once however often it stands there, as in rouge-chinese (default); count: as "
        "often as it is in both, as in Lin 2004 and rouge-score. ROUGE-L is the same",
    )
    how.add_argument("--lowercase", action="store_true", help="fold case before comparing")
    how.add_argument("--nfkc", action="store_true", help="fold full-width and other compatibility forms (NFKC)")
    how.add_argument(
        "--compatible",
        choices=("llamafactory",),
        help="numbers comparable with those LLaMA-Factory reports: mean BLEU-4 (method3) over characters, white space "
        "included; mean ROUGE F of rouge-chinese over jieba's words; each answer's score rounded to 4 digits",
    )
    how.add_argument("--bootstrap", type=int, default=1000, help="resamples for the intervals, default 1000; 0: none")
    how.add_argument("--seed", type=int, default=42, help="of the resamples, default 42")
    how.add_argument(
        "--check", type=int, default=20, help="short pairs that nltk and rouge-chinese score too, default 20"
    )
    how.add_argument("--num_workers", type=int, default=num_cores, help="processes, default: one a core")
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    out.add_argument("--per_sample", metavar="FILE", help="write every row's own scores to this .jsonl file")
    out.add_argument("--worst", type=int, default=3, help="show that many answers of lowest ROUGE-L, default 3")
    out.add_argument("--debug", action="store_true", help="show tracebacks (also STAGEKIT_DEBUG=1)")
    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args, parser):
    if [args.prediction_file, args.predictions, args.compare].count(None) != 2:
        parser.error("give one of: a file of predictions and references, --predictions, --compare A B")
    if args.predictions and not args.references:
        parser.error("--predictions needs --references; a file that holds both is given without a flag")
    if args.references and args.compare:
        parser.error("--compare reads predictions and references from the same files; leave --references out")
    if args.per_sample and args.compare:
        parser.error("--per_sample is for one file of predictions, not for --compare")
    if args.compare and not args.bootstrap:
        parser.error("--compare needs resamples; leave --bootstrap 0 out")
    inputs = [os.path.abspath(path) for path in (args.prediction_file, args.predictions, args.references) if path]
    if args.per_sample and os.path.abspath(args.per_sample) in inputs:
        parser.error(f"--per_sample {args.per_sample} would replace a file that is read; name another")
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


def main(args: argparse.Namespace) -> None:
    """Read and count the pairs, score them, print."""
    how = (args.smoothing or "method3", args.rouge_ngrams or "set", args.lowercase, args.nfkc)
    ways = [Settings(name, *how) for name in dict.fromkeys(args.tokenization)]
    ways = [LLAMAFACTORY] if args.compatible else ways
    if args.compare:
        found = compare_files(*(measure_file(path, None, ways, args) for path in args.compare), args)
    else:
        found = score_file(measure_file(args.prediction_file or args.predictions, args.references, ways, args), args)
    text = comparison_text if args.compare else report_text
    print(json.dumps(found, ensure_ascii=False, indent=2) if args.json else text(found))


# -- reading ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A prediction and its reference, with where they stand; the reference is None where there is none."""

    origin: str
    prediction: str
    reference: str | None
    index: object = None
    finish_reason: str | None = None


def read_rows(path: str, references: str | None, args: argparse.Namespace) -> Iterator[Row]:
    """Read predictions with their references, one at a time.

    Args:
        path: .jsonl, .csv or .tsv with both in a row; with `references` also any other file, an answer a line.
        references: file whose rows stand beside those of `path`.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a row that cannot be read, as file:line; or the two files differ in length.
    """
    keys = (args.prediction_column,) if args.prediction_column else PREDICTION_KEYS
    reference_keys = (args.reference_column,) if args.reference_column else REFERENCE_KEYS
    if references is None:
        for origin, record in read_records(path):
            if isinstance(record, str):
                raise ValueError(f"{path} holds one text a line; name the other file: --predictions, --references")
            prediction = _pick(record, keys, origin, "--prediction_column")
            reference = _pick(record, reference_keys, origin)
            yield Row(origin, prediction, reference, record.get("index"), record.get("finish_reason"))
        return
    pairs = itertools.zip_longest(read_records(path), read_records(references), fillvalue=(None, None))
    for number, ((origin, left), (other, right)) in enumerate(pairs):
        if left is None or right is None:
            longer, shorter = (references, path) if left is None else (path, references)
            raise ValueError(f"{shorter} ends after {number} rows and {longer} goes on; rows must belong together")
        prediction = _pick(left, keys, origin, "--prediction_column")
        yield Row(origin, prediction, _pick(right, (*reference_keys, *keys), other), number)


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
    line = 0
    try:
        for line, raw in enumerate(file, 1):
            yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:{line + 1}: damaged gzip file ({error})") from None


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
    try:
        header = next(reader, [])
        for fields in filter(None, reader):
            origin = f"{path}:{reader.line_num}"
            if len(fields) != len(header):
                raise ValueError(f"{origin}: {len(fields)} fields, and the header has {len(header)}")
            yield origin, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None


def _pick(record, keys, origin, flag=None):
    """The text under the first of the keys that a record has, or a record that is a text; None only without a flag."""
    if isinstance(record, str):
        return record
    key = next((key for key in keys if key in record), None)
    value = record.get(key)
    if value is None and not flag:
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


def tokenize(text: str, tokenization: str = "mixed") -> list[str]:
    """Split a text into tokens; the module's docstring says what each tokenization takes for one."""
    if tokenization in ("mixed", "mixed-word"):
        return _split_by_script(text, list if tokenization == "mixed" else cut_words)
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
    if tokenization == "llamafactory-word":  # to rouge-chinese a blank between two ends of sentences is an empty word
        from rouge_chinese import Rouge

        sentences = [
            " ".join(sentence.split()) for sentence in Rouge().cut_sent(" ".join(cut_words(text))) if sentence
        ]
        words = [word for sentence in sentences for word in sentence.split(" ")]
        return words if any(words) else []
    raise ValueError(f"tokenization {tokenization!r} is unknown; known: {', '.join(TOKENIZATIONS)}")


def _words(text):
    text = _STOP_AFTER_TEXT.sub(r"\1 \2 ", _PUNCTUATION.sub(r" \1 ", text))
    return _DASH_AFTER_DIGIT.sub(r"\1 \2 ", _STOP_BEFORE_TEXT.sub(r" \1 \2", text)).split()


def _split_by_script(text, cut):
    """Chinese by `cut`, everything between by word; a . or , beside Chinese stands beside a space."""
    tokens, parts = [], _RUNS.split(text.strip())
    for place in range(0, len(parts), 2):
        tokens.extend(cut(parts[place]))
        if place + 1 < len(parts):
            before, after = bool(parts[place]), bool(parts[place + 2])
            tokens.extend(_words(" " * before + parts[place + 1] + " " * after))
    return tokens


def cut_words(text: str) -> list[str]:
    """Cut a text into jieba's words, white space included."""
    import jieba

    if not jieba.dt.initialized:
        jieba.setLogLevel(logging.WARNING)  # it would report on stderr that it loads its dictionary
    return jieba.lcut(text)


# -- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """All that decides a number, but for its level; the flags of these names say what each may be."""

    tokenization: str = "mixed"
    smoothing: str = "method3"
    rouge_ngrams: str = "set"
    lowercase: bool = False
    nfkc: bool = False

    def __post_init__(self):
        for name, known in (("smoothing", SMOOTHINGS), ("rouge_ngrams", ROUGE_NGRAMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; known: {', '.join(known)}")

    def tokenizations(self) -> tuple[str, ...]:
        """The tokenization, or that of BLEU and that of ROUGE where they differ."""
        return ("llamafactory-char", "llamafactory-word") if self == LLAMAFACTORY else (self.tokenization,)

    def own_metrics(self) -> tuple[str, ...]:
        """What each answer is scored by."""
        return ("bleu-4", "rouge-1", "rouge-2", "rouge-l") if self == LLAMAFACTORY else OWN_METRICS

    def fold(self, text: str) -> str:
        """Return what is tokenized of a text."""
        text = unicodedata.normalize("NFKC", text) if self.nfkc else text
        return text.lower() if self.lowercase else text

    def signature(self, metric: str, level: str) -> str:
        """Name everything that decides a number of this metric; what is off is not named."""
        jieba = self.tokenizations()[-1] in USES_JIEBA and metric not in ("exact_match", "bleu-4")
        if self == LLAMAFACTORY:
            how = ["char", "smooth:method3"] if metric == "bleu-4" else ["zh-word", "ngrams:set", "f1"]
            how = ["llamafactory", *how, "round:4"]
        else:
            how = [self.tokenization, *["lower"] * self.lowercase, *["nfkc"] * self.nfkc]
            how += [f"smooth:{self.smoothing}"] * metric.startswith("bleu")
            how += [f"ngrams:{self.rouge_ngrams}"] * (metric in ("rouge1", "rouge2"))
            how += ["f1"] * metric.startswith("rouge")
            how = ["strip", *how[1:]] if metric == "exact_match" else how
        return "|".join([metric, *how, level, *[f"jieba:{metadata.version('jieba')}"] * jieba, f"v{VERSION}"])


# BLEU-4 with method3 over characters, white space included; F of rouge-chinese over jieba's words, 0 where a text has
# no word; each answer's score times 100, rounded to 4 digits, then averaged.
LLAMAFACTORY = Settings("llamafactory")
METRICS = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge1", "rouge2", "rougeL")
OWN_METRICS = (*METRICS, "exact_match", "distinct1", "distinct2")
# Every score follows from these numbers of each pair, so texts are read once and need not stay in memory.
COUNTS = (
    *("match1", "match2", "match3", "match4", "total1", "total2", "total3", "total4", "length", "reference_length"),
    *("overlap1", "size1", "reference_size1", "overlap2", "size2", "reference_size2"),
    *("overlapL", "sizeL", "reference_sizeL", "types1", "types2", "exact"),
)
_BLEU, _LENGTHS, _ROUGE, _TYPES, _EXACT = slice(10), slice(8, 10), slice(10, 19), slice(19, 21), slice(21, 22)


def count_pair(for_bleu: list[list[str]], for_rouge: list[list[str]], settings: Settings) -> dict[str, int]:
    """Count what the scores of a pair follow from: all that COUNTS names, but `exact`.

    With smoothing "exp" an answer shorter than n tokens has no n-grams, as in Papineni et al. 2002 and sacrebleu; else
    it has one, as in nltk.

    Args:
        for_bleu: tokens of the prediction, tokens of the reference.
        for_rouge: the same for ROUGE, as a rule the same lists.
    """
    shared = {n: shared_ngrams(*for_bleu, n) for n in range(1, 5)}
    length, reference_length = map(len, for_bleu)
    found = {"length": length, "reference_length": reference_length}
    for n, (both, ours, _) in shared.items():
        found[f"match{n}"], found[f"types{n}"] = both.total(), len(ours)
        found[f"total{n}"] = max(length + 1 - n, 0 if settings.smoothing == "exp" else 1)
    if for_rouge is not for_bleu:
        shared = {n: shared_ngrams(*for_rouge, n) for n in (1, 2)}
    size = len if settings.rouge_ngrams == "set" else Counter.total
    for n in (1, 2):
        found[f"overlap{n}"], found[f"size{n}"], found[f"reference_size{n}"] = map(size, shared[n])
    found["overlapL"] = longest_common_subsequence(*for_rouge)
    found["sizeL"], found["reference_sizeL"] = map(len, for_rouge)
    return found


def shared_ngrams(ours: list[str], theirs: list[str], n: int) -> tuple[Counter, Counter, Counter]:
    """Count the n-grams in both texts, each as often as it is in both, those of the first, those of the second."""
    first, second = Counter(ngrams(ours, n)), Counter(ngrams(theirs, n))
    return first & second, first, second


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


def bleu(counts: np.ndarray, smoothing: str) -> np.ndarray:
    """Compute BLEU-1..4 with uniform weights, section 2.3 of Papineni et al. 2002, times 100: (..., 4).

    Smoothing is Chen & Cherry 2014: method1 counts 0.1 for no match, method2 adds one to both sides for n > 1, method3
    (and exp) counts 1/2, 1/4, … for the first, second, … n without a match. No matching token at all scores 0.

    Args:
        counts: (..., 10), the first ten of COUNTS, of one answer or added up over a corpus.
    """
    matches, totals, length, reference_length = counts[..., :4], counts[..., 4:8], counts[..., 8], counts[..., 9]
    missed = matches == 0
    if smoothing == "method1":
        matches = np.where(missed, 0.1, matches)
    elif smoothing == "method2":
        added = np.array([0, 1, 1, 1])
        matches, totals = matches + added, totals + added
    elif smoothing in ("method3", "exp"):
        matches = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), matches)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(totals > 0, np.log(matches / totals), -np.inf)
        penalty = np.where(length > 0, np.minimum(1 - reference_length / length, 0), -np.inf)
    scores = np.exp(penalty[..., None] + np.cumsum(logs, axis=-1) / np.arange(1, 5))
    return 100 * np.where(missed[..., :1], 0.0, scores)


def rouge(counts: np.ndarray, rouge_ngrams: str) -> np.ndarray:
    """Compute F1 of ROUGE-1, -2 (n-grams) and -L (longest common subsequence of whole texts), times 100: (..., 3).

    Lin 2004 with beta = 1: 2PR / (P + R). With "set" the divisor is P + R + 1e-8, as in rouge-chinese, so that equal
    texts score 99.9999995.

    Args:
        counts: (..., 9), the next nine of COUNTS, of one answer or added up over a corpus.
    """
    counts = counts.reshape(*counts.shape[:-1], 3, 3)
    overlap, ours, theirs = counts[..., 0], np.maximum(counts[..., 1], 1), np.maximum(counts[..., 2], 1)
    precision, recall = overlap / ours, overlap / theirs
    divisor = precision + recall + (1e-8 if rouge_ngrams == "set" else 0)
    return 100 * 2 * precision * recall / np.where(overlap > 0, divisor, 1)


def bleu_and_rouge(counts: np.ndarray, settings: Settings) -> np.ndarray:
    """Score answers, or corpora: METRICS (..., 7) from counts (..., len(COUNTS))."""
    scores = bleu(counts[..., _BLEU], settings.smoothing), rouge(counts[..., _ROUGE], settings.rouge_ngrams)
    return np.concatenate(scores, axis=-1)


def own_scores(counts: np.ndarray, settings: Settings) -> np.ndarray:
    """Score each answer by itself: settings.own_metrics() (num_pairs, …) from counts (num_pairs, len(COUNTS))."""
    scores = bleu_and_rouge(counts, settings)
    if settings == LLAMAFACTORY:
        return np.array([[round(score, 4) for score in row] for row in scores[:, 3:].tolist()]).reshape(-1, 4)
    distinct = 100 * counts[:, _TYPES] / np.maximum(counts[:, _LENGTHS][:, :1], 1)
    return np.hstack([scores, 100 * counts[:, _EXACT], distinct])


def level_scores(sums: np.ndarray, num_pairs: int, settings: Settings) -> dict[tuple[str, str], np.ndarray]:
    """Turn sums over answers into scores: {(level, metric): (...)}; LLaMA-Factory has no corpus level.

    Args:
        sums: (..., columns) of counts and own scores, added up over num_pairs answers.
    """
    found = {}
    if settings != LLAMAFACTORY:
        pooled = bleu_and_rouge(sums, settings)
        found = {("corpus", name): pooled[..., place] for place, name in enumerate(METRICS)}
        with np.errstate(divide="ignore", invalid="ignore"):
            found["corpus", "length_ratio"] = np.divide(*np.moveaxis(sums[..., _LENGTHS], -1, 0))
    own = enumerate(settings.own_metrics(), len(COUNTS))
    return {**found, **{("mean", name): sums[..., place] / num_pairs for place, name in own}}


def resample_sums(terms: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Add columns up over answers drawn with replacement (bootstrap; Koehn 2004 for translation).

    Resample b takes the rows `rng.integers(n, size=n)`, the b-th such draw of `numpy.random.default_rng(seed)`;
    terms (num_pairs, columns) give (num_resamples, columns).
    """
    rng, (num_pairs, width) = np.random.default_rng(seed), terms.shape
    draws = (rng.integers(num_pairs, size=num_pairs) for _ in range(num_resamples))
    sums = [np.bincount(draw, minlength=num_pairs).astype(float) @ terms for draw in draws]
    return np.array(sums).reshape(num_resamples, width)


class Counted:
    """What is kept of many pairs that are scored in one way.

    Attributes:
        settings: the way.
        terms: (pairs of a chunk, columns) each: counts, then the answers' own scores.
        hashes: of distinct 1- and 2-grams of the predictions, 64 bits. Two of ten million n-grams share a hash with a
            chance of one in 400,000.
    """

    def __init__(self, settings: Settings):
        self.settings, self.terms, self.hashes = settings, [], ([], [])

    def add(self, counts: np.ndarray, *hashes: np.ndarray) -> np.ndarray:
        """Add what count_chunk found; return each answer's own scores."""
        own = own_scores(counts, self.settings)
        self.terms.append(np.hstack([counts, own]))
        for kept, new in zip(self.hashes, hashes, strict=True):
            kept.append(new)
            if len(kept) > 128:  # now and then: it sorts all of them
                kept[:] = [np.unique(np.concatenate(kept))]
        return own

    def scores(self, num_resamples: int, seed: int) -> tuple[dict, dict]:
        """Score the corpus, and resamples of it: {(level, metric): score}, {(level, metric): (num_resamples,)}.

        Distinct-n is that of arXiv:1510.03055: the distinct n-grams of all predictions by all of their tokens, for
        n = 2 by tokens too. It is not resampled: with answers repeated, a resample is less diverse than the sample.
        """
        terms = np.concatenate(self.terms)
        scores = level_scores(terms.sum(0), len(terms), self.settings)
        spread = level_scores(resample_sums(terms, num_resamples, seed), len(terms), self.settings)
        num_tokens = max(terms[:, _LENGTHS][:, 0].sum(), 1)
        for n, kept in enumerate(self.hashes if self.settings != LLAMAFACTORY else (), 1):
            scores["corpus", f"distinct{n}"] = 100 * len(np.unique(np.concatenate(kept))) / num_tokens
        return scores, spread if num_resamples else {}


def summarize(counted: Counted, num_resamples: int, seed: int) -> dict:
    """Score a corpus with its 95 % bootstrap intervals.

    Returns:
        {level: {metric: {"score", "low", "high", "signature"}}}; low and high are None where there are no resamples.
    """
    scores, spread = counted.scores(num_resamples, seed)
    found = {}
    for key, score in scores.items():
        low, high = np.percentile(spread[key], [2.5, 97.5]) if key in spread else (math.nan, math.nan)
        _enter(found, key, counted.settings, {"score": score, "low": low, "high": high})
    return found


def _enter(found, key, settings, numbers):
    level, metric = key
    numbers = {name: float(number) if math.isfinite(number) else None for name, number in numbers.items()}
    found.setdefault(level, {})[metric] = {**numbers, "signature": settings.signature(metric, level)}


def compare(first: Counted, second: Counted, num_resamples: int, seed: int) -> dict:
    """Compare two systems' answers to the same questions by paired bootstrap (Koehn 2004).

    Both are scored on the same resamples. p is two-sided: twice the share of resamples, one added, in which the
    difference does not have the sign it has on all answers; 1 where there is no difference.

    Returns:
        {level: {metric: {"first", "second", "difference", "low", "high", "p", "signature"}}}, difference is second -
        first, low and high its 95 % interval.
    """
    assert num_resamples, "a comparison needs resamples"
    scores, spread = first.scores(num_resamples, seed)
    others, spread_of_others = second.scores(num_resamples, seed)
    found = {}
    for key in spread:
        numbers = {"first": scores[key], "second": others[key], "difference": others[key] - scores[key]}
        differences = spread_of_others[key] - spread[key]
        numbers["low"], numbers["high"] = np.percentile(differences, [2.5, 97.5])
        against = differences <= 0 if numbers["difference"] > 0 else differences >= 0
        numbers["p"] = min(1.0, 2 * (1 + against.sum()) / (1 + num_resamples))
        _enter(found, key, first.settings, numbers)
    return found


# -- counting many pairs ---------------------------------------------------------------------------------------------


def count_chunk(pairs: list[tuple[str, str]], ways: list[Settings]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return, for each way, counts (num_pairs, len(COUNTS)), and hashes of the predictions' 1-grams and 2-grams."""
    found = []
    for way in ways:
        rows, grams = [], (set(), set())
        for pair in pairs:
            pair = [way.fold(text) for text in pair]
            tokens = [[tokenize(text, name) for text in pair] for name in way.tokenizations()]
            counts = {**count_pair(tokens[0], tokens[-1], way), "exact": int(pair[0].strip() == pair[1].strip())}
            rows.append([counts[name] for name in COUNTS])
            for n, kept in enumerate(grams, 1):
                kept.update(ngrams(tokens[0][0], n))
        hashes = _hashes(grams[0]), _hashes(map(" ".join, grams[1]))
        found.append((np.array(rows, dtype=float).reshape(-1, len(COUNTS)), *hashes))
    return found


def _hashes(grams):
    digests = (hashlib.blake2b(gram.encode("utf-8", "surrogatepass"), digest_size=8).digest() for gram in grams)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def count_all(rows: Iterable, ways: list[Settings], num_workers: int) -> Iterator[tuple[list, list]]:
    """Yield (rows of a chunk, count_chunk of those with a reference), in order; few chunks are in memory at a time.

    Args:
        num_workers: processes, but for a short file: starting one costs as much as some chunks.
    """
    rows = iter(rows)
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK_SIZE)), [])
    chunks = (
        (chunk, [(row.prediction, row.reference) for row in chunk if row.reference is not None]) for chunk in chunks
    )
    first = list(itertools.islice(chunks, 8))
    chunks = itertools.chain(first, chunks)
    if num_workers == 1 or len(first) < 8:
        yield from ((chunk, count_chunk(pairs, ways)) for chunk, pairs in chunks)
        return
    context = multiprocessing.get_context("spawn")  # a forked process may inherit a lock that nobody opens
    # Ctrl-C is for this process, which ends the others: they inherit the mask of the thread that starts them, and no
    # start is cut short, as Ctrl-C is raised in the main thread.
    starter = ThreadPoolExecutor(1, "starter", signal.pthread_sigmask, (signal.SIG_BLOCK, {signal.SIGINT}))
    pool = ProcessPoolExecutor(num_workers, context)
    waiting = deque()
    try:
        for chunk, pairs in chunks:
            waiting.append((chunk, starter.submit(pool.submit, count_chunk, pairs, ways)))
            if len(waiting) > 3 * num_workers:
                chunk, counted = waiting.popleft()
                yield chunk, counted.result().result()
        for chunk, counted in waiting:
            yield chunk, counted.result().result()
    finally:
        starter.shutdown()
        pool.shutdown(cancel_futures=True)


def score_pairs(
    predictions: list[str],
    references: list[str],
    settings: Settings = Settings(),
    num_resamples: int = 1000,
    seed: int = 42,
) -> dict:
    """Score predictions against references, in this process.

    Args:
        settings: how; LLAMAFACTORY for its four numbers.
        num_resamples: of the bootstrap; 0 for none.

    Returns:
        {"num_pairs": …, "corpus": {metric: {"score", "low", "high", "signature"}}, "mean": {…}}; metrics are bleu1..4,
        rouge1, rouge2, rougeL, distinct1, distinct2 at both levels, length_ratio (corpus), exact_match (mean); 0 to
        100, but for the ratio.

    Raises:
        ValueError: the lists differ in length or are empty, or the tokenization is unknown.
    """
    counted = _count_lists(predictions, references, settings)
    return {"num_pairs": len(references), **summarize(counted, num_resamples, seed)}


def compare_pairs(
    first: list[str],
    second: list[str],
    references: list[str],
    settings: Settings = Settings(),
    num_resamples: int = 1000,
    seed: int = 42,
) -> dict:
    """Compare two lists of answers to the same questions; arguments as in score_pairs, result as in compare."""
    both = (_count_lists(predictions, references, settings) for predictions in (first, second))
    return {"num_pairs": len(references), **compare(*both, num_resamples, seed)}


def _count_lists(predictions, references, settings):
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references; expected as many, above 0")
    counted, rows = Counted(settings), (Row("", *pair) for pair in zip(predictions, references, strict=True))
    for _, found in count_all(rows, [settings], num_workers=1):
        counted.add(*found[0])
    return counted


# -- files -----------------------------------------------------------------------------------------------------------

NOTED = {  # kinds of rows that are named, and what is said of them
    "without_reference": "without a reference, not scored",
    "empty_predictions": "with an empty prediction, which scores 0",
    "empty_references": "with an empty reference, which scores 0",
}


class Measured:
    """What is kept of a file: numbers of every pair, and the texts of a few.

    Attributes:
        summary: what --json says of the file; of each kind of NOTED {"count": …, "first": ["file:line", …]}.
        counted: the pairs, in each way.
        reference_hashes: one a row, to tell whether two files belong together.
        worst: (ROUGE-L, row), lowest first.
        probes: (random number, row) for check_against_libraries, drawn among pairs up to MAX_CHECKED.
    """

    def __init__(self, path: str, ways: list[Settings], args: argparse.Namespace):
        self.summary = {"file": path, "num_rows": 0, "num_pairs": 0, "pairs_too_long_to_check": 0}
        self.summary |= {kind: {"count": 0, "first": []} for kind in NOTED}
        self.summary |= {"finish_reasons": Counter(), "bootstrap": {"resamples": args.bootstrap, "seed": args.seed}}
        self.counted = [Counted(way) for way in ways]
        self.reference_hashes, self.worst, self.probes = [], [], []

    def note(self, row: Row) -> None:
        """Keep what is said about a row."""
        self.summary["num_rows"] += 1
        self.summary["num_pairs"] += row.reference is not None
        self.reference_hashes.append(hash(row.reference))
        if row.finish_reason is not None:
            self.summary["finish_reasons"][str(row.finish_reason)] += 1
        kinds = {"empty_predictions": row.prediction.strip() == "", "without_reference": row.reference is None}
        kinds["empty_references"] = row.reference is not None and row.reference.strip() == ""
        for kind in (kind for kind, true in kinds.items() if true):
            self.summary[kind]["count"] += 1
            if self.summary[kind]["count"] <= NAMED_ROWS:
                self.summary[kind]["first"].append(row.origin)


def measure_file(path: str, references: str | None, ways: list[Settings], args: argparse.Namespace) -> Measured:
    """Count every pair of a file in one pass; write --per_sample on the way.

    Raises:
        ValueError: a row cannot be read, or no row has a reference.
    """
    from tqdm import tqdm

    measured, rng = Measured(path, ways, args), np.random.default_rng(args.seed)
    rows = tqdm(read_rows(path, references, args), desc=path, unit=" rows", mininterval=1, delay=2, disable=None)
    with _whole_file(args.per_sample) if args.per_sample else contextlib.nullcontext() as output:
        for chunk, found in count_all(rows, ways, args.num_workers):
            own = [counted.add(*piece) for counted, piece in zip(measured.counted, found, strict=True)]
            for row in chunk:
                measured.note(row)
            scored = [row for row in chunk if row.reference is not None]
            rouge_l = own[0][:, ways[0].own_metrics().index("rouge-l" if args.compatible else "rougeL")]
            measured.worst = _lowest(args.worst, measured.worst, rouge_l, scored)
            short = [row for row in scored if len(row.prediction) * len(row.reference) <= MAX_CHECKED]
            measured.probes = _lowest(args.check, measured.probes, rng.random(len(short)), short)
            measured.summary["pairs_too_long_to_check"] += len(scored) - len(short) if args.check else 0
            if output:
                output.writelines(_sample_lines(chunk, own, ways))
    if not measured.summary["num_pairs"]:
        raise ValueError(
            f"{path}: none of {measured.summary['num_rows']} rows has a reference "
            f"({args.reference_column or ' or '.join(REFERENCE_KEYS)}); name its column with --reference_column, or "
            f"another file with --references"
        )
    check_against_libraries([row for _, row in measured.probes], ways)
    measured.summary["pairs_checked_with_nltk_and_rouge_chinese"] = len(measured.probes)
    return measured


def _lowest(number, kept, keys, rows):
    return heapq.nsmallest(number, [*kept, *zip(keys.tolist(), rows, strict=True)], key=lambda item: item[0])


def _sample_lines(rows, own, ways):
    """A line of JSON for every row, with null scores where there is no reference."""
    names = [way.signature(metric, "mean") for way in ways for metric in way.own_metrics()]
    scores = iter(np.hstack(own).tolist())
    for row in rows:
        line = {"index": row.index, "origin": row.origin, "scores": None}
        if row.reference is not None:
            line["scores"] = dict(zip(names, next(scores), strict=True))
        yield json.dumps(line, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _whole_file(path):
    """A file to write, which appears under its name when all is written."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_against_libraries(rows: list[Row], ways: list[Settings]) -> None:
    """Let nltk and rouge-chinese themselves score some pairs too.

    Raises:
        ValueError: they come to other numbers.
    """
    for way, row in itertools.product(ways, rows):
        if not way.smoothing.startswith("method") or way.rouge_ngrams != "set":  # ways that they do not know
            way = replace(way, smoothing="method3", rouge_ngrams="set")
        counts = count_chunk([(row.prediction, row.reference)], [way])[0][0]
        found = bleu_and_rouge(counts, way)[0, 3:].tolist()
        expected = library_scores(row.prediction, row.reference, way)
        if not np.allclose(found, expected, rtol=0, atol=1e-6):
            raise ValueError(
                f"{row.origin}: {', '.join(METRICS[3:])} are {found} here and {expected} by nltk and rouge-chinese "
                f"({way.tokenization}); please report this row, and go on with --check 0"
            )


def library_scores(prediction: str, reference: str, settings: Settings) -> list[float]:
    """Let nltk and rouge-chinese score a pair: BLEU-4, ROUGE-1, ROUGE-2, ROUGE-L, times 100."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge, rouge_score

    texts = settings.fold(prediction), settings.fold(reference)
    ours, theirs = (tokenize(text, settings.tokenizations()[0]) for text in texts)
    found = [sentence_bleu([theirs], ours, smoothing_function=getattr(SmoothingFunction(), settings.smoothing))]
    scores = [{"f": 0}] * 3
    if settings == LLAMAFACTORY:
        ours, theirs = (" ".join(jieba.lcut(text)) for text in texts)
        if ours.split() and theirs.split():
            scores = Rouge().get_scores(ours, theirs)[0].values()
    elif ours and theirs:
        ours, theirs = [" ".join(ours)], [" ".join(theirs)]
        scores = [rouge_score.rouge_n(ours, theirs, 1), rouge_score.rouge_n(ours, theirs, 2)]
        scores.append(rouge_score.rouge_l_summary_level(ours, theirs))
    return [100 * float(score) for score in (*found, *(score["f"] for score in scores))]


def score_file(measured: Measured, args: argparse.Namespace) -> dict:
    """Score what measure_file counted; the object that --json prints."""
    scores = {one.settings.tokenization: summarize(one, args.bootstrap, args.seed) for one in measured.counted}
    kept = ("origin", "prediction", "reference")
    worst = [{"score": score, **{name: getattr(row, name) for name in kept}} for score, row in measured.worst]
    return {**measured.summary, "scores": scores, "worst": worst}


def compare_files(first: Measured, second: Measured, args: argparse.Namespace) -> dict:
    """Compare what measure_file counted of two files; the object that --json prints.

    Raises:
        ValueError: the references are not the same, row by row.
    """
    name, other = (measured.summary["file"] for measured in (first, second))
    needed = "--compare needs answers to the same questions in the same order"
    if (rows := len(first.reference_hashes)) != (other_rows := len(second.reference_hashes)):
        raise ValueError(f"{name} has {rows} rows, {other} {other_rows}; {needed}")
    for number, pair in enumerate(zip(first.reference_hashes, second.reference_hashes, strict=True), 1):
        if pair[0] != pair[1]:
            raise ValueError(f"row {number} has another reference in {name} than in {other}; {needed}")
    both = zip(first.counted, second.counted, strict=True)
    scores = {one.settings.tokenization: compare(one, two, args.bootstrap, args.seed) for one, two in both}
    return {"first": first.summary, "second": second.summary, "scores": scores}


# -- report ----------------------------------------------------------------------------------------------------------


def description_text(summary: dict) -> list[str]:
    """The lines about a file that stand before its scores."""
    lines = [f"{summary['file']}: {summary['num_rows']:,} rows, {summary['num_pairs']:,} pairs scored"]
    for kind, text in NOTED.items():
        count, first = summary[kind]["count"], summary[kind]["first"]
        if count:
            lines.append(f"  {count:,} {text}: {', '.join(first)}{', …' * (count > len(first))}")
    if summary["finish_reasons"]:
        reasons = (f"{name} {count:,}" for name, count in summary["finish_reasons"].items())
        lines.append(f"  finish_reason: {', '.join(reasons)}")
    return lines


def report_text(found: dict) -> str:
    """The table for one file, and its worst answers."""
    lines, bootstrap = description_text(found), found["bootstrap"]
    if bootstrap["resamples"]:
        lines.append(f"  intervals: 95 % of {bootstrap['resamples']:,} bootstrap resamples, seed {bootstrap['seed']}")
    checked, long = found["pairs_checked_with_nltk_and_rouge_chinese"], found["pairs_too_long_to_check"]
    if checked or long:
        left_out = f"; {long:,} are too long for that" if long else ""
        lines.append(
            f"  checked: {checked} pairs scored by nltk and rouge-chinese as well, with equal results{left_out}"
        )
    lines += ["", f"{'score':>8}  {'95 % interval':^17}  signature"]
    for entry, digits in _entries(found):
        interval = "" if entry["low"] is None else f"{entry['low']:.{digits}f} – {entry['high']:.{digits}f}"
        score = "none" if entry["score"] is None else f"{entry['score']:.{digits}f}"
        lines.append(f"{score:>8}  {interval:^17}  {entry['signature']}")
    if found["worst"]:
        lines += ["", "lowest ROUGE-L:"]
    for item in found["worst"]:
        lines.append(f"{item['score']:8.2f}  {item['origin']}")
        for name in ("prediction", "reference"):
            text = " ".join(item[name].split())
            lines.append(f"          {name + ':':<11} {text if len(text) <= 90 else text[:89] + '…'}")
    return "\n".join(lines)


def comparison_text(found: dict) -> str:
    """The table for two files."""
    lines = ["A: " + "\n".join(description_text(found["first"])), "B: " + "\n".join(description_text(found["second"]))]
    resamples, seed = found["first"]["bootstrap"].values()
    lines.append(f"difference with its 95 % interval, and two-sided p: {resamples:,} paired resamples, seed {seed}")
    lines += ["", f"{'A':>8}{'B':>8}{'B - A':>8}  {'95 % interval':^17}  {'p':>6}  signature"]
    for entry, digits in _entries(found):
        if None not in entry.values():
            numbers = "".join(f"{entry[name]:>8.{digits}f}" for name in ("first", "second"))
            numbers += f"{entry['difference']:>+8.{digits}f}"
            interval = f"{entry['low']:+.{digits}f} – {entry['high']:+.{digits}f}"
            lines.append(f"{numbers}  {interval:^17}  {entry['p']:6.3f}  {entry['signature']}")
    return "\n".join(lines)


def _entries(found):
    """All entries, with the digits to show of each."""
    levels = (level for scores in found["scores"].values() for level in scores.values())
    return ((entry, 3 if metric == "length_ratio" else 2) for level in levels for metric, entry in level.items())


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
