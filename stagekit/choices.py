"""Multiple-choice questions of the usual medical benchmarks: one record for all, how they are put to a model, and how
its answer is read. No files, no model.

Read are CMB, CMExam, MedQA, MedMCQA, PubMedQA, C-Eval, CMMLU and MMLU in the forms they are published in, and the
plain {"question", "options": {"A": …}, "answer": "B" or "ACD", "subject", "language"}.
"""

import re
from dataclasses import dataclass
from itertools import combinations

from stagekit.formats import RowError
from stagekit.rewards import plain, read_choice, read_polarity, reference_letters, split_thinking

LETTERS = "ABCDEFGHIJK"  # as many options as rewards.read_choice knows
WORDS = ("yes", "no", "maybe")  # the options of PubMedQA, which have no letters
MAX_SEVERAL = 8  # options of a question with several right ones: 255 sets of letters to compare
SUBJECT_KEYS = ("subject", "exam_subject", "subject_name", "medical discipline", "meta_info")
ANSWER_KEYS = ("answer_idx", "answer", "answerkey", "label", "cop")
INSTRUCTIONS = {  # by language and kind; none forbids to think aloud, and none shows a letter that could be copied
    ("zh", "one"): "请回答正确选项的字母。",
    ("zh", "several"): "本题有不止一个正确选项，请把正确选项的字母连在一起回答。",
    ("en", "one"): "Answer with the letter of the correct option.",
    ("en", "several"): "More than one option is correct. Answer with their letters, written together.",
    ("en", "words"): "Answer with yes, no or maybe.",
    ("zh", "words"): "请回答 yes（是）、no（否）或 maybe（不确定）。",
}


@dataclass(frozen=True)
class Choice:
    """A question with options and a key.

    Attributes:
        question: with the context it is about, if it has one.
        options: text by letter, in order; for questions answered with a word, each word by itself.
        answer: the letters of the right options, in order ("B", "ACD"), or the word.
        several: the exam says that more than one option is right; then only the exact set of letters is right.
        subject: as the record names it, or None.
        language: "zh" or "en".
    """

    question: str
    options: dict[str, str]
    answer: str
    several: bool
    subject: str | None
    language: str

    @property
    def has_letters(self) -> bool:
        return tuple(self.options) != WORDS


# -- records ---------------------------------------------------------------------------------------------------------


def is_choice(record: object) -> bool:
    """Whether a record is a question with options of its own, rather than options inside the question's text."""
    fields = _fields(record)
    if not ("question" in fields or "sent1" in fields):
        return False
    return (
        any(fields.get(name) is not None for name in ("options", "option", "choices", "final_decision"))
        or {"opa", "opb"} <= fields.keys()
        or {"ending0", "ending1"} <= fields.keys()
        or {"a", "b"} <= fields.keys()
    )


def first_option(records: list[object]) -> int | None:
    """The number that stands for option A in a file's `cop` fields (MedMCQA: 0 on the hub, 1 in the original files).

    Returns:
        0 or 1; None where no record has such a field, or where the numbers allow both.
    """
    values = [_fields(record).get("cop") for record in records]
    numbers = {number for value in values if (number := _number(value)) is not None and number >= 0}
    return 0 if 0 in numbers else 1 if 4 in numbers else None


def to_choice(record: dict, first: int | None = None, subject: str | None = None) -> Choice:
    """Read one record of any of the known forms.

    Args:
        record: what the file holds.
        first: what `first_option` found or the user said; needed for records with a `cop` field.
        subject: for records that name none.

    Raises:
        RowError: not a question with options, or a key that is missing or names no option.
    """
    if not is_choice(record):
        raise RowError("expected a question with options and a key, such as question, options {A: …, B: …}, answer")
    fields = _fields(record)
    question = _question(fields)
    named = next((str(fields[key]) for key in SUBJECT_KEYS if fields.get(key) not in (None, "")), subject)
    language = fields.get("language") if fields.get("language") in ("zh", "en") else _language(question)
    if "final_decision" in fields:
        answer = str(fields["final_decision"]).strip().lower()
        if answer not in WORDS:
            raise RowError(f"final_decision {fields['final_decision']!r} is none of {', '.join(WORDS)}")
        return Choice(question, {word: word for word in WORDS}, answer, False, named, language)
    options, labels = _options(fields)
    answer = _answer(fields, options, labels, first)
    several = len(answer) > 1 or "多" in str(fields.get("question_type") or "")
    if several and len(options) > MAX_SEVERAL:
        raise RowError(f"{len(options)} options with several right ones; {MAX_SEVERAL} are the most")
    return Choice(question, options, answer, several, named, language)


def _fields(record):
    """A record with its field names in lower case: the same set is published as Question, QUESTION and question."""
    return {str(key).strip().lower(): value for key, value in record.items()} if isinstance(record, dict) else {}


def _question(fields):
    question = fields.get("question")
    if question is None:  # MedQA in the form of the SWAG data set
        question = " ".join(str(fields[key]) for key in ("sent1", "sent2") if fields.get(key))
    if not isinstance(question, str) or not question.strip():
        raise RowError("the question is empty or not a string")
    context = fields.get("context", fields.get("contexts"))
    context = context.get("contexts") if isinstance(context, dict) else context
    paragraphs = [context] if isinstance(context, str) else [] if context is None else context
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
    found = next((fields[key] for key in ("options", "option", "choices") if fields.get(key) is not None), None)
    if isinstance(found, dict) and isinstance(found.get("text"), list):  # ARC's {"text": […], "label": […]}
        labels, found = found.get("label"), found["text"]
    if isinstance(found, str):
        found = _split_options(found)
    elif isinstance(found, list) and all(isinstance(item, dict) for item in found):
        found = {item.get("key"): item.get("value") for item in found}
    elif found is None:
        found = _columns(fields)
    if isinstance(found, list):
        found = dict(zip(LETTERS, _without_letters(found), strict=False)) if len(found) <= len(LETTERS) else None
    if not isinstance(found, dict):
        raise RowError(f"the options cannot be read; expected at most {len(LETTERS)} as an object, a list or a string")
    found = {str(key).strip().upper(): value for key, value in found.items()}
    options = {key: str(value).strip() for key, value in found.items() if value is not None and str(value).strip()}
    if len(options) < 2 or not all(len(key) == 1 and key in LETTERS for key in options):
        raise RowError(f"expected two or more options named A to {LETTERS[-1]}, got {sorted(options) or 'none'}")
    named = labels if isinstance(labels, list) else LETTERS
    labels = {str(name).strip(): letter for name, letter in zip(named, LETTERS, strict=False) if letter in options}
    return dict(sorted(options.items())), labels


def _columns(fields):
    for names in ([f"op{letter}" for letter in "abcde"], [f"ending{number}" for number in range(len(LETTERS))]):
        if names[0] in fields:
            return [fields[name] for name in names if name in fields]
    return {letter: fields[letter.lower()] for letter in LETTERS if letter.lower() in fields}


def _split_options(text):
    """Cut "A xx\\nB yy" or "A. xx B. yy" into a dict; marks count only in the order of the alphabet."""
    for mark in (r"(?:^|\n)\s*([A-K])(?:\s*[.、:：)．]|\s)", r"(?:^|\s)([A-K])\s*[.、:：)．]"):
        places = []
        for found in re.finditer(mark, text):
            if found[1] == LETTERS[len(places)]:
                places.append(found)
        if len(places) > 1:
            ends = [*(place.start() for place in places[1:]), len(text)]
            return {place[1]: text[place.end() : end] for place, end in zip(places, ends, strict=True)}
    return None


def _without_letters(texts):
    """Options of a list, without the letters that some lists repeat: ["A. xx", "B. yy"]."""
    texts = [str(text) for text in texts]
    marks = [re.match(rf"\s*{letter}\s*[.、:：)．]", text) for letter, text in zip(LETTERS, texts, strict=False)]
    return [text[mark.end() :] for text, mark in zip(texts, marks, strict=True)] if all(marks) else texts


def _number(value):
    """An integer, also one written as text; None for anything else."""
    if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,3}(\.0)?", str(value).strip()):
        return None
    return int(float(value))


def _answer(fields, options, labels, first):
    key = next((key for key in ANSWER_KEYS if fields.get(key) not in (None, "", [])), None)
    if key is None:
        raise RowError(f"no key: none of the fields {', '.join(ANSWER_KEYS)} is filled (a test set without answers?)")
    counts = key == "cop" or "ending0" in fields  # there a number is a place, also where it is written as text
    items = fields[key] if isinstance(fields[key], list) else [fields[key]]
    return "".join(sorted(frozenset().union(*(_letters(key, item, options, labels, counts, first) for item in items))))


def _letters(key, value, options, labels, counts, first):
    """The letters that a key stands for: by the name of an option, by its text, or by its place."""
    text, number = plain(str(value)).strip(), _number(value)
    if text in labels:
        return frozenset(labels[text])
    if number is None or (isinstance(value, str) and not counts):
        letters = reference_letters(text, {name: plain(text) for name, text in options.items()})
        if not letters and re.fullmatch("[a-k]", text):
            letters = frozenset(text.upper()) & options.keys()
        if letters:
            return letters
    if number is None:
        raise RowError(f"{key} {value!r} names none of the options {', '.join(options)}")
    if key == "cop" and first is None:
        raise RowError(
            "cop: 0 stands for option A on the hub and 1 in MedMCQA's original files, and the numbers of this "
            "file allow both; say which with --first_option 0 or 1"
        )
    place = number - (first if key == "cop" else 0)
    if not 0 <= place < len(LETTERS) or LETTERS[place] not in options:
        raise RowError(f"{key} {value!r} names none of the {len(options)} options")
    return frozenset(LETTERS[place])


# -- questions and answers -------------------------------------------------------------------------------------------


def question_text(choice: Choice) -> str:
    """What the model is asked: the question, its options, one a line, and in which form to answer."""
    if not choice.has_letters:
        return f"{choice.question}\n{INSTRUCTIONS[choice.language, 'words']}"
    options = "\n".join(f"{letter}. {text}" for letter, text in choice.options.items())
    return f"{choice.question}\n{options}\n{INSTRUCTIONS[choice.language, 'several' if choice.several else 'one']}"


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
