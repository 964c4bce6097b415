"""What one record of a data file becomes, whatever form it came in: the canonical kinds. No files, no tokens.

A message is {"role": "system" | "user" | "assistant" | "tool", "content": str}. An assistant's may also have
"tool_calls": [{"type": "function", "function": {"name", "arguments"}}], and "train": False where it stands in the
dialogue but is not to be learnt.
"""

import reprlib
from collections import Counter
from dataclasses import dataclass, field

WORDS = ("yes", "no", "maybe")  # the options of questions that are answered with a word and have no letters

# Why a row that can be read is left out; the ledger counts rows by these.
NO_PARENT = "a message whose tree is not whole"
DROP_REASONS = (
    "empty text",
    "empty dialogue",
    "empty answer",
    "no question followed by an answer",
    "no answer in the data",
    "marked as not to be learnt",
    "the two answers belong to different questions",
    "deleted",
    "rejected in review",
    "a tree without an answer",
    "a tree without ranked answers",
    "comes with images, sound or video",
    NO_PARENT,
)
# What may be mended in a row so that it can be read; the ledger counts repairs by these.
REPAIRS = (
    "answer before the first question dropped",
    "turn after the last answer dropped",
    "empty message dropped",
    "neighbouring messages of one speaker merged",
    "number read as text",
    "HTML turned into text",
    "misspelt speaker's mark read",
    "missing line break before a speaker's mark",
    "dialogues compared from where they part",
    "word 'input' before an input removed",
    "placeholder in place of an input dropped",
    "loss weight taken as 1",
    "training marks within an answer ignored",
    "message of a tree left out with its replies",
)


class RowError(ValueError):
    """A record that cannot be read; the text says what is wrong and what was expected."""


class Unused(RowError):
    """A record that can be read and is not to be learnt from; it is dropped and counted, and never stops a run.

    Attributes:
        reason: one of DROP_REASONS; the text may say more.
    """

    def __init__(self, reason: str, text: str | None = None):
        assert reason in DROP_REASONS, f"{reason!r} is no reason of records.DROP_REASONS"
        super().__init__(text or reason)
        self.reason = reason

    def __reduce__(self):  # so that it comes through a pool of processes as it is
        return type(self), (self.reason, str(self))


@dataclass
class Repairs:
    """What was mended in a record so that it could be read, by kind. Never silent: the ledger counts it."""

    counts: Counter = field(default_factory=Counter)

    def note(self, kind: str) -> None:
        """Count a repair; `kind` is one of REPAIRS."""
        assert kind in REPAIRS, f"{kind!r} is no kind of records.REPAIRS"
        self.counts[kind] += 1


class _Short(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, number, level):  # Python refuses to write an integer of more than 4300 digits
        return repr(number) if -(10**40) < number < 10**40 else "an integer of more than 40 digits"


def shown(value: object) -> str:
    """A value as an error message quotes it: on one line and short, however large it is."""
    return _Short().repr(value)


# -- kinds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Running text for pretraining."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages in the order system?, then user/tool and assistant in turns, ending with assistant."""

    messages: list[dict]
    tools: list[dict] | None = None


@dataclass(frozen=True)
class Preference:
    """A prompt (messages ending with user or tool) and two continuations of it, better and worse.

    `margin` says by how much it is better, on whatever scale the data has; None where the data does not say.
    """

    prompt: list[dict]
    chosen: list[dict]
    rejected: list[dict]
    tools: list[dict] | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Ranking:
    """A prompt and several answers to it (each a list of messages) with their ranks: 0 is best, equal ranks tie."""

    prompt: list[dict]
    answers: list[list[dict]]
    ranks: list[int]
    tools: list[dict] | None = None

    @property
    def best(self) -> list[dict]:
        """The first of the best answers."""
        return self.answers[self.ranks.index(0)]

    def pairs(self) -> list[Preference]:
        """Every pair of answers of which one is better, best first."""
        order = sorted(range(len(self.ranks)), key=lambda index: self.ranks[index])
        return [
            Preference(self.prompt, self.answers[better], self.answers[worse], self.tools)
            for position, better in enumerate(order)
            for worse in order[position + 1 :]
            if self.ranks[better] < self.ranks[worse]
        ]


@dataclass(frozen=True)
class Question:
    """A prompt (messages ending with user or tool), the answer to compare with, and the worked solution.

    The solution is what a model would learn to write: the reasoning and the answer. Both are "" for a bare prompt.
    """

    prompt: list[dict]
    answer: str
    solution: str


@dataclass(frozen=True)
class Choice:
    """A question with options and a key.

    Attributes:
        question: with the context it is about, if it has one.
        options: text by letter, in order; for questions answered with a word, each word by itself.
        answer: the letters of the right options, in order ("B", "ACD"), or the word; "" where the data has none.
        several: the exam says that more than one option is right; then only the exact set of letters is right.
        subject: as the record names it, or None.
        language: "zh" or "en".
        explanation: why the answer is right, "" where the data does not say.
    """

    question: str
    options: dict[str, str]
    answer: str
    several: bool
    subject: str | None
    language: str
    explanation: str = ""

    @property
    def has_letters(self) -> bool:
        return tuple(self.options) != WORDS


@dataclass(frozen=True)
class Rubric:
    """A prompt (messages ending with user), what a good answer does, and an ideal answer, "" where there is none.

    `rubrics` are {"criterion": str, "points": number, "tags": [str]}; points below 0 are for what it must not do.
    """

    prompt: list[dict]
    rubrics: list[dict]
    answer: str


@dataclass(frozen=True)
class Message:
    """One message of a tree, in a file that has a row for each; `parent` is None for the first of a tree.

    The other attributes are those of Tree.
    """

    id: str
    parent: str | None
    role: str
    content: str
    rank: float | None = None
    lang: str = ""


@dataclass(frozen=True)
class Tree:
    """A message and the replies to it, which are alternatives to each other.

    Attributes:
        role: "user" or "assistant"; replies are the other's, and a whole tree begins with a user's message.
        content: not empty.
        rank: among its siblings, lower is better; None where nobody ranked it.
        lang: language code of the data, "" where there is none.
        replies: trees, the best first, those without a rank last.
    """

    role: str
    content: str
    rank: float | None = None
    lang: str = ""
    replies: list["Tree"] = field(default_factory=list)

    def threads(self) -> list[Conversation]:
        """Every way from the first message to a last answer, the best first.

        Threads share their beginnings. An answer that an earlier thread has already is marked "train": False, so that
        each is learnt once.
        """
        found, learnt = [], set()

        def walk(node, path):
            path = [*path, {"role": node.role, "content": node.content}]
            before = len(found)
            for reply in node.replies:
                walk(reply, path)
            if node.role == "assistant" and len(found) == before:
                found.append(path)

        walk(self, [])
        threads = []
        for path in found:
            threads.append(Conversation([{**m, "train": False} if id(m) in learnt else m for m in path]))
            learnt.update(id(message) for message in path if message["role"] == "assistant")
        return threads

    def questions(self) -> list[Question]:
        """Every user's message with all that stands before it, and the best answer to it, "" where it has none."""
        return [
            Question(prompt, best, best)
            for prompt, answers in self._asked()
            for best in [answers[0].content if answers else ""]
        ]

    def rankings(self) -> list[Ranking]:
        """The ranked answers to every user's message that has at least two of different rank; others are left out."""
        found = []
        for prompt, answers in self._asked():
            ranked = [answer for answer in answers if answer.rank is not None]
            levels = sorted({answer.rank for answer in ranked})
            if len(levels) > 1:
                texts = [[{"role": "assistant", "content": answer.content}] for answer in ranked]
                found.append(Ranking(prompt, texts, [levels.index(answer.rank) for answer in ranked]))
        return found

    def _asked(self):
        """[(messages ending with user, the replies to the last of them)], in the order of threads()."""
        found = []

        def walk(node, path):
            path = [*path, {"role": node.role, "content": node.content}]
            if node.role == "user":
                found.append((path, node.replies))
            for reply in node.replies:
                walk(reply, path)

        walk(self, [])
        return found


Canonical = Text | Conversation | Preference | Ranking | Question | Choice | Rubric | Tree | Message
