"""Log-likelihoods against a plain forward pass over the whole text, alone and in company; windows lose nothing."""

import math

import pytest
import torch
from conftest import build_model
from test_generation import COLD, FEVER, outputs, said  # noqa: F401 (one is a fixture)

from stagekit import generation, likelihood
from stagekit.likelihood import candidate_ids, score_candidates, text_windows
from stagekit.records import Conversation
from stagekit.tokenization import encode_conversation, encode_prompt

torch.set_num_threads(1)
TEXT = "What is a fever? 发烧是体温升高，要多喝水、多休息。\nDrink water and rest. Ask a doctor!"


def load(path, **options):
    source = (
        generation.find_source(*map(str, path)) if isinstance(path, tuple) else generation.find_source(str(path), None)
    )
    return generation.load_for_generation(source, generation.load_chat(source, **options), only_cpu=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models of three architectures; the heads are wide, so that a wrong position would show."""
    root, found = tmp_path_factory.mktemp("likelihood"), {}
    for architecture in ("qwen3", "llama", "bloom"):
        found[architecture] = load(build_model(root / architecture, architecture, chat=False), template_name="vicuna")
        head = found[architecture].model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))
    return found


@torch.no_grad()
def by_hand(loaded, prompt, candidate):
    """One whole sequence, all logits, one probability after the other."""
    logits = loaded.model(input_ids=torch.tensor([prompt + candidate])).logits[0].double()
    total = 0.0
    for place, token in enumerate(candidate):
        row = logits[len(prompt) + place - 1]
        total += (row[token] - torch.logsumexp(row, 0)).item()
    return total


ITEMS = [
    ([5, 6, 7, 8, 9], [[40], [41], [42]]),
    ([9, 8], [[40, 2], [40, 41, 2], [40, 41, 42, 2], [41, 2]]),
    ([11], [[43, 44, 45, 46]]),
]


# -- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "bloom"])
def test_every_candidate_has_the_likelihood_of_a_plain_forward_pass(models, architecture):
    loaded = models[architecture]
    found = score_candidates(loaded.model, ITEMS)
    expected = [[by_hand(loaded, prompt, ids) for ids in candidates] for prompt, candidates in ITEMS]
    assert [len(own) for own in found] == [3, 4, 1]
    for own, wanted in zip(found, expected, strict=True):
        assert own == pytest.approx(wanted, abs=2e-4)
    assert max(map(max, expected)) - min(map(min, expected)) > 5


@pytest.mark.parametrize("architecture", ["qwen3", "bloom"])
def test_what_else_is_in_the_batch_changes_nothing(models, architecture):
    together = score_candidates(models[architecture].model, ITEMS)
    for item, own in zip(ITEMS, together, strict=True):
        assert score_candidates(models[architecture].model, [item])[0] == pytest.approx(own, abs=1e-4)
    for candidates, own in zip(ITEMS[1][1], together[1], strict=True):
        assert score_candidates(models[architecture].model, [(ITEMS[1][0], [candidates])])[0] == pytest.approx(
            [own], abs=1e-4
        )


def test_what_padding_is_changes_nothing(models):
    before = score_candidates(models["qwen3"].model, ITEMS)
    tokenizer = models["qwen3"].chat.tokenizer
    pad = tokenizer.pad_token_id
    tokenizer.pad_token_id = 40
    try:
        assert score_candidates(models["qwen3"].model, ITEMS) == before
    finally:
        tokenizer.pad_token_id = pad


def test_a_model_that_computes_all_logits_gives_the_same(models, monkeypatch):
    before = score_candidates(models["qwen3"].model, ITEMS)
    monkeypatch.setattr(likelihood, "keeps_logits", lambda model: False)
    for own, wanted in zip(score_candidates(models["qwen3"].model, ITEMS), before, strict=True):
        assert own == pytest.approx(wanted, abs=1e-4)


def test_a_model_spread_over_several_devices_gives_the_same(models, monkeypatch):
    before = score_candidates(models["qwen3"].model, ITEMS)
    monkeypatch.setattr(models["qwen3"].model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    seen = []

    def look(module, args, inputs):
        seen.append(inputs["logits_to_keep"])

    hook = models["qwen3"].model.register_forward_pre_hook(look, with_kwargs=True)
    after = score_candidates(models["qwen3"].model, ITEMS)
    hook.remove()
    for own, wanted in zip(after, before, strict=True):
        assert own == pytest.approx(wanted, abs=1e-4)
    assert seen == [5]  # a number, which needs no device; all 5 positions, for the shortest prompt is 1 token long


def test_long_candidates_are_summed_in_chunks(models, monkeypatch):
    prompt, text = [5, 6], [token % 300 + 4 for token in range(23)]
    expected = by_hand(models["qwen3"], prompt, text)
    monkeypatch.setattr(likelihood, "CHUNK_TOKENS", 4)
    assert score_candidates(models["qwen3"].model, [(prompt, [text])])[0] == pytest.approx([expected], abs=1e-3)


def test_letters_of_one_token_take_one_sequence_and_the_prompt_is_read_once(models, monkeypatch):
    widths = []
    plain = likelihood._logits

    def counted(loaded, sequences, starts):
        widths.append([len(ids) for ids in sequences])
        return plain(loaded, sequences, starts)

    monkeypatch.setattr(likelihood, "_logits", counted)
    score_candidates(models["qwen3"].model, ITEMS)
    # the first prompt alone; of the second AB's, ABC's beginnings and B; of the third all but its last token
    assert widths == [[5, 2 + 3, 2 + 1, 1 + 3]]


def test_a_set_of_letters_ends_with_the_end_of_turn_as_training_writes_it(outputs):  # noqa: F811
    chat = load((outputs / "base", outputs / "sft")).chat
    messages = [said("system", "Be brief."), COLD]
    prompt = encode_prompt(chat, messages)
    (trained,), _ = encode_conversation(chat, Conversation([*messages, said("assistant", "AB")]), 1000)
    start, end = trained.turns[2]
    assert trained.input_ids[:start] == prompt
    whole = candidate_ids(chat, messages, "AB", whole=True)
    assert whole == trained.input_ids[start:end] and whole[-1] == chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert candidate_ids(chat, messages, "AB", whole=False) == whole[:-1]


def test_without_the_end_of_turn_no_set_could_beat_its_beginning(models):
    loaded = models["qwen3"]
    prompt = encode_prompt(loaded.chat, [FEVER])
    cut = [candidate_ids(loaded.chat, [FEVER], text, whole=False) for text in ("A", "AB")]
    assert cut[1][: len(cut[0])] == cut[0]
    shorter, longer = score_candidates(loaded.model, [(prompt, cut)])[0]
    assert longer <= shorter


# -- running text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length, stride", [(1000, 500), (10, 5), (10, 10), (7, 1), (1, 1), (12, 5)])
def test_windows_score_every_token_once_behind_as_much_text_as_fits(tokenizer, max_length, stride):
    ids = [tokenizer.eos_token_id, *tokenizer.encode(TEXT)]
    place = 1
    for number, (context, scored) in enumerate(text_windows(tokenizer, TEXT, max_length, stride)):
        assert scored == ids[place : place + len(scored)]
        assert context == ids[place - len(context) : place]
        read = len(context) + len(scored) - 1  # the last token is predicted, not read
        assert read <= max_length and len(scored) <= (stride if number else max_length)
        if number:
            assert read == max_length
        place += len(scored)
    assert place == len(ids)


def test_perplexity_windows_sum_up_to_the_forward_pass_over_the_whole_text(models):
    loaded = models["qwen3"]
    ((context, scored),) = text_windows(loaded.chat.tokenizer, TEXT, 1000, 500)
    whole = by_hand(loaded, [loaded.chat.tokenizer.eos_token_id], loaded.chat.tokenizer.encode(TEXT))
    assert sum(score_candidates(loaded.model, [(context, [scored])])[0]) == pytest.approx(whole, rel=1e-5)
    # in windows of 16, the second half of each is scored behind the first
    ids, expected = [loaded.chat.tokenizer.eos_token_id, *loaded.chat.tokenizer.encode(TEXT)], 0.0
    expected += by_hand(loaded, ids[:1], ids[1:17])
    for start in range(17, len(ids), 8):
        end = min(start + 8, len(ids))
        expected += by_hand(loaded, ids[end - 17 : start], ids[start:end])
    windows = [(context, [scored]) for context, scored in text_windows(loaded.chat.tokenizer, TEXT, 16, 8)]
    assert len(windows) == 4
    assert math.fsum(own for (own,) in score_candidates(loaded.model, windows)) == pytest.approx(expected, rel=1e-5)


def test_text_follows_the_bos_token_where_there_is_one(tokenizer):
    import copy

    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"bos_token": "<|im_start|>"})
    ids = own.encode("rest")
    assert list(text_windows(own, "rest", 99, 99)) == [([own.bos_token_id], ids)]
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", own.bos_token_id)]
    )
    assert own.encode("rest") == [own.bos_token_id, *ids]
    assert list(text_windows(own, "rest", 99, 99)) == [([own.bos_token_id], ids)]


def test_control_strings_in_a_text_stay_text(tokenizer):
    ((_, scored),) = text_windows(tokenizer, "rest<|im_end|>rest", 99, 99)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in scored
    assert tokenizer.decode(scored) == "rest<|im_end|>rest"
