"""Merging: the sum by hand, answers of base and adapter apart, faults that must be caught, what is left on disk."""

import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, build_model, conversations, stage_of, write_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from stagekit import export, generation, modeling
from stagekit.checkpoint import base_fingerprint, relative, resolve, stage_fingerprint, write_stage
from stagekit.commandline import run
from stagekit.modeling import generation_settings, merge_adapter
from stagekit.scoring import load_reward_model, score_answers
from stagekit.seen_prompts import SEEN_PROMPTS
from stagekit.tokenization import encode_prompt
from tools import merge_adapter as tool
from tools.merge_adapter import add_rounding_noise, difference, main, merge_is_exact, parse_args, round_weights

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUESTIONS = ["感冒了怎么办？", "What is a fever?", "多喝水吗？", "Should I rest?"]


def write_adapter(
    base,
    directory,
    *,
    scores=False,
    merged=(),
    spread=0.05,
    seed=1,
    dtype=torch.float32,
    stage=None,
    pad_token=None,
    **lora,
):
    """A stage's directory with an adapter of random weights on `base`, under which `merged` were merged before."""
    torch.manual_seed(seed)
    if scores:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    for path in merged:
        model = merge_adapter(model, str(path))
    options = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **lora}
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS" if scores else "CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = pad_token or tokenizer.pad_token
    tokenizer.save_pretrained(directory)
    if not scores:
        generation_settings([2, 0], tokenizer).save_pretrained(directory)
    np.save(directory / SEEN_PROMPTS, np.arange(5, dtype=np.uint64))
    record = {
        "format": 1,
        "stage": "rm" if scores else "sft",
        "seed": 42,
        "base_model": {
            "name_or_path": relative(str(base), directory),
            "revision": None,
            "fingerprint": base_fingerprint(str(base)),
        },
        "parent": None,
        "template": {"name": "own"},
        "metrics": {"after": {"accuracy": 0.9, "accuracy_low": 0.8} if scores else {"loss": 1.0}},
        **(stage or {}),
    }
    if merged:
        parts = [
            {"path": relative(str(path), directory), "fingerprint": stage_fingerprint(stage_of(path))}
            for path in merged
        ]
        record["base_model"]["merged"] = parts
    write_stage(directory, record)
    return directory


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """Of the probes: they show as much, and take a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "ANSWER_TOKENS", 6)
        yield


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """outputs/base -> outputs/sft and outputs/rm, side by side."""
    root = tmp_path_factory.mktemp("merge")
    build_model(root / "base")
    write_adapter(root / "base", root / "sft")
    write_adapter(root / "base", root / "rm", scores=True, spread=0.2)
    return root


@pytest.fixture(scope="module")
def merged(outputs):
    """outputs/sft, merged in fp32."""
    return merge(outputs / "sft", outputs / "whole")


@pytest.fixture
def target(outputs):
    """A place beside the stages, free again after the test."""
    path = outputs / "merged"
    yield path
    shutil.rmtree(path, ignore_errors=True)


def merge(adapter, target, *flags):
    main(parse_args(["--lora_model", str(adapter), "--output_dir", str(target), "--only_cpu", *map(str, flags)]))
    return target


def refusal(adapter, target, *flags):
    """The message with which a merge ends that must not go well; nothing is left of it."""
    before = sorted(target.iterdir()) if target.exists() else None
    with pytest.raises((ValueError, OSError)) as error:
        merge(adapter, target, *flags)
    assert (sorted(target.iterdir()) if target.exists() else None) == before
    assert not target.with_name(target.name + export.UNFINISHED).exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def weights_of(directory):
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def apart(base, *adapters, **options):
    """Base and adapters by transformers and PEFT alone, in fp32; all but the last are merged."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters[:-1]:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return PeftModel.from_pretrained(model, adapters[-1]).eval()


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(5, 69)[None]).logits.float()


def reloaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


# -- the sum ---------------------------------------------------------------------------------------------------------


def update_by_hand(adapter, name):
    """scaling · B · A of one weight in float64, from the adapter's files; arXiv:2106.09685, or 2312.03732 (rsLoRA)."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    if f"{key}A.weight" not in tensors:
        return 0
    return scaling * tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()


@pytest.mark.parametrize("rslora", [False, True])
def test_every_adapter_of_the_chain_is_added_to_the_weights(outputs, target, tmp_path, rslora):
    second = write_adapter(
        outputs / "base", tmp_path / "dpo", merged=[outputs / "sft"], seed=2, use_rslora=rslora, r=3
    )
    merge(second, target)
    base, found = load_file(outputs / "base" / "model.safetensors"), weights_of(target)
    assert found.keys() == base.keys()
    changed = 0
    for name, weight in base.items():
        first, then = (update_by_hand(adapter, name) for adapter in (outputs / "sft", second))
        assert_close(found[name].double(), weight.double() + first + then, rtol=0, atol=1e-6)
        changed += not torch.equal(found[name], weight)
    assert changed == 14
    assert_close(
        logits_of(reloaded(target)), logits_of(apart(outputs / "base", outputs / "sft", second)), rtol=0, atol=2e-4
    )


def test_the_sum_is_rounded_once(outputs, target):
    """A base in bfloat16: its weights plus the update in float64, rounded to the nearest."""
    base = build_model(outputs / "base16", seed=3)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = write_adapter(base, outputs / "sft16", dtype=torch.bfloat16)
    merge(adapter, target)
    total = 0
    for name, weight in load_file(base / "model.safetensors").items():
        exact, found = weight.double() + update_by_hand(adapter, name), weights_of(target)[name]
        assert found.dtype == torch.bfloat16
        nearest = exact.to(torch.float32).to(torch.bfloat16)
        total += int((found != nearest).sum())
    assert total <= 2  # a sum that lies half-way between two numbers, up to fp32
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype, error", [("float32", 1e-6), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_the_weights_have_the_type_that_was_asked_for(outputs, target, dtype, error):
    merge(outputs / "sft", target, "--dtype", dtype)
    for name, found in weights_of(target).items():
        weight = load_file(outputs / "base" / "model.safetensors")[name].double() + update_by_hand(
            outputs / "sft", name
        )
        assert found.dtype == getattr(torch, dtype)
        assert_close(found.double(), weight, rtol=error, atol=1e-6)
    check = stage_of(target)["checks"]["merge_is_exact"]
    assert check["passed"] and (f"another rounding to {dtype}" in check["limit"]) == (dtype != "float32")


KINDS = {
    "dora": {"use_dora": True},
    "embedding tied to the head": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding and head trained apart": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "norms trained whole": {"modules_to_save": ["norm"]},
}


@pytest.mark.filterwarnings("ignore:.*tie")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_merged_exactly(outputs, target, tmp_path, kind):
    adapter = write_adapter(outputs / "base", tmp_path / "sft", **KINDS[kind])
    wanted = logits_of(apart(outputs / "base", adapter))
    assert (wanted - logits_of(reloaded(outputs / "base"))).abs().max() > 0.1
    merge(adapter, target)
    model = reloaded(target)
    assert_close(logits_of(model), wanted, rtol=0, atol=2e-4)
    shared = model.lm_head.weight is model.model.embed_tokens.weight
    assert shared == (kind not in ("embedding and head trained apart", "lora on the embedding"))


def test_a_head_of_its_own_is_merged(tiny_llama, tmp_path):
    adapter = write_adapter(tiny_llama, tmp_path / "sft", modules_to_save=["embed_tokens", "lm_head"])
    merge(adapter, tmp_path / "merged", "--template_name", "vicuna")
    assert_close(logits_of(reloaded(tmp_path / "merged")), logits_of(apart(tiny_llama, adapter)), rtol=0, atol=2e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_a_base_without_template_is_compared_on_plain_text(tiny_llama, tmp_path):
    merge(write_adapter(tiny_llama, tmp_path / "pt"), tmp_path / "merged")
    assert stage_of(tmp_path / "merged")["checks"]["merge_is_exact"]["passed"]


def test_a_vocabulary_that_grew_is_merged_with_its_rows(outputs, target, tmp_path):
    adapter = tmp_path / "sft"
    model = AutoModelForCausalLM.from_pretrained(outputs / "base")
    tokenizer = AutoTokenizer.from_pretrained(outputs / "base")
    tokenizer.add_tokens([f"word{number}" for number in range(60)])
    model.resize_token_embeddings(len(tokenizer))
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=LINEAR, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    assert "--resize_emb True adds rows" in refusal(adapter, target)
    merge(adapter, target, "--resize_emb")
    with torch.no_grad():
        ids = torch.arange(440, len(tokenizer))[None]
        assert_close(reloaded(target)(ids).logits, model.eval()(ids).logits, rtol=0, atol=2e-4)


# -- what is written -------------------------------------------------------------------------------------------------


def answers(base_model, lora_model=None):
    """Greedy answers as inference.py gives them."""
    source = generation.find_source(base_model and str(base_model), lora_model and str(lora_model))
    loaded = generation.load_for_generation(source, generation.load_chat(source), only_cpu=True)
    prompts = [encode_prompt(loaded.chat, [{"role": "user", "content": question}]) for question in QUESTIONS]
    settings = generation.choose_settings(loaded, temperature=0.0, max_new_tokens=24)
    return generation.generate_batch(loaded, prompts, settings), loaded


def test_the_merged_directory_answers_as_the_adapter_does(outputs, merged, tmp_path):
    moved = shutil.copytree(merged, tmp_path / "moved")  # it needs neither base nor adapter
    (wanted, adapter), (found, alone) = answers(None, outputs / "sft"), answers(moved)
    assert found == wanted and len({answer.text for answer in found}) > 1
    assert alone.stop_ids == adapter.stop_ids == [2, 0]
    assert alone.defaults.temperature == 0.3  # as the stage had it
    assert found != answers(outputs / "base")[0]


def test_a_stage_starts_from_the_merged_directory(merged, tmp_path):
    from test_reward_modeling import run_main

    write_jsonl(tmp_path / "chats" / "a.jsonl", conversations(8))
    flags = ("--do_train", "--max_steps", "1", "--report_to", "none", "--disable_tqdm", "True")
    places = (
        "--model_name_or_path",
        merged,
        "--train_file_dir",
        tmp_path / "chats",
        "--output_dir",
        tmp_path / "next",
    )
    assert run_main("supervised_finetuning", *flags, *places, "--data_cache_dir", tmp_path / "cache") == 0
    stage = stage_of(tmp_path / "next")
    assert stage["parent"]["stage"] == "merge"
    assert stage["parent"]["fingerprint"] == stage_fingerprint(stage_of(merged))
    assert stage["base_model"]["fingerprint"] == base_fingerprint(str(merged))
    seen = np.load(tmp_path / "next" / SEEN_PROMPTS)
    assert set(np.arange(5)) < set(seen.tolist())  # those of the merged stage, and its own
    merge(tmp_path / "next", tmp_path / "again")  # and the result is merged in turn
    assert_close(
        logits_of(reloaded(tmp_path / "again")), logits_of(apart(merged, tmp_path / "next")), rtol=0, atol=2e-4
    )


def test_the_record_says_what_was_merged(outputs, merged):
    stage, parent = stage_of(merged), stage_of(outputs / "sft")
    assert (stage["stage"], stage["format"], stage["seed"]) == ("merge", 1, 42)
    assert stage["base_model"] == parent["base_model"]  # relative: outputs/ can be moved
    fingerprint = stage_fingerprint(parent)
    assert stage["parent"] == {"path": "../sft", "stage": "sft", "fingerprint": fingerprint}
    assert stage["tuning"]["adapters"] == [{"path": "../sft", "fingerprint": fingerprint}]
    assert stage["template"] == parent["template"] and stage["metrics"] == parent["metrics"]
    assert stage["command"].startswith("python -m tools.merge_adapter")
    assert stage["checks"]["merge_is_exact"]["same_top"] == stage["checks"]["merge_is_exact"]["positions"] > 100
    assert resolve(str(merged)).adapter is None  # which also compares every file with its hash


def test_sha256sum_confirms_every_file(outputs, target):
    merge(outputs / "sft", target, "--max_shard_size", "100KB")
    files = {path.name for path in target.iterdir()}
    assert sum(name.startswith("model-0000") for name in files) > 2 and "model.safetensors.index.json" in files
    command = ["sha256sum", "-c", "--strict", "sha256sums.txt"]
    checked = subprocess.run(command, cwd=target, capture_output=True, text=True)
    assert checked.returncode == 0
    assert {line.partition(":")[0] for line in checked.stdout.splitlines()} == files - {"sha256sums.txt"}
    sums = subprocess.run(
        ["sha256sum", *sorted(files - {"sha256sums.txt"})], cwd=target, capture_output=True, text=True
    )
    assert (target / "sha256sums.txt").read_text() == sums.stdout
    assert_close(logits_of(reloaded(target)), logits_of(apart(outputs / "base", outputs / "sft")), rtol=0, atol=2e-4)
    (target / "generation_config.json").write_text("{}")
    assert subprocess.run(command, cwd=target, capture_output=True).returncode == 1


# -- reward models ---------------------------------------------------------------------------------------------------


def scores(directory):
    reward = load_reward_model(str(directory), only_cpu=True)
    items = [
        (
            [{"role": "user", "content": question}],
            [[{"role": "assistant", "content": text}] for text in ("Rest.", "多喝水")],
            None,
        )
        for question in QUESTIONS
    ]
    return dict(score_answers(reward, items, 128, 4))


@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_a_merged_reward_model_gives_the_same_scores(outputs, target, dtype, error):
    wanted = scores(outputs / "rm")
    assert np.ptp(list(wanted.values())) > 0.5
    merge(outputs / "rm", target, "--dtype", dtype)
    assert scores(target) == pytest.approx(wanted, abs=error)
    assert stage_of(target)["metrics"]["after"]["accuracy_low"] == 0.8  # PPO asks for it
    assert not (target / "generation_config.json").exists()
    head = load_file(outputs / "rm" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(weights_of(target)["score.weight"], head.to(getattr(torch, dtype)))


def test_a_merged_reward_model_scores_at_the_end_of_turn_without_this_project(outputs, target, tmp_path):
    """The tokenizer pads with the very token at which answers are scored; training used another one."""
    adapter = write_adapter(outputs / "base", tmp_path / "rm", scores=True, spread=0.2, pad_token="<|im_end|>")
    merge(adapter, target)
    config = json.loads((target / "config.json").read_text())
    assert config["pad_token_id"] != 2 and config["architectures"] == ["Qwen3ForSequenceClassification"]
    text = "<|im_start|>user\nWhat is a fever?<|im_end|>\n<|im_start|>assistant\nRest.<|im_end|>"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(target),
        AutoTokenizer.from_pretrained(target),
    )
    with torch.no_grad():
        found = model(torch.tensor([tokenizer.encode(text)])).logits.item()
    assert found == pytest.approx(scores(adapter)[1, 0], abs=1e-5)


# -- faults ----------------------------------------------------------------------------------------------------------


def forget_adapter(model, progressbar):
    return model.unload()


def scale_twice(model, progressbar):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 2 * value for name, value in module.scaling.items()}
    return model.merge_and_unload()


def leave_out_a_layer(model, progressbar):
    for name, module in model.named_modules():
        if hasattr(module, "lora_B") and ".layers.1." in name:
            module.lora_B["default"].weight.data.zero_()
    return model.merge_and_unload()


def leave_out_a_matrix(model, progressbar):
    model.get_base_model().model.layers[1].self_attn.k_proj.lora_B["default"].weight.data.zero_()
    return model.merge_and_unload()


def take_another_base(model, progressbar):
    merged = model.merge_and_unload()
    for parameter in merged.model.layers.parameters():
        parameter.data += 1e-3 * parameter.data.std() * torch.randn_like(parameter)
    return merged


def draw_a_new_head(model, progressbar):
    merged = model.merge_and_unload()
    merged.score.weight.data.normal_(std=0.02)
    return merged


FAULTS = [forget_adapter, scale_twice, leave_out_a_layer, leave_out_a_matrix, take_another_base]


@pytest.mark.parametrize(
    "stage, dtype, fault",
    [
        *(("sft", "float32", fault) for fault in FAULTS),
        *(("sft", "bfloat16", fault) for fault in FAULTS),
        *(("rm", "float32", fault) for fault in (*FAULTS, draw_a_new_head)),
        ("rm", "bfloat16", draw_a_new_head),
    ],
)
def test_a_wrong_merge_is_caught(outputs, target, monkeypatch, stage, fault, dtype):
    monkeypatch.setattr(modeling, "merge_into_base", fault)
    message = refusal(outputs / stage, target, "--dtype", dtype)
    assert message.startswith("check merge_is_exact failed: merged in fp32, outputs differ by")


def test_a_small_adapter_of_which_a_layer_is_missing_is_caught(outputs, target, tmp_path, monkeypatch):
    """It changes logits by some thousandths of their size only, which is a thousand times what arithmetic does."""
    adapter = write_adapter(outputs / "base", tmp_path / "sft", spread=0.0003)
    merge(adapter, target)
    shutil.rmtree(target)
    monkeypatch.setattr(modeling, "merge_into_base", leave_out_a_layer)
    assert "merged in fp32, outputs differ" in refusal(adapter, target)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "stage, name",
    [("sft", "model.layers.1.mlp.down_proj.weight"), ("rm", "score.weight"), ("sft", "model.norm.weight")],
)
def test_a_fault_of_saving_is_caught(outputs, target, monkeypatch, stage, name, dtype):
    """One weight of a tensor is another, by less than rounding would explain; a missing score head is drawn anew."""
    right = tool.save

    def wrong(model, directory, *args):
        right(model, directory, *args)
        tensors = load_file(directory / "model.safetensors")
        if name == "score.weight":
            del tensors[name]
        else:
            tensors[name].view(-1)[7] += 2**-6
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(tool, "save", wrong)
    message = refusal(outputs / stage, target, "--dtype", dtype)
    assert "tensors are not the ones that were written" in message and name in message


@pytest.mark.parametrize("fault", [leave_out_a_layer, scale_twice, forget_adapter])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reloaded_logits_alone_show_a_fault(outputs, fault, dtype):
    """Without the comparison in fp32: the limit is rounding's own, which a good merge keeps and a bad one does not."""
    rows = [list(range(5, 60)), list(range(100, 160))]
    model = apart(outputs / "base", outputs / "sft")
    reference = tool.outputs(model, rows, "")
    with model.disable_adapter():
        effect = difference(reference, tool.outputs(model, rows, ""))

    def outcome(merged):
        _, rounded = round_weights(merged, dtype)
        merged = merged.float()
        found = tool.outputs(merged, rows, "")
        noise = tool.measure_noise(merged, rows, found, rounded, dtype)
        return merge_is_exact(reference, reference, found, effect, noise, dtype)

    assert outcome(modeling.merge_into_base(model))["passed"]
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"merge_is_exact failed: merged in {kind}, outputs differ"):
        outcome(fault(apart(outputs / "base", outputs / "sft"), False))


def test_differences_are_those_of_the_formula():
    """KL(p, q) of two tokens, by hand; a logit of -inf on both sides is no difference, a NaN is the largest one."""
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]]), torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.75, 0.0]])
    found = difference([p.log()], [q.log()])
    wanted = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert (found.kl_mean, found.kl_max) == pytest.approx((wanted / 2, wanted), rel=1e-6)
    assert found.largest == pytest.approx(math.log(2)) and (found.same_top, found.positions) == (1, 2)
    assert difference([p], [torch.full_like(p, math.nan)]).largest == math.inf
    scores = difference([torch.tensor([1.0]), torch.tensor([2.0])], [torch.tensor([1.5]), torch.tensor([1.0])])
    assert scores.largest == 1.0 and scores.kl_mean is None


def test_rounding_that_erases_the_training_is_refused(outputs, target, tmp_path):
    """Updates of less than half a unit in the last place: in bfloat16 the merged model would be its base."""
    base = shutil.copytree(outputs / "base", tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = write_adapter(base, tmp_path / "sft", spread=0.0002, dtype=torch.bfloat16)
    message = refusal(adapter, target)
    assert "rounding to bfloat16 moves the model by" in message and message.endswith("use --dtype float32")
    merge(adapter, target, "--dtype", "float32")


def test_a_weight_that_float16_cannot_hold_is_named(outputs, target, tmp_path):
    base = shutil.copytree(outputs / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = write_adapter(base, tmp_path / "sft")
    message = refusal(adapter, target, "--dtype", "float16")
    assert message.startswith("model.layers.0.mlp.down_proj.weight holds 1e+05, which torch.float16 cannot")


@pytest.mark.parametrize("dtype, bits, lowest", [(torch.bfloat16, 8, -126), (torch.float16, 11, -14)])
def test_noise_stays_within_what_rounds_to_the_same_weights(outputs, dtype, bits, lowest):
    model = reloaded(outputs / "base")
    exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _, rounded = round_weights(model, dtype)
    model = model.float()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    add_rounding_noise(model, rounded, dtype)
    for name, parameter in model.named_parameters():
        if name not in rounded:  # the ones of the norms
            assert torch.equal(parameter, exact[name])
            continue
        distance = torch.exp2(torch.floor(torch.log2(before[name].abs())).clamp(min=lowest) + 1 - bits)
        moved = (parameter - before[name]).abs()
        assert (moved <= 0.5001 * distance).all()
        spread = moved.square().mean() / (exact[name] - before[name]).square().mean()
        assert 0.8 < spread < 1.25  # as large as the real rounding was


def test_noise_in_fp32_moves_weights_to_their_neighbours(outputs):
    model = reloaded(outputs / "base")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    add_rounding_noise(model, set(before), torch.float32)
    for name, parameter in model.named_parameters():
        distance = torch.exp2(torch.floor(torch.log2(before[name].abs())).clamp(min=-126) - 23)
        assert ((parameter - before[name]).abs() <= distance).all()
        assert 0.3 < (parameter != before[name]).float().mean() < 0.8


# -- quantised bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, flag, bits",
    [("sft", "load_in_4bit", "4-bit"), ("sft", "load_in_8bit", "8-bit"), ("rm", "load_in_4bit", "4-bit")],
)
def test_a_chain_trained_on_a_quantised_base_goes_into_the_original_weights(
    outputs, target, tmp_path, caplog, stage, flag, bits
):
    pytest.importorskip("bitsandbytes")
    facts = {"arguments": {flag: True}, "tuning": {"method": "qlora"}}
    adapter = write_adapter(outputs / "base", tmp_path / "qlora", scores=stage == "rm", stage=facts)
    caplog.set_level("INFO")
    merge(adapter, target)
    assert f"trained on a {bits} base: the adapter is merged into the original weights" in caplog.text
    base = load_file(outputs / "base" / "model.safetensors")
    for name, found in weights_of(target).items():
        if name != "score.weight":
            assert_close(found.double(), base[name].double() + update_by_hand(adapter, name), rtol=0, atol=1e-6)
    told = stage_of(target)["tuning"]["trained_on"]
    assert told["base"] == bits
    if stage == "rm":
        assert told["largest_difference"] > 0 and "scores on the probes differ from the 4-bit ones" in caplog.text
    else:
        assert 1e-6 < told["kl_mean"] < told["kl_max"] < 10 and f"from {bits} base and adapter" in caplog.text


def test_the_distance_to_the_quantised_chain_is_that_of_inference(outputs, target, tmp_path):
    pytest.importorskip("bitsandbytes")
    adapter = write_adapter(
        outputs / "base", tmp_path / "qlora", stage={"arguments": {"qlora": True}, "tuning": {"method": "qlora"}}
    )
    merge(adapter, target)
    source = generation.find_source(None, str(adapter))
    chat = generation.load_chat(source)
    quantised = generation.load_for_generation(source, chat, only_cpu=True, load_in_4bit=True)
    plan = SimpleNamespace(scores=False, config=quantised.model.config)
    rows = tool.probe_rows(
        generation.load_for_generation(source, chat, only_cpu=True).model, source, plan, chat.tokenizer, chat
    )
    with torch.no_grad():
        divergences = []
        for ids in rows:
            p, q = (
                model(torch.tensor([ids])).logits[0].double().softmax(-1)
                for model in (quantised.model, reloaded(target))
            )
            divergences.append((p * (p / q).log()).sum(-1))
    assert stage_of(target)["tuning"]["trained_on"]["kl_mean"] == pytest.approx(
        torch.cat(divergences).mean().item(), rel=1e-3
    )


def test_without_bitsandbytes_the_merge_is_made_and_the_distance_is_not_known(
    outputs, target, tmp_path, monkeypatch, caplog
):
    adapter = write_adapter(outputs / "base", tmp_path / "qlora", stage={"tuning": {"method": "qlora"}})

    def missing(*args, quantised=modeling.load_model, **options):
        if args[1].load_in_4bit:
            raise ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes")
        return quantised(*args, **options)

    monkeypatch.setattr(modeling, "load_model", missing)
    merge(adapter, target)
    assert "could not be measured here (Using `bitsandbytes`" in caplog.text
    assert stage_of(target)["tuning"]["trained_on"] == {"base": "4-bit"}


def test_quantised_weights_are_no_base_to_merge_into(outputs, target, tmp_path):
    base = shutil.copytree(outputs / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    adapter = shutil.copytree(outputs / "sft", tmp_path / "sft")
    (adapter / "stage.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    assert "holds quantised weights, into which an update cannot be merged exactly" in refusal(adapter, target)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_base_that_is_not_the_chains_own_is_refused(outputs, target, tmp_path):
    other = build_model(tmp_path / "other", seed=9)
    assert "was trained on" in refusal(outputs / "sft", target, "--base_model", other)
    moved = shutil.copytree(outputs, tmp_path / "outputs")
    shutil.copy(other / "model.safetensors", moved / "base")  # another revision under the old name
    assert "its weights are not the ones that" in refusal(moved / "sft", target)


def test_a_base_that_is_gone_is_named_with_a_way_out(outputs, target, tmp_path):
    adapter = shutil.copytree(outputs / "sft", tmp_path / "sft")
    assert "name its new place with --base_model" in refusal(adapter, target)
    merge(adapter, tmp_path / "deeper" / "merged", "--base_model", outputs / "base")
    assert stage_of(tmp_path / "deeper" / "merged")["base_model"]["name_or_path"] == str(outputs / "base")


def test_there_must_be_an_adapter(outputs, target):
    assert "holds no adapter: its weights stand alone already" in refusal(outputs / "base", target)


def test_a_directory_that_holds_something_is_replaced_only_on_demand_and_only_after_success(
    outputs, target, monkeypatch
):
    merge(outputs / "sft", target)
    first = stage_of(target)["created"], (target / "model.safetensors").stat().st_mtime_ns
    assert "is not empty; name another directory" in refusal(outputs / "sft", target)
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "merge_into_base", scale_twice)
        refusal(outputs / "sft", target, "--overwrite_output_dir")
    assert (stage_of(target)["created"], (target / "model.safetensors").stat().st_mtime_ns) == first
    (target / "thesis.txt").write_text("years of work")
    assert "holds 'thesis.txt', which --overwrite_output_dir would delete" in refusal(
        outputs / "sft", target, "--overwrite_output_dir"
    )
    (target / "thesis.txt").unlink()
    merge(outputs / "sft", target, "--overwrite_output_dir", "--dtype", "bfloat16")
    assert stage_of(target)["tuning"]["dtype"] == "bfloat16"
    assert {path.name for path in outputs.glob("merged*")} == {"merged"}


@pytest.mark.parametrize("name", ["sft", "base"])
def test_what_is_merged_is_never_overwritten(outputs, name):
    assert "is what the run starts from" in refusal(outputs / "sft", outputs / name, "--overwrite_output_dir")


def test_an_interruption_leaves_nothing_and_what_a_killed_run_left_is_removed(outputs, target, monkeypatch):
    left = target.with_name(target.name + export.UNFINISHED)
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")

    def interrupted(*args):
        assert list(left.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "reload", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(outputs / "sft", target)
    assert not target.exists() and not left.exists()


def test_a_disk_or_memory_too_small_is_told_before_anything_is_loaded(outputs, target, monkeypatch):
    def loading(*args, **options):
        raise AssertionError("it loads")

    monkeypatch.setattr(modeling, "load_model", loading)
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30_000_000))
        message = refusal(outputs / "sft", target)
    assert message.startswith(f"--output_dir {target} needs ") and message.endswith("and 30 MB are free on that disk")
    monkeypatch.setattr("stagekit.memory.available_bytes", lambda use_cpu: 1_000_000)
    assert "merging in fp32 needs 6." in refusal(outputs / "sft", target)


def test_the_predicted_size_is_what_is_written(outputs, target, monkeypatch):
    told = []
    monkeypatch.setattr(export, "check_room", lambda path, needed: told.append(needed))
    merge(outputs / "sft", target)
    written = sum(path.stat().st_size for path in target.iterdir())
    assert written <= told[0] < 1.05 * written + 2**25


# -- the command -----------------------------------------------------------------------------------------------------


def test_a_failed_check_is_one_line_and_exit_code_2(outputs, target, monkeypatch, capsys):
    monkeypatch.setattr(modeling, "merge_into_base", forget_adapter)
    args = parse_args(["--lora_model", str(outputs / "sft"), "--output_dir", str(target), "--only_cpu"])
    with pytest.raises(SystemExit) as end:
        run(main, args, tool.PROGRAM, "")
    assert end.value.code == 2 and not target.exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("python -m tools.merge_adapter: error: check merge_is_exact failed")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--lora_model, --output_dir"),
        (["--max_shard_size", "big"], "--max_shard_size 'big' is no size such as 5GB or 500MB"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--only_cpu", "--gpus", "0"], "--only_cpu and --gpus exclude each other"),
        (["--template_name", "chatlm"], "--template_name 'chatlm' is not a template; did you mean 'chatglm'"),
        (["--lora_modle", "x"], "unknown flag --lora_modle; did you mean --lora_model?"),
    ],
)
def test_wrong_flags_are_one_line(capsys, flags, message):
    given = ["--lora_model", "a", "--output_dir", "b"] if flags else []
    with pytest.raises(SystemExit) as end:
        parse_args([*given, *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_help_loads_nothing_heavy():
    code = (
        "import sys, tools.merge_adapter as tool\n"
        "try: tool.parse_args(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.startswith("usage: python -m tools.merge_adapter") and told.endswith("[]\n")
