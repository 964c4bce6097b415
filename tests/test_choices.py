"""Every published form of multiple choice becomes the same record; keys that could mean two things are refused."""

import pytest

from stagekit.choices import answer_text, candidates, choose_shots, first_option, is_choice, question_text, read_answer
from stagekit.choices import to_choice as read
from stagekit.records import Choice, RowError

FOUR = {"A": "Liver", "B": "Spleen", "C": "Skin", "D": "Lung"}
# One record in each form, invented; all but the last two ask the same.
SCHEMAS = {
    "plain": {"question": "Largest organ?", "options": FOUR, "answer": "C", "subject": "anatomy", "language": "en"},
    "CMB": {
        **{"exam_type": "e", "exam_class": "c", "exam_subject": "anatomy", "question_type": "单项选择题"},
        **{"question": "Largest organ?", "answer": "C", "option": {**FOUR, "E": "", "F": None}},
    },
    "CMExam csv": {
        **{"Question": "Largest organ?", "Options": "A Liver\nB Spleen\nC Skin\nD Lung", "Answer": "C"},
        **{"Explanation": "e", "Medical Discipline": "anatomy"},
    },
    "CMExam json": {
        "Question": "Largest organ?",
        "Options": [{"key": key, "value": value} for key, value in FOUR.items()],
        "Answer": "C",
        "Medical Discipline": "anatomy",
    },
    "MedQA": {
        **{"question": "Largest organ?", "answer": "Skin", "options": FOUR, "meta_info": "anatomy"},
        **{"answer_idx": "C", "metamap_phrases": ["organ"]},
    },
    "MedQA hf": {
        **{"id": "1", "sent1": "Largest organ?", "sent2": "", "ending0": "Liver", "ending1": "Spleen"},
        **{"ending2": "Skin", "ending3": "Lung", "label": 2, "subject": "anatomy"},
    },
    "MedMCQA": {
        **{"id": "x", "question": "Largest organ?", "opa": "Liver", "opb": "Spleen", "opc": "Skin", "opd": "Lung"},
        **{"cop": 2, "choice_type": "multi", "exp": None, "subject_name": "anatomy", "topic_name": None},
    },
    "C-Eval": {
        **{"id": "0", "question": "Largest organ?", **FOUR, "answer": "C", "explanation": "", "subject": "anatomy"},
    },
    "CMMLU": {"": "0", "Question": "Largest organ?", **FOUR, "Answer": "C", "subject": "anatomy"},
    "MMLU hub": {"question": "Largest organ?", "choices": list(FOUR.values()), "answer": 2, "subject": "anatomy"},
}


@pytest.mark.parametrize("form", SCHEMAS)
def test_every_published_form_becomes_the_same_record(form):
    assert is_choice(SCHEMAS[form])
    explanation = SCHEMAS[form].get("Explanation", "")
    assert read(SCHEMAS[form], first=0) == Choice("Largest organ?", FOUR, "C", False, "anatomy", "en", explanation)


@pytest.mark.parametrize(
    "record",
    [
        {
            **{"pubid": 1, "question": "Does gum help?", "long_answer": "It may.", "final_decision": "maybe"},
            "context": {"contexts": ["Forty were followed.", "Gum went home first."], "labels": ["M", "R"]},
        },
        {
            **{"QUESTION": "Does gum help?", "CONTEXTS": ["Forty were followed.", "Gum went home first."]},
            **{"LABELS": ["M", "R"], "YEAR": None, "final_decision": "maybe", "LONG_ANSWER": "It may."},
        },
    ],
    ids=["hub", "GitHub"],
)
def test_pubmedqa_is_answered_with_a_word_after_its_context(record):
    choice = read(record)
    assert choice.question == "Forty were followed.\nGum went home first.\nDoes gum help?"
    assert choice.answer == "maybe" and candidates(choice) == ["yes", "no", "maybe"]
    assert question_text(choice) == choice.question + "\nAnswer with yes, no or maybe."


@pytest.mark.parametrize(
    "record, several",
    [({"question": "体征？", "option": FOUR, "answer": "ABD", "question_type": "多项选择题"}, True)]
    + [
        ({"question": "体征？", "options": FOUR, "answer": key}, True)
        for key in ("BDA", "A,B,D", "A、B、D", ["A", "B", "D"])
    ]
    + [({"question": "体征？", "option": FOUR, "answer": "B", "question_type": "多项选择题"}, True)]
    + [({"question": "体征？", "option": FOUR, "answer": "B", "question_type": "单项选择题"}, False)],
)
def test_several_right_letters_are_a_set_and_the_exam_says_so(record, several):
    choice = read(record)
    assert choice.several is several and choice.answer == ("B" if record["answer"] == "B" else "ABD")
    assert ("不止一个" in question_text(choice)) is several


# -- keys that are numbers -------------------------------------------------------------------------------------------


def medmcqa(*numbers):
    return [{"question": "q?", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": number} for number in numbers]


@pytest.mark.parametrize(
    "numbers, first",
    [((0, 1, 3), 0), ((1, 2, 4), 1), (("1", "4"), 1), ((1, 2, 3), None), ((-1, 0), 0), ((), None), ((None,), None)],
)
def test_the_number_of_option_a_is_told_by_the_whole_file(numbers, first):
    assert first_option(medmcqa(*numbers)) == first


@pytest.mark.parametrize("first, letters", [(0, "ABCD"), (1, "?ABC")])
def test_the_key_of_medmcqa_counts_from_there(first, letters):
    for number, letter in enumerate(letters):
        if letter == "?":
            with pytest.raises(RowError, match="cop 0 names none of the 4 options"):
                read(medmcqa(number)[0], first)
        else:
            assert read(medmcqa(number)[0], first).answer == letter


def test_numbers_that_allow_both_are_refused_rather_than_guessed():
    with pytest.raises(RowError, match="--first_option 0 or 1"):
        read(medmcqa(1)[0], first_option(medmcqa(1, 2, 3)))


def test_an_index_into_a_list_counts_from_0_whatever_the_file_says_of_cop():
    assert read(SCHEMAS["MMLU hub"], first=1).answer == "C"
    assert read(SCHEMAS["MedQA hf"], first=1).answer == "C"


NUMBERS = {"A": "1", "B": "2", "C": "3"}
GROUPS = {"A": "B", "B": "A", "C": "AB", "D": "O"}  # of blood
ARC = {"text": ["Liver", "Spleen", "Skin"], "label": ["1", "2", "3"]}


@pytest.mark.parametrize(
    "record, answer",
    [
        ({"options": NUMBERS, "answer": "2"}, "B"),  # a text is the option of that text ...
        ({"options": NUMBERS, "answer": 2}, "C"),  # ... and a number a place
        ({"options": ["1", "2", "3"], "answer": "1"}, "A"),
        ({"options": list(FOUR.values()), "answer": "2"}, "C"),
        ({"options": list(FOUR.values()), "answer": "2.0"}, "C"),
        ({"options": FOUR, "answer": [0, 2]}, "AC"),
        ({"options": FOUR, "answer": ["2", "0"]}, "AC"),
        ({"options": FOUR, "answer": ["Skin", "Liver"]}, "AC"),
        ({"options": FOUR, "answer": [2]}, "C"),
        ({"options": ["3", "5", "7"], "answer": ["3", "7"]}, "AC"),
        ({"choices": ARC, "answerKey": "3"}, "C"),
        ({"choices": ARC, "answerKey": 3}, "C"),
        ({"choices": {**ARC, "text": ["3", "1", "2"]}, "answerKey": "3"}, "C"),
        ({"choices": {**ARC, "label": ["B", "C", "A"]}, "answerKey": "A"}, "C"),
        ({"choices": {**ARC, "label": ["A", "B", "C"]}, "answerKey": "C"}, "C"),
        ({"options": {"A": "Liver", "B": "", "C": "Skin", "D": "Lung"}, "answer": 2}, "C"),
        ({"options": ["Liver", None, "Skin", "Lung"], "answer": 3}, "D"),
        ({"options": GROUPS, "answer": "A"}, "A"),  # a letter is the name of an option before it is a text
        ({"options": GROUPS, "answer": "AB"}, "C"),
        ({"ending0": "2", "ending1": "4", "ending2": "6", "label": "2"}, "C"),  # as a table has it
        ({"opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": "2"}, "B"),
    ],
)
def test_a_key_is_the_name_of_an_option_its_text_or_its_place_in_that_order(record, answer):
    assert read({"question": "Which?", **record}, first=1).answer == answer


@pytest.mark.parametrize(
    "options, answer",
    [({"A": "Liver", "B": "", "C": "Skin"}, 1), (["Liver", "Skin"], [0, 2]), (["Liver", "Skin"], 11), (NUMBERS, -1)],
)
def test_a_place_without_an_option_is_refused(options, answer):
    with pytest.raises(RowError, match="names none of the"):
        read({"question": "Which?", "options": options, "answer": answer})


@pytest.mark.parametrize("key", ["answer", "answer_idx"])
def test_one_letter_is_a_letter_even_where_it_is_the_text_of_another_option(key):
    vitamins = {"A": "A", "B": "B12", "C": "D", "D": "K"}
    assert read({"question": "Which vitamin clots?", "options": vitamins, key: "D"}).answer == "D"
    drugs = {"A": "CA", "B": "ACE", "C": "BA", "D": "D"}
    record = {"question": "Which one?", "options": drugs, key: "CA"}
    assert read(record).answer == ("A" if key == "answer" else "AC")


def test_a_row_to_learn_from_may_lack_its_key_and_have_many_options():
    record = {**SCHEMAS["plain"], "answer": None}
    assert read(record, to_measure=False).answer == ""
    assert read({**medmcqa(-1)[0]}, to_measure=False).answer == ""
    many = {letter: letter * 2 for letter in "ABCDEFGHI"}
    record = {"question": "q", "options": many, "answer": "AB"}
    assert read(record, to_measure=False).answer == "AB"


def test_what_a_model_learns_to_answer_is_read_back_as_the_key():
    for form in SCHEMAS.values():
        choice = read(form, first=0)
        assert read_answer(choice, answer_text(choice)) == "C"
    several = {"question": "哪些是体征？", "options": {"A": "体温", "B": "脉搏", "C": "身高", "D": "血压"}}
    choice = read({**several, "answer": "DBA", "explanation": "身高不是生命体征。"})
    assert answer_text(choice) == "ABD\nA. 体温\nB. 脉搏\nD. 血压\n\n身高不是生命体征。"
    assert read_answer(choice, answer_text(choice)) == "ABD"
    word = read({"question": "Does it?", "final_decision": "no", "long_answer": "It does not help."})
    assert answer_text(word) == "no\n\nIt does not help." and read_answer(word, answer_text(word)) == "no"


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        "A. Liver B. Spleen C. Skin D. Lung",
        "A、Liver\nB、Spleen\nC、Skin\nD、Lung",
        "A Liver\nB Spleen\nC Skin\nD Lung\n",
        ["A. Liver", "B. Spleen", "C. Skin", "D. Lung"],
        ["Liver", "Spleen", "Skin", "Lung"],
        {"a": "Liver", "b": " Spleen ", "c": "Skin", "d": "Lung", "e": ""},
    ],
)
def test_options_are_read_from_strings_lists_and_objects(options):
    assert read({"question": "Largest organ?", "options": options, "answer": "C"}).options == FOUR


def test_marks_count_in_the_order_of_the_alphabet_only():
    options = "A. Vitamin K. B. Iron C. Zinc"
    expected = {"A": "Vitamin K.", "B": "Iron", "C": "Zinc"}
    assert read({"question": "Largest organ?", "options": options, "answer": "C"}).options == expected


def test_a_letter_inside_an_option_is_no_mark():
    options = "A 维生素 B 族\nB 维生素 C\nC 铁剂"
    assert read({"question": "缺什么？", "options": options, "answer": "A"}).options == {
        "A": "维生素 B 族",
        "B": "维生素 C",
        "C": "铁剂",
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": ""}, "no key"),
        ({"answer": None}, "no key"),
        ({"answer": "E"}, "answer 'E' names none of the options A, B, C, D"),
        ({"answer": "Kidney"}, "names none of the options"),
        ({"answer": 7}, "answer 7 names none of the 4 options"),
        ({"options": {"A": "Liver", "B": ""}}, r"two or more options named A to K, got \['A'\]"),
        ({"options": {"1": "Liver", "2": "Skin"}}, "two or more options named A to K"),
        ({"options": "Liver or skin"}, "the options cannot be read"),
        ({"options": [str(number) for number in range(12)]}, "at most 11"),
        ({"options": {letter: letter * 2 for letter in "ABCDEFGHI"}, "answer": "AB"}, "8 are the most"),
        ({"question": " "}, "the question is empty"),
        ({"context": {"contexts": 5}}, "the context must be a string or a list of strings"),
    ],
)
def test_a_record_that_cannot_be_scored_says_why(change, message):
    with pytest.raises(RowError, match=message):
        read({**SCHEMAS["plain"], **change})


@pytest.mark.parametrize(
    "record",
    [{"question": "q", "answer": "B"}, {"options": FOUR}, {"question": "q", "final_decision": None}, "text", 3],
)
def test_other_records_are_no_choices(record):
    assert not is_choice(record)


# -- questions and answers -------------------------------------------------------------------------------------------


def test_the_question_lists_its_options_and_asks_for_the_letter():
    assert question_text(read(SCHEMAS["plain"])) == (
        "Largest organ?\nA. Liver\nB. Spleen\nC. Skin\nD. Lung\nAnswer with the letter of the correct option."
    )


def test_candidates_of_several_are_all_non_empty_sets():
    choice = Choice("q", {"A": "a", "B": "b", "C": "c"}, "AB", True, None, "en")
    assert candidates(choice) == ["A", "B", "C", "AB", "AC", "BC", "ABC"]
    eight = Choice("q", {letter: letter * 2 for letter in "ABCDEFGH"}, "AB", True, None, "en")
    assert len(set(candidates(eight))) == 255


@pytest.mark.parametrize(
    "said, read_as",
    [
        ("C", "C"),
        ("The answer is C.", "C"),
        ("Let's think. The liver is large, but the skin is larger. Answer: C", "C"),
        ("Skin", "C"),
        ("<think>Perhaps A.</think>C", "C"),
        ("<think>Perhaps A", None),
        ("A or C", ""),
        ("The answer is A. The answer is C.", ""),
        ("Drink water and rest.", None),
        ("", None),
        (question_text(read(SCHEMAS["plain"])), None),
    ],
)
def test_an_answer_is_read_as_its_final_choice(said, read_as):
    assert read_answer(read(SCHEMAS["plain"]), said) == read_as


@pytest.mark.parametrize("said, read_as", [("ABD", "ABD"), ("选A、B、D。", "ABD"), ("答案：DBA", "ABD"), ("AB", "AB")])
def test_several_letters_are_read_as_a_set(said, read_as):
    choice = read(
        {"question": "哪些是体征？", "options": {"A": "体温", "B": "脉搏", "C": "身高", "D": "血压"}, "answer": "ABD"}
    )
    assert read_answer(choice, said) == read_as


@pytest.mark.parametrize("said, read_as", [("Yes, it does.", "yes"), ("Maybe.", "maybe"), ("The answer is no", "no")])
def test_words_are_read_as_yes_no_or_maybe(said, read_as):
    assert read_answer(read({"question": "Does it?", "final_decision": "no"}), said) == read_as


def test_shots_of_the_same_form_and_subject_come_first():
    def choice(name, subject, several=False):
        return Choice(name, FOUR, "A", several, subject, "en")

    pool = [choice("1", "eye"), choice("2", "ear", True), choice("3", "ear"), choice("4", "ear")]
    asked = choice("q", "ear")
    assert [shot.question for shot in choose_shots(asked, pool, 3)] == ["3", "4", "1"]
    assert [shot.question for shot in choose_shots(asked, pool, 9)] == ["3", "4", "1", "2"]
