"""What stands in data/: enough of it, readable as it is, evaluation apart from training, nothing that could harm."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from stagekit.data import find_files, prompt_hash, read_records
from stagekit.formats import Conversation, Question, RowError, Text, to_canonical

DATA = Path(__file__).resolve().parents[1] / "data"
RUN = 13  # characters, letters and digits only, that count as copied when they stand in both texts


def load(folder):
    """[(origin, raw record, canonical record, repairs)] of every record below data/<folder>."""
    rows = []
    for path in find_files(str(DATA / folder)):
        for record, line in read_records(path):
            assert not isinstance(record, RowError), f"{path}:{line}: {record}"
            canonical, repairs = to_canonical(record)
            rows.append((f"{path.relative_to(DATA)}:{line}", record, canonical, dict(repairs.counts)))
    return rows


@pytest.fixture(scope="module")
def rows():
    return {folder: load(folder) for folder in ("pretrain", "finetune", "eval")}


def everything(rows):
    return [row for part in rows.values() for row in part]


def letters(text):
    """Letters and digits of a text in lower case and normal width."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(char for char in text if unicodedata.category(char)[0] in "LN")


def language(text):
    chinese = sum("\u4e00" <= char <= "\u9fff" for char in text)
    return "zh" if chinese > 0.1 * len(text) else "en"


def texts_of(canonical):
    """All that a record says to a reader."""
    if isinstance(canonical, Text):
        return [canonical.text]
    if isinstance(canonical, Question):
        return [message["content"] for message in canonical.prompt] + [canonical.solution]
    return [message["content"] for message in canonical.messages]


def test_every_record_is_of_its_folders_kind_and_needs_no_repair(rows):
    kinds = {"pretrain": Text, "finetune": Conversation, "eval": Question}
    for folder, part in rows.items():
        for origin, _, canonical, repairs in part:
            assert type(canonical) is kinds[folder], origin
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


def test_there_is_enough_to_evaluate_with(rows):
    questions = [canonical for _, _, canonical, _ in rows["eval"]]
    languages = Counter(language(canonical.solution) for canonical in questions)
    assert len(questions) >= 100
    assert min(languages["zh"], languages["en"]) >= 20
    assert all(len(canonical.solution) >= 20 for canonical in questions)


def test_no_record_stands_there_twice(rows):
    for folder, part in rows.items():
        seen = {}
        for origin, _, canonical, _ in part:
            whole = letters("".join(texts_of(canonical)))
            assert seen.setdefault(whole, origin) == origin, folder
    asked = {}
    for origin, _, canonical, _ in rows["eval"]:
        assert asked.setdefault(prompt_hash(canonical), origin) == origin


def test_no_evaluation_question_is_a_training_prompt(rows):
    trained = {
        prompt_hash(canonical): origin
        for folder in ("pretrain", "finetune")
        for origin, _, canonical, _ in rows[folder]
    }
    for origin, _, canonical, _ in rows["finetune"]:  # a question may also stand deeper in a conversation
        for message in canonical.messages:
            if message["role"] == "user":
                single = Conversation([message, {"role": "assistant", "content": ""}])
                trained[prompt_hash(single)] = origin
    for origin, _, canonical, _ in rows["eval"]:
        found = prompt_hash(canonical)
        assert found not in trained, f"{origin} is asked in {trained.get(found)}"


def test_no_evaluation_question_is_mostly_copied_from_a_training_text(rows):
    """Of the runs of 13 characters in a question, at most 40 % may stand in one and the same training record."""
    holders = {}
    for folder in ("pretrain", "finetune"):
        for origin, _, canonical, _ in rows[folder]:
            whole = letters("\n".join(texts_of(canonical)))
            for start in range(len(whole) - RUN + 1):
                holders.setdefault(whole[start : start + RUN], set()).add(origin)
    for origin, _, canonical, _ in rows["eval"]:
        question = letters(canonical.prompt[-1]["content"])
        runs = [question[start : start + RUN] for start in range(len(question) - RUN + 1)]
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
    "dose": rf"\d ?{UNIT}|\d ?{UNIT_ZH}",
    "number of tablets": r"\b(?:one|two|three|four|\d+) (?:tablet|pill|capsule)s?\b"
    r"|(?:每次|一次|每[日天]|服用?)[^，。]{0,4}[一二两三四半\d] ?[片粒丸]",
    "control token": r"<\|[^|>]*\|>|\[/?INST\]|</?s>",
    "damaged character": "\ufffd",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_personal_and_no_dose_stands_in_any_record(rows, what):
    pattern = re.compile(FORBIDDEN[what])
    found = [
        f"{origin}: {match.group()!r}"
        for origin, record, _, _ in everything(rows)
        for match in [pattern.search(json.dumps(record, ensure_ascii=False))]
        if match
    ]
    assert found == []


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
