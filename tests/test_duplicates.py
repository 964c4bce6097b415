"""Exact and near duplicates: the near ones against the Jaccard similarity of sets of 5-grams, counted here in full."""

import json
import math
import os
import random
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from stagekit import duplicates
from stagekit.duplicates import (
    CROWD,
    NUM_HASHES,
    SAMPLE,
    Repeats,
    Signature,
    choose_bands,
    digest,
    find_repeats,
    grams,
    readable,
    sign,
    similarity,
    units,
)

ROOT = Path(__file__).resolve().parents[1]
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 400)]
LATIN = [f"{first}{second}er" for first in "bcdfghklmnprst" for second in ("an", "el", "in", "ot", "um")]


def english(words):
    return " ".join(words)


def chinese(characters):
    return "".join(characters)


def jaccard(first, second):
    """Exactly, over sets of five units in a row; a text is given as a list of its units."""
    sets = [{tuple(text[start : start + 5]) for start in range(len(text) - 4)} for text in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def made_up(seed, alphabet, count=60):
    """Lists of units: new texts, and copies of earlier ones with some units changed or a passage put in front."""
    rng, made = random.Random(seed), []
    for number in range(count):
        if number % 3 == 0 or not made:
            made.append(rng.choices(alphabet, k=rng.randint(60, 300)))
            continue
        copy = list(rng.choice(made))
        if number % 2:
            copy = rng.choices(alphabet, k=rng.randint(1, 4)) + copy
        for place in rng.sample(range(len(copy)), rng.choice([0, 1, 2, 20])):
            copy[place] = rng.choice(alphabet)
        made.append(copy)
    return made


def by_brute_force(made, threshold=0.8):
    """For each text the first one that is left and as similar as that; None where there is none."""
    left, found = [], []
    for number, text in enumerate(made):
        found.append(next((other for other in left if jaccard(made[other], text) >= threshold), None))
        left += [number] if found[-1] is None else []
    return found


# -- what counts -----------------------------------------------------------------------------------------------------


def test_words_numbers_and_single_characters_of_solid_scripts_are_units():
    assert units("Take 5mg of Paracetamol-B, 每次１片！") == [
        "take",
        "5mg",
        "of",
        "paracetamol",
        "b",
        "每",
        "次",
        "1",
        "片",
    ]
    assert units("カタカナ ＡＢＣ naïve") == ["カ", "タ", "カ", "ナ", "abc", "naïve"]
    assert units("…!? \n") == []


def test_grams_are_runs_of_units_and_a_short_text_is_one():
    assert list(grams("a b c d", 3)) == ["a b c", "b c d"]
    assert list(grams("一，二。三四", 3)) == ["一 二 三", "二 三 四"]
    assert list(grams("A b", 3)) == ["a b"]
    assert list(grams(" !? ", 3)) == ["!?"]
    assert readable("每 日 3 次 of tea 一 杯") == "每日 3 次 of tea 一杯"


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("发烧怎么办", "发烧怎么办", True),
        ("a b\nc", "  a  b c\n", True),
        ("a b", "ab", False),
        ("A", "a", False),
        ("a.", "a", False),
        ("发烧怎么办", "发热怎么办", False),
    ],
)
def test_exact_repeats_differ_in_nothing_but_the_amount_of_white_space(first, second, same):
    assert (digest(first) == digest(second)) is same
    assert list(find_repeats([first, second], "exact")) == [None, 0 if same else None]


def test_texts_without_words_repeat_each_other_only_where_they_are_the_same():
    assert list(find_repeats(["!!", "…", "!!", "🙂", "🙂"], "near")) == [None, None, 0, None, 3]


def test_one_changed_number_makes_another_question_of_a_short_template():
    texts = [
        f"护士要把一袋{ml}毫升的液体在{hours}小时内匀速输完，输液泵应设为每小时多少毫升？"
        for ml in (250, 500)
        for hours in (3, 4)
    ]
    assert list(find_repeats(texts, "near")) == [None] * 4
    assert list(find_repeats([texts[0], texts[0].replace("，", ", ").replace("？", "?")], "near")) == [None, 0]


# -- near ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alphabet", "write"), [(LATIN, english), (HAN, chinese)], ids=["english", "chinese"])
@pytest.mark.parametrize("seed", range(4))
def test_near_repeats_are_those_of_brute_force(alphabet, write, seed):
    made = made_up(seed, alphabet)
    expected, found = by_brute_force(made), list(find_repeats(map(write, made), "near"))
    assert sum(known is not None for known in expected) >= 15
    for number, earlier in enumerate(found):
        if earlier is not None:
            assert jaccard(made[number], made[earlier]) >= 0.8
    left = [number for number, earlier in enumerate(found) if earlier is None]
    for place, number in enumerate(left):  # no two that are left are alike, but for the few the bands may overlook
        assert all(jaccard(made[number], made[other]) < 0.84 for other in left[:place])
    close = [jaccard(made[a], made[b]) for a in range(len(made)) for b in range(a)]
    if not any(0.8 <= value < 0.84 for value in close):
        assert found == expected


def test_rows_of_one_template_are_told_apart_as_exactly_as_others():
    """Many rows of nearly the same text: an estimate would take some for near duplicates by chance."""
    rng, made = random.Random(0), []
    frame = rng.choices(HAN, k=150)
    for _ in range(120):
        row = list(frame)
        for place in rng.sample(range(10, 140), 2):
            row[place] = rng.choice(HAN)
        made.append(row)
    expected, found = by_brute_force(made), list(find_repeats(map(chinese, made), "near"))
    close = sum(0.7 < jaccard(made[a], made[b]) < 0.85 for a in range(40) for b in range(a))
    assert close > 400 and 20 < sum(earlier is not None for earlier in expected) < 110
    assert all(jaccard(made[number], made[other]) >= 0.8 for number, other in enumerate(found) if other is not None)
    assert abs(found.count(None) - expected.count(None)) <= 3


def long_pair(rng, length, edits):
    """Two long texts of which one has some units replaced."""
    text = [f"{rng.choice(LATIN)}{number}" for number in range(length)]
    copy = list(text)
    for place in rng.sample(range(length), edits):
        copy[place] = "changed"
    return text, copy


def test_a_sample_of_long_texts_estimates_their_similarity():
    rng, errors = random.Random(4), []
    for _ in range(30):
        first, second = long_pair(rng, 2000, rng.choice([20, 60, 120, 300]))
        exact = jaccard(first, second)
        samples = [sign(english(text)).sample for text in (first, second)]
        assert [len(sample) for sample in samples] == [SAMPLE, SAMPLE]
        errors.append((similarity(*samples) - exact) / math.sqrt(exact * (1 - exact) / SAMPLE))
    assert abs(np.mean(errors)) < 0.5 and 0.6 < np.std(errors) < 1.3 and np.abs(errors).max() < 4


def test_texts_with_all_their_grams_in_the_sample_are_compared_exactly():
    rng = random.Random(5)
    for length in (10, 100, SAMPLE + 4):
        first, second = long_pair(rng, length, max(1, length // 60))
        samples = [sign(english(text)).sample for text in (first, second)]
        assert similarity(*samples) == pytest.approx(jaccard(first, second), abs=1e-12)


@pytest.mark.parametrize("length", [300, 1500])  # with less and with more grams than a sample
def test_the_beginning_of_a_long_text_is_as_similar_as_it_is_long(length):
    first, _ = long_pair(random.Random(6), 3000, 0)
    second = first[:length]
    samples = [sign(english(text)).sample for text in (first, second)]
    exact = jaccard(first, second)
    error = math.sqrt(exact * (1 - exact) / SAMPLE)
    assert similarity(*samples) == similarity(*samples[::-1]) == pytest.approx(exact, abs=3 * error)


def test_pairs_near_the_threshold_are_found_as_often_as_the_bands_promise():
    rng, found = random.Random(0), 0
    for _ in range(150):
        text = rng.choices(HAN, k=204)  # 200 5-grams
        copy = list(text)
        for place in (20, 60, 100, 140):  # 20 of them differ: 180 / 220 = 0.818
            copy[place] = "ü"
        assert jaccard(text, copy) == pytest.approx(180 / 220, abs=0.01)
        repeats = Repeats()
        repeats.find(digest("a"), sign(chinese(text)))
        found += repeats.find(digest("b"), sign(chinese(copy))) is not None
    assert found >= 0.95 * 150


def test_bands_are_as_wide_as_the_promised_recall_allows():
    # at 0.8: 16 bands of 8 find 1 - (1 - 0.8^8)^16 = 0.947 of the pairs, 18 bands of 7 find 0.986
    assert choose_bands(0.8) == (18, 7)
    # at 0.5: 32 bands of 4 find 0.873, 42 of 3 find 0.996
    assert choose_bands(0.5) == (42, 3)
    assert choose_bands(1.0) == (1, 128)


def test_candidates_are_those_of_the_tables_of_datasketch():
    made = made_up(5, LATIN) + made_up(6, LATIN)
    theirs, left = [], []
    table = MinHashLSH(num_perm=NUM_HASHES, params=choose_bands(0.8))
    for number, text in enumerate(made):
        sketch = MinHash(num_perm=NUM_HASHES, hashfunc=zlib.crc32)
        sketch.update_batch([english(text[start : start + 5]).encode() for start in range(len(text) - 4)])
        assert (sketch.hashvalues == sign(english(text)).hashes).all()
        alike = [other for other in sorted(table.query(sketch)) if jaccard(made[other], text) >= 0.8]
        theirs.append(alike[0] if alike else None)
        if not alike:
            left.append(number)
            table.insert(number, sketch)
    assert len(left) < len(made) - 30
    assert list(find_repeats(map(english, made), "near")) == theirs


def test_a_repeat_of_a_repeat_stands_for_the_first():
    base = [f"w{number}" for number in range(100)]
    second, third = ["x", *base[1:]], ["x", "y", *base[2:]]
    texts = [english(text) for text in (base, second, second, third, base)]
    assert list(find_repeats(texts, "near")) == [None, 0, 0, 0, 0]


def test_a_text_that_is_only_like_a_repeat_is_new():
    rng = random.Random(1)
    base = rng.choices(LATIN, k=304)
    second, third = base[:280], base[24:280]  # 300, 276 and 252 grams
    assert jaccard(base, second) == pytest.approx(0.92) and jaccard(base, third) == pytest.approx(0.84)
    found = list(find_repeats([english(text) for text in (base, second, base[60:280])], "near"))
    assert found[:2] == [None, 0] and jaccard(second, base[60:280]) < 0.8 and found[2] is None


def test_the_threshold_decides():
    rng = random.Random(2)
    base = rng.choices(HAN, k=204)
    texts = [chinese(base), chinese(base[:144])]  # 140 of 200 grams
    assert list(find_repeats(texts, "near", 0.6)) == [None, 0]
    assert list(find_repeats(texts, "near")) == [None, None]  # 0.8


def bare(hashes, grams):
    """A signature of hand-made numbers."""
    return Signature(np.array(hashes, np.uint32), np.array(sorted(grams), np.uint32))


def test_of_several_texts_that_are_like_it_the_first_is_named():
    hashes = range(128)
    first, second = bare(hashes, range(100)), bare(hashes, range(15, 115))  # 85 of 115
    between = bare(hashes, range(8, 108))  # 92 of 108, and 93 of 107
    repeats = Repeats()
    assert [repeats.find(digest(name), given) for name, given in (("a", first), ("b", second))] == [None, None]
    assert repeats.find(digest("c"), between) == (0, False)


def test_texts_that_share_a_band_by_chance_do_not_hide_each_other():
    first, second = bare(range(128), range(100)), bare([*range(7), *range(1007, 1128)], range(500, 600))
    alone = [1000 + place if place < 7 or place % 7 else 5000 + place for place in range(128)]
    third = bare([*range(7), *alone[7:]], range(500, 600))  # shares the first band with both, and no other
    repeats = Repeats()
    assert [repeats.find(digest(name), given) for name, given in (("a", first), ("b", second))] == [None, None]
    assert repeats.find(digest("c"), third) == (1, False)


def test_a_crowd_under_one_band_is_not_compared_without_end(monkeypatch):
    compared = []
    monkeypatch.setattr(duplicates, "similarity", lambda first, second: compared.append(1) or 0.0)
    repeats = Repeats()
    for number in range(100):
        repeats.find(digest(str(number)), bare(range(128), [number]))
    assert len(compared) == sum(min(number, CROWD) for number in range(100))


# -- how -------------------------------------------------------------------------------------------------------------


def test_the_result_depends_on_neither_process_nor_number_of_processes():
    texts = [english(text) for text in made_up(7, LATIN, 80)]
    here = list(find_repeats(texts, "near"))
    assert list(find_repeats(texts, "near", num_workers=2)) == here
    program = (
        "import json, sys; from stagekit.duplicates import find_repeats; "
        "print(json.dumps(list(find_repeats(json.load(sys.stdin), 'near'))))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        there = subprocess.run(
            command, input=json.dumps(texts), cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert json.loads(there.stdout) == here


def test_texts_are_read_one_by_one():
    read = []

    def texts():
        for number in range(10):
            read.append(number)
            yield f"text {number}"

    found = find_repeats(texts(), "near")
    assert next(found) is None and read == [0]


@pytest.mark.parametrize(("mode", "limit"), [("near", 4000), ("exact", 250)])
def test_memory_is_bounded_for_each_text_whatever_its_length(mode, limit):
    rng = random.Random(3)
    list(find_repeats(["warm", "up"], mode))
    for length, count in ((10, 400), (1500, 30)):
        found = find_repeats((" ".join(rng.choices(LATIN, k=length)) + f" {n}" for n in range(count)), mode)
        tracemalloc.start()
        assert [next(found) for _ in range(count)] == [None] * count
        size = tracemalloc.get_traced_memory()[0] / count
        tracemalloc.stop()
        assert size < limit * (1 if count == 400 else 3), size


def test_a_long_text_is_hashed_in_blocks():
    text = "病人发热咳嗽" * 8_000
    tracemalloc.start()
    sample = sign(text).sample
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15_000_000  # 48,000 grams; all their hashes at once would take 25 MB
    assert similarity(sample, sign("病人发热咳嗽" * 3).sample) == 1  # the same six grams


def test_the_progress_is_shown(capsys):
    list(find_repeats(["a", "b"], "exact", total=2, description="looking"))
    assert "looking: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "threshold", "message"), [("none", 0.8, "'none'"), ("near", 0.0, "0.0"), ("near", 1.1, "1.1")]
)
def test_a_wrong_mode_or_threshold_is_told_at_once(mode, threshold, message):
    with pytest.raises(ValueError, match=message):
        find_repeats([], mode, threshold)
