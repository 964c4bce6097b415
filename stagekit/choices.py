"""Multiple-choice questions of the usual medical benchmarks: one record for all, how they are put to a model, and how
its answer is read. No files, no model.

Read are CMB, CMExam, MedQA, MedMCQA, PubMedQA, C-Eval, CMMLU and MMLU in the forms they are published in, and the
plain {"question", "options": {"A": …}, "answer": "B" or "ACD", "subject", "language", "explanation"}. Training and
evaluation read them here alike.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations

from stagekit.dialogues import is_missing, is_number
from stagekit.records import WORDS, Choice, RowError, shown
from stagekit.rewards import plain, read_choice, read_polarity, reference_letters, split_thinking

LETTERS = "ABCDEFGHIJK"  # as many options as rewards.read_choice knows
MAX_SEVERAL = 8  # options of a question with several right ones: 255 sets of letters to compare
MAX_OPTION_CHARS = 10_000  # a longer one is a mistake, and would be made a pattern of
SUBJECT_KEYS = ("subject", "exam_subject", "subject_name", "medical discipline", "meta_info")
ANSWER_KEYS = ("answer_idx", "answer", "answerkey", "label", "cop")
HOLDERS = ("options", "option", "choices", "final_decision")  # where options stand, or what stands for them
COLUMNS = (("opa", "opb"), ("ending0", "ending1"), ("a", "b"))  # the first two fields of options in columns
EXPLANATION_KEYS = ("explanation", "exp", "long_answer", "rationale")
INSTRUCTIONS = {  # by language and kind; none forbids to think aloud, and none shows a letter that could be copied
    ("zh", "one"): "请回答正确选项的字母。",
    ("zh", "several"): "本题有不止一个正确选项，请把正确选项的字母连在一起回答。",
    ("en", "one"): "Answer with the letter of the correct option.",
    ("en", "several"): "More than one option is correct. Answer with their letters, written together.",
    ("en", "words"): "Answer with yes, no or maybe.",
    ("zh", "words"): "请回答 yes（是）、no（否）或 maybe（不确定）。",
}


# -- records ---------------------------------------------------------------------------------------------------------


def is_choice(record: object) -> bool:
    """Whether a record is a question with options of its own, rather than options inside the question's text."""
    if not isinstance(record, dict) or not _may_be_choice(tuple(record)):
        return False
    fields = _fields(record)
    in_columns = any(first in fields and second in fields for first, second in COLUMNS)
    return in_columns or any(not is_missing(fields.get(name)) for name in HOLDERS)


@lru_cache(maxsize=1024)
def _may_be_choice(names):
    """Whether records with these field names can be choices; asked for every row, and files repeat their names."""
    fields = {str(name).strip().lower() for name in names}
    asked = "question" in fields or "sent1" in fields
    return asked and (not fields.isdisjoint(HOLDERS) or any(fields.issuperset(pair) for pair in COLUMNS))


def first_option(records: Iterable[object]) -> int | None:
    """The number that stands for option A in a file's `cop` fields (MedMCQA: 0 on the hub, 1 in the original files).

    Args:
        records: of one file, in any order; reading stops at the first 0, which settles it.

    Returns:
        0 or 1; None where no record has such a field, or where the numbers allow both.
    """
    found = None
    for record in records:
        number = _number(_fields(record).get("cop"))
        if number == 0:
            return 0
        if number == 4:  # does not settle it: of five options it may be the last, counted from 0
            found = 1
    return found


def needs_first_option(record: object) -> bool:
    """Whether the key of a record is a number that only the whole file explains; first_option finds out."""
    number = _number(_fields(record).get("cop")) if is_choice(record) else None
    return number is not None and number >= 0


def to_choice(record: dict, first: int | None = None, subject: str | None = None, to_measure: bool = True) -> Choice:
    """Read one record of any of the known forms.

    Args:
        record: what the file holds.
        first: what `first_option` found or the user said; needed for records with a `cop` field.
        subject: for records that name none.
        to_measure: the key must be there, and the sets of letters few enough to compare; to learn from, neither.

    Raises:
        RowError: not a question with options, or a key that is missing or names no option.
    """
    if not is_choice(record):
        raise RowError("expected a question with options and a key, such as question, options {A: …, B: …}, answer")
    fields = _fields(record)
    question = question_of(fields)
    named = next((str(fields[key]) for key in SUBJECT_KEYS if _is_name(fields.get(key))), subject)
    language = fields.get("language") if fields.get("language") in ("zh", "en") else _language(question)
    explanation = next((fields[key].strip() for key in EXPLANATION_KEYS if _is_text(fields.get(key))), "")
    if not is_missing(fields.get("final_decision")):
        decision = fields["final_decision"]
        answer = decision.strip().lower() if isinstance(decision, str) else ""
        if answer not in WORDS:
            raise RowError(f"final_decision {shown(decision)} is none of {', '.join(WORDS)}")
        return Choice(question, {word: word for word in WORDS}, answer, False, named, language, explanation)
    options, labels = _options(fields)
    answer = _answer(fields, options, labels, first, to_measure)
    kind = fields.get("question_type")
    several = len(answer) > 1 or (isinstance(kind, str) and "多" in kind)
    if to_measure and several and len(options) > MAX_SEVERAL:
        raise RowError(f"{len(options)} options with several right ones; {MAX_SEVERAL} are the most")
    return Choice(question, options, answer, several, named, language, explanation)


def _fields(record):
    """A record with its field names in lower case: the same set is published as Question, QUESTION and question."""
    return {str(key).strip().lower(): value for key, value in record.items()} if isinstance(record, dict) else {}


def _is_text(value):
    return isinstance(value, str) and bool(value.strip())


def _is_name(value):
    return _is_text(value) or is_number(value)


def question_of(fields: dict) -> str:
    """The question of a record, with the paragraphs it is about in front; field names are in lower case.

    Raises:
        RowError: it is empty, or one of them is no text.
    """
    question = fields.get("question")
    if question is None:  # MedQA in the form of the SWAG data set
        question = " ".join(fields[key] for key in ("sent1", "sent2") if _is_text(fields.get(key)))
    if not _is_text(question):
        raise RowError("the question is empty or not a string")
    context = fields.get("context", fields.get("contexts"))
    context = context.get("contexts") if isinstance(context, dict) else context
    paragraphs = [context] if isinstance(context, str) else [] if is_missing(context) else context
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, str) for paragraph in paragraphs):
        raise RowError("the context must be a string or a list of strings")
    return "\n".join([*(paragraph.strip() for paragraph in paragraphs if paragraph.strip()), question.strip()])


def _language(text):
    return "zh" if re.search("[\u3400-\u9fff]", text) else "en"


def _options(fields):
    """(options by letter, letters by the names that the record has for them).

    Empty options, which fill up a fixed number of columns, are left out.
    """
    labels = None
    found = next((fields[key] for key in HOLDERS[:3] if not is_missing(fields.get(key))), None)
    if isinstance(found, dict) and isinstance(found.get("text"), list):  # ARC's {"text": […], "label": […]}
        labels, found = found.get("label"), found["text"]
    if isinstance(found, str):
        found = _split_options(found)
    elif isinstance(found, list) and all(isinstance(item, dict) for item in found):
        found = {str(item.get("key"))[:9]: item.get("value") for item in found}
    elif found is None:
        found = _columns(fields)
    if isinstance(found, list):
        found = dict(zip(LETTERS, _without_letters(found), strict=False)) if len(found) <= len(LETTERS) else None
    if not isinstance(found, dict):
        raise RowError(f"the options cannot be read; expected at most {len(LETTERS)} as an object, a list or a string")
    texts = {str(key).strip().upper(): _option_text(value) for key, value in found.items()}
    options = {key: text for key, text in texts.items() if text}
    if len(options) < 2 or not all(len(key) == 1 and key in LETTERS for key in options):
        names = shown(sorted(options)) if options else "none"
        raise RowError(f"expected two or more options named A to {LETTERS[-1]}, got {names}")
    named = labels if isinstance(labels, list) else LETTERS
    labels = {str(name).strip(): letter for name, letter in zip(named, LETTERS, strict=False) if letter in options}
    return dict(sorted(options.items())), labels


def _option_text(value):
    if isinstance(value, str):
        return value.strip()
    if is_missing(value):
        return ""
    if not is_number(value) and not isinstance(value, bool):
        raise RowError(f"an option must be text, got {type(value).__name__}")
    return str(value)


def _columns(fields):
    for names in ([f"op{letter}" for letter in "abcde"], [f"ending{number}" for number in range(len(LETTERS))]):
        if names[0] in fields:
            return [fields[name] for name in names if name in fields]
    return {letter: fields[letter.lower()] for letter in LETTERS if letter.lower() in fields}


def _split_options(text):
    """Cut "A xx\\nB yy" or "A. xx B. yy" into a dict; marks count only in the order of the alphabet."""
    for mark in (r"(?:^|\n)[^\S\n]*([A-K])(?:\s*[.、:：)．]|\s)", r"(?:^|\s)([A-K])\s*[.、:：)．]"):
        places = []
        for found in re.finditer(mark, text):
            if len(places) < len(LETTERS) and found[1] == LETTERS[len(places)]:
                places.append(found)
        if len(places) > 1:
            ends = [*(place.start() for place in places[1:]), len(text)]
            return {place[1]: text[place.end() : end] for place, end in zip(places, ends, strict=True)}
    return None


def _without_letters(options):
    """Options of a list, without the letters that some lists repeat: ["A. xx", "B. yy"]."""
    texts = [_option_text(option) for option in options]
    marks = [re.match(rf"\s*{letter}\s*[.、:：)．]", text) for letter, text in zip(LETTERS, texts, strict=False)]
    return [text[mark.end() :] for text, mark in zip(texts, marks, strict=True)] if all(marks) else texts


def _number(value):
    """An integer, also one written as text; None for anything else."""
    text = str(value).strip() if is_number(value) else value.strip() if isinstance(value, str) else ""
    return int(float(text)) if len(text) < 9 and re.fullmatch(r"-?\d{1,3}(\.0)?", text) else None


def _answer(fields, options, labels, first, to_measure):
    """The letters of the key; "" where there is none and none is needed."""
    key = next((key for key in ANSWER_KEYS if _is_filled(fields.get(key))), None)
    if key is None:
        if not to_measure:
            return ""
        raise RowError(f"no key: none of the fields {', '.join(ANSWER_KEYS)} is filled (a test set without answers?)")
    value = fields[key]
    if key == "cop" and _number(value) == -1 and not to_measure:  # MedMCQA's test set
        return ""
    counts = key == "cop" or "ending0" in fields  # there a number is a place, also where it is written as text
    items = value if isinstance(value, list) else [value]
    return "".join(sorted(frozenset().union(*(_letters(key, item, options, labels, counts, first) for item in items))))


def _letters(key, value, options, labels, counts, first):
    """The letters that a key stands for: by the name of an option, by its text, or by its place."""
    text = plain(value).strip() if isinstance(value, str) else str(value) if is_number(value) else ""
    number = _number(value)
    if text in labels:
        return frozenset(labels[text])
    if number is None or (isinstance(value, str) and not counts):
        # "ACE" may also be the text of an option, which rewards.reference_letters looks for
        texts = {option.strip(" .").upper() for option in options.values()} if len(text) > 1 else ()
        if text and set(text) <= options.keys() and (key == "answer_idx" or text not in texts):
            return frozenset(text)
        letters = None
        if max(len(text), *map(len, options.values())) <= MAX_OPTION_CHARS:
            letters = reference_letters(text, {name: plain(option) for name, option in options.items()})
        if not letters and re.fullmatch("[a-k]", text):
            letters = frozenset(text.upper()) & options.keys()
        if letters:
            return letters
    if number is None:
        raise RowError(f"{key} {shown(value)} names none of the options {', '.join(options)}")
    if key == "cop" and first is None:
        raise RowError(
            "cop: 0 stands for option A on the hub and 1 in MedMCQA's original files, and the numbers of this "
            "file allow both; say which with --first_option 0 or 1"
        )
    place = number - (first if key == "cop" else 0)
    if not 0 <= place < len(LETTERS) or LETTERS[place] not in options:
        raise RowError(f"{key} {shown(value)} names none of the {len(options)} options")
    return frozenset(LETTERS[place])


def _is_filled(value):
    return not (is_missing(value) or value == [] or (isinstance(value, str) and not value.strip()))


# -- questions and answers -------------------------------------------------------------------------------------------


def options_text(choice: Choice) -> str:
    """The options, one a line; "" for a question that is answered with a word."""
    return "\n".join(f"{letter}. {text}" for letter, text in choice.options.items()) if choice.has_letters else ""


def question_text(choice: Choice) -> str:
    """What the model is asked: the question, its options, one a line, and in which form to answer."""
    kind = "words" if not choice.has_letters else "several" if choice.several else "one"
    parts = (choice.question, options_text(choice), INSTRUCTIONS[choice.language, kind])
    return "\n".join(part for part in parts if part)


def answer_text(choice: Choice) -> str:
    """What a model learns to answer: what question_text asks for, the text of the options, why they are right.

    "C. Skin", or for several "AC" with a line for each option, or a word; the explanation behind an empty line. It
    begins with the letters that are asked for, so that read_answer and the likelihood of the candidates agree.
    """
    chosen = [f"{letter}. {choice.options[letter]}" for letter in choice.answer] if choice.has_letters else []
    if not chosen:
        answer = choice.answer
    else:
        answer = chosen[0] if len(chosen) == 1 else "\n".join([choice.answer, *chosen])
    return "\n\n".join(part for part in (answer, choice.explanation) if part)


def candidates(choice: Choice) -> list[str]:
    """All answers that can be given: the letters (or words), or every set of letters where several are right."""
    if not choice.several:
        return list(choice.options)
    sizes = range(1, len(choice.options) + 1)
    return ["".join(letters) for size in sizes for letters in combinations(choice.options, size)]


def read_answer(choice: Choice, completion: str) -> str | None:
    """Find what a free answer finally chooses.

    Returns:
        Letters in order or a word; "" where it contradicts itself or leaves it open ("A or B"), which is wrong; None
        where nothing can be read.
    """
    prompt = question_text(choice)
    answer = split_thinking(completion, prompt)[1]
    if not answer:
        return None
    if choice.has_letters:
        options = {letter: plain(text).strip(" .,;。、") or letter for letter, text in choice.options.items()}
        found = read_choice(plain(answer), plain(prompt), options)
        return None if found is None else "".join(sorted(found)) if isinstance(found, frozenset) else ""
    found = read_polarity(plain(answer))
    return None if found is None else found if isinstance(found, str) else ""


def choose_shots(choice: Choice, pool: list[Choice], count: int) -> list[Choice]:
    """Choose solved questions to show before one: the first of the pool, those of its form and subject before others.

    Args:
        choice: the question that will be asked.
        pool: solved questions, none of which is measured.
        count: how many to show.
    """

    def distance(shot):
        return (shot.several, shot.has_letters) != (choice.several, choice.has_letters), shot.subject != choice.subject

    return sorted(pool, key=distance)[:count]
