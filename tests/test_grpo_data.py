"""Questions whose answer can be verified: data/grpo/, data/eval/verifiable.jsonl and the tool behind them."""

import dataclasses
import datetime
import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from test_shipped_data import READ_BY_STAGES

from stagekit.files import find_files, read_records
from stagekit.formats import to_canonical
from stagekit.records import Conversation, Preference, Question, Ranking, RowError, Text
from stagekit.seen_prompts import prompt_hash
from tools.make_grpo_data import TEMPLATES, draw, files_to_write, fixed, is_ambiguous, main, make_item, make_items

DATA = Path(__file__).resolve().parents[1] / "data"
HELD_OUT = DATA / "eval" / "verifiable.jsonl"
OPTION = re.compile(r"^([A-Z])\. (\S.*)$", re.MULTILINE)
YES_NO = {"zh": ("是", "否", "不确定"), "en": ("yes", "no", "maybe")}
PERSONAL = {
    "e-mail address": r"[\w.+-]+@[\w-]+\.\w+",
    "telephone number": r"(?<!\d)1[3-9]\d{9}(?!\d)|(?<![\d.])\(?\d{3,4}\)?[ -]\d{3,4}[ -]?\d{4}(?!\d)",
    "identity card": r"(?<!\d)\d{17}[\dXx](?!\w)",
    "web address": r"https?://|www\.",
    "name with a title": r"\b(?:Mr|Mrs|Ms|Dr)\.? [A-Z]|[王李张刘陈杨赵黄周吴](?:某|先生|女士|大爷|阿姨|医生)",
    "control token": r"<\|[^|>]*\|>|\[/?INST\]|</?s>|\ufffd",
}
# Nothing written by hand names an amount of a medicine; the sums do, of substances that do not exist.
DOSE = r"\d ?(?:mg|mcg|μg|µg|ug|IU|毫克|微克)(?! ?(?:/|每) ?(?:d?L|分?升))"


def load(path):
    """[(origin, raw record)] of a file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(f"{path.name}:{number}", row) for number, row in enumerate(rows, 1)]


TRAINED = [row for path in find_files(str(DATA / "grpo")) for row in load(Path(path))]
EVALUATED = load(HELD_OUT)
EVERYTHING = TRAINED + EVALUATED


def of_kind(rows, *kinds):
    return [(origin, row) for origin, row in rows if row["kind"] in kinds]


def options_of(row):
    return dict(OPTION.findall(row["question"]))


def stem_of(row):
    """What a choice asks: the line above its options."""
    return row["question"][: OPTION.search(row["question"]).start()].strip().split("\n")[-1]


def letters(text):
    return "".join(char for char in text.lower() if char.isalnum())


def hash_of(text):
    return prompt_hash(Conversation([{"role": "user", "content": text}]))


# -- the files -------------------------------------------------------------------------------------------------------


def test_there_is_enough_of_every_kind_in_both_languages():
    trained = Counter((row["kind"], row["language"]) for _, row in TRAINED)
    held_out = Counter((row["kind"], row["language"]) for _, row in EVALUATED)
    assert trained == {
        **{("choice", "zh"): 82, ("choices", "zh"): 17, ("yesno", "zh"): 22, ("number", "zh"): 60},
        **{("choice", "en"): 68, ("choices", "en"): 13, ("yesno", "en"): 18, ("number", "en"): 50},
    }
    assert held_out == {
        **{("choice", "zh"): 20, ("choices", "zh"): 4, ("yesno", "zh"): 6, ("number", "zh"): 16},
        **{("choice", "en"): 16, ("choices", "en"): 4, ("yesno", "en"): 4, ("number", "en"): 14},
    }


def test_files_hold_what_their_names_say():
    kinds = {
        "choice_zh.jsonl": {("choice", "zh"), ("choices", "zh")},
        "choice_en.jsonl": {("choice", "en"), ("choices", "en")},
        "yesno.jsonl": {("yesno", "zh"), ("yesno", "en")},
        "numeric.jsonl": {("number", "zh"), ("number", "en")},
    }
    found = {}
    for origin, row in TRAINED:
        found.setdefault(origin.split(":")[0], set()).add((row["kind"], row["language"]))
    assert found == kinds


def test_every_row_is_read_as_a_question_with_its_answer():
    for origin, row in EVERYTHING:
        assert list(row) == ["question", "answer", "kind", "language"], origin
        canonical, repairs = to_canonical(row)
        prompt = [{"role": "user", "content": row["question"]}]
        assert canonical == Question(prompt, row["answer"], row["answer"]), origin
        assert not repairs.counts, origin
        assert row["question"] == row["question"].strip() and "  " not in row["question"], origin


def test_questions_are_in_the_language_they_claim():
    for origin, row in EVERYTHING:
        chinese = len(re.findall(r"[\u4e00-\u9fff]", row["question"]))
        assert (chinese >= 2) if row["language"] == "zh" else (chinese == 0), origin


def test_answer_letters_stand_among_the_options():
    for origin, row in of_kind(EVERYTHING, "choice", "choices"):
        options = options_of(row)
        assert "".join(options) in ("ABCD", "ABCDE"), origin
        assert len(OPTION.findall(row["question"])) == len(options), origin
        assert len({text.strip().lower() for text in options.values()}) == len(options), origin
        assert set(row["answer"]) <= set(options), origin
        assert list(row["answer"]) == sorted(set(row["answer"])), origin
        assert (len(row["answer"]) == 1) if row["kind"] == "choice" else (len(row["answer"]) >= 2), origin


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("rows", [TRAINED, EVALUATED], ids=["trained", "held out"])
def test_no_letter_is_right_too_often(rows, language):
    answers = Counter(row["answer"] for _, row in of_kind(rows, "choice") if row["language"] == language)
    assert max(answers.values()) <= 0.4 * answers.total(), answers
    assert min(answers[letter] for letter in "ABCD") >= 0.15 * answers.total(), answers


def test_the_right_option_is_not_told_by_its_length():
    longest = shortest = 0
    questions = of_kind(EVERYTHING, "choice")
    for _, row in questions:
        sizes = {letter: len(text) for letter, text in options_of(row).items()}
        right = sizes.pop(row["answer"])
        longest += right > max(sizes.values())
        shortest += right < min(sizes.values())
    assert longest <= 0.35 * len(questions)
    assert shortest <= 0.35 * len(questions)


def test_several_answers_are_neither_always_all_nor_always_the_same():
    answers = Counter(row["answer"] for _, row in of_kind(TRAINED, "choices"))
    assert len(answers) >= 8
    everything = sum(len(row["answer"]) == len(options_of(row)) for _, row in of_kind(TRAINED, "choices"))
    assert everything <= 0.2 * answers.total()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_yes_no_and_maybe_all_occur_and_maybe_is_offered_where_it_is_the_answer(language):
    yes, no, maybe = YES_NO[language]
    rows = [(origin, row) for origin, row in of_kind(EVERYTHING, "yesno") if row["language"] == language]
    counts = Counter(row["answer"] for _, row in rows)
    assert set(counts) == {yes, no, maybe}
    assert max(counts.values()) <= 0.5 * counts.total()
    offered = [(origin, row) for origin, row in rows if maybe in row["question"]]
    assert {row["answer"] for _, row in offered} == {yes, no, maybe}, "offering maybe must not give it away"
    for origin, row in rows:
        assert row["answer"] in (yes, no) or (origin, row) in offered, origin


def test_numbers_carry_a_unit_that_the_question_names():
    for origin, row in of_kind(EVERYTHING, "number"):
        unit = re.fullmatch(r"-?\d+(?:\.\d{1,2})? (\S+)", row["answer"])[1]
        assert unit in row["question"], origin
        assert float(row["answer"].split()[0]) != 0, origin


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_form_of_the_answer_is_asked_for_in_many_words(language):
    frames = {"choice": set(), "choices": set(), "yesno": set()}
    for kind, found in frames.items():
        for _, row in of_kind(TRAINED, kind):
            if row["language"] == language:
                text = row["question"] if kind == "yesno" else row["question"].replace(stem_of(row), "")
                found.add((text[:6], text[-6:]) if kind == "yesno" else OPTION.sub("", text).strip())
    asked = {kind: len(found) for kind, found in frames.items()}
    assert asked["choice"] >= 10 and asked["choices"] >= 5
    endings = Counter(ending for _, ending in frames["yesno"])
    assert sum(count > 1 for count in endings.values()) >= 4, "the same few endings come back, several of them"


def test_no_prompt_stands_there_twice():
    seen = {}
    for origin, row in EVERYTHING:
        canonical, _ = to_canonical(row)
        assert seen.setdefault(prompt_hash(canonical), origin) == origin
    stems = {}
    for origin, row in of_kind(EVERYTHING, "choice", "choices"):
        assert stems.setdefault(letters(stem_of(row)), origin) == origin


def test_no_evaluation_prompt_stands_in_any_training_folder():
    def prompts(path):
        for record, line in read_records(path):
            assert not isinstance(record, RowError), f"{path}:{line}"
            canonical, _ = to_canonical(record)
            yield f"{path}:{line}", prompt_hash(canonical)
            if not isinstance(canonical, Text):
                messages = canonical.messages if isinstance(canonical, Conversation) else canonical.prompt
                assert isinstance(canonical, (Conversation, Preference, Ranking, Question))
                yield from (
                    (f"{path}:{line}", hash_of(message["content"]))
                    for message in messages
                    if message["role"] == "user"
                )

    folders = [folder for folder in DATA.iterdir() if folder.is_dir() and folder.name not in ("eval", "rag")]
    assert {folder.name for folder in folders} >= {"pretrain", "finetune", "reward", "grpo"}
    trained = {}
    for folder in folders:
        for path in find_files(str(folder)):
            trained |= {found: origin for origin, found in prompts(path)}
    assert len(trained) > 1000
    for name in READ_BY_STAGES:
        for origin, found in prompts(DATA / "eval" / name):
            assert found not in trained, f"{origin} stands in {trained.get(found)}"


def test_no_held_out_choice_is_mostly_a_trained_one():
    """Of the runs of 8 letters in its question and right options, at most 40 % may stand in one trained item."""

    def said(row):
        right = [text for letter, text in options_of(row).items() if letter in row["answer"]]
        return letters(stem_of(row) + "".join(right))

    trained = {origin: said(row) for origin, row in of_kind(TRAINED, "choice", "choices")}
    for origin, row in of_kind(EVALUATED, "choice", "choices"):
        text = said(row)
        runs = {text[start : start + 8] for start in range(len(text) - 7)}
        for other, whole in trained.items():
            assert sum(run in whole for run in runs) <= 0.4 * len(runs), f"{origin} and {other}"


@pytest.mark.parametrize("what", PERSONAL)
def test_nothing_personal_stands_in_any_row(what):
    found = [origin for origin, row in EVERYTHING if re.search(PERSONAL[what], row["question"] + "\n" + row["answer"])]
    assert found == []


def test_nothing_written_by_hand_holds_a_dose():
    rows = of_kind(EVERYTHING, "choice", "choices", "yesno")
    assert [origin for origin, row in rows if re.search(DOSE, row["question"])] == []


def test_amounts_per_kilogram_belong_to_substances_that_do_not_exist():
    asked = [row["question"] for _, row in of_kind(EVERYTHING, "number") if re.search(r"mg\b", row["answer"])]
    per_weight = [text for text in asked if re.search(r"每千克|mg/kg|per kg|every kg", text)]
    assert len(per_weight) >= 6
    for text in per_weight:
        assert re.search("虚构|made-up|does not exist|imaginary", text), text


# -- the tool --------------------------------------------------------------------------------------------------------


def test_the_tool_writes_the_committed_files_byte_for_byte(tmp_path):
    for path, text in files_to_write(DATA, 20240).items():
        assert path.read_bytes() == text.encode(), path
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "verifiable.jsonl").write_bytes(HELD_OUT.read_bytes())
    main(["--data_dir", str(tmp_path)])
    main(["--data_dir", str(tmp_path)])  # once more: nothing is added to what is there
    assert (tmp_path / "eval" / "verifiable.jsonl").read_bytes() == HELD_OUT.read_bytes()
    assert (tmp_path / "grpo" / "numeric.jsonl").read_bytes() == (DATA / "grpo" / "numeric.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["numeric.jsonl", "verifiable.jsonl"]


def test_another_seed_gives_other_values_and_as_many():
    one, two = make_items(20240), make_items(5)
    assert [len(part) for part in one] == [len(part) for part in two] == [110, 30]
    assert one != two


def test_kinds_of_sums_are_many_and_worded_in_three_ways_or_more():
    assert sum(template.trained for template in TEMPLATES.values()) == 22
    assert sum(not template.trained for template in TEMPLATES.values()) == 4
    for template in TEMPLATES.values():
        for wordings in (template.zh, template.en):
            assert len(set(wordings)) == len(wordings) >= 3, template.name
            fields = [sorted(re.findall(r"\{(\w+)\}", wording)) for wording in wordings]
            assert {"elapsed", *template.givens} >= {*fields[0]} - {"today"}, template.name
            assert fields == [fields[0]] * len(fields), f"{template.name}: a wording leaves something out"


HAND_WORKED = [
    # 750 mL in 90 min: 750 / 1.5 h
    ("infusion_rate", {"volume": 750, "minutes": 90}, "500.0 mL/h"),
    # 500 mL × 20 drops = 10 000 drops in 480 min: 20.83
    ("drip_rate", {"volume": 500, "hours": 8, "factor": 20}, "21 drops/min"),
    # 650 / 125 = 5.2
    ("infusion_time", {"volume": 650, "rate": 125}, "5.2 h"),
    # 500 mL at 5 % hold 25 g; 100 mL of 30 % hold 30 g, so 83.33 mL
    ("dilution", {"stock": 30, "target": 5, "final": 500}, "83.3 mL"),
    ("weight_based", {"amount": Fraction("2.5"), "weight": 13}, "32.5 mg"),
    # 100 / 16 = 6.25 would be a tie; 90 / 16 = 5.625
    ("volume_to_draw", {"amount": 90, "strength": 16}, "5.6 mL"),
    ("milligrams_to_grams", {"mass": 70}, "0.07 g"),
    ("grams_to_milligrams", {"mass": Fraction("0.075")}, "75 mg"),
    # 5.6 × 18 = 100.8
    ("glucose_to_mg_per_dl", {"glucose": Fraction("5.6")}, "101 mg/dL"),
    # 126 / 18 = 7
    ("glucose_to_mmol_per_l", {"glucose": 126}, "7.0 mmol/L"),
    # 38.4 × 1.8 = 69.12, + 32
    ("celsius_to_fahrenheit", {"temperature": Fraction("38.4")}, "101.1 °F"),
    # 102.2 - 32 = 70.2; 70.2 / 1.8 = 39
    ("fahrenheit_to_celsius", {"temperature": Fraction("102.2")}, "39.0 °C"),
    # 13.3 × 7.5 = 99.75
    ("kilopascals_to_mmhg", {"pressure": Fraction("13.3")}, "100 mmHg"),
    # 150 × 0.4536 = 68.04
    ("pounds_to_kilograms", {"mass": 150}, "68.0 kg"),
    # 1.75² = 3.0625; 70 / 3.0625 = 22.857
    ("body_mass_index", {"weight": 70, "height": 175}, "22.9 kg/m²"),
    # 80 + 40 / 3 = 93.33
    ("mean_arterial_pressure", {"systolic": 120, "diastolic": 80}, "93 mmHg"),
    # 140 - 104 - 24
    ("anion_gap", {"sodium": 140, "chloride": 104, "bicarbonate": 24}, "12 mmol/L"),
    # 2.05 + 0.02 × 15
    ("corrected_calcium", {"calcium": Fraction("2.05"), "albumin": 25}, "2.35 mmol/L"),
    # 177 / 88.4 = 2.0023
    ("creatinine_units", {"creatinine": 177}, "2.00 mg/dL"),
    # 1000 + 500 - 1800 - 50
    ("fluid_balance", {"drunk": 1000, "infused": 500, "urine": 1800, "lost": 50}, "-350 mL"),
    # 1.34 × 15 × 0.98 = 19.698, + 0.003 × 90 = 0.27: 19.968
    ("oxygen_content", {"haemoglobin": 15, "saturation": 98, "pressure": 90}, "20.0 mL/dL"),
    # 100 / 7.5 = 13.33
    ("mmhg_to_kilopascals", {"pressure": 100}, "13.3 kPa"),
    # 12 × 0.5 L
    ("minute_volume", {"breaths": 12, "tidal": 500}, "6.0 L/min"),
    # 280 + 5.5 + 6.2
    ("osmolality", {"sodium": 140, "glucose": Fraction("5.5"), "urea": Fraction("6.2")}, "291.7 mmol/kg"),
    # 30 of 90
    ("predictive_value", {"ill": 30, "healthy": 60}, "33.3 %"),
]


@pytest.mark.parametrize(("name", "givens", "answer"), HAND_WORKED, ids=[name for name, _, _ in HAND_WORKED])
def test_a_sum_worked_by_hand(name, givens, answer):
    assert make_item(TEMPLATES[name], givens, "en", 0)["answer"] == answer


def test_every_kind_of_sum_is_worked_by_hand():
    assert {name for name, _, _ in HAND_WORKED} | {"due_date"} == set(TEMPLATES)


def test_a_due_date_worked_by_hand():
    """From 1 January 2024 (a leap year), 280 days end on 7 October; from 1 September there are 36 days left."""
    start = (datetime.date(2024, 1, 1) - datetime.date(2023, 1, 1)).days
    assert start == 365
    row = make_item(TEMPLATES["due_date"], {"start": start, "elapsed": 31 + 29 + 31 + 30 + 31 + 30 + 31 + 31}, "en", 0)
    assert "1 January 2024" in row["question"] and "1 September 2024" in row["question"]
    assert row["answer"] == "36 days"
    chinese = make_item(TEMPLATES["due_date"], {"start": start, "elapsed": 244}, "zh", 0)
    assert "2024年1月1日" in chinese["question"] and "2024年9月1日" in chinese["question"]
    assert chinese["answer"] == "36 天"


def numbers(text):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


# A way to know a committed row by its words, and its answer from the numbers in it, in the order they stand there.
RECOMPUTED = {
    r"^(?:体温|A thermometer|Convert a body temperature).* °C.*°F": lambda t: t * 9 / 5 + 32,
    r"^血压\d|^Blood pressure is": lambda systolic, diastolic, *_: diastolic + (systolic - diastolic) / 3,
    r"^身高|^An adult is": lambda height, weight: weight / height / height * 1e4,
    r"^血肌酐|^A creatinine of|^Express a creatinine": lambda creatinine, *_: creatinine / 88.4,
    r"^钠\d.*碳酸氢根|^Sodium .*anion gap|^Leaving potassium": lambda na, cl, hco3, *_: na - cl - hco3,
    r"^一袋|^A bag of": lambda volume, minutes: volume / (minutes / 60),
    r"^某试验真阳性|^Of the people with a positive": lambda ill, healthy: 100 * ill / (ill + healthy),
    r"^总钙|^Total calcium": lambda calcium, albumin, *_: calcium + 0.02 * (40 - albumin),
}


@pytest.mark.parametrize("pattern", RECOMPUTED)
def test_committed_answers_are_what_their_numbers_give(pattern):
    rows = [(origin, row) for origin, row in of_kind(EVERYTHING, "number") if re.search(pattern, row["question"])]
    assert rows
    for origin, row in rows:
        text = row["question"].replace("HCO3", "bicarbonate")
        number = row["answer"].split()[0]
        decimals = len(number.partition(".")[2])
        expected = RECOMPUTED[pattern](*numbers(text))
        assert f"{expected:.{decimals}f}" == number, f"{origin}: {expected}"


def test_due_dates_of_committed_rows_by_the_calendar():
    months = {datetime.date(2000, month, 1).strftime("%B"): month for month in range(1, 13)}
    checked = 0
    for _, row in of_kind(EVERYTHING, "number"):
        days = [datetime.date(*map(int, found)) for found in re.findall(r"(\d+)年(\d+)月(\d+)日", row["question"])]
        days += [
            datetime.date(int(year), months[month], int(day))
            for day, month, year in re.findall(r"(\d+) ([A-Z][a-z]+) (\d{4})", row["question"])
        ]
        if days:
            start, today = days
            left = (start + datetime.timedelta(days=280) - today).days
            assert row["answer"].split()[0] == str(left), row["question"]
            checked += 1
    assert checked >= 6


@pytest.mark.parametrize(
    ("number", "decimals", "ambiguous"),
    [
        ("6.25", 1, True),  # half up gives 6.3, half to even 6.2
        ("6.251", 1, True),
        ("6.24", 1, False),
        ("6.26", 1, False),
        ("2.5", 0, True),
        ("-2.5", 0, True),
        ("2.4", 0, False),
        ("7", 0, False),
        ("0.005", 2, True),
    ],
)
def test_a_number_near_a_tie_is_ambiguous(number, decimals, ambiguous):
    assert is_ambiguous(Fraction(number), decimals) is ambiguous


def test_an_item_whose_rounding_is_ambiguous_is_refused():
    with pytest.raises(AssertionError, match="near a tie"):
        make_item(TEMPLATES["volume_to_draw"], {"amount": 100, "strength": 16}, "en", 0)


def test_an_answer_that_does_not_lead_back_is_refused():
    """Were a formula mistyped, no item of it would come out."""
    right = TEMPLATES["mean_arterial_pressure"]
    wrong = dataclasses.replace(right, solve=lambda systolic, diastolic: (2 * systolic + diastolic) / 3)
    with pytest.raises(AssertionError, match="does not lead back"):
        make_item(wrong, {"systolic": 120, "diastolic": 90}, "en", 0)
    late = dataclasses.replace(TEMPLATES["due_date"], solve=lambda start, elapsed: 281 - elapsed)
    with pytest.raises(AssertionError, match="does not lead back"):
        make_item(late, {"start": 3, "elapsed": 100}, "en", 0)


@pytest.mark.parametrize(
    ("number", "decimals", "text"),
    [("12.54", 1, "12.5"), ("-0.4", 1, "-0.4"), ("7", 1, "7.0"), ("0.07", 2, "0.07"), ("99.6", 0, "100")],
)
def test_numbers_are_written_with_the_decimals_asked_for(number, decimals, text):
    assert fixed(Fraction(number), decimals) == text


def test_drawn_values_stay_in_their_ranges():
    for template in TEMPLATES.values():
        for seed in range(20):
            givens = draw(template, random.Random(seed))
            for name, value in givens.items():
                low, high, step = map(Fraction, template.givens[name])
                assert low <= value <= high and (value - low) % step == 0, template.name
            low, high = template.between
            assert low <= template.solve(**givens) <= high, template.name
