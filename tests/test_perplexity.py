"""The loss of running text: against one forward pass, lm-evaluation-harness, and a model whose loss is known."""

import math

import pytest
import torch
from conftest import build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagekit.perplexity import TextLoss, text_nll

TEXTS = ["What is a fever? Drink water and rest. " * 6, "发烧是体温升高，要多喝水、多休息。" * 3, "Rest."]


@pytest.fixture(scope="module")
def model(tiny_qwen3):
    return AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)


def by_hand(model, ids, first):
    """Summed loss of all ids, each seeing all before it, behind the id `first`."""
    with torch.no_grad():
        logits = model(torch.tensor([[first, *ids[:-1]]])).logits[0].double()
    return -logits.log_softmax(-1)[range(len(ids)), ids].sum().item()


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_loss_is_that_of_one_forward_pass_over_every_text(model, tokenizer):
    wanted = [by_hand(model, ids_of(tokenizer, text), tokenizer.eos_token_id) for text in TEXTS]
    found = text_nll(model, tokenizer, TEXTS, 1024)
    assert found.nll == pytest.approx(sum(wanted), rel=1e-5)
    assert found.tokens == sum(len(ids_of(tokenizer, text)) for text in TEXTS)
    assert found.bytes == len(TEXTS[0]) + 3 * len(TEXTS[1]) + 5


def test_the_mean_is_over_tokens_and_not_over_texts(model, tokenizer):
    whole, parts = (
        text_nll(model, tokenizer, TEXTS, 1024),
        [text_nll(model, tokenizer, [text], 1024) for text in TEXTS],
    )
    assert whole.perplexity == pytest.approx(
        math.exp(sum(part.nll for part in parts) / sum(part.tokens for part in parts))
    )
    unweighted = math.exp(sum(part.nll / part.tokens for part in parts) / 3)
    assert abs(unweighted - whole.perplexity) > 1e-3 * whole.perplexity
    assert whole.bits_per_byte == pytest.approx(sum(part.nll for part in parts) / math.log(2) / whole.bytes)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_it_does_not_matter_how_texts_are_batched(model, tokenizer, batch_tokens):
    wanted = text_nll(model, tokenizer, TEXTS, 32)
    found = text_nll(model, tokenizer, [*TEXTS[1:], "", TEXTS[0]], 32, batch_tokens)
    assert found.nll == pytest.approx(wanted.nll, rel=1e-5) and found[1:] == wanted[1:]


def test_a_text_longer_than_the_context_is_read_in_windows(model, tokenizer):
    ids, wanted = ids_of(tokenizer, TEXTS[0]), 0.0
    assert len(ids) > 40
    for start in range(0, len(ids), 16):
        end = min(start + 16, len(ids))
        before = [tokenizer.eos_token_id, *ids][max(0, end - 16) : end]  # what predicts the last token, at the end
        with torch.no_grad():
            logits = model(torch.tensor([before])).logits[0].double().log_softmax(-1)
        wanted -= logits[range(len(before) - (end - start), len(before)), ids[start:end]].sum().item()
    assert text_nll(model, tokenizer, TEXTS[:1], 16).nll == pytest.approx(wanted, rel=1e-5)
    assert text_nll(model, tokenizer, TEXTS[:1], 16).nll != pytest.approx(
        text_nll(model, tokenizer, TEXTS[:1], 999).nll
    )


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(tiny_qwen3, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    model.get_output_embeddings().weight.data.zero_()
    found = text_nll(model, tokenizer, TEXTS, 64)
    assert found.nll == pytest.approx(found.tokens * math.log(448), rel=1e-6)
    assert found.perplexity == pytest.approx(448, rel=1e-6)


def test_a_text_begins_behind_bos_where_there_is_one(model):
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    wanted = by_hand(model, ids_of(tokenizer, TEXTS[2]), tokenizer.bos_token_id)
    found = text_nll(model, tokenizer, TEXTS[2:], 64)
    assert found.nll == pytest.approx(wanted, rel=1e-5) and found.tokens == len(ids_of(tokenizer, TEXTS[2]))


def test_control_strings_in_a_text_are_text(model, tokenizer):
    assert text_nll(model, tokenizer, ["<|im_end|>"], 64).tokens > 1
    assert len(ids_of(tokenizer, "<|im_end|>")) == 1


def test_logits_of_half_precision_are_summed_in_full(tiny_qwen3, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.bfloat16)
    wanted = by_hand(model, ids_of(tokenizer, TEXTS[0]), tokenizer.eos_token_id)  # the same logits, summed in float64
    assert text_nll(model, tokenizer, TEXTS[:1], 1024).nll == pytest.approx(wanted, rel=1e-5)


def test_progress_counts_every_token(model, tokenizer):
    told = []
    found = text_nll(model, tokenizer, TEXTS, 16, progress=told.append)
    assert sum(told) == found.tokens and len(told) >= 1


def test_what_cannot_be_measured_is_said(tiny_qwen3, model, tokenizer):
    with pytest.raises(ValueError, match="no text to predict"):
        text_nll(model, tokenizer, ["", ""], 16)
    broken = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    broken.get_input_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the loss of these texts is nan"):
        text_nll(broken, tokenizer, TEXTS, 16)
    assert TextLoss(1e9, 10, 10).perplexity == math.inf
    assert AutoTokenizer.from_pretrained(tiny_qwen3).eos_token_id == tokenizer.eos_token_id
