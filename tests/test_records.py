"""The canonical kinds, and the closed lists of what may happen to a row: every entry is used, nothing else is."""

import ast
import pickle

import pytest
from conftest import ROOT

from stagekit import records
from stagekit.records import DROP_REASONS, REPAIRS, Choice, Repairs, RowError, Tree, Unused, shown


def words_given_to(name):
    """[(file:line, word)] of the first argument of every call of a function or method in the project's code."""
    found = []
    paths = {path for pattern in ("*.py", "stagekit/*.py", "tools/*.py") for path in ROOT.glob(pattern)}
    for path in sorted(paths - {ROOT / "eval_metrics.py"}):  # which imports nothing of ours
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = getattr(node, "func", None)
            if isinstance(node, ast.Call) and name in (getattr(called, "id", None), getattr(called, "attr", None)):
                first = node.args[0]
                cases = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
                found += [(f"{path.name}:{node.lineno}", word_of(case)) for case in cases]
    return found


def word_of(node):
    """A literal, or what a name of stagekit.records stands for."""
    return getattr(records, node.id, None) if isinstance(node, ast.Name) else getattr(node, "value", None)


@pytest.mark.parametrize(("name", "closed"), [("note", REPAIRS), ("Unused", DROP_REASONS)])
def test_repairs_and_reasons_are_closed_lists_and_each_is_used(name, closed):
    given = words_given_to(name)
    assert [(place, word) for place, word in given if word not in closed] == []
    assert {word for _, word in given} == set(closed)
    assert len(set(closed)) == len(closed)


def test_a_kind_that_is_on_no_list_is_a_programming_error():
    with pytest.raises(AssertionError, match="'typo' is no kind"):
        Repairs().note("typo")
    with pytest.raises(AssertionError, match="'typo' is no reason"):
        Unused("typo")


def test_a_row_left_out_keeps_its_reason_through_a_pool_of_processes():
    left_out = pickle.loads(pickle.dumps(Unused("deleted", "the message was deleted")))
    assert isinstance(left_out, RowError)
    assert (left_out.reason, str(left_out)) == ("deleted", "the message was deleted")
    assert str(Unused("deleted")) == "deleted"


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, "line\nbreak", 10**5000, -(10**50), [[[[[[[["deep"]]]]]]]], {"a": "b" * 500}, float("nan")],
    ids=["long", "lines", "digits", "negative", "deep", "object", "nan"],
)
def test_a_value_is_shown_short_and_on_one_line_however_large_it_is(value):
    assert len(shown(value)) < 200 and "\n" not in shown(value)


def test_small_values_are_shown_as_they_are():
    assert [shown(value) for value in ("alien", None, 7, [1], 1.5)] == ["'alien'", "None", "7", "[1]", "1.5"]


def test_threads_of_a_deep_tree_are_walked():
    tree = Tree("assistant" if 200 % 2 else "user", "last")
    for depth in reversed(range(200)):
        tree = Tree("assistant" if depth % 2 else "user", str(depth), replies=[tree])
    (thread,) = tree.threads()
    assert len(thread.messages) == 200 and len(tree.questions()) == 101


def test_a_choice_without_letters_is_told_by_its_words():
    assert not Choice("q", {word: word for word in ("yes", "no", "maybe")}, "no", False, None, "en").has_letters
    assert Choice("q", {"A": "yes", "B": "no"}, "A", False, None, "en").has_letters
