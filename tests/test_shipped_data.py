"""What stands in data/: enough of it, readable as it is, evaluation apart from training, nothing that could harm."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from stagekit.files import find_files, read_records
from stagekit.formats import to_canonical
from stagekit.records import Conversation, Preference, Question, Ranking, RowError, Text
from stagekit.seen_prompts import prompt_hash

DATA = Path(__file__).resolve().parents[1] / "data"
FOLDERS = ("pretrain", "finetune", "reward", "eval")
TRAINED = ("pretrain", "finetune", "reward")  # what a model may have seen before it is evaluated
READ_BY_STAGES = ("preferences.jsonl", "questions.jsonl", "verifiable.jsonl")  # of eval/; others: test_eval_data.py
FAULTS = {
    *("overconfident_diagnosis", "missing_red_flags", "invented_dose", "unkind_tone", "dangerous_advice"),
    *("dishonest", "unhelpful"),
}
RUN = 13  # characters, letters and digits only, that count as copied when they stand in both texts


def load(folder):
    """[(origin, raw record, canonical record, repairs)] of every record below data/<folder> that a stage reads."""
    rows = []
    paths = ",".join(str(DATA / "eval" / name) for name in READ_BY_STAGES) if folder == "eval" else str(DATA / folder)
    for path in find_files(paths):
        for record, line in read_records(path):
            assert not isinstance(record, RowError), f"{path}:{line}: {record}"
            canonical, repairs = to_canonical(record)
            rows.append((f"{path.relative_to(DATA)}:{line}", record, canonical, dict(repairs.counts)))
    return rows


@pytest.fixture(scope="module")
def rows():
    return {folder: load(folder) for folder in FOLDERS}


def everything(rows):
    return [row for part in rows.values() for row in part]


def letters(text):
    """Letters and digits of a text in lower case and normal width."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(char for char in text if unicodedata.category(char)[0] in "LN")


def language(text):
    chinese = sum("\u4e00" <= char <= "\u9fff" for char in text)
    return "zh" if chinese > 0.1 * len(text) else "en"


def contents(messages):
    return [message["content"] for message in messages]


def texts_of(canonical):
    """All that a record says to a reader."""
    if isinstance(canonical, Text):
        return [canonical.text]
    if isinstance(canonical, Question):
        return [*contents(canonical.prompt), canonical.solution]
    if isinstance(canonical, Preference):
        return contents([*canonical.prompt, *canonical.chosen, *canonical.rejected])
    if isinstance(canonical, Ranking):
        return contents([*canonical.prompt, *(message for answer in canonical.answers for message in answer)])
    return contents(canonical.messages)


def meant_to_be_followed(record, canonical):
    """What a record holds up as right, as JSON: all of it but worse answers."""
    if isinstance(canonical, Preference):
        record = [canonical.prompt, canonical.chosen, canonical.tools]
    if isinstance(canonical, Ranking):
        best = [answer for answer, rank in zip(canonical.answers, canonical.ranks, strict=True) if rank == 0]
        record = [canonical.prompt, best, canonical.tools]
    return json.dumps(record, ensure_ascii=False)


def preferences(part):
    """[(origin, raw record, preference)] of the rows that hold one pair."""
    return [(origin, record, canonical) for origin, record, canonical, _ in part if isinstance(canonical, Preference)]


def rankings(part):
    return [canonical for _, _, canonical, _ in part if isinstance(canonical, Ranking)]


def users_texts(canonical):
    """What the user of a record asks, message by message."""
    messages = canonical.messages if isinstance(canonical, Conversation) else canonical.prompt
    return [message["content"] for message in messages if message["role"] == "user"]


def hash_of(text):
    """The prompt hash of a conversation that opens with a text."""
    return prompt_hash(Conversation([{"role": "user", "content": text}]))


def test_every_record_is_of_its_folders_kind_and_needs_no_repair(rows):
    kinds = {"pretrain": {Text}, "finetune": {Conversation}, "reward": {Preference, Ranking}}
    kinds["eval"] = {Question, Preference}
    for folder, part in rows.items():
        assert {type(canonical) for _, _, canonical, _ in part} == kinds[folder], folder
        for origin, _, _, repairs in part:
            assert repairs == {}, origin


def test_there_is_enough_to_pretrain_on(rows):
    sizes = [len(canonical.text.encode()) for _, _, canonical, _ in rows["pretrain"]]
    assert sum(sizes) >= 300_000
    assert len(sizes) >= 150
    assert min(sizes) >= 200, "a document of a few words is no document"
    assert Counter(language(canonical.text) for _, _, canonical, _ in rows["pretrain"]).keys() == {"zh", "en"}


def test_there_is_enough_to_finetune_on(rows):
    talks = [canonical for _, _, canonical, _ in rows["finetune"]]
    turns = [sum(message["role"] == "user" for message in talk.messages) for talk in talks]
    with_calls = [talk for talk in talks if any("tool_calls" in message for message in talk.messages)]
    with_system = [talk for talk in talks if talk.messages[0]["role"] == "system"]
    languages = Counter(language("".join(texts_of(talk))) for talk in talks)
    assert len(talks) >= 400
    assert sum(count > 1 for count in turns) >= len(talks) / 3
    assert len(with_calls) >= 20
    assert len(with_system) >= 10
    assert min(languages["zh"], languages["en"]) >= 100


def test_there_is_enough_to_learn_preferences_from(rows):
    pairs = [pair for _, _, pair in preferences(rows["reward"])]
    languages = Counter(language("".join(texts_of(pair))) for pair in pairs)
    assert len(pairs) >= 250
    assert min(languages["zh"], languages["en"]) >= 100
    assert sum(len(users_texts(pair)) > 1 for pair in pairs) >= 30
    assert sum(pair.prompt[0]["role"] == "system" for pair in pairs) >= 10
    assert any(pair.tools for pair in pairs)
    ranked = Counter(language("".join(texts_of(ranking))) for ranking in rankings(rows["reward"]))
    assert min(ranked["zh"], ranked["en"]) >= 10


def test_there_is_enough_to_evaluate_with(rows):
    asked = [(record, canonical) for _, record, canonical, _ in rows["eval"] if isinstance(canonical, Question)]
    questions = [canonical for record, canonical in asked if "kind" not in record]  # the others: test_grpo_data.py
    languages = Counter(language(canonical.solution) for canonical in questions)
    assert len(questions) >= 100
    assert min(languages["zh"], languages["en"]) >= 20
    assert all(len(canonical.solution) >= 20 for canonical in questions)
    pairs = preferences(rows["eval"])
    languages = Counter(language("".join(texts_of(pair))) for _, _, pair in pairs)
    assert len(pairs) >= 60
    assert min(languages["zh"], languages["en"]) >= 20
    assert any(len(users_texts(pair)) > 1 for _, _, pair in pairs)


def test_answers_are_in_the_language_of_their_question(rows):
    for origin, record, pair in preferences(rows["reward"] + rows["eval"]):
        sides = {language("".join(contents(part))) for part in (pair.prompt, pair.chosen, pair.rejected)}
        assert len(sides) == 1 and record.get("language") in (None, *sides), origin


def test_no_two_answers_to_be_compared_are_the_same(rows):
    for origin, _, canonical, _ in rows["reward"] + rows["eval"]:
        answers = {Preference: lambda pair: [pair.chosen, pair.rejected], Ranking: lambda ranking: ranking.answers}
        sides = [
            letters("".join(contents(answer))) for answer in answers.get(type(canonical), lambda _: [])(canonical)
        ]
        assert len(set(sides)) == len(sides) and all(sides), origin


def test_a_better_answer_is_not_told_by_its_length(rows):
    """With a longer better answer in nearly all pairs, a model would learn to count."""
    groups = {"ranked": [pair for ranking in rankings(rows["reward"]) for pair in ranking.pairs()]}
    for folder in ("reward", "eval"):
        for origin, record, pair in preferences(rows[folder]):
            for name in (folder, origin.split(":")[0], f"{folder} {language(''.join(texts_of(pair)))}"):
                groups.setdefault(name, []).append(pair)
            if folder == "reward":
                groups.setdefault(record["fault"], []).append(pair)
    for name, pairs in groups.items():
        longer = sum(len("".join(contents(pair.chosen))) > len("".join(contents(pair.rejected))) for pair in pairs)
        assert 0.35 <= longer / len(pairs) <= 0.65, f"{name}: longer in {longer} of {len(pairs)}"


def test_every_fault_is_known_and_stands_in_enough_pairs(rows):
    trained = Counter(record["fault"] for _, record, _ in preferences(rows["reward"]))
    held_out = Counter(record["fault"] for _, record, _ in preferences(rows["eval"]))
    assert set(trained) == set(held_out) == FAULTS
    assert min(trained.values()) >= 20
    assert min(held_out.values()) >= 5


def test_no_record_stands_there_twice(rows):
    for folder, part in rows.items():
        seen = {}
        for origin, _, canonical, _ in part:
            whole = letters("".join(texts_of(canonical)))
            assert seen.setdefault(whole, origin) == origin, folder
    for folder in ("reward", "eval"):
        asked = {}
        for origin, _, canonical, _ in rows[folder]:
            assert asked.setdefault(prompt_hash(canonical), origin) == origin


def test_no_evaluation_prompt_is_a_training_prompt(rows):
    trained = {prompt_hash(canonical): origin for folder in TRAINED for origin, _, canonical, _ in rows[folder]}
    for origin, _, canonical, _ in rows["finetune"] + rows["reward"]:
        for text in users_texts(canonical):  # a question may also stand deeper in a conversation
            trained[hash_of(text)] = origin
    for origin, _, canonical, _ in rows["eval"]:
        for found in (prompt_hash(canonical), *map(hash_of, users_texts(canonical))):
            assert found not in trained, f"{origin} is asked in {trained.get(found)}"


def test_no_evaluation_prompt_or_answer_is_mostly_copied_from_a_training_text(rows):
    """Of the runs of 13 characters in a text, at most 40 % may stand in one and the same training record."""
    holders = {}
    for folder in TRAINED:
        for origin, _, canonical, _ in rows[folder]:
            whole = letters("\n".join(texts_of(canonical)))
            for start in range(len(whole) - RUN + 1):
                holders.setdefault(whole[start : start + RUN], set()).add(origin)
    for origin, _, canonical, _ in rows["eval"]:
        texts = [canonical.prompt[-1]["content"]]
        if isinstance(canonical, Preference):
            texts += contents([*canonical.chosen, *canonical.rejected])
        for text in map(letters, texts):
            runs = [text[start : start + RUN] for start in range(len(text) - RUN + 1)]
            copied = Counter(holder for run in runs for holder in holders.get(run, ()))
            for holder, count in copied.most_common(1):
                assert count <= 0.4 * len(runs), f"{origin}: {count} of {len(runs)} runs stand in {holder}"


# An amount in a volume of blood ("54 mg/dL") is a laboratory value and no dose.
PER_VOLUME = r"(?! ?(?:/|per) ?(?:[dm]?[lL](?![A-Za-z])|(?:deci|milli)?lit))"
UNIT = rf"(?:mg|mcg|μg|µg|ug|IU|milligrams?|micrograms?)(?![A-Za-z]){PER_VOLUME}"
UNIT_ZH = r"(?:毫克|微克|国际单位)(?!/ ?(?:d?[lL]|分?升|毫升)|每(?:分升|升|毫升))"
FORBIDDEN = {
    "e-mail address": r"[\w.+-]+@[\w-]+\.\w+",
    "Chinese mobile number": r"(?<!\d)1[3-9]\d{9}(?!\d)",
    "telephone number": r"(?<![\d.])(?:\+?\d{1,3}[ -])?\(?\d{3,4}\)?[ -]\d{3,4}[ -]?\d{4}(?!\d)",
    "identity card": r"(?<!\d)\d{17}[\dXx](?!\w)",
    "web address": r"https?://|www\.",
    "dose": rf"\d ?{UNIT}|[\d一二两三四五六七八九十百千半] ?{UNIT_ZH}",
    "number of tablets": r"\b(?:one|two|three|four|\d+) (?:tablet|pill|capsule)s?\b"
    r"|(?:每次|一次|每[日天]|服用?)[^，。]{0,4}[一二两三四半\d] ?[片粒丸]",
    "control token": r"<\|[^|>]*\|>|\[/?INST\]|</?s>",
    "damaged character": "\ufffd",
}


DOSES = ("dose", "number of tablets")


def found_in(rows, what, text_of):
    pattern = re.compile(FORBIDDEN[what])
    return [
        f"{origin}: {match.group()!r}"
        for origin, record, canonical, _ in everything(rows)
        for match in [pattern.search(text_of(record, canonical))]
        if match
    ]


@pytest.mark.parametrize("what", [what for what in FORBIDDEN if what not in DOSES])
def test_nothing_personal_or_damaged_stands_in_any_record(rows, what):
    assert found_in(rows, what, lambda record, _: json.dumps(record, ensure_ascii=False)) == []


@pytest.mark.parametrize("what", DOSES)
def test_no_dose_stands_in_anything_but_a_worse_answer(rows, what):
    def real(record, canonical):  # a sum names made-up amounts, as test_grpo_data.py sees to
        return "" if record.get("kind") == "number" else meant_to_be_followed(record, canonical)

    assert found_in(rows, what, real) == []


def test_a_dose_in_a_worse_answer_is_what_some_pairs_warn_of(rows):
    """Were doses looked for in the wrong place, or their pattern too narrow, the test above would pass for nothing."""
    for folder, least in (("reward", 10), ("eval", 3)):
        warned = [pair for _, record, pair in preferences(rows[folder]) if record["fault"] == "invented_dose"]
        worse = ["".join(contents(pair.rejected)) for pair in warned]
        assert sum(any(re.search(FORBIDDEN[what], text) for what in DOSES) for text in worse) >= least


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("e-mail address", "write to a.b@example.org"),
        ("Chinese mobile number", "电话13812345678。"),
        ("telephone number", "call 010-6552 1234 or (555) 123-4567"),
        ("identity card", "11010519491231002X"),
        ("web address", "see https://x"),
        ("dose", "take 500 mg"),
        ("dose", "每次0.5毫克"),
        ("dose", "一日5mg的药"),
        ("dose", "每次五百毫克"),
        ("dose", "10 mg per day"),
        ("dose", "5 mg/kg"),
        ("dose", "每次5毫克/公斤"),
        ("number of tablets", "take two tablets"),
        ("number of tablets", "每次吃两片"),
        ("control token", "<|im_end|>"),
        ("damaged character", "发\ufffd"),
    ],
)
def test_the_patterns_find_what_they_are_meant_to_find(what, text):
    assert re.search(FORBIDDEN[what], text)


@pytest.mark.parametrize("text", ["54 mg/dL是", "10 milligrams per litre", "5 mg per L", "54毫克/分升", "10毫克每升"])
def test_a_laboratory_value_is_no_dose(text):
    assert not re.search(FORBIDDEN["dose"], text)


def test_tool_calls_are_json_for_a_tool_that_is_offered(rows):
    for origin, _, canonical, _ in rows["finetune"]:
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in canonical.tools or []}
        for previous, message in zip(canonical.messages, canonical.messages[1:], strict=False):
            for call in message.get("tool_calls", []):
                name, given = call["function"]["name"], call["function"]["arguments"]
                assert name in offered, (origin, name)
                assert isinstance(given, dict), origin
                assert set(offered[name].get("required", [])) <= set(given) <= set(offered[name]["properties"]), origin
            if message["role"] == "tool":
                json.loads(message["content"])
                assert previous.get("tool_calls") or previous["role"] == "tool", origin
