"""Loading as the flags ask, adapters, positions, and the loss against a computation by hand in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import SPECIAL, build_tokenizer
from torch.testing import assert_close

from stagekit.arguments import LoraArguments, ModelArguments
from stagekit.checkpoint import Source, resolve
from stagekit.modeling import (
    add_adapter,
    choose_pad_token,
    fetch_from_modelscope,
    generation_settings,
    load_config,
    load_model,
    load_tokenizer,
    packs_exactly,
    prepare_for_training,
    takes_position_ids,
)
from stagekit.tokenization import IGNORE_INDEX, Collator
from stagekit.trainers import LanguageTrainer, token_nll


def model_args(**options):
    return ModelArguments(model_name_or_path="unused", **options)


def lora_args(**options):
    return LoraArguments(**{"lora_dropout": 0.0, **options})


TRAINING = SimpleNamespace(bf16=False, fp16=False, use_cpu=True, activation_checkpointing=False, deepspeed=None)


def load(directory, adapter_args=None, **options):
    """The model behind a directory, with an adapter when its arguments are given."""
    source = resolve(str(directory))
    config = load_config(source, model_args(**options))
    model = load_model(source, model_args(**options), TRAINING, config)
    if adapter_args is None:
        return model
    model, tuning = add_adapter(model, source, adapter_args, TRAINING)
    prepare_for_training(model, TRAINING)
    return model, tuning


def batch_of(seed=0, rows=4, width=24, vocabulary=300):
    """Random ids, of which about a third is learnt, in stretches; the first token never."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocabulary, (rows, width), generator=generator)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row in range(rows):
        start = int(torch.randint(1, width - 2, (1,), generator=generator))
        labels[row, start : start + width // 3] = ids[row, start : start + width // 3]
    return {"input_ids": ids, "position_ids": torch.arange(width).expand(rows, width).contiguous()}, labels


def one_step(model, rate=0.05):
    inputs, labels = batch_of()
    sums, counts = token_nll(model, inputs, labels, keeps_logits=True)
    loss = sums.sum() / counts.sum()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    return loss.item()


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(**batch_of()[0], use_cache=False).logits.float()


# -- tokens ----------------------------------------------------------------------------------------------------------


def padded(pad=None, unk=None, eos="<|endoftext|>", tokens=()):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token = eos, pad, unk
    size = len(tokenizer)
    choose_pad_token(tokenizer)
    assert len(tokenizer) == size
    return tokenizer.pad_token


def test_a_padding_token_that_is_not_eos_is_kept():
    assert padded(pad="<|im_start|>") == "<|im_start|>"


def test_a_padding_token_is_chosen_that_is_not_eos():
    assert padded() == "<|pad|>"
    assert padded(pad="<|endoftext|>") == "<|pad|>"  # as many tokenizers come
    assert padded(tokens=["<|reserved_0|>"], eos="<|pad|>") == "<|reserved_0|>"
    assert padded(eos="<|pad|>", unk="<unk>", tokens=["<unk>"]) == "<unk>"


def test_a_token_that_ends_answers_is_no_padding():
    # Whoever masks padding by its id would never learn to stop.
    assert padded(eos="<|pad|>") == "<|im_start|>" and SPECIAL[2] == "<|im_end|>"


def test_an_unknown_token_that_is_eos_as_in_gpt2_is_no_padding():
    assert padded(eos="<|pad|>", unk="<|pad|>", tokens=["<|extra|>"]) == "<|extra|>"


def test_without_any_other_token_padding_is_eos_and_says_so(caplog):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    choose_pad_token(tokenizer)
    assert tokenizer.pad_token == "</s>" and len(tokenizer) == 2
    assert "no token to pad with but '</s>'" in caplog.text


def test_a_tokenizer_is_loaded_with_its_padding(tiny_qwen3):
    tokenizer = load_tokenizer(resolve(str(tiny_qwen3)), model_args())
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|endoftext|>")


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-text token; set eos_token"):
        load_tokenizer(Source(str(tmp_path)), model_args())


def test_generation_stops_at_every_stop_token():
    tokenizer = build_tokenizer()
    config = generation_settings([2, 0], tokenizer)
    assert (config.eos_token_id, config.pad_token_id, config.do_sample) == ([2, 0], 3, True)


# -- models that are not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [load_config, load_tokenizer])
def test_a_hub_that_cannot_be_reached_is_one_line_with_three_ways_out(what):
    with pytest.raises(ValueError) as refusal:
        what(Source("nobody/no-such-model"), model_args())
    text = str(refusal.value)
    assert text.startswith("model 'nobody/no-such-model' is not a directory here, and the hub") and "\n" not in text
    assert "HF_ENDPOINT" in text and "--model_hub modelscope" in text and "BASE_MODEL=starter" in text


def test_a_directory_that_is_no_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for what in (load_config, load_tokenizer):
        with pytest.raises(ValueError, match=f"^{tmp_path}: no") as refusal:
            what(Source(str(tmp_path)), model_args())
        assert "\n" not in str(refusal.value)


def test_modelscope_needs_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    with pytest.raises(ValueError, match="pip install modelscope"):
        fetch_from_modelscope("a/b", None, None)


def test_flash_attention_without_a_gpu_is_refused(tiny_qwen3):
    with pytest.raises(ValueError, match="--flash_attn True needs a GPU"):
        load(tiny_qwen3, flash_attn=True)


# -- positions -------------------------------------------------------------------------------------------------------

PLAIN_FREQUENCIES = [10000.0 ** (-pair / 16) for pair in range(16)]  # head_dim 32: theta^(-2i/32)


def stretched(directory, kind, longest, **options):
    config = load_config(resolve(str(directory)), model_args(rope_scaling=kind), longest)
    model = load_model(resolve(str(directory)), model_args(), TRAINING, config)
    return config, model.model.rotary_emb


def test_linear_scaling_divides_every_frequency(tiny_qwen3):
    config, rotary = stretched(tiny_qwen3, "linear", 8192)
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert config.max_position_embeddings == 8192
    assert_close(rotary.inv_freq, torch.tensor(PLAIN_FREQUENCIES) / 4)


def test_dynamic_scaling_starts_where_the_models_own_length_ends(tiny_qwen3):
    config, rotary = stretched(tiny_qwen3, "dynamic", 8192)
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    assert config.max_position_embeddings == 2048
    assert_close(rotary.inv_freq, torch.tensor(PLAIN_FREQUENCIES))
    rotary(torch.zeros(1, 8192, 1), torch.arange(8192)[None])
    base = 10000.0 * (4.0 * 8192 / 2048 - 3.0) ** (32 / 30)  # NTK-aware, for a text of 8192 tokens
    assert_close(rotary.inv_freq, torch.tensor([base ** (-pair / 16) for pair in range(16)]))


def test_yarn_keeps_high_frequencies_and_divides_low_ones(tiny_qwen3):
    config, rotary = stretched(tiny_qwen3, "yarn", 8192)
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
    }
    assert config.max_position_embeddings == 8192
    plain = torch.tensor(PLAIN_FREQUENCIES)
    assert_close(rotary.inv_freq[0], plain[0])  # 2048 / 2π = 326 turns, more than 32: kept
    assert_close(rotary.inv_freq[-1], plain[-1] / 4)  # 0.06 turns, less than 1: divided
    assert_close(rotary.attention_scaling, 0.1 * math.log(4) + 1)  # arXiv:2309.00071, eq. 22


def test_a_text_that_fits_is_not_stretched(tiny_qwen3, caplog):
    config, rotary = stretched(tiny_qwen3, "yarn", 2048)
    assert config.rope_parameters["rope_type"] == "default" and config.max_position_embeddings == 2048
    assert "--rope_scaling yarn changes nothing: 2048 tokens fit the model's 2048 positions" in caplog.text
    assert_close(rotary.inv_freq, torch.tensor(PLAIN_FREQUENCIES))


def test_a_text_that_is_too_long_is_refused(tiny_qwen3):
    source = resolve(str(tiny_qwen3))
    load_config(source, model_args(), 2048)
    with pytest.raises(ValueError, match="2049 tokens do not fit the model's 2048 positions; .*--rope_scaling yarn"):
        load_config(source, model_args(), 2049)


def test_a_model_without_rotary_positions_is_refused(tiny_bloom):
    with pytest.raises(ValueError, match="--rope_scaling linear: bloom has no rotary positions to stretch"):
        load_config(resolve(str(tiny_bloom)), model_args(rope_scaling="linear"), 8192)
    load_config(resolve(str(tiny_bloom)), model_args(), 8192)  # its positions have no end


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_positions_that_are_stretched_already_are_not_stretched_again(tiny_qwen3, tmp_path, kind):
    config, _ = stretched(tiny_qwen3, kind, 8192)
    config.save_pretrained(tmp_path)
    source = Source(str(tmp_path))
    for asked in (None, kind):  # what they reach is used without a word
        again = load_config(source, model_args(rope_scaling=asked), 8192)
        assert again.rope_parameters == config.rope_parameters
    with pytest.raises(ValueError, match=f"stretched already .{kind}, up to 8192 tokens"):
        load_config(source, model_args(rope_scaling="linear"), 8193)
    with pytest.raises(ValueError, match="8193 tokens do not fit the model's 8192 positions"):
        load_config(source, model_args(), 8193)


# -- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture, linear", [("tiny_qwen3", 14), ("tiny_llama", 14), ("tiny_bloom", 8)])
def test_all_linear_layers_get_an_adapter_but_the_head(request, architecture, linear):
    model, tuning = load(request.getfixturevalue(architecture), lora_args())
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == linear and not any("lm_head" in name or "embed" in name for name in trained)
    assert tuning["method"] == "lora" and len(tuning["target_modules"]) == linear


def test_the_adapter_is_the_one_the_flags_describe(tiny_qwen3):
    options = {"lora_rank": 4, "lora_alpha": 12.0, "lora_dropout": 0.25, "target_modules": "q_proj, v_proj"}
    model, tuning = load(tiny_qwen3, LoraArguments(use_rslora=True, **options))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 64)
    assert layer.scaling["default"] == 12.0 / math.sqrt(4)  # arXiv:2312.03732
    assert layer.lora_dropout["default"].p == 0.25
    assert tuning["target_modules"] == ["q_proj", "v_proj"] and tuning["use_rslora"] and not tuning["continued"]


def test_unknown_modules_are_named(tiny_qwen3):
    with pytest.raises(ValueError, match="^--target_modules W_pack: "):
        load(tiny_qwen3, lora_args(target_modules="W_pack"))


def test_an_adapter_is_continued_where_it_ended(tiny_qwen3, tmp_path):
    model, _ = load(tiny_qwen3, lora_args(lora_rank=3))
    one_step(model)
    before = logits_of(model)
    model.save_pretrained(tmp_path)
    again, tuning = load(tmp_path, lora_args())
    assert_close(logits_of(again), before)
    assert tuning["continued"] and tuning["rank"] == 3
    assert any(parameter.requires_grad for parameter in again.parameters())


def test_all_weights_can_be_trained_and_are_in_fp32(tiny_qwen3):
    model, tuning = load(tiny_qwen3, lora_args(use_peft=False), dtype="bfloat16")
    assert tuning == {"method": "full"}
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(
        p.requires_grad for p in model.parameters()
    )


def test_an_adapter_is_not_left_out_in_silence(tiny_qwen3, tmp_path):
    load(tiny_qwen3, lora_args())[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an adapter; --use_peft False would leave it out"):
        load(tmp_path, lora_args(use_peft=False))


def test_a_model_of_which_nothing_is_trained_is_refused(tiny_qwen3):
    model = load(tiny_qwen3).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of this model takes gradients"):
        prepare_for_training(model, TRAINING)


@pytest.mark.parametrize("modules", ["embed_tokens,lm_head", "lm_head", "embed_tokens"])
def test_an_embedding_shared_with_the_head_stays_shared(tiny_qwen3, tmp_path, modules):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model, _ = load(tiny_qwen3, lora_args(modules_to_save=modules))
    inner = model.get_base_model()
    embedding = inner.model.embed_tokens.modules_to_save["default"].weight
    before = embedding.detach().clone()
    one_step(model)
    assert inner.lm_head.modules_to_save["default"].weight is embedding and not torch.equal(embedding, before)
    after = logits_of(model)

    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert all(torch.equal(tensor, embedding) for tensor in saved if tensor.shape == (448, 64))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_qwen3), tmp_path / "adapter")
    assert_close(logits_of(again), after)

    merged = again.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(merged.lm_head.weight, embedding)
    assert_close(logits_of(merged), after, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert_close(logits_of(reloaded), after, atol=1e-4, rtol=1e-4)


def test_a_head_of_its_own_is_trained_beside_its_embedding(tiny_llama):
    model, tuning = load(tiny_llama, lora_args(modules_to_save="embed_tokens,lm_head"))
    whole = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert [name.split(".")[-4] for name in whole] == ["embed_tokens", "lm_head"]
    assert sorted(tuning["modules_to_save"]) == ["embed_tokens", "lm_head"]


# -- quantisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag, layer", [("load_in_4bit", "Linear4bit"), ("load_in_8bit", "Linear8bitLt")])
@pytest.mark.parametrize("architecture", ["tiny_qwen3", "tiny_llama"])
def test_a_quantised_base_trains_an_adapter_on_the_cpu(request, architecture, flag, layer):
    pytest.importorskip("bitsandbytes")
    directory = request.getfixturevalue(architecture)
    model, tuning = load(directory, lora_args(), **{flag: True})
    assert tuning["method"] == "qlora" and model.is_quantized
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == layer
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    exact = logits_of(load(directory))
    assert (logits_of(model) - exact).norm() < 0.5 * exact.norm()  # rounded, but the same model
    model.train()
    losses = [one_step(model, rate=0.5) for _ in range(4)]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


def test_an_evaluation_does_not_cut_the_gradients_of_a_quantised_base(tiny_qwen3):
    pytest.importorskip("bitsandbytes")
    found = []
    for evaluate in (False, True):
        torch.manual_seed(0)
        model, _ = load(tiny_qwen3, lora_args(), load_in_4bit=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        if evaluate:
            logits_of(model)
        model.train()
        token_nll(model, *batch_of(), True)[0].sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item(), msg=name)


def test_nf4_is_asked_for_as_in_the_paper(tiny_qwen3):
    pytest.importorskip("bitsandbytes")
    config = load(tiny_qwen3, load_in_4bit=True).config.quantization_config
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)


def test_all_weights_of_a_quantised_base_cannot_be_trained(tiny_qwen3):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(
        ValueError, match="--use_peft False trains all weights, which 4-bit and 8-bit bases do not allow"
    ):
        load(tiny_qwen3, lora_args(use_peft=False), load_in_4bit=True)


# -- packing ---------------------------------------------------------------------------------------------------------


def test_packing_is_chosen_where_samples_can_be_kept_apart(tiny_qwen3, tiny_llama, tiny_bloom, caplog):
    qwen3, llama, bloom = (load_config(resolve(str(d)), model_args()) for d in (tiny_qwen3, tiny_llama, tiny_bloom))
    assert takes_position_ids(qwen3) and takes_position_ids(llama) and not takes_position_ids(bloom)
    assert packs_exactly(qwen3, None) and packs_exactly(llama, True) and not packs_exactly(qwen3, False)
    assert not packs_exactly(bloom, None) and not packs_exactly(bloom, False)
    with pytest.raises(
        ValueError, match="--packing True: bloom has no position_ids, so packed samples would see each"
    ):
        packs_exactly(bloom, True)


# -- the loss --------------------------------------------------------------------------------------------------------


def nll_by_hand(model, inputs, labels):
    """Cross entropy in float64, token by token, from the logits of a plain forward pass: (sums, counts)."""
    logits = model(**inputs, use_cache=False).logits.double()
    sums, counts = [], []
    for row in range(labels.shape[0]):
        losses = [
            torch.logsumexp(logits[row, place - 1], 0) - logits[row, place - 1, labels[row, place]]
            for place in range(1, labels.shape[1])
            if labels[row, place] != IGNORE_INDEX
        ]
        sums.append(torch.stack(losses).sum())
        counts.append(len(losses))
    return torch.stack(sums), counts


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert found
    return found


@pytest.mark.parametrize(
    "architecture, keeps", [("tiny_qwen3", True), ("tiny_qwen3", False), ("tiny_llama", True), ("tiny_bloom", False)]
)
@pytest.mark.parametrize("chunk", [1024, 5])
def test_the_loss_and_its_gradients_are_those_of_cross_entropy(request, monkeypatch, architecture, keeps, chunk):
    monkeypatch.setattr("stagekit.trainers.CHUNK_TOKENS", chunk)
    model = load(request.getfixturevalue(architecture)).float()
    inputs, labels = batch_of()
    if architecture == "tiny_bloom":
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(labels)}
    wanted, wanted_counts = nll_by_hand(model, inputs, labels)
    wanted.sum().backward()
    wanted_gradients = gradients(model)
    sums, counts = token_nll(model, inputs, labels, keeps)
    assert counts.tolist() == wanted_counts and sums.dtype == torch.float32
    assert_close(sums.double(), wanted, rtol=1e-5, atol=1e-4)
    sums.sum().backward()
    for name, gradient in gradients(model).items():
        scale = wanted_gradients[name].abs().max()
        assert_close(gradient / scale, wanted_gradients[name] / scale, rtol=1e-4, atol=1e-4)


def test_the_loss_of_transformers_own_is_the_same(tiny_qwen3):
    model = load(tiny_qwen3)
    inputs, labels = batch_of(seed=3)
    sums, counts = token_nll(model, inputs, labels, True)
    assert_close(sums.sum() / counts.sum(), model(**inputs, labels=labels, use_cache=False).loss)


def test_a_first_token_that_is_labelled_is_not_learnt(tiny_qwen3):
    model = load(tiny_qwen3)
    inputs, labels = batch_of()
    wanted, counts = token_nll(model, inputs, labels, True)
    labels[:, 0] = inputs["input_ids"][:, 0]
    again, same_counts = token_nll(model, inputs, labels, True)
    assert torch.equal(wanted, again) and torch.equal(counts, same_counts)


def test_a_row_without_labels_counts_nothing_and_a_batch_without_is_an_error(tiny_qwen3):
    model = load(tiny_qwen3)
    inputs, labels = batch_of()
    labels[1] = IGNORE_INDEX
    sums, counts = token_nll(model, inputs, labels, True)
    assert (sums[1].item(), counts[1].item()) == (0.0, 0) and (sums[[0, 2, 3]] > 0).all()
    labels[:, 1:] = IGNORE_INDEX
    with pytest.raises(ValueError, match="a batch holds no token to learn"):
        token_nll(model, inputs, labels, True)


def test_it_does_not_matter_how_a_batch_is_split(tiny_qwen3):
    model = load(tiny_qwen3)
    trainer = SimpleNamespace(
        keeps_logits=True,
        args=SimpleNamespace(average_tokens_across_devices=True),
        accelerator=SimpleNamespace(num_processes=1),
    )
    inputs, labels = batch_of(rows=8)
    labels[2, labels[2].ne(IGNORE_INDEX).nonzero()[3:]] = IGNORE_INDEX  # rows of different weight
    labels[5, :-2] = IGNORE_INDEX
    labels[5, -2:] = inputs["input_ids"][5, -2:]
    total = int((labels[:, 1:] != IGNORE_INDEX).sum())
    results = []
    for size in (8, 4, 1):
        losses = []
        for start in range(0, 8, size):
            part = {key: value[start : start + size] for key, value in inputs.items()}
            loss = LanguageTrainer.compute_loss(
                trainer, model, {**part, "labels": labels[start : start + size]}, False, total
            )
            loss.backward()
            losses.append(loss.item())
        results.append((sum(losses), gradients(model)))
    wanted, counts = nll_by_hand(model, inputs, labels)
    for loss, found in results:
        assert loss == pytest.approx(wanted.sum().item() / sum(counts), rel=1e-5)
        for name, gradient in found.items():
            assert_close(gradient, results[0][1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [8, 2, 1])
def test_a_step_of_the_trainer_does_not_depend_on_the_split_either(tiny_qwen3, tmp_path, size):
    import copy

    from datasets import Dataset

    from stagekit.arguments import StageTrainingArguments
    from stagekit.checks import Checks

    inputs, labels = batch_of(rows=8, width=16)
    labels[3, 6:] = IGNORE_INDEX
    labels[3, 5] = inputs["input_ids"][3, 5]
    rows = {"input_ids": inputs["input_ids"].tolist(), "labels": labels.tolist(), "lengths": [[16]] * 8}
    model, _ = load(tiny_qwen3, lora_args(use_peft=False))
    by_hand = copy.deepcopy(model)
    args = StageTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    run = SimpleNamespace(checks=Checks())
    trainer = LanguageTrainer(
        run, model=model, args=args, train_dataset=Dataset.from_dict(rows), data_collator=Collator(pad_token_id=3)
    )
    trainer.train()
    by_hand.train()
    sums, counts = nll_by_hand(by_hand, inputs, labels)
    loss = sums.sum() / sum(counts)
    loss.backward()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-4)
    for (name, parameter), wanted in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert_close(parameter, wanted - 0.1 * wanted.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert run.checks.outcomes["packing_is_exact"]["passed"] and run.checks.outcomes["gradients_flow"]["passed"]
