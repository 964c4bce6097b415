"""Pairs of a better and a worse answer: expected ids come from transformers' own rendering of prompt and answer."""

import random

import pytest
import torch
from conftest import build_tokenizer, encoded
from test_tokenization import BMI, DROPS_THOUGHTS, FAMILIES, NO_MARKS, THINKS, calls, chat_of, said, talk, text_of

from stagekit.checks import loss_mask, template_parity
from stagekit.ledger import ANSWER_TOO_LONG, IDENTICAL, Ledger
from stagekit.pairs import PairCollator, encode_answers, encode_pairs, encode_preference, padding_id
from stagekit.records import Preference, Ranking
from stagekit.rows import Row
from stagekit.tokenization import IGNORE_INDEX, answer_runs, encode_prompt, prepare_chat

QUESTION = "What is a fever?"


@pytest.fixture(scope="module")
def chat():
    return prepare_chat(build_tokenizer(), "chatml")


def answer(text):
    return [said("assistant", text)]


def preference(chosen, rejected, prompt=None, **more):
    return Preference(prompt or talk(QUESTION), answer(chosen), answer(rejected), **more)


def ranking(texts, ranks):
    return Ranking(talk(QUESTION), [answer(text) for text in texts], ranks)


def only_pair(chat, record, max_length=2000, whole_answers=True):
    pairs, left_out = encode_preference(chat, record, max_length, whole_answers)
    assert (len(pairs), left_out) == (1, {})
    return pairs[0]


def rendered(chat, prompt, tools=None):
    """The prompt as transformers renders it, ready for an answer."""
    return chat.tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, return_dict=False)


def ids_of(chat, text):
    return chat.tokenizer.encode(text, add_special_tokens=False)


def closed(chat, text):
    """The tokens of an answer in ChatML, with its end-of-turn."""
    return ids_of(chat, text + "<|im_end|>")


def learnt(chat, sample):
    return [text_of(chat, sample.labels[start:end]) for start, end in answer_runs(sample.labels)]


def assert_is(sample, prompt_ids, answer_ids, truncated=False):
    assert sample.input_ids == [*prompt_ids, *answer_ids]
    assert sample.labels == [*[IGNORE_INDEX] * len(prompt_ids), *answer_ids]
    assert sample.truncated == truncated


# -- prompt and answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_side_is_what_inference_sends_and_its_answer_up_to_the_end_of_turn(name):
    options, _, answers, stops = FAMILIES[name]
    chat, prompt = chat_of(name, **options), talk("Q1", "A1", "Q2")
    pair = only_pair(chat, preference("A2", "rest", prompt))
    sent = encode_prompt(chat, prompt)
    for side, text in ((pair.chosen, answers[1]), (pair.rejected, answers[1].replace("A2", "rest"))):
        assert side.input_ids[: len(sent)] == sent
        assert text_of(chat, side.input_ids[len(sent) :]) == text
        assert side.input_ids[-1] == chat.tokenizer.convert_tokens_to_ids(stops[0]) == chat.stop_ids[0]
        assert side.labels == [IGNORE_INDEX] * len(sent) + side.input_ids[len(sent) :]
        assert not side.truncated
    assert (pair.weight, pair.margin, pair.shortened) == (1, 0, False)


@pytest.mark.parametrize("source", [NO_MARKS, THINKS, DROPS_THOUGHTS], ids=["no marks", "thinks", "drops thoughts"])
def test_a_template_of_the_tokenizers_own_ends_with_the_end_of_turn_as_well(source):
    chat, prompt = chat_of(source=source), talk("Q1", "<think>\nhm\n</think>\n\nA1", "Q2", system="S")
    pair = only_pair(chat, preference("good", "bad", prompt))
    shown = rendered(chat, prompt)
    assert_is(pair.chosen, shown, closed(chat, "good"))
    assert_is(pair.rejected, shown, closed(chat, "bad"))


def test_what_a_template_writes_behind_the_end_of_turn_is_left_out():
    tail = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add_gen"
    chat = chat_of(source=NO_MARKS.replace("{% if add_gen", tail))
    pair = only_pair(chat, preference("good", "bad"))
    assert text_of(chat, pair.chosen.input_ids).endswith("assistant\ngood<|im_end|>")
    assert chat.tokenizer.eos_token_id not in pair.chosen.input_ids + pair.rejected.input_ids


def test_system_prompt_history_tools_and_a_tools_result_stand_in_the_prompt_and_are_not_learnt(chat):
    prompt = [
        *talk("Hello", "How can I help?", "BMI at 70 kg?", system="You are a doctor."),
        said("assistant", "", tool_calls=calls("bmi", kg=70)),
        said("tool", "22.9"),
    ]
    pair = only_pair(chat, preference("It is 22.9.", "No idea.", prompt, tools=[BMI]))
    shown = rendered(chat, prompt, [BMI])
    assert_is(pair.chosen, shown, closed(chat, "It is 22.9."))
    assert_is(pair.rejected, shown, closed(chat, "No idea."))
    for part in ("You are a doctor.", '"Body mass index"', "<tool_response>\n22.9", "How can I help?"):
        assert part in text_of(chat, pair.chosen.input_ids)


def test_of_an_answer_of_several_messages_only_the_assistants_are_learnt(chat):
    prompt, chosen = talk("Q1", system="S"), [*answer("Since when?"), *talk("Two days.", "Rest.")]
    pair = only_pair(chat, Preference(prompt, chosen, answer("Drink.")))
    assert learnt(chat, pair.chosen) == ["Since when?<|im_end|>", "Rest.<|im_end|>"]
    assert learnt(chat, pair.rejected) == ["Drink.<|im_end|>"]
    shown = rendered(chat, prompt)
    assert pair.chosen.input_ids[: len(shown)] == pair.rejected.input_ids[: len(shown)] == shown
    whole = chat.tokenizer.apply_chat_template([*prompt, *chosen], return_dict=False)
    assert pair.chosen.input_ids == whole[:-1]  # but for the newline behind the end-of-turn
    assert sorted(pair.chosen.turns) == [2, 4] and sorted(pair.rejected.turns) == [2]


def test_an_answer_may_call_a_tool_and_use_its_result(chat):
    chosen = [said("assistant", "", tool_calls=calls("bmi", kg=70)), said("tool", "22.9"), *answer("It is 22.9.")]
    pair = only_pair(chat, Preference(talk("BMI at 70 kg?"), chosen, answer("About 25."), [BMI]))
    call = '<tool_call>\n{"name": "bmi", "arguments": {"kg": 70}}\n</tool_call><|im_end|>'
    assert learnt(chat, pair.chosen) == [call, "It is 22.9.<|im_end|>"]
    assert "<tool_response>\n22.9" in text_of(chat, pair.chosen.input_ids)


def test_where_the_template_rewrites_history_only_the_last_message_of_an_answer_is_learnt():
    chat = chat_of(source=DROPS_THOUGHTS)
    chosen = [*answer("<think>\nhm\n</think>\n\nSince when?"), *talk("Two days.", "Rest.")]
    pair = only_pair(chat, Preference(talk("Q1"), chosen, answer("Drink.")))
    assert learnt(chat, pair.chosen) == ["Rest.<|im_end|>"]
    assert "hm" not in text_of(chat, pair.chosen.input_ids)


def test_control_strings_in_an_answer_do_not_end_it(chat):
    pair = only_pair(chat, preference("yes<|im_end|>\n<|im_start|>user\nno", "bad"))
    assert learnt(chat, pair.chosen) == ["yes<|im_end|>\n<|im_start|>user\nno<|im_end|>"]
    begin = rendered(chat, talk(QUESTION))
    control = [token for token in pair.chosen.input_ids[len(begin) :] if token in chat.tokenizer.added_tokens_decoder]
    assert control == [chat.stop_ids[0]]


# -- what gives way --------------------------------------------------------------------------------------------------


def test_the_oldest_exchanges_give_way_first_and_the_system_prompt_stays(chat):
    prompt = talk("fever", "rest", "water", "drink", "body", "user", "What now?", system="You are a doctor.")
    chosen, rejected = "Rest. " * 9, "Drink."
    for first in (1, 3, 5, 7):  # the exchange with which the visible history begins
        shown = rendered(chat, [prompt[0], *prompt[first:]])
        exact = len(shown) + len(closed(chat, chosen))
        pair = only_pair(chat, preference(chosen, rejected, prompt), exact)
        assert_is(pair.chosen, shown, closed(chat, chosen))
        assert_is(pair.rejected, shown, closed(chat, rejected))  # it could show more, but both see the same
        assert not pair.shortened
        assert "You are a doctor." in text_of(chat, pair.chosen.input_ids)
        if first > 1:
            longer = only_pair(chat, preference(chosen, rejected, prompt), exact + 1)
            assert len(longer.chosen.input_ids) == exact, "one token more brings no exchange back"


def test_it_is_the_longer_side_that_decides_whichever_it_is(chat):
    prompt = talk("fever", "rest", "What now?")
    short, long = rendered(chat, prompt[2:]), "Rest. " * 9
    exact = len(short) + len(closed(chat, long))
    for record in (preference(long, "Drink.", prompt), preference("Drink.", long, prompt)):
        pair = only_pair(chat, record, exact)
        assert pair.chosen.input_ids[: len(short)] == pair.rejected.input_ids[: len(short)] == short


def test_then_the_prompt_loses_as_much_of_its_beginning_as_the_answers_need(chat):
    prompt = talk("fever " * 50, system="S")
    shown, long = rendered(chat, prompt), closed(chat, "Rest. " * 5)
    room = 30
    assert len(shown) > 55 and room > (room + len(long)) // 4
    pair = only_pair(chat, preference("Rest. " * 5, "Drink.", prompt), room + len(long))
    assert_is(pair.chosen, shown[-room:], long)
    assert_is(pair.rejected, shown[-room:], closed(chat, "Drink."))
    assert pair.shortened


@pytest.mark.parametrize("long_side", ["chosen", "rejected"])
def test_at_last_the_answer_loses_its_end_and_its_end_of_turn_beside_a_quarter_of_prompt(chat, long_side):
    prompt, texts = talk("fever " * 50), {"chosen": "Drink.", "rejected": "Drink."}
    texts[long_side] = "Rest. " * 40
    shown, long = rendered(chat, prompt), closed(chat, texts[long_side])
    assert len(long) > 60
    pair = only_pair(chat, preference(texts["chosen"], texts["rejected"], prompt), 43, whole_answers=False)
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    assert_is(sides.pop(long_side), shown[-10:], long[:33], truncated=True)
    assert_is(sides.popitem()[1], shown[-10:], closed(chat, "Drink."))
    assert pair.shortened and chat.stop_ids[0] not in long[:33]


def test_a_prompt_shorter_than_a_quarter_stays_whole_beside_an_answer_that_is_cut(chat):
    shown, long = rendered(chat, talk("Q")), closed(chat, "Rest. " * 60)
    assert len(shown) < 25 and len(long) > 100
    pair = only_pair(chat, preference("Rest. " * 60, "Drink.", talk("Q")), 100, whole_answers=False)
    assert_is(pair.chosen, shown, long[: 100 - len(shown)], truncated=True)
    assert_is(pair.rejected, shown, closed(chat, "Drink."))
    assert not pair.shortened


def test_a_bos_stays_where_the_prompt_loses_its_beginning():
    chat = chat_of("llama2", bos_token="<s>")
    prompt, long, short = talk("fever " * 50), " Rest. Rest. Rest. <|endoftext|>", " Drink. <|endoftext|>"
    shown, bos = rendered(chat, prompt), chat.tokenizer.bos_token_id
    assert shown[0] == bos and shown.count(bos) == 1
    room = 40 - len(ids_of(chat, long))
    assert 10 < room < len(shown)
    answers = [answer("Rest. Rest. Rest."), answer("Drink.")]
    samples, shortened, all_whole = encode_answers(chat, prompt, answers, None, 40)
    assert shortened and all(all_whole)
    assert_is(samples[0], [bos, *shown[1 - room :]], ids_of(chat, long))
    assert_is(samples[1], [bos, *shown[1 - room :]], ids_of(chat, short))
    (whole,), shortened, all_whole = encode_answers(chat, prompt, answers[1:], None, 200)
    assert all(all_whole) and not shortened
    assert_is(whole, shown, ids_of(chat, short))


def test_an_answer_that_fits_to_the_token_is_whole_and_one_token_less_is_not(chat):
    shown, long = rendered(chat, talk("Q")), closed(chat, "Rest. " * 40)
    exact, record = len(shown) + len(long), preference("Rest. " * 40, "Drink.", talk("Q"))
    assert len(shown) < exact // 4  # the prompt gives nothing
    for whole_answers in (True, False):
        assert_is(only_pair(chat, record, exact, whole_answers).chosen, shown, long)
    assert_is(only_pair(chat, record, exact - 1, False).chosen, shown, long[:-1], truncated=True)
    assert encode_preference(chat, record, exact - 1, True) == ([], {ANSWER_TOO_LONG: 1})
    assert ANSWER_TOO_LONG == "answer does not fit the length limit"


def test_lengths_are_counted_in_tokens_and_not_in_characters(chat):
    many_characters, many_tokens = "temperature " * 12, "鑫" * 50
    assert len(many_characters) > 120 > len(ids_of(chat, many_characters)) + 20
    assert len(many_tokens) < 100 < 120 < len(ids_of(chat, many_tokens))
    pair = only_pair(chat, preference(many_characters, "Drink."), 120)
    assert not pair.shortened and learnt(chat, pair.chosen) == [many_characters + "<|im_end|>"]
    assert encode_preference(chat, preference("Drink.", many_tokens), 120, True) == ([], {ANSWER_TOO_LONG: 1})


def test_several_answers_all_see_the_same_part_of_the_prompt(chat):
    prompt = talk("fever", "rest", "What now?", system="S")
    texts = ["Rest.", "Drink water and rest. " * 3, "多休息。"]
    shown = rendered(chat, [prompt[0], *prompt[3:]])
    exact = len(shown) + max(len(closed(chat, text)) for text in texts)
    samples, shortened, all_whole = encode_answers(chat, prompt, [answer(text) for text in texts], None, exact)
    assert all(all_whole) and not shortened
    for sample, text in zip(samples, texts, strict=True):
        assert_is(sample, shown, closed(chat, text))
        assert sample.turns == {4: (len(shown), len(sample.input_ids))}


WORDS = "fever water rest 发烧 多喝水 temperature body what drink user assistant 休息 Z 9 鑫".split()


def test_whatever_the_lengths_the_answers_come_first_and_then_as_much_prompt_as_fits(chat):
    source, met = random.Random(3), set()

    def words(most):
        return " ".join(source.choices(WORDS, k=source.randint(1, most)))

    for _ in range(300):
        max_length = source.choice((24, 48, 90, 200))
        texts = [words(12) for _ in range(2 * source.randint(0, 4) + 1)]
        prompt = talk(*texts, system=words(3) if source.random() < 0.5 else None)
        sides = [words(source.choice((3, 25, 80))) for _ in range(2)]
        system = prompt[:1] if len(prompt) % 2 == 0 else []
        shown = [rendered(chat, system + prompt[first:]) for first in range(len(system), len(prompt), 2)]
        endings = [closed(chat, text) for text in sides]
        room = max_length - max(map(len, endings))
        visible = next((ids for ids in shown if len(ids) <= room), None)
        if visible is None:
            visible = shown[-1][-max(room, max_length // 4) :]
        samples, shortened, all_whole = encode_answers(
            chat, prompt, [answer(text) for text in sides], None, max_length
        )
        assert all_whole == [not sample.truncated for sample in samples]
        for sample, ending in zip(samples, endings, strict=True):
            cut = ending[: max_length - len(visible)]
            assert_is(sample, visible, cut, truncated=len(cut) < len(ending))
            assert len(sample.input_ids) <= max_length
        assert shortened == (len(visible) < len(shown[-1]))
        met.add("prompt cut" if shortened else "all shown" if visible == shown[0] else "exchanges dropped")
        met.update("answer cut" for sample in samples if sample.truncated)
    assert met == {"all shown", "exchanges dropped", "prompt cut", "answer cut"}


# -- what gives no pair ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_answers", [True, False])
def test_identical_answers_are_left_out(chat, whole_answers):
    assert encode_preference(chat, preference("Rest.", "Rest."), 200, whole_answers) == ([], {IDENTICAL: 1})
    assert IDENTICAL == "identical answers"
    only_pair(chat, preference("Rest.", "Rest"), 200, whole_answers)
    long = "Rest. " * 60
    assert encode_preference(chat, preference(long, long), 100, whole_answers) == ([], {IDENTICAL: 1})


def test_answers_that_differ_only_behind_the_cut_are_left_out(chat):
    record = preference("Rest. " * 60 + "Now.", "Rest. " * 60 + "Later.")
    assert encode_preference(chat, record, 100, False) == ([], {IDENTICAL: 1})
    assert encode_preference(chat, record, 100, True) == ([], {ANSWER_TOO_LONG: 1})
    only_pair(chat, record, 400, True)


def test_the_margin_of_the_data_is_kept_and_is_otherwise_zero(chat):
    assert only_pair(chat, preference("Rest.", "Drink.", margin=1.5)).margin == 1.5
    assert only_pair(chat, preference("Rest.", "Drink.")).margin == 0


# -- rankings --------------------------------------------------------------------------------------------------------


def texts_of(chat, pairs):
    """What stands in each pair: (better answer, worse answer)."""
    return [
        tuple(learnt(chat, side)[0].removesuffix("<|im_end|>") for side in (pair.chosen, pair.rejected))
        for pair in pairs
    ]


def test_a_ranking_becomes_all_its_pairs_which_share_a_weight_of_one(chat):
    pairs, left_out = encode_preference(chat, ranking(["c", "a", "d", "b"], [2, 0, 3, 1]), 200, True)
    assert texts_of(chat, pairs) == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")]
    assert [pair.weight for pair in pairs] == [1 / 6] * 6
    assert left_out == {}


def test_equal_ranks_give_no_pair(chat):
    pairs, left_out = encode_preference(chat, ranking(["a", "b", "c"], [0, 1, 1]), 200, True)
    assert texts_of(chat, pairs) == [("a", "b"), ("a", "c")]
    assert [pair.weight for pair in pairs] == [0.5, 0.5] and left_out == {}
    pairs, left_out = encode_preference(chat, ranking(["a", "a", "c"], [0, 0, 1]), 200, True)
    assert texts_of(chat, pairs) == [("a", "c"), ("a", "c")] and left_out == {}


def test_the_pairs_left_of_a_ranking_share_its_weight(chat):
    long = "Rest. " * 60
    pairs, left_out = encode_preference(chat, ranking(["a", "b", long, "a"], [0, 1, 2, 3]), 100, True)
    assert texts_of(chat, pairs) == [("a", "b"), ("b", "a")]
    assert [pair.weight for pair in pairs] == [0.5, 0.5]
    assert left_out == {ANSWER_TOO_LONG: 3, IDENTICAL: 1}


# -- rows ------------------------------------------------------------------------------------------------------------


def tokenized(chat, records, max_length=200, whole_answers=True, ledger=None, num_workers=None):
    rows = [Row(record, f"pairs.jsonl:{number}") for number, record in enumerate(records, 1)]
    ledger = ledger or Ledger(read=len(rows), files=["pairs.jsonl"])

    def encode(record):
        return encode_preference(chat, record, max_length, whole_answers)

    return encoded(rows, lambda chunk: encode_pairs(chunk, encode), ledger, num_workers)


def test_the_ledger_of_pairs_adds_up(chat):
    long = "Rest. " * 60
    ledger = Ledger(read=7, files=["pairs.jsonl"])
    ledger.drop("unreadable")
    records = [
        preference("Rest.", "Drink.", margin=2.0),
        ranking(["a", "b", "c", long], [0, 1, 2, 3]),
        preference("Rest.", "Rest."),
        preference("Rest.", long),
        ranking(["a", long], [0, 1]),
        preference("Rest.", "Drink.", talk("fever " * 120)),
    ]
    columns, probes, ledger = tokenized(chat, records, 100, True, ledger)
    assert (ledger.read, ledger.used) == (7, 3)
    assert ledger.dropped == {"unreadable": 1, IDENTICAL: 1, ANSWER_TOO_LONG: 2}
    assert ledger.pairs == {
        "from rankings": 3,
        f"of rankings left out: {ANSWER_TOO_LONG}": 3,
        "whose prompt lost its beginning": 1,
    }
    assert (ledger.samples, ledger.truncated) == (5, 0)
    assert columns["weight"] == [1, 1 / 3, 1 / 3, 1 / 3, 1]
    assert columns["margin"] == [2, 0, 0, 0, 0]
    shown = rendered(chat, talk(QUESTION))
    one, rest, drink = len(closed(chat, "a")), len(closed(chat, "Rest.")), len(closed(chat, "Drink."))
    trained = 2 * (rest + drink) + 6 * one
    shortened = 2 * (100 - max(rest, drink))
    assert ledger.tokens == {"trained": trained, "used": trained + 8 * len(shown) + shortened}
    table = "\n".join(ledger.lines("training"))
    assert "pairs from rankings" in table and "pairs whose prompt lost its beginning" in table


def test_the_columns_hold_ids_and_labels_of_both_sides(chat):
    columns, _, _ = tokenized(chat, [preference("Rest.", "Drink."), preference("多休息。", "Drink.")])
    shown = rendered(chat, talk(QUESTION))
    ignored = [IGNORE_INDEX] * len(shown)
    texts = {"chosen": ("Rest.", "多休息。"), "rejected": ("Drink.", "Drink.")}
    for side, sayings in texts.items():
        assert columns[f"{side}_ids"] == [shown + closed(chat, text) for text in sayings]
        assert columns[f"{side}_labels"] == [ignored + closed(chat, text) for text in sayings]
    assert set(columns) == {"chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels", "weight", "margin"}


def test_answers_that_lost_their_end_are_counted_one_by_one(chat):
    long, longer = "Rest. " * 60, "Drink. " * 60
    records = [preference(long, longer), preference("Rest.", long), preference("Rest.", "Drink.")]
    columns, _, ledger = tokenized(chat, records, 100, whole_answers=False)
    assert (ledger.used, ledger.samples, ledger.truncated) == (3, 3, 3)
    assert [len(ids) for ids in columns["chosen_ids"][:1] + columns["rejected_ids"][:2]] == [100] * 3
    assert ledger.pairs == {}


def test_two_processes_give_what_one_gives(chat):
    records = [preference(f"Rest {number}.", "Drink.") for number in range(9)] + [ranking(["a", "b"], [0, 1])]
    alone, together = tokenized(chat, records), tokenized(chat, records, num_workers=2)
    assert alone == together


def test_where_no_pair_is_left_the_error_names_the_file_and_the_reasons(chat):
    records = [preference("Rest.", "Rest."), preference("Rest.", "Rest. " * 60), preference("Rest. " * 60, "Rest.")]
    with pytest.raises(ValueError) as error:
        tokenized(chat, records, 100)
    assert str(error.value) == (
        "pairs.jsonl: nothing is left to learn from (identical answers: 1, answer does not fit the length limit: 2)"
    )


def test_a_row_the_template_refuses_is_named(chat):
    refused = preference("Rest.", "Drink.", [said("user", "a"), said("user", "b")])
    with pytest.raises(ValueError, match="^pairs.jsonl:2: the chat template refuses this conversation"):
        tokenized(chat, [preference("Rest.", "Drink."), refused])


def test_the_probes_are_both_sides_of_the_rows_and_pass_the_checks(chat):
    long = talk("fever " * 300, "rest", "What now?", system="S")
    records = [
        preference("Rest.", "Drink."),
        ranking(["a", "b", "c"], [1, 0, 2]),
        preference("It is 22.9.", "About 25.", talk("BMI?"), tools=[BMI]),
        Preference(talk("Q1"), [*answer("Since when?"), *talk("Two days.", "Water.")], answer("Drink.")),
        preference("Rest. " * 50, "Drink.", long),  # its first exchange does not fit
        preference("Rest. " * 300, "Drink."),  # its answer is cut
        preference("Rest.", "Drink.", talk("fever " * 600)),  # its prompt is cut: inference sends something else
    ]
    limit = 480
    columns, probes, ledger = tokenized(chat, records, limit, whole_answers=False)
    assert columns["chosen_ids"][6] == rendered(chat, [long[0], long[3]]) + closed(chat, "Rest. " * 50)
    assert (ledger.truncated, ledger.pairs["whose prompt lost its beginning"]) == (1, 1)
    seen = sorted((probe.origin[-1], probe.conversation.messages[-1]["content"][:6]) for probe in probes)
    assert seen == [
        *[("1", "Drink."), ("1", "Rest."), ("2", "a"), ("2", "b"), ("3", "About "), ("3", "It is ")],
        *[("4", "Drink."), ("4", "Water."), ("5", "Drink."), ("5", "Rest. "), ("6", "Drink."), ("6", "Rest. ")],
    ]
    assert loss_mask(chat, probes, False) == ("12 samples", "exact")
    compared = "12 prompts, 12 equal to transformers' own, stop token '<|im_end|>'"
    assert template_parity(chat, probes) == (compared, "exact")


def test_a_ranking_of_which_pairs_were_left_out_does_not_mix_up_the_probes(chat):
    records = [ranking(["a", "a", "c"], [0, 1, 2]), preference("Rest.", "Drink.")]
    columns, probes, ledger = tokenized(chat, records)
    assert len(columns["weight"]) == 3 and ledger.pairs[f"of rankings left out: {IDENTICAL}"] == 1
    assert loss_mask(chat, probes, False) == (f"{len(probes)} samples", "exact")
    assert {probe.origin for probe in probes} >= {"pairs.jsonl:2"}


# -- batches ---------------------------------------------------------------------------------------------------------


def row(chosen, rejected, prompt=1, **more):
    """A row of the dataset: `prompt` tokens are not learnt."""
    labels = {
        f"{side}_labels": [IGNORE_INDEX] * prompt + ids[prompt:]
        for side, ids in (("chosen", chosen), ("rejected", rejected))
    }
    return {"chosen_ids": chosen, "rejected_ids": rejected, **labels, "weight": 1.0, "margin": 0.0, **more}


def test_a_batch_holds_the_chosen_sequences_and_then_the_rejected_ones_padded_on_the_right():
    batch = PairCollator(99)([row([5, 6, 7], [5, 8]), row([1, 2, 3, 4], [1, 2, 9], prompt=2)])
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 99, 99, 99, 99, 99],
        [1, 2, 3, 4, 99, 99, 99, 99],
        [5, 8, 99, 99, 99, 99, 99, 99],
        [1, 2, 9, 99, 99, 99, 99, 99],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
    ]
    assert batch["completion_mask"].tolist() == [
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0],
    ]
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask", "weights", "margins"}


@pytest.mark.parametrize(("longest", "width"), [(1, 8), (8, 8), (9, 16), (16, 16)])
def test_a_batch_is_as_wide_as_its_longest_side_rounded_up_to_eight(longest, width):
    for rows in ([row([1] * longest, [1])], [row([1], [1] * longest)]):
        assert PairCollator(0)(rows)["input_ids"].shape == (2, width)


def test_weights_margins_and_reference_logps_are_single_precision_numbers_one_a_pair():
    rows = [
        row([1], [2], weight=1 / 3, margin=1.5, ref_chosen_logps=-12.5, ref_rejected_logps=-20.25),
        row([3], [4], weight=1.0, margin=0.0, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0),
    ]
    batch = PairCollator(0)(rows)
    expected = {
        "weights": [1 / 3, 1.0],
        "margins": [1.5, 0.0],
        "ref_chosen_logps": [-12.5, -1.0],
        "ref_rejected_logps": [-20.25, -2.0],
    }
    for name, values in expected.items():
        assert batch[name].dtype == torch.float32 and batch[name].tolist() == pytest.approx(values)


# The tiny tokenizer has <|endoftext|> 0 (its eos), <|im_start|> 1, <|im_end|> 2, <|pad|> 3; ChatML stops at 2 and 0.
@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({}, "<|pad|>"),
        ({"pad_token": "<|im_end|>"}, "<|im_start|>"),
        ({"pad_token": "<|endoftext|>"}, "<|im_start|>"),
        ({"pad_token": "<|im_end|>", "bos_token": "<s>"}, "<s>"),
        ({"pad_token": "<|im_end|>", "bos_token": "<|endoftext|>", "unk_token": "<unk>"}, "<unk>"),
        ({"pad_token": "<|endoftext|>", "bos_token": "<|im_end|>", "unk_token": "<|im_end|>"}, "<|im_start|>"),
    ],
)
def test_padding_never_ends_an_answer(special, expected):
    chat = chat_of("chatml", **special)
    stops = [chat.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert chat.stop_ids == stops
    found = padding_id(chat.tokenizer, chat.stop_ids)
    assert found not in stops and chat.tokenizer.convert_ids_to_tokens(found) == expected


def test_a_tokenizer_without_padding_gets_one_that_is_no_stop():
    chat = chat_of("chatml")
    chat.tokenizer.pad_token = None
    assert padding_id(chat.tokenizer, [0, 1, 2]) == 3
    assert padding_id(chat.tokenizer, [1, 2]) == 0


def test_a_cut_between_two_answers_of_one_continuation_ends_with_the_first(chat):
    """The question between them would teach nothing, and an answer that is whole keeps its end-of-turn."""
    better = [*answer("rest"), *talk("fever " * 40), *answer("water")]
    record = Preference(talk("Q"), better, answer("drink"))
    (pair,), _ = encode_preference(chat, record, 50, whole_answers=False)
    assert_is(pair.chosen, rendered(chat, talk("Q")), closed(chat, "rest"))
    assert not pair.chosen.truncated
    assert encode_preference(chat, record, 50, whole_answers=True) == ([], {"answer does not fit the length limit": 1})
