"""What of evaluation data stands in training data: prompts, runs of thirteen units, and what share of a text."""

from conftest import write_jsonl

from stagekit.contamination import Evaluations, Overlap, read_evaluations, runs_of
from stagekit.records import Conversation, Text
from stagekit.seen_prompts import prompt_hash

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words(count, prefix="w"):
    return " ".join(f"{prefix}{number}" for number in range(count))


def read(tmp_path, *rows) -> Evaluations:
    return read_evaluations(str(write_jsonl(tmp_path / "eval" / "rows.jsonl", rows)))


def look(evaluations, *texts):
    """The overlap with training rows of one text each."""
    overlap = Overlap(evaluations)
    for index, text in enumerate(texts):
        overlap.add(index, prompt_hash(Text(text)), evaluations.known_runs([text]))
    return overlap


def test_a_run_is_thirteen_words_or_characters_without_signs():
    assert runs_of(words(12)) == []
    assert runs_of(f"{words(7)}, {words(6, 'W')}!") == [f"{words(7)} {words(6)}"]
    assert len(runs_of(words(20))) == 8
    assert runs_of("一二三四五六七，八九十百千万") == ["一 二 三 四 五 六 七 八 九 十 百 千 万"]
    assert len(runs_of("一" * 30)) == 1


def test_every_kind_of_evaluation_row_is_looked_for(tmp_path):
    long = words(13)
    rows = [
        {"question": f"safe {words(12)}", "kind": "dose", "must_not": ["x"]},
        {"question": "pick", "options": {"A": words(5, "a"), "B": words(5, "b")}, "answer": "A"},
        {"prompt": "short", "chosen": f"better {long}", "rejected": f"worse {long}"},
        {"text": f"text {long}"},
        {"question": "free?", "answer": f"reference {long}"},
        {"question": f"letter {long}", "answer": "B", "kind": "choice"},
        {"nothing": 1},
    ]
    found = read(tmp_path, *rows)
    path = tmp_path / "eval" / "rows.jsonl"
    assert found.origins == [f"{path}:{line}" for line in range(1, 7)]
    assert [item["origin"] for item in found.rejected] == [f"{path}:7"]
    for run, row in (
        (f"safe {words(12)}", 0),
        (f"pick a {words(5, 'a')} b {words(5, 'b')}", 1),  # question and options in one
        (f"better {words(12)}", 2),
        (f"worse {words(12)}", 2),
        (f"text {words(12)}", 3),
        (f"reference {words(12)}", 4),
        (f"letter {words(12)}", 5),
    ):
        assert [found.texts[text][0] for text in found.runs[run]] == [row], run


def test_the_same_prompt_is_found_whatever_its_signs(tmp_path):
    evaluations = read(
        tmp_path, {"question": "发烧怎么办？", "answer": "多喝水"}, {"question": "other", "answer": "x"}
    )
    overlap = Overlap(evaluations)
    asked = Conversation([{"role": "user", "content": "发烧，怎么办"}, {"role": "assistant", "content": "休息"}])
    overlap.add(5, prompt_hash(asked), [])
    assert overlap.same == [(5, 0)] and overlap.seen() == {0}


def test_a_row_is_seen_when_half_of_the_runs_of_a_text_stand_in_one_row(tmp_path):
    evaluations = read(tmp_path, {"question": words(22), "answer": "x"})  # 10 runs
    for shared, seen in ((16, set()), (17, {0}), (22, {0})):  # 4, 5 and 10 of them
        overlap = look(evaluations, f"before {words(shared)} behind")
        assert overlap.shared[0].share == (shared - 12) / 10 and overlap.seen() == seen
        assert overlap.shared[0].run == words(13)
    assert look(evaluations, words(12)).shared == {}
    parts = look(evaluations, words(16), " ".join(words(22).split()[6:]))  # two rows with 4 runs each
    assert parts.shared[0].share == 0.4 and parts.seen() == set() and parts.rows_sharing == 2


def test_of_several_rows_the_one_that_shares_most_is_named(tmp_path):
    evaluations = read(tmp_path, {"question": "q", "answer": words(22)})
    overlap = look(evaluations, words(14), "nothing", words(20), words(15))
    assert (overlap.shared[0].index, overlap.shared[0].share, overlap.rows_sharing) == (2, 0.8, 3)


def test_the_answer_counts_by_itself(tmp_path):
    evaluations = read(tmp_path, {"question": words(100), "answer": words(13, "a")})
    assert look(evaluations, words(13, "a")).seen() == {0}  # all of the answer, nothing of the long question


def test_a_run_in_more_than_ten_evaluation_texts_is_a_phrase(tmp_path):
    phrase = words(13, "p")
    for count, known in ((10, 10), (11, 0)):
        evaluations = read(
            tmp_path, *({"question": f"{letter} {phrase}", "answer": "x"} for letter in LETTERS[:count])
        )
        assert len(look(evaluations, phrase).shared) == known


def test_runs_do_not_go_across_messages(tmp_path):
    evaluations = read(tmp_path, {"question": words(13), "answer": "x"})
    first, second = words(13).split()[:6], words(13).split()[6:]
    assert evaluations.known_runs([" ".join(first), " ".join(second)]) == []
    assert evaluations.known_runs(["x", words(13)]) == [words(13)]
