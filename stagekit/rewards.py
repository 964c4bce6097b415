"""Rewards that can be verified without a model: is the answer right, well formed, in the right language, not overlong.

A built-in reward is a function of (completion, reference, prompt) -> Judgement, listed in REWARDS; a user's own is a
function in a file of theirs. Patterns here repeat a bounded number of times, so that half a megabyte of anything
is read in linear time.
"""

import difflib
import importlib.util
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import isfinite, nan
from numbers import Real
from pathlib import Path

from eval_metrics import longest_common_subsequence

RELATIVE_TOLERANCE = 0.01  # of a number that must be right
NO_UNIT_SCORE = 0.5  # the number is right, its unit is missing and nobody said which one was asked for
BUDGET_TOKENS = 1024  # of a whole completion, thinking included; see judge_length
NGRAM = 4
MAX_NAME_WORDS = 3  # so many Latin words within Chinese text are taken for a name: "amoxicillin clavulanate potassium"
MAX_MATH_CHARS = 2_000  # of the end of an answer; a parser of formulas is slow
MAX_ROUGE_TOKENS = 10_000  # the common subsequence is looked for in so many; lengths are counted in full
CJK = "\u3400-\u9fff"
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


@dataclass(frozen=True)
class Judgement:
    """What a reward says of one completion; parsed is False, and the score 0, where there was nothing to judge."""

    score: float
    parsed: bool


UNREAD = Judgement(0.0, False)


def split_thinking(completion: str, prompt: str) -> tuple[str, str | None]:
    """Cut a completion into (thinking, answer); the answer is None where the thinking never ends.

    Some chat templates open <think> at the end of the prompt, so the completion may only close it.
    """
    if prompt.rstrip().endswith("<think>"):
        completion = "<think>" + completion
    *closed, rest = completion.split("</think>")
    answers, thoughts = [], []
    for part in closed:
        before, tag, inside = part.partition("<think>")
        answers.append(before if tag else "")
        thoughts.append(inside if tag else part)
    if "<think>" in rest:
        return completion, None
    answer = "\n".join([*answers, rest])
    if (start := answer.rfind("<answer>")) >= 0:
        answer = answer[start + len("<answer>") :].partition("</answer>")[0]
    return "\n".join(thoughts), answer.strip()


def plain(text: str) -> str:
    """Fold full-width forms, LaTeX and bold away, whitespace runs to one character; \\boxed{x} says "answer: x"."""
    text = re.sub("[⁻⁺⁰¹²³⁴-⁹]{1,9}", lambda power: "^" + power[0], text)  # else NFKC makes 109 of 10⁹
    text = unicodedata.normalize("NFKC", re.sub("(?=[¼-¾])", " ", text)).replace("⁄", "/").replace("’", "'")
    text = text.replace("İ", "I").replace("ı", "i")  # which re.IGNORECASE takes for an i and casefold does not
    text = re.sub(r"\\[dt]?frac ?\{(\d{1,9})\} ?\{(\d{1,9})\}", r" \1/\2", text)
    text = re.sub(r"/\((\w{1,6})[·.*⋅](\w{1,6})\)", r"/\1/\2", text)  # mg/(kg·d)
    text = re.sub(r"\\boxed ?\{((?:[^{}]|\{[^{}]{0,99}\}){0,99})\}", r" answer: \1. ", text)
    text = re.sub(r"\\boxed|####", " answer: ", text).replace("\\times", "×").replace("bpm", "beats/min")
    text = re.sub(r"\\(?:text|mathrm|mathbf|[,;!])|\*\*|[`$]", "", text)
    return re.sub(r"[\s{}\\\"“”「」【】]+", lambda run: "\n" if "\n" in run[0] else " ", text).strip()


# -- which statement is final ----------------------------------------------------------------------------------------

# Each takes back what was said before it ...
CORRECTION = re.compile(  # not the "wait 2 hours", "correction of sodium" and "重新评估" of medicine
    r"(?i:(?=\b(?:wait[,.!:;]|wait no\b|actually,|on second thought|correction:|no, (?:it's|it is|the answer)))"
    r"|(?=不,答案|不,应|不对[,。!]|等等,|更正|我错了|重新[想看算审考]))"
)
# ... and each announces a statement that outranks the earlier ones.
CONCLUSION = re.compile(
    r"(?i:\b(?:so|thus|therefore|hence|finally|final|in conclusion|overall|but|however|instead)\b"
    r"|因此|所以|故|综上|最终|最后|总之|但|然而)"
)
FILLER = (
    r"(?:'s|is|are|was|would|should|must|be|to|likely|most|clearly|probably|therefore|thus|option|choice|letter|about"
    r"|approximately|around|roughly|[:=≈~]|-(?![\d.]))"
)
STATEMENT = (
    rf"(?:(?i:(?<![a-z])(?:answer|result|(?:correct|best|right|final|my) (?:choice|option)) ?(?:{FILLER} ?){{0,6}})"
    r"|(?:答案|结果|回答|答(?=:)|正确的|选项(?=[是为:]))(?:应该?|可能|就|大?约|是|为|选择?|[:=≈~]| ){0,6}(?:选项 ?)?)"
)
CONTRADICTION = object()  # two answers, or one that is none: parsed, and equal to nothing


def settle(text: str, readers: tuple[Callable[[str], list]]) -> object | None:
    """Find the one answer that a text ends up with.

    Args:
        text: the answer, as plain() leaves it.
        readers: from the most explicit form of answer to the least; each gives (position, value) in order.

    Returns:
        The value; CONTRADICTION where final statements differ; None where no reader finds anything.
    """
    for segment in reversed(CORRECTION.split(text)):
        for read in readers:
            if found := read(segment):
                cues = [cue.start() for cue in CONCLUSION.finditer(segment, 0, found[-1][0])]
                final = {value for position, value in found if position >= (cues[-1] if cues else 0)}
                return final.pop() if len(final) == 1 else CONTRADICTION
    return None


# -- accuracy: multiple choice ---------------------------------------------------------------------------------------

# A letter before any other lower-case word is an article or half a name: "A patient", "E coli".
AFTER_LETTER = r"(?! (?!(?:is|are|was|and|or|but|not|because|since|as|for|with|due|given|in|by|rather|on|if)\b)[a-z])"
NAMED = re.compile(  # letters that belong to a name
    r"((?i:\b(?:vitamin|hepatitis|type|group|grade|class|stage|influenza|factor)s?[ -])|维生素 ?|血型为? ?)"
    r"([A-K])(?![A-Za-z0-9])"
)
NOT = (
    r"(?:[不误错别勿](?:能|应该?|可以?|要|会)?选择?|不是|并非|而非|排除|除了?|(?i:(?:\bnot|n't|\bneither|\bnor"
    r"|\brul(?:e|es|ed|ing) out|\bexclud(?:e|es|ed|ing)|\beliminat(?:e|es|ed|ing)|\breject(?:s|ed|ing)?"
    r"|\brather than|\binstead of)"
    r"(?: (?:be|is|option|choice|answer|choose|select|pick|to|with|go)){0,4}))"
)
IS = (
    r" ?(?:(?:is|are|was|were|seems?|looks?|would|can|could|should|must|be|has|to|also|both|all|clearly|therefore) )"
    "{1,4}"
)
IS_WRONG = (
    r"(?: ?(?:选项|项)?[也均都是可被明显然]{0,4}(?:错|不正确|不对|不符|不选(?![A-K])|有误|不合适|不适合|排除|不考虑"
    r"|不成立)误?"
    rf"|(?i:(?:{IS}(?:not|wrong|incorrect|false|excluded|ruled out|eliminated|unlikely)| (?:is|are|do|does|ca)n't)"
    r"(?: (?:the|a|correct|right|true|best|most|appropriate|answer|choice|option|one|as well|too)\b){0,5}))"
)
IS_RIGHT = (
    r"(?: ?(?:选项|项)?[是为才最更均都也]{0,3}(?:正确|对(?=的|\W|$)|合适|恰当|符合|答案)"
    rf"|(?i:{IS}(?:(?:the|most|likely|only|my|single) ){{0,3}}(?:correct|right|true|best|appropriate|answer|choice)\b"
    r"| remains\b))"
)
CHOOSE = (
    rf"(?:{STATEMENT}|选(?!项)择?[:是为]? ?(?:选项 ?)?"
    r"|(?i:\b(?:choose|select|pick|go(?:ing)? with|opt for) (?:option |answer )?))"
)
CONCLUDE = (
    rf"(?:{CONCLUSION.pattern}[, ]{{0,2}}|(?:应该?|认为|觉得)[是为] ?"
    r"|(?i:\b(?:it's|it is|I(?:'d| would)? (?:think|say|believe)) (?:it's |it is )?(?:option |answer )?))"
)
END = r"(?=[.、:),;。!]| -| ?$| ?(?:because|since|因为))"


def list_options(prompt: str) -> dict[str, str]:
    """Read the options at the end of a prompt: {"A": "aspirin", …}, in order from A; empty where it lists none.

    Options may follow each other without a space ("A.肝B.肾"); that form comes second, for it splits "A. 维生素B、铁".
    """
    for before in (r"(?<!\w)", r"(?<![A-Za-z0-9])"):
        best, run = {}, {}
        marks = list(re.finditer(rf"{before}\(?([A-K]) ?[.、:)]", prompt))
        for mark, end in zip(marks, [*(m.start() for m in marks[1:]), len(prompt)], strict=False):
            if mark[1] == "A":
                run = {}
            if mark[1] != chr(ord("A") + len(run)):
                continue
            run[mark[1]] = prompt[mark.end() : end].strip().partition("\n")[0].strip(" .,;。、")
            if len(run) > 1 and all(run.values()):  # an empty text: "choose from A、B、C"
                best = run
        if best:
            return dict(best)
    return {}


def reference_letters(reference: str, options: dict[str, str]) -> frozenset | None:
    """The letters a reference stands for ("ACD", "A,C", "(B)", "B. aspirin", "aspirin"), None where it is none."""
    if not options:
        return None
    if reference in options:  # the letter, also where another option's text is just that ("D" for vitamin D)
        return frozenset(reference)
    for letter, text in options.items():
        if re.fullmatch(rf"(?i:(?:\(?{letter} ?[.、:)] ?)?{re.escape(text)}\.?)", reference):
            return frozenset(letter)
    letters = re.sub(r"[\s,、;.()和与]|and", "", reference)
    return frozenset(letters) if letters and set(letters) <= set(options) else None


@lru_cache(maxsize=64)
def choice_patterns(options: tuple[tuple[str, str], ...]) -> tuple[re.Pattern, ...]:
    """Build the patterns for one question: (echo, rejected, stated, concluded, right, bare)."""
    letter = f"[{''.join(name for name, _ in options)}]"
    texts = "|".join(re.escape(text) for _, text in sorted(options, key=lambda option: -len(option[1])))
    # After a comma a letter goes on with a list only if no clause begins with it: "B, A is wrong", "选B,A错误".
    guard = rf"(?={letter}(?!(?!选|项)\w)(?! (?!and|or|are)[a-z]))"
    run, more = f"{letter}{{1,{len(options)}}}", f"{{0,{len(options) - 1}}}"

    def token(comma, before_text=r"(?<!\w)"):
        join = rf"(?:{comma} ?{guard}|,? ?(?:[、/&+]|and|or|nor|和|与|或|及) ?)"
        return (
            rf"(?:(?P<list>(?<![A-Za-z0-9'-]){run}(?:{join}{run}){more})(?!-?[A-Za-z0-9'])"
            rf"(?: ?[.、:)(]? ?(?i:{texts})\b\)?|{AFTER_LETTER})|{before_text}(?P<text>(?i:{texts}))(?!\w))"
        )

    inside, stating, alone = token("[,;]"), token("[,;]", before_text=""), token("[,;]?")  # 答案是阿司匹林; A C
    nameless = re.sub(r"\?P<\w+>", "?:", inside)
    return (
        re.compile(r"\W{0,9}".join(rf"\(?{name} ?[.、:)] ?{re.escape(text)}" for name, text in options)),
        re.compile(rf"{NOT} ?{nameless}(?:[,; ]{{0,2}}(?:but rather|but|而?是))? ?|{nameless}{IS_WRONG}"),
        re.compile(CHOOSE + stating),
        re.compile(f"(?m:{CONCLUDE}{stating}{END})"),
        re.compile(inside + IS_RIGHT),
        re.compile(rf"(?m:^\W{{0,5}}(?:(?i:option|choice) |选项 ?)?{alone}(?: ?选?项)?{END})"),
    )


def read_letters(found: re.Match, letter_of: dict[str, str]) -> frozenset:
    """The letters of a token; "A or B" gives none, which no reference equals."""
    if found["text"]:
        return frozenset(letter_of.get(found["text"].casefold(), ""))
    return frozenset() if re.search("or|或", found["list"]) else frozenset(re.findall("[A-K]", found["list"]))


def read_choice(answer: str, prompt: str, options: dict[str, str]) -> object | None:
    """Find the letters that an answer finally names; see settle for what is returned."""
    echo, rejected, stated, concluded, right, bare = choice_patterns(tuple(options.items()))
    text = echo.sub("\n", answer.replace(prompt, "\n"))
    text = NAMED.sub(lambda name: name[1] + name[2].lower(), text)
    text = re.sub(r" ?[(\['<] ?([A-Ka-k]{1,10}) ?[)\]'>] ?", lambda inner: f" {inner[1].upper()} ", text)
    text = re.sub(r"(?m:(?:^|(?<=[ :是为选]))[a-k](?=\.?$))", lambda last: last[0].upper(), text)  # "answer: b"
    text = re.sub(" +", " ", rejected.sub(" ", text))
    letter_of = {text.casefold(): letter for letter, text in options.items()}

    def each(pattern, segment):
        return [(m.end(), read_letters(m, letter_of)) for m in pattern.finditer(segment)]

    def together(pattern, segment):  # "A is correct … C is correct" is one answer, AC
        found = each(pattern, segment)
        return found and [(found[-1][0], frozenset().union(*(letters for _, letters in found)))]

    readers = (partial(each, stated), partial(each, concluded), partial(together, right), partial(together, bare))
    return settle(text, readers)


# -- accuracy: numbers with units ------------------------------------------------------------------------------------

UNIT_TABLE = {
    "mass": {
        1e3: "kg 千克 公斤",
        1: "g 克 gram grams",
        1e-3: "mg milligram milligrams 毫克",
        1e-6: "μg ug mcg microgram micrograms 微克",
        1e-9: "ng 纳克",
    },
    "volume": {
        1: "l 升 liter liters litre litres",
        0.1: "dl 分升",
        1e-3: "ml milliliter milliliters millilitre millilitres 毫升 cc",
        1e-6: "μl ul 微升",
    },
    "time": {
        **{
            1: "s sec second seconds 秒",
            60: "min mins minute minutes 分钟 分",
            3600: "h hr hrs hour hours 小时 个小时 时",
        },
        **{
            86400: "d day days 天 日",
            604800: "week weeks 周",
            2629800: "month months 月 个月",
            31557600: "year years 年 岁",
        },
    },
    "amount": {1: "mol", 1e-3: "mmol 毫摩尔", 1e-6: "μmol umol 微摩尔", 1e-9: "nmol", 1e-12: "pmol"},
    "activity": {1: "u iu unit units 单位 国际单位", 1e-3: "miu"},
    "pressure": {1: "kpa 千帕", 0.133322: "mmhg 毫米汞柱"},
    "celsius": {1: "°c celsius degrees_celsius 摄氏度 度"},
    "fahrenheit": {1: "°f fahrenheit degrees_fahrenheit 华氏度"},
    "length": {1: "m 米", 1e-2: "cm 厘米", 1e-3: "mm 毫米"},
    "area": {1: "m^2 m2 平方米"},
    "percent": {1: "% percent"},
    "equivalents": {1e-3: "meq"},
    "beats": {1: "beats beat 次"},
    "tablets": {1: "tablet tablets 片"},
    "drops": {1: "gtt drop drops 滴"},
}
UNITS = {
    name.replace("_", " "): (dimension, factor)
    for dimension, sizes in UNIT_TABLE.items()
    for factor, names in sizes.items()
    for name in names.split()
}
MOLAR_MASSES = {  # g/mol, by the words that name the analyte in a prompt
    "glucose|blood sugar|葡萄糖|血糖": 180.16,
    "cholesterol|胆固醇|ldl|hdl": 386.65,
    "creatinine|肌酐": 113.12,
}
ATOM = rf"(?:{'|'.join(re.escape(name) for name in sorted(UNITS, key=len, reverse=True))})(?![A-Za-z])"
PER = r" ?(?:/|\bper |每|\ban? ) ?"
UNIT = rf"(?i:(?:{ATOM})?(?:{PER}{ATOM}){{0,3}})"
UNSIGNED = (  # a fraction has two digits at most, for 120/80 is a blood pressure
    r"(?:(?:\d{1,3} )?\d{1,2}/\d{1,2}(?!\.?\d|/)|\.\d{1,15}"
    r"|(?:\d{1,3}(?:,\d{3}){1,5}|\d{1,15})(?!\d)(?:\.\d{1,15})?(?: ?[×x*] ?10 ?\^ ?[-+−]?\d{1,3}|e[-+]?\d{1,3}\b)?)"
)
NUMBER = rf"(?<![A-Za-z\d.^])(?<![A-Za-z\d]-)[-+−]?{UNSIGNED}"
QUANTITY = re.compile(
    rf"(?:每(?P<per>{ATOM})\D{{0,4}})?(?P<low>{NUMBER}) ?(?P<unit>{UNIT})"
    rf"(?: ?(?:[-–—~至到或]|to\b|or\b) ?(?P<high>{UNSIGNED}) ?(?P<high_unit>{UNIT}))?"
)
STATED_QUANTITY = re.compile(STATEMENT + QUANTITY.pattern)
NOT_QUANTITY = re.compile(
    r"(?:(?i:\bnot|n't|\brather than|\binstead of)|不是|并非|而非) ?"
    + re.sub(r"\?P<\w+>", "?:", QUANTITY.pattern)
    + "(?:[,; ]{0,2}(?:but|而是))?"
)
ASKED_UNIT = re.compile(rf"(?:(?i:\bin |how many )|多少 ?|几 ?|单位(?:为|是|:)? ?|\()(?=(?i:{ATOM}))({UNIT})")

Unit = tuple[tuple[str, ...], float]  # dimensions ("volume", "/time") and the size in SI-like base units


@dataclass(frozen=True)
class Quantity:
    """A number, or the two ends of a range, with its unit if it has one."""

    values: tuple[float, ...]
    unit: Unit | None


def parse_number(text: str) -> float:
    """Read what UNSIGNED matches; not a number where it divides by 0."""
    text = text.replace(",", "").replace("−", "-")
    if "/" in text:
        *whole, fraction = text.split(" ")
        above, below = (float(part) for part in fraction.split("/"))
        return sum(map(float, whole)) + above / below if below else nan
    return float(re.sub(r" ?[×x*] ?10 ?\^ ?", "e", text))


def parse_unit(text: str) -> Unit | None:
    """Read "mL/h"; a mass that is divided by counts as body weight, so that mg/kg keeps a dimension."""
    dimensions, factor = [], 1.0
    for place, name in enumerate(re.split(f"(?i:{PER})", text.strip())):
        if name and not (place and name == "次"):  # a dose "每次 300 mg" is a dose of 300 mg
            dimension, size = UNITS[name.casefold()]
            dimensions.append(f"/{dimension}" if place else dimension)
            factor = factor / size if place else factor * size
    return (tuple(sorted(dimensions)), factor) if dimensions else None


def read_quantity(found: re.Match) -> Quantity:
    """Turn a match of QUANTITY into numbers; of a range, either end may carry the unit."""
    unit = found["unit"] or found["high_unit"] or ""
    unit = parse_unit(f"{unit}/{found['per']}" if found["per"] else unit)
    return Quantity(tuple(parse_number(part) for part in (found["low"], found["high"]) if part), unit)


def to_base(values: tuple[float, ...], unit: Unit, prompt: str) -> tuple[tuple[str, ...], list[float]]:
    """Express values in base units; a named analyte turns its moles into grams, °F become °C."""
    dimensions, factor = unit
    if dimensions == ("fahrenheit",):
        return ("celsius",), [(value - 32) * 5 / 9 for value in values]
    molar_mass = next((mass for names, mass in MOLAR_MASSES.items() if re.search(names, prompt, re.IGNORECASE)), None)
    if molar_mass and "amount" in dimensions:
        dimensions = tuple(sorted("mass" if name == "amount" else name for name in dimensions))
        factor *= molar_mass
    return dimensions, [value * factor for value in values]


def score_quantity(given: Quantity, expected: Quantity, prompt: str) -> float:
    """1 where two quantities are equal within RELATIVE_TOLERANCE, NO_UNIT_SCORE where only the unit is missing."""
    asked = next((parse_unit(found[1]) for found in reversed(list(ASKED_UNIT.finditer(prompt)))), None)
    unit = expected.unit or asked
    if unit is None:
        return float(are_close(given.values, expected.values))
    dimensions, expected_values = to_base(expected.values, unit, prompt)
    credit, given_unit = 1.0, given.unit
    if given_unit is None and asked and to_base((), asked, prompt)[0] == dimensions:
        given_unit = asked
    elif given_unit is None:
        credit, given_unit = NO_UNIT_SCORE, unit
    given_dimensions, given_values = to_base(given.values, given_unit, prompt)
    return credit * (given_dimensions == dimensions and are_close(given_values, expected_values))


def are_close(given, expected) -> bool:
    """Whether as many numbers are equal within the tolerance; the last digits of a float may push 101 over 1 %."""
    return len(given) == len(expected) and all(
        abs(a - b) <= RELATIVE_TOLERANCE * abs(b) * (1 + 1e-9) for a, b in zip(given, expected, strict=True)
    )


def read_final_quantity(answer: str) -> object | None:
    """Find the number an answer states as its answer, or else the last number in it."""

    def stated(segment):
        return [(m.end(), read_quantity(m)) for m in STATED_QUANTITY.finditer(segment)]

    def last(segment):
        *_, final = None, *QUANTITY.finditer(segment)
        return [(final.end(), read_quantity(final))] if final else []

    return settle(NOT_QUANTITY.sub(" ", answer), (stated, last))


# -- accuracy: yes, no, maybe ----------------------------------------------------------------------------------------

POLARITY_WORDS = {
    "maybe": "不确定 不一定 无法确定 无法判断 不能确定 不清楚 未知 也许 或许 可能 maybe uncertain unclear unknown "
    "perhaps possibly inconclusive not_sure not_certain",
    "yes": "yes true correct right 是的 是 对的 对 正确的 正确",
    "no": "no false incorrect wrong 否 错误的 错误 错的 错 不",
}
POLARITY = {word.replace("_", " "): name for name, words in POLARITY_WORDS.items() for word in words.split()}
POLARITY |= {"不是": "no", "不对": "no", "不正确": "no"}
POLAR = (
    r"(?P<negations>(?:不是|并非|并不|不|非|(?i:not ?|(?:is)?n't ?|never ?)){0,4})"
    rf"(?P<polar>(?i:{'|'.join(sorted(POLARITY, key=len, reverse=True))}))"
    r"(?=[^\w ]|$| ?因为| (?:it|this|that|these|because|there|since|as|the|they|he|she|we)\b)"
)
POLAR_READERS = (
    re.compile(STATEMENT + POLAR),
    re.compile(rf"(?:^|[.!?。;:\n,]) ?(?:(?i:so|thus|therefore|hence)|因此|所以)?[, ]?{POLAR}"),
    re.compile(rf"(?:(?i:\b(?:is|was|seems) ?)|(?:说法|观点|结论|判断|陈述|做法|这)是?) ?{POLAR}"),
)


def read_polarity(answer: str) -> object | None:
    """Find "yes", "no" or "maybe": stated as the answer, at the start of a clause, or said of the claim."""

    def reader(pattern):
        return lambda segment: [(found.end(), polarity(found)) for found in pattern.finditer(segment)]

    def polarity(found):
        name = POLARITY[found["polar"].casefold()]
        odd = len(re.findall(r"不是|并非|并不|不|非|(?i:not|n't|never)", found["negations"])) % 2
        return {"yes": "no", "no": "yes"}.get(name, name) if odd else name

    return settle(answer, tuple(reader(pattern) for pattern in POLAR_READERS))


# -- the built-in rewards --------------------------------------------------------------------------------------------


def judge_accuracy(completion: str, reference: str, prompt: str) -> Judgement:
    """Compare the answer with the reference, which decides how: option letters, yes/no, a number, or free text."""
    answer = split_thinking(completion, prompt)[1]
    if not answer:
        return UNREAD
    answer, reference, prompt = plain(answer), plain(reference), plain(prompt)
    options = list_options(prompt)
    if expected := reference_letters(reference, options):
        return judge_equal(read_choice(answer, prompt, options), expected)
    if expected := POLARITY.get(reference.casefold().strip(" .。")):
        return judge_equal(read_polarity(answer), expected)
    if found := QUANTITY.fullmatch(reference.lstrip("约≈~ ")):
        given = read_final_quantity(answer)
        if isinstance(given, Quantity):
            return Judgement(score_quantity(given, read_quantity(found), prompt), True)
        return judge_equal(given, reference)
    words = WORD.findall(answer.lower())
    return Judgement(rouge_l(words, WORD.findall(reference.lower())), True) if words else UNREAD


def is_checkable(reference: str, prompt: str) -> bool:
    """Whether a reference is option letters, yes or no, or a number: something an answer is right or wrong about."""
    reference = plain(reference)
    return bool(
        reference_letters(reference, list_options(plain(prompt)))
        or POLARITY.get(reference.casefold().strip(" .。"))
        or QUANTITY.fullmatch(reference.lstrip("约≈~ "))
    )


def judge_equal(given: object | None, expected: object) -> Judgement:
    """1 where the same, 0 where not, UNREAD where nothing was given."""
    return UNREAD if given is None else Judgement(float(given == expected), True)


def rouge_l(candidate: list[str], reference: list[str]) -> float:
    """F1 of the longest common subsequence (ROUGE-L, Lin 2004), over Chinese characters and words of other scripts."""
    common = longest_common_subsequence(candidate[:MAX_ROUGE_TOKENS], reference[:MAX_ROUGE_TOKENS])
    return 2 * common / (len(candidate) + len(reference)) if common else 0.0


def judge_format(completion: str, reference: str, prompt: str) -> Judgement:
    """1 for one <think>…</think> at the start and an answer after it, neither of them empty.

    0.5 where the tags are there but repeated, after other text, or have nothing inside or behind them; not parsed
    where no thinking is opened and closed.
    """
    opened = prompt.rstrip().endswith("<think>")
    text = ("<think>" if opened else "") + completion.strip()
    start = text.find("<think>")
    if start < 0 or text.find("</think>", start) < 0:
        return UNREAD
    thinking, _, answer = text.removeprefix("<think>").partition("</think>")
    once = text.count("<think>") == text.count("</think>") == 1 and start == 0
    return Judgement(1.0 if once and thinking.strip() and answer.strip() else 0.5, True)


def judge_language(completion: str, reference: str, prompt: str) -> Judgement:
    """Share of the answer in the prompt's language, by Chinese characters and words of other scripts.

    Left out are code, units, and in Chinese text whatever can be a name: capitals and up to MAX_NAME_WORDS Latin words
    in a row. 1 where nothing is left, or where the prompt has no language.
    """
    answer = split_thinking(completion, prompt)[1]
    if not answer:
        return UNREAD
    pieces = plain_words("".join(part for part in answer.split("```")[::2]).replace("`", " "))
    asked = [is_latin for is_latin, _ in plain_words(prompt)]
    if not asked or not pieces:
        return Judgement(1.0, True)
    if sum(asked) * 2 > len(asked):
        return Judgement(sum(is_latin for is_latin, _ in pieces) / len(pieces), True)
    own, foreign, run = 0, 0, 0
    for is_latin, word in [*pieces, (False, "")]:
        if is_latin:
            run += 1
            continue
        foreign, run = foreign + (run if run > MAX_NAME_WORDS else 0), 0
        is_own = bool(re.match(f"[{CJK}]", word))
        own, foreign = own + is_own, foreign + (bool(word) and not is_own)
    return Judgement(own / (own + foreign) if own + foreign else 1.0, True)


def plain_words(text: str) -> list[tuple[bool, str]]:
    """(is Latin or Greek, word) for the words of a text that are no number, unit or abbreviation."""
    words = WORD.findall(unicodedata.normalize("NFKC", text))
    return [
        (word[0].isalpha() and word[0] < "\u0400", word)
        for word in words
        if not word.isdecimal() and (len(word) == 1 and word > "\u3400" or not is_unit_or_capitals(word))
    ]


def is_unit_or_capitals(word: str) -> bool:
    """Whether a word means the same in every language: mg, CT, HbA1c, 10mg."""
    return word.casefold() in UNITS or word.isupper() or any(char.isdigit() for char in word)


def judge_repetition(completion: str, reference: str, prompt: str) -> Judgement:
    """1 minus the share of 4-grams that stood there before; thinking included, for loops begin there."""
    words = WORD.findall(completion.lower())
    if not words:
        return UNREAD
    ngrams = list(zip(*(words[start:] for start in range(NGRAM)), strict=False))
    return Judgement(len(set(ngrams)) / len(ngrams) if len(ngrams) > 1 else 1.0, True)


def judge_length(completion: str, reference: str, prompt: str) -> Judgement:
    """1 within BUDGET_TOKENS, 0 from twice as many on, linear between; a token is a Chinese character or 4 others."""
    if not completion.strip():
        return UNREAD
    chinese = len(re.findall(f"[{CJK}]", completion))
    tokens = chinese + (len(completion) - chinese) / 4
    return Judgement(min(1.0, max(0.0, 2 - tokens / BUDGET_TOKENS)), True)


def judge_math(completion: str, reference: str, prompt: str) -> Judgement:
    """Compare two mathematical expressions with math-verify, an optional package."""
    from math_verify import parse, verify

    answer = split_thinking(completion, prompt)[1]
    if not answer:
        return UNREAD
    if "\\boxed" not in answer:  # what follows the last "the answer is"; Chinese would hide "答案是42" from the parser
        *_, cue = None, *re.finditer(STATEMENT, answer)
        answer = re.sub(f"[{CJK}，。：]", " ", answer[cue.end() :] if cue else answer)
    given, expected = parse(answer[-MAX_MATH_CHARS:]), parse(reference) or parse(f"${reference}$")
    return Judgement(float(verify(expected, given)), True) if given else UNREAD


REWARDS: dict[str, Callable[[str, str, str], Judgement]] = {
    "accuracy": judge_accuracy,
    "format": judge_format,
    "language": judge_language,
    "repetition": judge_repetition,
    "length": judge_length,
    "math": judge_math,
}


# -- what --reward_functions names -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reward:
    """A reward with its weight in the sum.

    Attributes:
        name: as --reward_functions gives it.
        label: what logs and files call it; of path/to/file.py:function the function.
    """

    name: str
    weight: float
    judge_all: Callable[[list, list, list], list[Judgement]]

    @property
    def label(self) -> str:
        return self.name.rpartition(":")[2]

    def score_all(self, prompts: list, completions: list[str], references: list[str]) -> list[Judgement]:
        """Judge one batch; the three lists belong together item by item."""
        return self.judge_all(prompts, completions, references)


def load_rewards(names: str | None, weights: str | None = None) -> list[Reward]:
    """Read --reward_functions and --reward_weights.

    Args:
        names: built-in rewards or path/to/file.py:function, separated by commas; None for no functions.
        weights: as many numbers; None for 1 each.

    Raises:
        ValueError: a name or weight cannot be used, or math-verify is missing; also later, from score_all, where a
            user's function fails or returns anything but one finite number for each completion.
    """
    if names is None:
        return []
    items = [item.strip() for item in names.split(",") if item.strip()]
    if not items:
        raise ValueError(f"--reward_functions is empty; known: {', '.join(REWARDS)}, or path/to/file.py:function")
    if len(set(items)) < len(items):
        raise ValueError(f"--reward_functions {names!r} names a reward twice; give it a weight instead")
    numbers = read_weights(weights, items)
    rewards = [Reward(name, weight, find_reward(name)) for name, weight in zip(items, numbers, strict=True)]
    labels = [reward.label for reward in rewards]
    if len(set(labels)) < len(labels):
        raise ValueError(f"--reward_functions {names!r}: two functions have one name; logs could not tell them apart")
    return rewards


def read_weights(weights: str | None, items: list[str]) -> list[float]:
    """One finite weight for each reward."""
    if weights is None:
        return [1.0] * len(items)
    try:
        numbers = [float(weight) for weight in weights.split(",")]
    except ValueError:
        numbers = [nan]
    if not all(map(isfinite, numbers)):
        raise ValueError(f"--reward_weights {weights!r} must be numbers separated by commas, such as 1,0.2")
    if len(numbers) != len(items):
        raise ValueError(f"--reward_weights has {len(numbers)} numbers for {len(items)} --reward_functions")
    return numbers


def find_reward(name: str) -> Callable[[list, list, list], list[Judgement]]:
    """A function that judges a batch, from a built-in name or from a user's file."""
    if ".py:" in name:
        return partial(judge_with_users_function, name, load_users_function(name))
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"--reward_functions {name!r} is unknown; {hint}known: {', '.join(REWARDS)}, or path/to/file.py:function"
        )
    if name == "math":
        try:
            importlib.import_module("math_verify")
        except ImportError:
            raise ValueError("--reward_functions math needs a package: pip install math-verify") from None
    judge = REWARDS[name]
    return lambda prompts, completions, references: [
        judge(completion, reference, prompt)
        for prompt, completion, reference in zip(prompts, completions, references, strict=True)
    ]


def load_users_function(name: str) -> Callable:
    """Import path/to/file.py:function."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"--reward_functions {name}: there is no file {path}")
    module_name = f"users_reward_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--reward_functions {name}: {path} cannot be imported: {one_line(error)}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--reward_functions {name}: {path} has no function {function!r}")
    return getattr(module, function)


def judge_with_users_function(name, function, prompts, completions, references) -> list[Judgement]:
    """Call function(prompts, completions, answers) and check what it returns."""
    try:
        scores = list(function(prompts, completions, references))
    except Exception as error:
        raise ValueError(f"--reward_functions {name} failed: {one_line(error)}") from error
    if len(scores) != len(completions):
        raise ValueError(f"--reward_functions {name} returned {len(scores)} scores for {len(completions)} completions")
    for score in scores:
        if not isinstance(score, Real) or not isfinite(score):
            raise ValueError(f"--reward_functions {name} returned {score!r}; expected a finite number")
    return [Judgement(float(score), True) for score in scores]


def one_line(error: Exception) -> str:
    """An error's kind and its text without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
