"""eval_metrics.py: its numbers against nltk, sacrebleu, rouge-chinese, rouge-score and work by hand; its files."""

import contextlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import psutil
import pytest
from conftest import ROOT, write_jsonl

import eval_metrics
from eval_metrics import (
    LLAMAFACTORY,
    TOKENIZATIONS,
    Settings,
    compare_pairs,
    cut_words,
    longest_common_subsequence,
    score_pairs,
    tokenize,
)

# Predictions and references of every awkward kind that answers come in.
PAIRS = [
    ("发烧时多喝水，多休息。", "发烧是体温升高，要多喝水、多休息，持续高热要及时就医。"),  # shorter
    ("普通感冒多由病毒引起，一般不需要吃抗生素，可以多休息、多饮水。", "感冒多由病毒引起，不需要抗生素。"),  # longer
    ("每次服用布洛芬200mg，一天不超过1,200mg（约6片）。", "布洛芬每次200 mg，每日最多1200mg。"),
    ("Take 5mg twice a day, i.e. 10mg; don't exceed 0.5-1 g/day.", "Take 5 mg twice daily, but not above 1 g a day."),
    ("The dose is 2.5 mg. See your doctor!", "The dose is 2.5 mg. See your doctor!"),
    ("建议做CT或MRI检查，WBC 12.5×10^9/L，提示感染。", "建议查CT，WBC升高到12.5×10^9/L，考虑细菌感染"),
    ("好好好好好，是是是的的的的。", "好的，好的，是的。"),  # clipping
    ("the the the the the the the", "the cat is on the mat"),
    ("", "请尽快就医。"),
    ("请尽快就医。", ""),
    ("", ""),
    ("是", "是"),
    ("否", "是"),
    ("no", "No"),
    ("头痛 发热", "头痛发热"),
    ("。。。，，？！", "。，！"),
    ("……………？”他说。“对”", "……？”他说。"),
    ("😊多喝水😊 drink water😊", "😊 多喝水 drink water 😊"),
    ("ＡＢＣ１２３，ｍｇ", "ABC123,mg"),
    ("第一步：休息。\n\n第二步：喝水。\r\n- 第三步：就医", "第一步：休息。\n第二步：喝水。\n第三步：就医"),
    ("  体温\t38.5℃ — “高热”，血压≥140/90 mmHg　", "体温38.5℃，“高热”，血压≥140／90mmHg"),
    ("A&amp;B <skipped> well-\nknown &lt;5%", "A&B well-known <5%"),
    ("𠮷野家的牛肉饭嘌呤高", "𠮷野家牛肉饭的嘌呤很高"),
]
# Three pairs whose numbers under other packages are frozen below, so that the comparison needs no package.
FROZEN = [PAIRS[0], PAIRS[2], PAIRS[3]]
KINDS = ["rouge1", "rouge2", "rougeL"]


@pytest.fixture(scope="module")
def texts():
    """PAIRS, and some worse and better answers of the shipped data."""
    lines = (ROOT / "data/eval/preferences.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return PAIRS + [(record["rejected"], record["chosen"]) for record in records[:: len(records) // 12]]


def split(pairs, tokenization):
    return [[tokenize(text, tokenization) for text in side] for side in zip(*pairs, strict=True)]


def scores(pairs, tokenization="mixed", level="corpus", **options):
    """{metric: score} without intervals."""
    predictions, references = zip(*pairs, strict=True)
    found = score_pairs(predictions, references, Settings(tokenization, **options), num_resamples=0)
    return {metric: entry["score"] for metric, entry in found[level].items()}


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenization, text, expected",
    [
        ("mixed", "服5mg，2.5 ml。OK?", "服 5mg ， 2.5 ml 。 OK ?"),
        ("mixed", "“38.5℃”—≥１２", "“ 38.5 ℃ ” — ≥ １ ２"),
        ("mixed", "don't, 1,200-5", "don't , 1,200 - 5"),
        ("mixed", "𠮷a", "𠮷 a"),
        (
            "mixed",
            "服5.好.6，约7.",
            "服 5 . 好 . 6 ， 约 7.",
        ),  # beside Chinese . is beside a space, at the end it is not
        ("mixed-word", "高血压患者服5mg阿司匹林。", "高血压 患者 服 5mg 阿司匹林 。"),
        ("zh-char", "服5mg，\n OK", "服 5 m g ， O K"),
        ("zh-word", "高血压患者 服5mg，OK", "高血压 患者 服 5mg ， OK"),
        (
            "en-word",
            "It's 2.5 mg (max. 1,200), well-\nknown &lt;5%.",
            "It's 2.5 mg ( max . 1,200 ) , wellknown < 5 % .",
        ),
        ("en-word", "12-lead ECG: 5-10.", "12 - lead ECG : 5 - 10 ."),
    ],
)
def test_what_a_token_is(tokenization, text, expected):
    assert tokenize(text, tokenization) == expected.split(" ")


def test_case_and_width_are_folded_only_on_demand():
    assert tokenize("ＣＴ检查Ａ", "mixed") == ["Ｃ", "Ｔ", "检", "查", "Ａ"]
    assert tokenize(Settings(nfkc=True, lowercase=True).fold("ＣＴ检查Ａ"), "mixed") == ["ct", "检", "查", "a"]
    assert [scores([(text, "a")], level="mean")["exact_match"] for text in ("Ａ", "A", "ａ", "a")] == [0, 0, 0, 100]
    assert scores([("Ａ", "a")], level="mean", nfkc=True, lowercase=True)["exact_match"] == 100


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'word' is unknown; known: mixed, mixed-word"):
        score_pairs(["a"], ["a"], Settings("word"))
    for option in ("smoothing", "rouge_ngrams"):
        with pytest.raises(ValueError, match=f"{option} 'x' is unknown; known: "):
            Settings(**{option: "x"})


def test_mixed_is_zh_and_en_word_13a_and_zh_char_char_of_sacrebleu(texts):
    metrics = pytest.importorskip("sacrebleu.metrics")
    plane = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    samples = ["x5" + character + "6." for character in plane]
    samples += [text for pair in texts for text in pair if "𠮷" not in text]
    for ours, theirs in (("mixed", "zh"), ("en-word", "13a"), ("zh-char", "char")):
        split = metrics.BLEU(tokenize=theirs).tokenizer
        different = [text for text in samples if tokenize(text, ours) != split(text.rstrip()).split()]
        assert not different, (ours, different[:5])


def test_words_are_jiebas(texts):
    import jieba

    assert cut_words("高血压 患者，\n5.5%") == ["高血压", " ", "患者", "，", "\n", "5.5%"]
    for text in [*itertools.chain(*texts), "C++", "........", "a_b-c.d+e#f&g"]:
        assert cut_words(text) == jieba.lcut(text), text


# -- BLEU ------------------------------------------------------------------------------------------------------------


def test_bleu_by_hand():
    # Papineni et al. 2002, example 2: `the` counts twice, not seven times; there is no second word in both.
    the = scores([PAIRS[7]], "en-word", smoothing="none")
    assert the["bleu1"] == pytest.approx(100 * 2 / 7) and the["bleu2"] == 0
    # 4 of 5 characters, 2 of 4 pairs, 1 of 3 triples, no four; 5 against 7 characters
    one = scores([("多喝温水好", "多喝开水好水好")], "zh-char", smoothing="method3")
    penalty, precisions = math.exp(1 - 7 / 5), [4 / 5, 2 / 4, 1 / 6, 1 / 8]
    for n in (1, 2, 3, 4):
        assert one[f"bleu{n}"] == pytest.approx(100 * penalty * math.prod(precisions[:n]) ** (1 / n))


@pytest.mark.parametrize("method", ["none", "method1", "method2", "method3"])
@pytest.mark.parametrize("tokenization", ["mixed", "zh-word", "en-word"])
def test_bleu_is_nltks(tokenization, method, texts):
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu

    predictions, references = split(texts, tokenization)
    smooth = getattr(SmoothingFunction(), method.replace("none", "method0"))
    weights = [(1 / n,) * n for n in (1, 2, 3, 4)]

    def expected(chosen):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours, theirs = [predictions[i] for i in chosen], [[references[i]] for i in chosen]
            return [100 * score for score in corpus_bleu(theirs, ours, weights, smooth)]

    alone = np.array([expected([i]) for i in range(len(texts))])
    for level, numbers in (("corpus", expected(range(len(texts)))), ("mean", alone.mean(0))):
        found = scores(texts, tokenization, level, smoothing=method)
        assert [found[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx(list(numbers), abs=1e-9), level
    for i in range(len(texts)):  # a corpus of one: every pair by itself, which an average could hide
        found = scores(texts[i : i + 1], tokenization, smoothing=method)
        assert [found[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx(alone[i], abs=1e-9), texts[i]


@pytest.mark.parametrize("smoothing, theirs", [("exp", "exp"), ("none", "none")])
@pytest.mark.parametrize("tokenization, name", [("mixed", "zh"), ("en-word", "13a"), ("zh-char", "char")])
def test_bleu_is_sacrebleus(tokenization, name, smoothing, theirs, texts):
    metrics = pytest.importorskip("sacrebleu.metrics")
    pairs = [pair for pair in texts if "𠮷" not in pair[0]]
    if smoothing == "none":  # nltk's, which counts otherwise in short answers: see below
        pairs = [pair for pair in pairs if len(tokenize(pair[0], tokenization)) >= 4]
    predictions, references = map(list, zip(*pairs, strict=True))
    found = scores(pairs, tokenization, smoothing=smoothing)
    for n in (1, 2, 3, 4):
        metric = metrics.BLEU(tokenize=name, smooth_method=theirs, max_ngram_order=n)
        assert found[f"bleu{n}"] == pytest.approx(metric.corpus_score(predictions, [references]).score, abs=1e-9)
    for pair in pairs:
        alone = metric.corpus_score([pair[0]], [[pair[1]]]).score
        assert scores([pair], tokenization, smoothing=smoothing)["bleu4"] == pytest.approx(alone, abs=1e-9), pair


def test_frozen_numbers_of_sacrebleu_and_rouge_score():
    # sacrebleu 2.6.0: corpus_bleu(predictions, [references], tokenize="zh" and "13a", smooth_method="exp")
    assert scores(FROZEN, "mixed", smoothing="exp")["bleu4"] == pytest.approx(9.057883903246806, abs=1e-9)
    assert scores(FROZEN, "en-word", smoothing="exp")["bleu4"] == pytest.approx(6.608217507882084, abs=1e-9)
    # rouge-score 0.1.2, F of RougeScorer with tokenize(text, "mixed"), mean of three pairs
    found = scores(FROZEN, "mixed", "mean", rouge_ngrams="count")
    assert [found[kind] for kind in KINDS] == pytest.approx([47.86967418546366, 21.38047138047138, 38.64661654135338])


def test_an_answer_too_short_for_an_ngram_has_one_that_misses_by_nltk_and_none_by_sacrebleu():
    pairs = [("是", "是"), ("请多喝温水", "请多喝温水")]
    assert scores(pairs, smoothing="exp")["bleu4"] == pytest.approx(100)
    # of n-grams for n = 1..4 there are 6, 4 + 1, 3 + 1, 2 + 1
    assert scores(pairs, smoothing="method3")["bleu4"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


# -- ROUGE -----------------------------------------------------------------------------------------------------------


def test_rouge_l_by_hand():
    # Lin 2004, section 3.1: S1 `police killed the gunman`
    reference = "police killed the gunman"
    found = [
        scores([(text, reference)], "en-word", rouge_ngrams="count")["rougeL"]
        for text in ("police kill the gunman", "the gunman kill police")
    ]
    assert found == [pytest.approx(75), pytest.approx(50)]


def test_rouge_ngrams_by_hand():
    # `the` stands seven times and twice: once in both as a set, twice as a count
    found = {kind: scores([PAIRS[7]], "en-word", rouge_ngrams=kind) for kind in ("set", "count")}
    assert found["set"]["rouge1"] == pytest.approx(100 * 2 * (1 / 1) * (1 / 5) / (1 / 1 + 1 / 5))
    assert found["count"]["rouge1"] == pytest.approx(100 * 2 * (2 / 7) * (2 / 6) / (2 / 7 + 2 / 6))
    assert found["set"]["rouge2"] == found["count"]["rouge2"] == 0


@pytest.mark.parametrize("tokenization", ["mixed", "zh-word", "en-word"])
def test_rouge_is_rouge_chineses(tokenization, texts):
    from rouge_chinese import rouge_score as rouge_chinese

    def by_rouge_chinese(ours, theirs):
        if not ours or not theirs:
            return [0, 0, 0]
        sides = [" ".join(ours)], [" ".join(theirs)]
        found = [*(rouge_chinese.rouge_n(*sides, n) for n in (1, 2)), rouge_chinese.rouge_l_summary_level(*sides)]
        return [100 * score["f"] for score in found]

    alone = [by_rouge_chinese(*pair) for pair in zip(*split(texts, tokenization), strict=True)]
    for pair, expected in zip(texts, alone, strict=True):
        found = scores([pair], tokenization, "mean")
        assert [found[kind] for kind in KINDS] == pytest.approx(expected, abs=1e-9), pair
    found = scores(texts, tokenization, "mean")
    assert [found[kind] for kind in KINDS] == pytest.approx(np.mean(alone, axis=0), abs=1e-9)


@pytest.mark.parametrize("tokenization", ["mixed", "zh-word", "en-word"])
def test_rouge_is_rouge_scores(tokenization, texts):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

    class Splitter:
        def tokenize(self, text):
            return tokenize(text, tokenization)

    scorer = rouge_scorer.RougeScorer(KINDS, tokenizer=Splitter())
    for prediction, reference in texts:
        expected = [100 * score.fmeasure for score in scorer.score(reference, prediction).values()]
        found = scores([(prediction, reference)], tokenization, "mean", rouge_ngrams="count")
        assert [found[kind] for kind in KINDS] == pytest.approx(expected, abs=1e-9)


def test_corpus_rouge_pools_the_counts():
    # 2 of 2 and 2 of 4 characters; then 1 of 1 and 1 of 1: together P = 3 / 3 and R = 3 / 5
    assert scores([("喝水", "多喝温水"), ("是", "是")], rouge_ngrams="count")["rouge1"] == pytest.approx(75)


def test_the_longest_common_subsequence_is_that_of_the_table():
    rng = random.Random(0)
    for _ in range(300):
        first, second = (rng.choices("abcd", k=rng.randrange(0, 90)) for _ in range(2))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, j in itertools.product(range(len(first)), range(len(second))):
            both = table[i][j] + 1 if first[i] == second[j] else max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = both
        assert longest_common_subsequence(first, second) == table[-1][-1]


# -- the other numbers -----------------------------------------------------------------------------------------------


def test_exact_match_distinct_and_length_ratio_by_hand():
    pairs = [("多多喝水", "多喝水"), (" 多喝水\n", "多喝水"), ("喝", "多")]
    corpus, mean = scores(pairs), scores(pairs, level="mean")
    assert mean["exact_match"] == pytest.approx(100 / 3)
    assert corpus["length_ratio"] == pytest.approx(8 / 7)
    assert corpus["distinct1"] == pytest.approx(100 * 3 / 8)  # 多 喝 水
    assert corpus["distinct2"] == pytest.approx(100 * 3 / 8)  # 多多 多喝 喝水, by tokens
    assert mean["distinct1"] == pytest.approx(100 * (3 / 4 + 1 + 1) / 3)
    assert mean["distinct2"] == pytest.approx(100 * (3 / 4 + 2 / 3 + 0) / 3)
    assert scores([("ab c", ""), ("a bc", "")], "en-word")["distinct2"] == 100 * 2 / 4


def test_distinct_of_many_chunks_is_that_of_all_texts(monkeypatch):
    monkeypatch.setattr(eval_metrics, "CHUNK_SIZE", 2)
    rng = random.Random(0)
    predictions = ["".join(rng.choices("甲乙丙丁戊己庚辛壬癸", k=3)) for _ in range(598)]
    predictions = ["子丑寅", *predictions, "卯辰巳"]
    found = score_pairs(predictions, predictions, Settings("zh-char"), num_resamples=0)["corpus"]
    assert found["distinct1"]["score"] == pytest.approx(100 * 16 / 1800)
    pairs = {text[i : i + 2] for text in predictions for i in (0, 1)}
    assert found["distinct2"]["score"] == pytest.approx(100 * len(pairs) / 1800)


def test_every_number_has_its_own_signature():
    ways = [*map(Settings, TOKENIZATIONS), Settings(smoothing="none"), Settings(lowercase=True, rouge_ngrams="count")]
    found = [score_pairs(["a b"], ["a c"], way, num_resamples=2) for way in ways]
    signatures = [entry["signature"] for one in found for level in ("corpus", "mean") for entry in one[level].values()]
    assert "bleu4|zh-char|smooth:method3|corpus|v1" in signatures
    assert "rouge2|mixed|lower|ngrams:count|f1|mean|v1" in signatures
    assert "rougeL|zh-word|f1|mean|jieba:0.42.1|v1" in signatures
    assert len(set(signatures)) > 5 * 17
    for one in found:
        mine = [entry["signature"] for level in ("corpus", "mean") for entry in one[level].values()]
        assert len(set(mine)) == len(mine) == 20


def test_llamafactory_is_its_published_formula(texts):
    """BLEU-4 over characters, white space and all; rouge-chinese over jieba's words; rounded, then averaged."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    pairs = [*texts, ("好。 \n\n 好的\n。\n", "好。\n\n\n好的。"), ("  ", "好"), (".........是", "......是")]
    expected = {"bleu-4": [], "rouge-1": [], "rouge-2": [], "rouge-l": []}
    for prediction, reference in pairs:
        ours, theirs = " ".join(jieba.cut(prediction)), " ".join(jieba.cut(reference))
        f = {name: {"f": 0.0} for name in expected if name != "bleu-4"}
        if ours.split() and theirs.split():
            f = Rouge().get_scores(ours, theirs)[0]
        for name, score in f.items():
            expected[name].append(round(score["f"] * 100, 4))
        score = sentence_bleu([list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3)
        expected["bleu-4"].append(round(score * 100, 4))
    found = score_pairs(*zip(*pairs, strict=True), LLAMAFACTORY, num_resamples=0)["mean"]
    for name, numbers in expected.items():
        assert found[name]["score"] == pytest.approx(np.mean(numbers), abs=1e-9), name


# -- intervals -------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_resampling_the_texts():
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu

    pairs = PAIRS[:8]
    found = score_pairs(*zip(*pairs, strict=True), num_resamples=200, seed=3)
    rng, numbers = np.random.default_rng(3), {"corpus": [], "mean": [], "ratio": []}
    predictions, references = split(pairs, "mixed")
    alone = np.array([scores([pair], level="mean")["rougeL"] for pair in pairs])
    for _ in range(200):
        drawn = rng.integers(8, size=8)
        ours, theirs = [predictions[i] for i in drawn], [[references[i]] for i in drawn]
        numbers["corpus"].append(100 * corpus_bleu(theirs, ours, smoothing_function=SmoothingFunction().method3))
        numbers["mean"].append(alone[drawn].mean())
        numbers["ratio"].append(sum(map(len, ours)) / sum(len(one[0]) for one in theirs))
    entries = found["corpus"]["bleu4"], found["mean"]["rougeL"], found["corpus"]["length_ratio"]
    for entry, drawn in zip(entries, numbers.values(), strict=True):
        assert [entry["low"], entry["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-9)
        assert entry["low"] < entry["score"] < entry["high"]


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for trial in range(200):
        right = rng.random(60) < 0.4
        terms = np.array(right, dtype=float)[:, None]
        low, high = np.percentile(eval_metrics.resample_sums(terms, 300, trial)[:, 0] / 60, [2.5, 97.5])
        held += low <= 0.4 <= high
    assert 0.88 < held / 200 < 0.99


def test_the_paired_bootstrap_is_that_of_resampling_the_texts():
    first, second, references = zip(*[(b + "吗", a, b) for a, b in PAIRS[:8]], strict=True)
    found = compare_pairs(first, second, references, num_resamples=100, seed=5)
    own = [
        [scores([pair], level="mean")["rougeL"] for pair in zip(side, references, strict=True)]
        for side in (first, second)
    ]
    rng, differences = np.random.default_rng(5), []
    for _ in range(100):
        drawn = rng.integers(8, size=8)
        differences.append(np.mean(np.array(own[1])[drawn]) - np.mean(np.array(own[0])[drawn]))
    entry, differences = found["mean"]["rougeL"], np.array(differences)
    assert entry["difference"] == pytest.approx(np.mean(own[1]) - np.mean(own[0])) and entry["difference"] < 0
    assert [entry["low"], entry["high"]] == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=1e-9)
    assert entry["p"] == pytest.approx(2 * (1 + np.sum(differences >= 0)) / 101)


def test_equal_systems_do_not_differ_and_opposite_ones_mirror():
    predictions, references = zip(*PAIRS[:8], strict=True)
    same = compare_pairs(predictions, predictions, references, num_resamples=50)
    entries = [*same["corpus"].values(), *same["mean"].values()]
    assert len(entries) == 18 and all(entry["p"] == 1 and entry["difference"] == 0 for entry in entries)
    assert all(entry["low"] == entry["high"] == 0 for entry in entries)
    there, back = (
        compare_pairs(*sides, references, num_resamples=200)["corpus"]["rouge1"]
        for sides in ((predictions, references), (references, predictions))
    )
    assert there["difference"] == pytest.approx(-back["difference"]) and there["p"] == back["p"]
    assert there["low"] == pytest.approx(-back["high"])


def test_a_small_difference_among_few_answers_is_no_proof():
    references = ["多喝水休息"] * 6
    first, second = ["多喝水休息"] * 3 + ["不"] * 3, ["多喝水休息"] * 2 + ["不"] * 3 + ["多喝水休息"]
    assert compare_pairs(first, second, references, num_resamples=300)["mean"]["exact_match"]["p"] > 0.5
    entry = compare_pairs(["不"] * 6, references, references, num_resamples=300)["mean"]["exact_match"]
    assert entry["p"] == pytest.approx(2 / 301)


# -- many pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_long_file_is_read_as_it_is_counted(num_workers):
    read = 0

    def rows():
        nonlocal read
        for _ in range(40 * eval_metrics.CHUNK_SIZE):
            read += 1
            yield eval_metrics.Row("", "是", "是")

    counted = eval_metrics.count_all(rows(), [Settings("zh-char")], num_workers)
    next(counted)
    assert read <= 16 * eval_metrics.CHUNK_SIZE
    assert sum(len(chunk) for chunk, _ in counted) == 39 * eval_metrics.CHUNK_SIZE


def test_lists_that_do_not_belong_together_are_refused():
    for lists in ((["a"], ["a", "b"]), ([], [])):
        with pytest.raises(ValueError, match="expected as many, above 0"):
            score_pairs(*lists)


# -- files -----------------------------------------------------------------------------------------------------------


def run(*flags):
    """The command as a user gives it: (exit code, stdout, stderr)."""
    command = [sys.executable, str(ROOT / "eval_metrics.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def measure(capsys, *flags):
    """The JSON of a run in this process."""
    eval_metrics.main(eval_metrics.parse_args(["--json", "--num_workers", "1", *map(str, flags)]))
    return json.loads(capsys.readouterr().out)


def fails(*flags):
    """The one line that a run in this process ends with."""
    with pytest.raises(ValueError) as caught:
        eval_metrics.main(eval_metrics.parse_args([*map(str, flags), "--num_workers", "1"]))
    return str(caught.value)


@pytest.fixture
def predictions(tmp_path):
    """Four rows as inference.py writes them; the third has no reference."""
    rows = [
        {"index": i, "input": "?", "messages": [], "prediction": prediction, "reference": reference}
        for i, (prediction, reference) in enumerate([*PAIRS[:2], ("随便", None), ("", "请就医。")])
    ]
    del rows[2]["reference"]
    reasons = ("stop", "length", "stop", "prompt_too_long")
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, [{**row, "finish_reason": reason} for row, reason in zip(rows, reasons, strict=True)])
    return path


def test_a_run_prints_a_signature_with_every_number_and_what_it_did_not_score(predictions):
    code, out, err = run(predictions, "--bootstrap", "50", "--worst", "1")
    assert code == 0, err
    expected = scores([*PAIRS[:2], ("", "请就医。")])["bleu4"]
    line = next(line for line in out.splitlines() if line.endswith("bleu4|mixed|smooth:method3|corpus|v1"))
    assert line.split()[0] == f"{expected:.2f}" and "–" in line
    assert out.count("|v1") == 20
    assert "4 rows, 3 pairs scored" in out
    assert f"1 without a reference, not scored: {predictions}:3" in out
    assert f"1 with an empty prediction, which scores 0: {predictions}:4" in out
    assert "finish_reason: stop 2, length 1, prompt_too_long 1" in out
    assert "checked: 3 pairs scored by nltk and rouge-chinese as well" in out
    assert f"{predictions}:4" in out.partition("lowest ROUGE-L:")[2]


def test_files_of_every_kind_give_the_same_numbers(tmp_path, capsys):
    import csv
    import gzip

    pairs = [*PAIRS[:3], ('引号"和,逗号', '引号"和\t制表')]
    expected = scores(pairs)["bleu4"]
    write_jsonl(tmp_path / "a.jsonl", [{"predict": p, "label": r} for p, r in pairs])
    write_jsonl(tmp_path / "own.jsonl", [{"mine": p, "gold": r} for p, r in pairs])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name, delimiter in (("c.csv", ","), ("d.tsv", "\t")):
        with open(tmp_path / name, "w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([("prediction", "reference"), *pairs])
    for name, texts in zip(("p.txt", "r.txt"), zip(*pairs, strict=True), strict=True):
        (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    ways = [[tmp_path / name] for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.tsv")]
    ways += [["--predictions", tmp_path / "p.txt", "--references", tmp_path / "r.txt"]]
    ways += [["--predictions", tmp_path / "c.csv", "--references", tmp_path / "r.txt"]]
    ways += [[tmp_path / "own.jsonl", "--prediction_column", "mine", "--reference_column", "gold"]]
    for way in ways:
        found = measure(capsys, *way, "--bootstrap", "0", "--check", "0")
        assert found["scores"]["mixed"]["corpus"]["bleu4"]["score"] == pytest.approx(expected), way
        assert found["num_pairs"] == 4


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"prediction": "a", "reference": "b"}\n{"prediction": \n', "a.jsonl:2: no JSON"),
        ("a.jsonl", b'\n["a", "b"]\n', "a.jsonl:2: expected one JSON object a line, got list"),
        ("a.jsonl", b'{"answer": "a", "reference": "b"}', "a.jsonl:1: no prediction or predict; there is answer, ref"),
        ("a.jsonl", b'{"prediction": 5, "reference": "b"}', "a.jsonl:1: 'prediction' must be a string, got 5"),
        ("a.jsonl", b'{"prediction": null}', "a.jsonl:1: 'prediction' must be a string, got null"),
        ("a.jsonl", b'{"prediction": "a", "reference": ["b"]}', "a.jsonl:1: 'reference' must be a string"),
        ("a.jsonl", b'{"prediction": "\xb7\xa2"}', "a.jsonl:1: not UTF-8"),
        (
            "a.jsonl",
            b'{"prediction": "a"}\n{"prediction": "b"}',
            "none of 2 rows has a reference (reference or label)",
        ),
        ("a.jsonl", b"", "none of 0 rows has a reference"),
        ("a.csv", b"prediction,reference\na,b\na\n", "a.csv:3: 1 fields, and the header has 2"),
        ("a.csv", b'prediction,reference\n"a,b\n', "a.csv:2: unexpected end of data"),
        ("a.csv", b"text,label\na,b\n", "a.csv:2: no prediction or predict; there is text, label"),
        ("a.txt", b"a\n", "a.txt holds one text a line; name the other file"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in fails(tmp_path / name)


def test_parallel_files_must_be_as_long(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    (tmp_path / "b.txt").write_text("a\n")
    flags = ["--predictions", tmp_path / "a.txt", "--references", tmp_path / "b.txt"]
    assert (
        fails(*flags) == f"{tmp_path}/b.txt ends after 1 rows and {tmp_path}/a.txt goes on; rows must belong together"
    )


def test_an_error_is_one_line_and_code_2_and_debug_shows_where(tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    code, out, err = run(tmp_path / "a.jsonl")
    assert code == 2 and out == ""
    assert err.startswith(f"eval_metrics.py: error: {tmp_path}/a.jsonl:1: ") and err.count("\n") == 1
    assert "Traceback" in run(tmp_path / "a.jsonl", "--debug")[2]
    assert run(tmp_path / "none.jsonl")[0] == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["a", "--smothing", "exp"], "unknown flag --smothing; did you mean --smoothing?"),
        (["a", "--smooth", "exp"], "unknown flag --smooth"),
        ([], "give one of"),
        (["a", "--compare", "b", "c"], "give one of"),
        (["--predictions", "a"], "--predictions needs --references"),
        (["a", "--tokenization", "mixed,words"], "--tokenization 'words' is unknown; known: mixed,"),
        (["a", "--compatible", "llamafactory", "--smoothing", "none"], "leave --smoothing out"),
        (["a", "--compatible", "llamafactory", "--tokenization", "zh-char"], "leave --tokenization out"),
        (["a", "--bootstrap", "-1"], "--bootstrap -1 must be at least 0"),
        (["--compare", "a", "b", "--bootstrap", "0"], "--compare needs resamples"),
        (["--compare", "a", "b", "--per_sample", "c"], "--per_sample is for one file"),
        (["./a", "--per_sample", "a"], "--per_sample a would replace a file that is read"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        eval_metrics.parse_args(flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


def test_help_needs_none_of_the_libraries():
    command = [sys.executable, "-X", "importtime", str(ROOT / "eval_metrics.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "--compatible" in done.stdout and "argparse" in imported
    assert not imported & {"nltk", "jieba", "rouge_chinese", "tqdm", "torch"}


def test_per_sample_has_a_line_for_every_row(predictions, tmp_path, capsys):
    target = tmp_path / "samples.jsonl"
    found = measure(capsys, predictions, "--per_sample", target, "--tokenization", "mixed,zh-word", "--bootstrap", "0")
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["origin"] for row in rows] == [f"{predictions}:{line}" for line in (1, 2, 3, 4)]
    assert rows[2]["scores"] is None
    for name in ("mixed", "zh-word"):
        entry = found["scores"][name]["mean"]["rougeL"]
        own = [row["scores"][entry["signature"]] for row in rows if row["scores"]]
        assert np.mean(own) == pytest.approx(entry["score"])
        assert own[0] == pytest.approx(scores(PAIRS[:1], name)["rougeL"])


def test_processes_do_not_change_a_number(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [{"prediction": p, "reference": r} for p, r in PAIRS * 100])
    flags = [tmp_path / "a.jsonl", "--tokenization", "mixed,en-word", "--bootstrap", "10"]
    samples = [tmp_path / f"{num_workers}.jsonl" for num_workers in (1, 2)]
    alone, together = (measure(capsys, *flags, "--per_sample", path, "--num_workers", path.stem) for path in samples)
    assert alone == together and samples[0].read_text() == samples[1].read_text()


@pytest.fixture
def long_run(tmp_path):
    """A parallel run that has read 16 chunks and waits for more, and --per_sample's file as it is written."""
    os.symlink("/dev/stdin", tmp_path / "a.jsonl")
    command = [sys.executable, str(ROOT / "eval_metrics.py"), str(tmp_path / "a.jsonl"), "--num_workers", "2"]
    command += ["--per_sample", str(tmp_path / "samples.jsonl"), "--bootstrap", "0", "--check", "0"]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    run = subprocess.Popen(command, text=True, start_new_session=True, pipesize=2**20, **pipes)  # all rows fit in
    run.stdin.write('{"prediction": "drink water", "reference": "drink warm water"}\n' * 16 * eval_metrics.CHUNK_SIZE)
    run.stdin.flush()
    yield run, tmp_path / "samples.jsonl.tmp"
    for process in processes(run.pid):
        process.kill()


@pytest.mark.parametrize("at_work", [False, True])
def test_ctrl_c_ends_all_processes_with_one_line_and_no_file(long_run, at_work):
    """As in a terminal every process gets the signal: while the first starts that counts, or when it has counted."""
    run, samples = long_run
    wait_for(lambda: len(processes(run.pid)) >= 3)  # itself, its resource tracker, one that counts
    if at_work:
        wait_for(samples.read_text)
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err) == (130, "", "interrupted\n")
    assert [path.name for path in samples.parent.iterdir()] == ["a.jsonl"]
    wait_for(lambda: not processes(run.pid))


def test_ctrl_c_is_heard_by_the_first_process_alone(long_run):
    """Else those that count would print tracebacks, or break the run, at a moment that nobody can foresee."""
    run, samples = long_run

    def disturb():
        for process in processes(run.pid):
            if process.pid != run.pid:
                process.send_signal(signal.SIGINT)
        return samples.exists() and samples.read_text()

    wait_for(disturb)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (0, "") and "4,096 pairs scored" in out


def processes(group):
    """The processes of a process group that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_per_sample_leaves_nothing_half_written(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prediction": "a", "reference": "a"}, {"wrong": 1}])
    (tmp_path / "samples.jsonl").write_text("of an earlier run")
    assert ":2: no prediction" in fails(tmp_path / "a.jsonl", "--per_sample", tmp_path / "samples.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "samples.jsonl"]
    assert (tmp_path / "samples.jsonl").read_text() == "of an earlier run"


def test_the_worst_are_the_lowest_in_order(tmp_path, capsys):
    texts = ["多喝水休息", "多喝水", "多", "不", "多喝"]
    write_jsonl(tmp_path / "a.jsonl", [{"prediction": text, "reference": "多喝水休息"} for text in texts])
    found = measure(capsys, tmp_path / "a.jsonl", "--worst", "3", "--bootstrap", "0")["worst"]
    assert [item["prediction"] for item in found] == ["不", "多", "多喝"]
    assert [item["origin"][-1] for item in found] == ["4", "3", "5"]


def test_compatible_prints_the_four_numbers_that_are_published(predictions, capsys):
    found = measure(capsys, predictions, "--compatible", "llamafactory", "--bootstrap", "20")["scores"]["llamafactory"]
    assert list(found) == ["mean"] and list(found["mean"]) == ["bleu-4", "rouge-1", "rouge-2", "rouge-l"]
    pairs = [*PAIRS[:2], ("", "请就医。")]
    expected = score_pairs(*zip(*pairs, strict=True), LLAMAFACTORY, num_resamples=20)["mean"]
    assert found["mean"] == expected
    assert expected["bleu-4"]["signature"] == "bleu-4|llamafactory|char|smooth:method3|round:4|mean|v1"


def test_compare_says_which_is_better(tmp_path, capsys):
    for name, place in (("a", 0), ("b", 1)):
        write_jsonl(
            tmp_path / f"{name}.jsonl", [{"prediction": pair[place], "reference": pair[1]} for pair in PAIRS[:8]]
        )
    flags = ["--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--bootstrap", "100", "--check", "2"]
    entry = measure(capsys, *flags)["scores"]["mixed"]["mean"]["rougeL"]
    expected = compare_pairs(*zip(*PAIRS[:8], strict=True), [pair[1] for pair in PAIRS[:8]], num_resamples=100)
    assert entry == expected["mean"]["rougeL"] and entry["difference"] > 0
    code, out, err = run(*flags)
    line = next(line for line in out.splitlines() if line.endswith("rougeL|mixed|f1|mean|v1"))
    assert code == 0 and line.split()[:3] == [f"{entry[name]:.2f}" for name in ("first", "second")] + [
        f"{entry['difference']:+.2f}"
    ]
    assert f"{entry['p']:.3f}" in line


def test_compare_refuses_answers_to_other_questions(tmp_path):
    rows = [{"prediction": "a", "reference": reference} for reference in ("a", "b", "c")]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [rows[0], rows[2], rows[1]])
    write_jsonl(tmp_path / "c.jsonl", rows[:2])
    assert "row 2 has another reference in" in fails("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "a.jsonl has 3 rows," in fails("--compare", tmp_path / "a.jsonl", tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    "part, wrong, flags",
    [
        ("count_pair", "match2", []),
        ("count_pair", "overlap1", ["--smoothing", "exp", "--rouge_ngrams", "count"]),
        ("count_pair", "overlapL", ["--compatible", "llamafactory"]),
        ("count_pair", "size2", ["--tokenization", "mixed,zh-word"]),
        ("cut_words", None, ["--compatible", "llamafactory"]),
    ],
)
def test_a_run_that_differs_from_the_libraries_stops(tmp_path, monkeypatch, part, wrong, flags):
    write_jsonl(tmp_path / "a.jsonl", [{"prediction": "多喝温水好", "reference": "多喝温水"}] * 3)
    right = getattr(eval_metrics, part)
    broken = {
        "count_pair": lambda *pair: {**(found := right(*pair)), wrong: found[wrong] + 1},
        "cut_words": lambda text: list(text),
    }
    monkeypatch.setattr(eval_metrics, part, broken[part])
    message = fails(tmp_path / "a.jsonl", *flags)
    assert "please report" in message
    eval_metrics.main(eval_metrics.parse_args([str(tmp_path / "a.jsonl"), *flags, "--check", "0", "--bootstrap", "5"]))


def test_the_pairs_that_the_libraries_check_come_from_all_over_the_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"index": i, "prediction": "a", "reference": "a"} for i in range(1000)])
    args = eval_metrics.parse_args([str(tmp_path / "a.jsonl"), "--check", "40", "--num_workers", "1"])
    measured = eval_metrics.measure_file(args.prediction_file, None, [Settings("en-word")], args)
    places = [row.index // 250 for _, row in measured.probes]
    assert len({row.index for _, row in measured.probes}) == 40 and all(places.count(i) > 2 for i in range(4))


def test_long_pairs_are_left_to_nobody_who_would_take_gigabytes(tmp_path, monkeypatch, capsys):
    long, short = {"prediction": "发" * 3000, "reference": "烧" * 3000}, {"prediction": "a", "reference": "a"}
    write_jsonl(tmp_path / "a.jsonl", [long] * 30 + [short] * 2)
    sizes, scores_of = [], eval_metrics.library_scores

    def counted(prediction, reference, settings):
        sizes.append(len(prediction))
        assert len(prediction) < 3000, "this would take a minute and 2 GB"
        return scores_of(prediction, reference, settings)

    monkeypatch.setattr(eval_metrics, "library_scores", counted)
    flags = [str(tmp_path / "a.jsonl"), "--bootstrap", "0", "--num_workers", "1", "--worst", "0"]
    eval_metrics.main(eval_metrics.parse_args(flags))
    assert sizes == [1, 1]
    assert (
        "checked: 2 pairs scored by nltk and rouge-chinese as well, with equal results; 30 are too long for that"
        in (capsys.readouterr().out)
    )
    eval_metrics.main(eval_metrics.parse_args([*flags, "--check", "0"]))
    assert "checked" not in capsys.readouterr().out and sizes == [1, 1]


@pytest.mark.parametrize("damage", ["cut off", "changed", "no gzip"])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    import gzip

    lines = "".join(json.dumps({"prediction": str(n * 7919), "reference": "b"}) + "\n" for n in range(500)).encode()
    raw = gzip.compress(lines)
    middle = len(raw) // 2
    changed = raw[:middle] + bytes(255 - byte for byte in raw[middle : middle + 40]) + raw[middle + 40 :]
    raw = {"cut off": raw[:middle], "changed": changed, "no gzip": lines}[damage]
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    message = fails(tmp_path / "a.jsonl.gz")
    assert message.startswith(f"{tmp_path / 'a.jsonl.gz'}:") and "damaged gzip file" in message


def test_half_a_surrogate_pair_does_not_stop_a_run(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prediction": "\\ud83d\\u4e00", "reference": "\\ud83d"}')
    per_sample = ["--per_sample", tmp_path / "s.jsonl", "--check", "0"]
    for flags in (per_sample, ["--json", "--compatible", "llamafactory"]):
        code, out, err = run(tmp_path / "a.jsonl", "--bootstrap", "5", *flags)
        assert code == 0 and out and err == ""
