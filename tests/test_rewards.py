"""Each reward on answers as models write them; every expected score was reasoned by hand from the text."""

import random
import sys
import time
import types

import pytest

from eval_metrics import longest_common_subsequence
from stagekit.rewards import BUDGET_TOKENS, REWARDS, Judgement, list_options, load_rewards

ENGLISH = (
    "A 60-year-old man has chest pain. Which drug is given first?\nA. Warfarin\nB. Aspirin\nC. Ibuprofen\n"
    "D. Vitamin K\nAnswer with the letter."
)
CHINESE = "急性心肌梗死首选的药物是？\nA、华法林\nB、阿司匹林\nC、布洛芬\nD、维生素K\n请从A、B、C、D中选择。"
ECHO = "A. Warfarin\nB. Aspirin\nC. Ibuprofen\nD. Vitamin K"
UNREAD = Judgement(0.0, False)


def scored(score):
    """What a table's number stands for; None is an answer that cannot be read."""
    return UNREAD if score is None else Judgement(pytest.approx(score), True)


# -- accuracy: multiple choice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("B", 1),
        ("b", 1),
        ("Ｂ", 1),
        ("（Ｂ）", 1),
        ("B.", 1),
        ("B. Aspirin", 1),
        ("B) Aspirin, because it stops platelets.", 1),
        ("B Aspirin", 1),
        ("**B**", 1),
        ("Aspirin", 1),
        ("aspirin.", 1),
        ("The answer is aspirin.", 1),
        ("The answer is (B).", 1),
        ("The correct answer is option B", 1),
        ("Answer: b", 1),
        ("The answer's B.", 1),
        ("B is correct.", 1),
        ("Option B (Aspirin) is the best choice.", 1),
        (r"Platelets matter. $\boxed{B}$", 1),
        (r"\boxed{\text{B}}", 1),
        ("I would choose B.", 1),
        ("<think>A looks good</think>B", 1),
        ("<think>A</think><answer>B</answer>", 1),
        ("reasoning about A</think>\nThe answer is B", 1),  # the template had opened the tag
        ("A is wrong; B", 1),
        ("A is wrong. C and D are wrong as well. So B.", 1),
        ("A, C and D are incorrect, B is right.", 1),
        ("The answer is not A but B", 1),
        ("The answer is B because A is too slow", 1),
        ("It's B.", 1),
        ('The answer is "B".', 1),
        ("Answer: 'B'", 1),
        ('{"answer": "B"}', 1),
        ("Option B.", 1),
        ("The answer is A? No, it's B.", 1),
        ("I'd go with C, but the correct answer is B.", 1),
        ("Although A seems right, B is the correct answer.", 1),
        ("The answer is neither A nor C; it is B.", 1),
        ("I think B", 1),
        ("not A but C", 0),
        ("The answer is B, A is wrong.", 1),
        ("The answer is B, not C.", 1),
        ("B rather than A", 1),
        ("Rule out A, C and D.\nB", 1),
        ("At first the answer is A. Wait, no: the answer is B.", 1),
        ("The answer is A. Wait, that fails: B is correct.", 1),
        ("The answer is A, so to say. However, the final answer is B.", 1),
        ("The answer is B. A is correct in children.", 1),  # a statement outranks a verdict on an option
        ("The answer is B, C would be used later.", 1),
        (ECHO + "\nThe answer is B.", 1),
        (ENGLISH + "\nB", 1),
        ("Answer: B. Aspirin\n" + ECHO, 1),
        ("A. Warfarin: too slow.\nB. Aspirin: fast.\nC. Ibuprofen: no.\nD. Vitamin K: no.\nTherefore, B.", 1),
        ("A", 0),
        ("The answer is A. The answer is B.", 0),
        ("Answer: A\nAnswer: B", 0),
        (r"\boxed{A} \boxed{B}", 0),
        ("The answer is A or B.", 0),
        ("A and B are correct", 0),
        ("A\nB", 0),
        ("The answer is B. Therefore, the answer is C.", 0),
        ("The answer is warfarin", 0),
        ("A patient with chest pain needs care.", None),
        ("Answer: A patient with chest pain needs care.", None),
        ("The answer is not A.", None),
        ("B is wrong.", None),
        ("Vitamin B is correct for beriberi.", None),
        ("Hepatitis B is the answer to another question.", None),
        (ENGLISH, None),
        (ECHO, None),
        ("(A) Warfarin (B) Aspirin (C) Ibuprofen (D) Vitamin K", None),
        ("", None),
        ("  \n ", None),
        ("<think>B", None),
        ("<think>The answer is B</think>", None),
        ("The answer is B <think> or is it", None),
        ("I cannot say.", None),
    ],
)
def test_an_english_multiple_choice_answer(completion, expected):
    assert REWARDS["accuracy"](completion, "B", ENGLISH) == scored(expected)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("答案是B", 1),
        ("答案：Ｂ", 1),
        ("答案为 B。", 1),
        ("答案选B。", 1),
        ("正确答案是：B、阿司匹林", 1),
        ("故选 B", 1),
        ("故选：B。", 1),
        ("因此本题选B", 1),
        ("应选（B）", 1),
        ("我选择B选项", 1),
        ("B项正确", 1),
        ("B正确，A错误", 1),
        ("选项B是正确的", 1),
        ("只有B符合题意", 1),
        ("阿司匹林", 1),
        ("答案是阿司匹林。", 1),
        ("Ｂ．阿司匹林", 1),
        ("B，因为它抑制血小板", 1),
        ("不选A，应选B", 1),
        ("答案不是A，而是B", 1),
        ("答案是B，A错误", 1),
        ("A、C、D均错误，故选B", 1),
        ("排除A、C、D。\n选B", 1),
        ("初看答案是A，但答案应该是B", 1),
        ("答案是A。不对，答案是B。", 1),
        ("答案是A。等等，应该是B", 1),
        ("维生素C有用。答案是B", 1),
        ("答案：B。A正确的说法应为华法林，C正确的说法略。", 1),
        (CHINESE + "答案是B", 1),
        ("【答案】B【解析】A错误，C为止痛药。", 1),
        ("本题答案为“B”。", 1),
        ("答：B", 1),
        ("选项B", 1),
        ("B选项", 1),
        ("选B不选A", 1),
        ("除A外，B也正确", 1),
        ("答案不是A，是B", 1),
        ("答案是A吗？不，答案是B。", 1),
        ("很多人误选A，其实应选B", 1),
        ("故选A", 0),
        ("答案是A。答案是B。", 0),
        ("答案是A或B", 0),
        ("选AB", 0),
        ("A正确，B正确", 0),
        ("布洛芬", 0),
        ("维生素B是对的", None),
        ("B错误", None),
        ("不选B", None),
        (CHINESE, None),
        ("不知道", None),
        ("<think>选B</think>\n", None),
    ],
)
def test_a_chinese_multiple_choice_answer(completion, expected):
    assert REWARDS["accuracy"](completion, "B", CHINESE) == scored(expected)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("AC", 1),
        ("A,C", 1),
        ("A、C", 1),
        ("A C", 1),
        ("CA", 1),
        ("Ａ，Ｃ", 1),
        ("答案是AC", 1),
        ("选A和C", 1),
        ("故选A、C。", 1),
        ("The answer is A and C.", 1),
        ("Answer: (A) and (C)", 1),
        ("Both A and C are correct.", 1),
        ("A正确，B错误，C正确，D错误", 1),
        ("A. Warfarin\nC. Ibuprofen", 1),
        (r"\boxed{A, C}", 1),
        ("ACD", 0),
        ("A", 0),
        ("A, B and C", 0),
        ("A or C", 0),
        ("答案是A。答案是C。", 0),
        ("B and D are wrong.", None),
    ],
)
def test_several_letters_must_match_exactly(completion, expected):
    assert REWARDS["accuracy"](completion, "AC", ENGLISH) == scored(expected)


@pytest.mark.parametrize(
    ("reference", "completion", "expected"),
    [
        ("A,C", "AC", 1),
        ("ＡＣ", "AC", 1),
        ("A、C", "C, A", 1),
        ("(B)", "B", 1),
        ("B. Aspirin", "B", 1),
        ("Aspirin", "B", 1),
        ("ABCD", "ABCD", 1),
        ("B", "AB", 0),
    ],
)
def test_a_reference_names_options_in_several_ways(reference, completion, expected):
    assert REWARDS["accuracy"](completion, reference, ENGLISH) == scored(expected)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (ENGLISH, {"A": "Warfarin", "B": "Aspirin", "C": "Ibuprofen", "D": "Vitamin K"}),
        ("Which? (A) liver (B) kidney", {"A": "liver", "B": "kidney"}),
        ("Which? A) liver B) kidney", {"A": "liver", "B": "kidney"}),
        ("哪个器官？A.肝B.肾C.脾", {"A": "肝", "B": "肾", "C": "脾"}),
        ("A. 维生素A、铁\nB. 钙", {"A": "维生素A、铁", "B": "钙"}),
        ("Example: A. x B. y\nAnswer: A\n\nWhich? A. liver B. kidney", {"A": "liver", "B": "kidney"}),
        ("Which organ? Answer with A, B or C.", {}),
        ("从A、B、C中选择", {}),
        ("How do I treat a cold?", {}),
    ],
)
def test_options_are_read_from_the_prompt(prompt, options):
    assert list_options(prompt) == options


def test_the_answer_to_an_example_in_the_prompt_is_not_the_models():
    prompt = "Example: A. tea B. milk\nAnswer: A\n\nWhich? A. liver B. kidney\n"
    assert REWARDS["accuracy"](prompt + "B", "B", prompt) == Judgement(1.0, True)


# -- accuracy: numbers -----------------------------------------------------------------------------------------------

RATE = "How fast should the pump run?"
RATE_IN = "How fast should the pump run, in mL/h?"


@pytest.mark.parametrize(
    ("reference", "prompt", "completion", "expected"),
    [
        ("12.5 mL/h", RATE, "12.5 mL/h", 1),
        ("12.5 mL/h", RATE, "12.5ml/hr", 1),
        ("12.5 mL/h", RATE, "12.5 mL per hour", 1),
        ("12.5 mL/h", RATE, "１２．５ 毫升/小时", 1),
        ("12.5 mL/h", RATE, "每小时12.5毫升", 1),
        ("12.5 mL/h", RATE, "0.3 L/day", 1),  # 300 mL in 24 h
        ("12.5 mL/h", RATE, "1000 mg / 80 mg/mL = 12.5 mL/h", 1),
        ("12.5 mL/h", RATE, "The answer is 12.5 mL/h, given over 8 hours.", 1),
        ("12.5 mL/h", RATE, r"\boxed{12.5 \text{ mL/h}}", 1),
        ("12.5 mL/h", RATE, "not 10 mL/h but 12.5 mL/h", 1),
        ("12.5 mL/h", RATE, "The answer is 12.5 mL/h, not 10 mL/h.", 1),
        ("12.5 mL/h", RATE, "12.5 mL/h rather than 10 mL/h", 1),
        ("12.5 mL/h", RATE, "The answer is 10 mL/h. Wait, 12.5 mL/h", 1),
        ("12.5 mL/h", RATE, "12.6 mL/h", 1),  # 0.8 % off
        ("12.5 mL/h", RATE, "12.7 mL/h", 0),  # 1.6 % off
        ("12.5 mL/h", RATE, "12.5 mL/min", 0),
        ("12.5 mL/h", RATE, "12.5 mg/h", 0),
        ("12.5 mL/h", RATE, "12.5 mL", 0),
        ("12.5 mL/h", RATE, "12.5", 0.5),
        ("12.5 mL/h", RATE_IN, "12.5", 1),
        ("12.5 mL/h", "泵速应为多少毫升/小时？", "12.5", 1),
        ("12.5 mL/h", "How fast, in L/h?", "0.0125", 1),
        ("12.5 mL/h", "How long, in days?", "12.5", 0.5),  # the prompt asks for something else as well
        ("12.5 mL/h", RATE_IN, "12.5 mg/h", 0),
        ("12.5 mL/h", RATE_IN, "13", 0),
        ("12.5 mL/h", RATE, "The answer is 12.5 mL/h. The answer is 14 mL/h.", 0),
        ("12.5 mL/h", RATE, "12.5 or 14 mL/h", 0),
        ("12.5 mL/h", RATE, "12–13 mL/h", 0),
        ("12.5 mL/h", RATE, "-12.5 mL/h", 0),
        ("12.5 mL/h", RATE, "I do not know", None),
        ("12.5 mL/h", RATE, "<think>12.5 mL/h", None),
        ("12.5 mL/h", RATE, "", None),
        ("0.3 g", "", "300 mg", 1),
        ("0.3 g", "", "300毫克", 1),
        ("0.3 g", "", "0.3克", 1),
        ("0.3 g", "", "300,000 mcg", 1),
        ("0.3 g", "", "300000 μg", 1),
        ("0.3 g", "", "300000 µg", 1),  # the micro sign, not the Greek letter
        ("0.3 g", "", ".3 g", 1),
        ("0.3 g", "", "每次300mg", 1),
        ("0.3 g", "", "300 milligrams", 1),
        ("0.3 g", "", r"$300\,\text{mg}$", 1),
        ("0.3 g", "", "0.3 mg", 0),
        ("0.3 g", "", "300 mL", 0),
        ("300 mg", "", "500 mg is the dose", 0),
        ("1/2 tablet", "", "0.5 tablets", 1),
        ("1.5 mg", "", "1 1/2 mg", 1),
        ("1.5 mg", "", "1½ mg", 1),
        ("0.5", "", "1/2", 1),
        ("0.5", "", r"\frac{1}{2}", 1),
        ("0.5", "", "1/0", 0),
        ("5×10^9/L", "", "5×10^9/L", 1),
        ("5×10^9/L", "", "5×10⁹/L", 1),
        ("5×10^9/L", "", r"5 \times 10^{9}/L", 1),
        ("5×10^9/L", "", "5000/μL", 1),
        ("5×10^9/L", "", "5×10^8/L", 0),
        ("1,500 mL", "", "1.5 L", 1),
        ("1500 mL", "", "1,500毫升", 1),
        ("2 mg/kg", "", "2 mg/kg", 1),
        ("2 mg/kg", "", "2 mg", 0),
        ("48 mg/kg/day", "", "2 mg/(kg·h)", 1),
        ("10 IU", "", "10 U", 1),
        ("10 IU", "", "10单位", 1),
        ("80 次/分", "", "每分钟 80 次", 1),
        ("80 beats/min", "", "80 bpm", 1),
        ("16 kPa", "", "120 mmHg", 1),  # 15.9986 kPa
        ("16 kPa", "", "120 kPa", 0),
        ("98.6 °F", "", "37 ℃", 1),
        ("37.0 ℃", "", "98.6°F", 1),
        ("37.0 ℃", "", "37 degrees Celsius", 1),
        ("37.0 ℃", "", "37度", 1),
        ("37.0 ℃", "", "37 °F", 0),
        ("5%", "", "5％", 1),
        ("5 min", "", "5 mın", 1),  # re.IGNORECASE takes the dotless i for an i, str.casefold does not
        ("80/s", "", "80/s", 1),
        ("80/s", "", "80 s", 0),
        ("100 mg", "", "101 mg", 1),  # 1 % is within the tolerance, though 0.101 - 0.1 > 0.001
        ("约100 mg", "", "100 mg", 1),
        ("-2.5", "", "−2.5", 1),
        ("-525 mL", "", "The answer is -525 mL.", 1),
        ("-525 mL", "", "答案：-525 mL", 1),
        ("-525 mL", "", "525 mL", 0),
        ("5.6 mmol/L", "What is the glucose?", "100.9 mg/dL", 1),  # 5.6 × 18.016
        ("5.6 mmol/L", "血糖是多少？", "101 mg/dL", 1),
        ("5.6 mmol/L", "What is the level?", "100.9 mg/dL", 0),  # of what is not said
        ("5.6 mmol/L", "What is the cholesterol?", "216.5 mg/dL", 1),  # 5.6 × 38.665
        ("88.4 umol/L", "肌酐？", "1.0 mg/dL", 1),  # 88.4 × 0.011312
        ("88.4 umol/L", "肌酐？", "88.4 μmol/L", 1),
        ("37.2", "", "37.2", 1),
        ("37.2", "", "体温37.2", 1),
        ("37.2", "What is it in °C?", "99 °F", 1),  # 37.2 °C
        ("10-12 mmol/L", "", "10–12 mmol/L", 1),
        ("10-12 mmol/L", "", "10 to 12 mmol/L", 1),
        ("10-12 mmol/L", "", "10 mmol/L ~ 12 mmol/L", 1),
        ("10-12 mmol/L", "", "11 mmol/L", 0),
        ("10-12 mmol/L", "", "10-13 mmol/L", 0),
        ("10-12 mmol/L", "", "10至12", 0.5),
        ("72", "", "48 / 2 = 24 and 48 + 24 = 72\n#### 72", 1),
        ("72", "", "The answer is 72, not 71.", 1),
        ("71", "", "The answer is 72, not 71.", 0),
        ("9", "", "Vitamin B12, COVID-19 and CO2", None),
    ],
)
def test_a_number_with_its_unit(reference, prompt, completion, expected):
    assert REWARDS["accuracy"](completion, reference, prompt) == scored(expected)


# -- accuracy: yes, no, maybe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "completion", "expected"),
    [
        ("yes", "Yes", 1),
        ("yes", "Yes, because the trial showed it.", 1),
        ("yes", "The answer is yes.", 1),
        ("yes", r"\boxed{yes}", 1),
        ("yes", "The statement is true.", 1),
        ("yes", "The statement is not false.", 1),
        ("yes", "No. Wait, yes.", 1),
        ("yes", "No, one might say. However, the answer is yes.", 1),
        ("yes", "Yes. There is no evidence against it.", 1),
        ("yes", "是", 1),
        ("yes", "是的，可以。", 1),
        ("yes", "对", 1),
        ("yes", "答案是：是", 1),
        ("yes", "这个说法是正确的。", 1),
        ("yes", "No", 0),
        ("yes", "Yes. No.", 0),
        ("yes", "Not true.", 0),
        ("yes", "Maybe", 0),
        ("yes", "不是", 0),
        ("yes", "Doctors differ in what they do.", None),
        ("yes", "对患者来说这是好事", None),  # 对 and 是 within a sentence say nothing
        ("yes", "<think>yes</think>", None),
        ("yes", "", None),
        ("no", "No", 1),
        ("no", "No, it is not.", 1),
        ("no", "It is not true.", 1),
        ("no", "This isn't correct.", 1),
        ("no", "The answer is not yes.", 1),
        ("no", "Incorrect.", 1),
        ("no", "否", 1),
        ("no", "不是，病毒感染无需抗生素。", 1),
        ("no", "不对。", 1),
        ("no", "不，不需要。", 1),
        ("no", "答案是否", 1),
        ("no", "答案：错误", 1),
        ("no", "这种说法不正确。", 1),
        ("no", "是的。不对，重新想：不是。", 1),
        ("no", "Yes", 0),
        ("no", "不是不对", 0),
        ("maybe", "Maybe", 1),
        ("maybe", "Uncertain.", 1),
        ("maybe", "The answer is maybe.", 1),
        ("maybe", "It is unclear.", 1),
        ("maybe", "不确定", 1),
        ("maybe", "不一定，要看情况。", 1),
        ("maybe", "无法确定。", 1),
        ("maybe", "Yes", 0),
        ("不确定", "maybe", 1),
        ("对", "正确", 1),
        ("错", "这是错误的。", 1),
        ("否", "是", 0),
        ("True", "true", 1),
        ("False", "true", 0),
    ],
)
def test_a_yes_no_or_maybe(reference, completion, expected):
    assert REWARDS["accuracy"](completion, reference, "Is it so?") == scored(expected)


# -- accuracy: free text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "completion", "expected"),
    [
        ("rest and drink water", "rest and drink water", 1),
        ("rest and drink water", "Rest, and drink WATER!", 1),
        ("rest and drink water", "rest", 0.4),  # 2·1/(1+4)
        ("rest and drink water", "water drink and rest", 0.25),  # one word in order: 2·1/8
        ("rest and drink water", "drink water", 2 / 3),  # 2·2/6
        ("rest and drink water", "please rest and also drink warm water", 8 / 11),  # 2·4/(7+4)
        ("rest and drink water", "surgery", 0),
        ("rest and drink water", "water water water water", 0.25),
        ("rest and drink water", "wat", 0),  # words, not letters
        ("rest and drink water", "<think>surgery</think>rest and drink water", 1),
        ("rest and drink water", "<think>rest and drink water</think>surgery", 0),
        ("rest and drink water", "", None),
        ("rest and drink water", "<think>rest and drink water", None),
        ("rest and drink water", "...!", None),
        ("多休息多喝水", "多休息多喝水", 1),
        ("多休息多喝水", "多休息，多喝水。", 1),
        ("多休息多喝水", "多喝水", 2 / 3),  # 2·3/(3+6)
        ("多休息多喝水", "喝水", 0.5),  # 2·2/(2+6)
        ("多休息多喝水", "水喝多", 2 / 9),
        ("多休息多喝水", "手术", 0),
        ("服用 aspirin", "服用 Aspirin", 1),
        ("服用 aspirin", "aspirin", 0.5),  # two characters and a word: 2·1/(1+3)
        ("120/80 mmHg", "120/80 mmHg", 1),
        ("120/80 mmHg", "150/100 mmHg", 1 / 3),  # mmHg alone is common: 2·1/6
        ("", "something", 0),
    ],
)
def test_free_text_is_scored_by_rouge_l(reference, completion, expected):
    assert REWARDS["accuracy"](completion, reference, "What helps?") == scored(expected)


def test_the_common_subsequence_is_that_of_the_textbook_table():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(12))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert longest_common_subsequence(a, b) == table[-1][-1]


# -- format, language, repetition, length ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think>b", 1),
        ("<think>\na\nb\n</think>\n\nc\nd\n", 1),
        ("  \n<think>a</think> b", 1),
        ("<think>嗯</think>答案是B", 1),
        ("<think>a < b > c</think>b", 1),
        ("<think>" + "a" * 10_000 + "</think>b", 1),
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>a</think>", 0.5),
        ("<think>a</think> \n ", 0.5),
        ("<think></think>b", 0.5),
        ("<think> \n</think>b", 0.5),
        ("Well. <think>a</think>b", 0.5),
        ("<think>a</think>b<think>c</think>d", 0.5),
        ("<think><think>a</think>b", 0.5),
        ("<think>a</think>b</think>c", 0.5),
        ("<think>a</think>b<think>", 0.5),
        ("</think><think>a</think>b", 0.5),
        ("<think></think>", 0.5),
        ("b", None),
        ("", None),
        ("<think>a", None),
        ("a</think>b", None),
        ("</think>a<think>", None),
        ("<Think>a</Think>b", None),
        ("<thinking>a</thinking>b", None),
    ],
)
def test_the_form_of_a_completion(completion, expected):
    assert REWARDS["format"](completion, "", "Why?") == scored(expected)


def test_a_template_that_opens_the_thinking_leaves_only_its_end_to_the_model():
    prompt = "<|im_start|>assistant\n<think>\n"
    assert REWARDS["format"]("a</think>b", "", prompt) == Judgement(1.0, True)
    assert REWARDS["accuracy"]("first A</think>yes", "yes", prompt) == Judgement(1.0, True)
    assert REWARDS["accuracy"]("yes", "yes", prompt) == UNREAD


ZH, EN = "感冒了怎么办？", "What helps against a cold?"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        (ZH, "多休息，多喝水。", 1),
        (EN, "Rest and drink water.", 1),
        (ZH, "Rest and drink plenty of water.", 0),
        (EN, "多休息，多喝水。", 0),
        (ZH, "多休息喝水 and then go to bed", 0.5),  # five characters, five words
        (EN, "Rest well 休息", 0.5),
        (EN, "Rest, drink and sleep 多喝水吧", 0.5),
        (ZH, "可用 ibuprofen 退热", 1),
        (ZH, "可用阿莫西林（amoxicillin clavulanate potassium）治疗", 1),
        (ZH, "做CT和MRI，查HbA1c", 1),
        (ZH, "做 CT、MRI、PET、ECG 检查", 1),
        (ZH, "查 HbA1c、CYP2D6x、Ca19x、Vit12x", 1),
        ("ibuprofen 怎么吃？", "饭后吃", 1),  # one Latin word makes no English prompt
        (ZH, "每次 500 mg，滴速 20 mL/h，体重 60 kg，共 3 mL 或 5 mL", 1),
        (ZH, "剂量：5 mg, 10 mg, 20 mg, 40 mg/kg", 1),
        (ZH, "运行：\n```python\nfor item in some list do this\n```\n即可", 1),
        (EN, "<think>先想一想</think>Rest and drink water.", 1),
        (ZH, "<think>let me think about the cold first</think>多喝水", 1),
        (ZH, "aspirin", 1),  # a name
        (ZH, "12.5 mL/h", 1),
        (EN, "12.5", 1),
        (ZH, "нужно много пить", 0),
        (EN, "Drink води", 0.5),
        (ZH, "α受体和β受体", 1),
        ("37 + 5 = ?", "多喝水", 1),  # a prompt in no language
        (ZH, "", None),
        (ZH, "<think>多喝水", None),
        (EN, "<think>Rest</think>", None),
    ],
)
def test_the_share_of_the_answer_in_the_language_of_the_prompt(prompt, completion, expected):
    assert REWARDS["language"](completion, "", prompt) == scored(expected)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("B", 1),
        ("Rest and drink water.", 1),
        ("one two three four five six", 1),
        ("yes yes yes yes", 1),  # a single 4-gram
        ("yes yes yes yes yes", 1 / 2),
        ("yes " * 13, 1 / 10),
        ("YES yes Yes yes yes", 1 / 2),
        ("a b c d a b c d", 4 / 5),  # abcd bcda cdab dabc abcd
        ("a b c d e a b c d e", 5 / 7),
        ("a, b. c! d? a; b: c d", 4 / 5),
        ("a b c d " * 25, 4 / 97),
        ("多喝水", 1),
        ("多喝水多休息", 1),
        ("多喝水吧多喝水吧", 4 / 5),
        ("多多多多多", 1 / 2),
        ("好" * 103, 1 / 100),
        ("多喝水，多喝水，多喝水，多喝水", 3 / 9),
        ("<think>a b c d a b c d</think>", 6 / 7),  # ten words with the tags; abcd stands twice
        ("1 2 3 4 1 2 3 4", 4 / 5),
        ("", None),
        ("!!! ...", None),
    ],
)
def test_repeated_four_grams_are_counted(completion, expected):
    assert REWARDS["repetition"](completion, "", "") == scored(expected)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("B", 1),
        ("多喝水", 1),
        ("好" * BUDGET_TOKENS, 1),
        ("好" * (BUDGET_TOKENS * 5 // 4), 0.75),
        ("好" * (BUDGET_TOKENS * 3 // 2), 0.5),
        ("好" * (BUDGET_TOKENS * 7 // 4), 0.25),
        ("好" * (BUDGET_TOKENS * 2), 0),
        ("好" * (BUDGET_TOKENS * 3), 0),
        ("a" * BUDGET_TOKENS, 1),
        ("a" * (BUDGET_TOKENS * 4), 1),
        ("a" * (BUDGET_TOKENS * 5), 0.75),
        ("a" * (BUDGET_TOKENS * 6), 0.5),
        ("a" * (BUDGET_TOKENS * 8), 0),
        ("a" * 500_000, 0),
        ("word " * BUDGET_TOKENS, 0.75),  # five characters a word
        ("." * (BUDGET_TOKENS * 6), 0.5),
        ("好" * (BUDGET_TOKENS // 2) + "a" * (BUDGET_TOKENS * 2), 1),
        ("好" * BUDGET_TOKENS + "a" * (BUDGET_TOKENS * 2), 0.5),
        ("<think>" + "好" * (BUDGET_TOKENS * 2) + "</think>B", 0),
        ("B" + "\n" * (BUDGET_TOKENS * 8), 0),
        ("", None),
        (" \n", None),
    ],
)
def test_text_over_the_budget_is_penalised(completion, expected):
    assert REWARDS["length"](completion, "", "") == scored(expected)


# -- math ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "completion", "expected"),
    [
        ("42", "42", 1),
        ("42", r"\boxed{42}", 1),
        ("42", "The answer is 42.", 1),
        ("42", "答案是42", 1),
        ("42", "答案：42。", 1),
        ("42", "<think>41</think>42", 1),
        ("42", "41", 0),
        ("42", "<think>42</think>41", 0),
        ("42", "<think>42", None),
        ("42", "", None),
        ("42", "I cannot say", None),
        ("1/2", "$0.5$", 1),
        ("1/2", r"\boxed{\frac{1}{2}}", 1),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1),
        (r"$\sqrt{2}$", r"$2^{1/2}$", 1),
        (r"$\sqrt{2}$", "$2$", 0),
        ("$x^2$", r"$x \cdot x$", 1),
        ("$x^2+2x+1$", "$(x+1)^2$", 1),
        ("$x^2$", "$x^3$", 0),
        ("72", "48/2 = 24, 48 + 24 = 72. The answer is 72", 1),
        ("3", r"First \boxed{2}? No, $\boxed{3}$", 1),
    ],
)
def test_mathematical_expressions_are_compared_by_math_verify(reference, completion, expected):
    pytest.importorskip("math_verify")
    assert REWARDS["math"](completion, reference, "") == scored(expected)


def test_without_math_verify_the_user_hears_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match="^--reward_functions math needs a package: pip install math-verify$"):
        load_rewards("accuracy,math")


def test_math_verify_sees_what_follows_the_last_statement(monkeypatch):
    seen = []
    fake = types.SimpleNamespace(parse=lambda text: seen.append(text) or [text], verify=lambda a, b: a == b)
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    REWARDS["math"]("答案是 1？<think>41</think>所以答案是42", "42", "")
    assert [text.strip() for text in seen] == ["42", "42"]
    assert [reward.name for reward in load_rewards("math")] == ["math"]


# -- all of them -----------------------------------------------------------------------------------------------------

REFERENCES = [("B", ENGLISH), ("AC", CHINESE), ("12.5 mL/h", RATE_IN), ("yes", "Is it?"), ("rest and water", EN)]
WITHOUT_MATH = sorted(set(REWARDS) - {"math"})
BITS = [
    *(
        "A",
        "B",
        "AC",
        " ",
        "\n",
        "，",
        "。",
        "<think>",
        "</think>",
        "<answer>",
        "答案",
        "是",
        "不",
        "选",
        "故",
        "or",
        "and",
    ),
    *(
        "The answer is ",
        "not ",
        "wrong",
        "1",
        "2/3",
        "12.5",
        ",",
        "mL",
        "/",
        "h",
        "×10^",
        "9",
        "e",
        "°F",
        "-",
        "–",
        "每",
    ),
    *(
        "yes",
        "no",
        "是否",
        "\\boxed{",
        "}",
        "\\frac{1}{0}",
        "½",
        "⁹",
        "ﷺ",
        "\u0000",
        "\ud83d",
        "😀",
        "Ａ",
        "İ",
        "ſ",
        "٣",
    ),
    *("wait", "so", "A. Warfarin", "(", ")", ".", "```", "#### ", "$", "**", "vitamin ", "µg", "1,000", "to", "per "),
]


@pytest.mark.parametrize("name", WITHOUT_MATH)
def test_no_string_raises_and_every_score_lies_between_0_and_1(name):
    rng = random.Random(1)

    def text(length):
        return "".join(rng.choice(BITS) for _ in range(rng.randrange(length)))

    for round_number in range(1500):
        reference, prompt = rng.choice(REFERENCES) if round_number % 3 else (text(6), text(25))
        completion = text(25)
        judgement = REWARDS[name](completion, reference, prompt)
        assert isinstance(judgement.score, float) and isinstance(judgement.parsed, bool), completion
        assert 0 <= judgement.score <= 1 and (judgement.parsed or judgement.score == 0), completion


UNITS = [
    *("A", "A,", "A ", "A, B ", "(A", "A is ", "B is not ", "the answer is A. ", "answer is ", "选A", "答案", "不"),
    *(" ", "\n", " \n", "a", "so ", "wait, ", "<think>", "</think>", "<answer>", "{", "\\boxed{", "\\frac{1}", "`"),
    *(
        "1",
        "1,",
        "1,000,",
        "1 ",
        "1/",
        "1-",
        "-",
        "10^",
        "⁹",
        "½",
        "1e9 ",
        "mg/",
        "每",
        "每小时",
        "not ",
        "yes ",
        "no,",
    ),
    *("是", "答案是B。", "rest and water ", "```a", "|", "不是", "¼/", "\\text"),
]


def seconds(name, completion, reference, prompt):
    start = time.perf_counter()
    REWARDS[name](completion, reference, prompt)
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("name", "reference", "prompt"),
    [
        *(("accuracy", *item) for item in REFERENCES),
        *((name, "yes", ZH) for name in WITHOUT_MATH if name != "accuracy"),
    ],
)
def test_nothing_is_read_in_quadratic_time(name, reference, prompt):
    """A pattern that starts over at every character needs 10⁹ steps for one of these, some minutes."""
    times = {unit: seconds(name, unit * (50_000 // len(unit)) + "!", reference, prompt) for unit in UNITS}
    assert max(times.values()) < 3, max(times, key=times.get)


@pytest.mark.parametrize("name", WITHOUT_MATH)
@pytest.mark.parametrize(("reference", "prompt"), REFERENCES)
def test_half_a_megabyte_takes_about_a_second(name, reference, prompt):
    sentence = "The answer is B, not A. 因此选B，剂量为 12.5 mL/h。Yes, it is correct. Rest and drink water.\n"
    assert seconds(name, sentence * (500_000 // len(sentence.encode())), reference, prompt) < 6  # others work here too


# -- load_rewards ----------------------------------------------------------------------------------------------------


def test_rewards_are_read_with_their_weights():
    accuracy, form = load_rewards("accuracy, format", "1,0.2")
    assert (accuracy.name, accuracy.weight, form.name, form.weight) == ("accuracy", 1.0, "format", 0.2)
    judged = accuracy.score_all([ENGLISH, ENGLISH, "?"], ["B", "A", ""], ["B", "B", "yes"])
    assert judged == [Judgement(1.0, True), Judgement(0.0, True), UNREAD]
    assert form.score_all(["?"], ["<think>a</think>b"], [""]) == [Judgement(1.0, True)]


def test_weights_are_one_where_none_are_given():
    assert [reward.weight for reward in load_rewards("length,language,repetition", None)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ("", None, "--reward_functions is empty"),
        (" , ", None, "--reward_functions is empty"),
        ("accurracy", None, "'accurracy' is unknown; did you mean accuracy"),
        ("bleu", None, "'bleu' is unknown; known: accuracy, format, language, repetition, length, math"),
        ("accuracy,accuracy", None, "names a reward twice"),
        ("accuracy,format", "1", "--reward_weights has 1 numbers for 2 --reward_functions"),
        ("accuracy", "1,2", "--reward_weights has 2 numbers for 1"),
        ("accuracy", "high", "--reward_weights 'high' must be numbers"),
        ("accuracy,format", "1,", "--reward_weights '1,' must be numbers"),
        ("accuracy", "nan", "--reward_weights 'nan' must be numbers"),
        ("accuracy", "inf", "--reward_weights 'inf' must be numbers"),
        ("missing.py:score", None, "--reward_functions missing.py:score: there is no file missing.py"),
        ("missing.py", None, "'missing.py' is unknown"),
    ],
)
def test_flags_that_cannot_be_read_are_named(names, weights, message):
    with pytest.raises(ValueError) as error:
        load_rewards(names, weights)
    assert message in str(error.value) and "\n" not in str(error.value)


def users_file(tmp_path, body, head=""):
    path = tmp_path / "mine.py"
    path.write_text(f"{head}\ndef score(prompts, completions, answers):\n    {body}\n", encoding="utf-8")
    return f"{path}:score"


def test_a_users_function_gets_lists_and_its_scores_are_kept(tmp_path):
    name = users_file(tmp_path, "return [len(p + c + a) - 2 for p, c, a in zip(prompts, completions, answers)]")
    (reward,) = load_rewards(name, "-0.5")
    assert (reward.name, reward.weight) == (name, -0.5)
    judged = reward.score_all(["p", "pp"], ["c", "cc"], ["a", "aa"])
    assert judged == [Judgement(1.0, True), Judgement(4.0, True)]


def test_a_users_file_may_define_dataclasses_and_return_numpy(tmp_path):
    head = (
        "from __future__ import annotations\nimport dataclasses, numpy\n@dataclasses.dataclass\nclass A:\n    x: int"
    )
    (reward,) = load_rewards(users_file(tmp_path, "return numpy.array([A(1).x, 0.5], dtype=numpy.float32)", head))
    assert [judgement.score for judgement in reward.score_all(["", ""], ["", ""], ["", ""])] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "returned 1 scores for 2 completions"),
        ("return [1.0, 2.0, 3.0]", "returned 3 scores for 2 completions"),
        ("return [1.0, 'good']", "returned 'good'; expected a finite number"),
        ("return [1.0, None]", "returned None; expected a finite number"),
        ("return [1.0, float('nan')]", "returned nan; expected a finite number"),
        ("return [1.0, float('inf')]", "returned inf; expected a finite number"),
        ("return 1.0", "failed: TypeError: 'float' object is not iterable"),
        ("return {}['a']", "failed: KeyError: 'a'"),
        ("raise RuntimeError('two\\nlines')", "failed: RuntimeError: two lines"),
    ],
)
def test_a_users_function_that_fails_is_named(tmp_path, body, message):
    name = users_file(tmp_path, body)
    (reward,) = load_rewards(name)
    with pytest.raises(ValueError) as error:
        reward.score_all(["a", "b"], ["a", "b"], ["a", "b"])
    assert f"--reward_functions {name} {message}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "function", "message"),
    [
        ("return []", "other", "has no function 'other'"),
        ("return [", "score", "cannot be imported: SyntaxError"),
        ("return []\nraise OSError('no\\ndisk')", "score", "cannot be imported: OSError: no disk"),
        ("return []\nvalue = 3", "value", "has no function 'value'"),
    ],
)
def test_a_users_file_without_the_function_is_named(tmp_path, body, function, message):
    name = users_file(tmp_path, body).replace(":score", f":{function}")
    with pytest.raises(ValueError) as error:
        load_rewards(name)
    assert name in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
