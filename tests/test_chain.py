"""The way through the stages: base -> PT -> SFT -> DPO, by directory alone, moved, and on the wrong base."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import build_model, conversations, run_script, stage_of, write_jsonl
from test_dpo_training import preferences, refused, train

import dpo_training
from stagekit.checkpoint import stage_fingerprint
from stagekit.seen_prompts import SEEN_PROMPTS

FAST = ("--do_train", "--max_steps", "2", "--learning_rate", "1e-2", "--report_to", "none")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """outputs/base -> outputs/pt -> outputs/sft, side by side as the wrappers leave them."""
    root = tmp_path_factory.mktemp("chain")
    write_jsonl(root / "texts" / "a.jsonl", [{"text": f"Document {n}. Rest and drink water."} for n in range(12)])
    write_jsonl(root / "chats" / "a.jsonl", conversations(12))
    build_model(root / "outputs" / "base")
    cache = ("--data_cache_dir", root / "cache")
    base, pt, sft = (root / "outputs" / name for name in ("base", "pt", "sft"))
    run_script(
        "pretraining.py",
        *FAST,
        *cache,
        "--model_name_or_path",
        base,
        "--train_file_dir",
        root / "texts",
        "--output_dir",
        pt,
    )
    run_script(
        "supervised_finetuning.py",
        *(*FAST, *cache, "--model_name_or_path", pt, "--train_file_dir", root / "chats", "--output_dir", sft),
    )
    return root / "outputs"


def logits(directory):
    """Logits of a stage directory, loaded as any later program loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from stagekit.checkpoint import resolve

    source = resolve(str(directory))
    model = AutoModelForCausalLM.from_pretrained(source.base)
    if source.adapter:
        model = PeftModel.from_pretrained(model, source.adapter)
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


def test_each_stage_names_its_parent_and_its_base(outputs):
    pt, sft = stage_of(outputs / "pt"), stage_of(outputs / "sft")
    assert pt["parent"] is None and pt["base_model"]["name_or_path"] == "../base"
    assert sft["parent"]["path"] == "../pt" and sft["parent"]["stage"] == "pt"
    assert sft["base_model"] == pt["base_model"] and sft["tuning"]["continued"] is True


def test_fine_tuning_continues_the_adapter_of_pretraining(outputs):
    base, pt, sft = (logits(outputs / name) for name in ("base", "pt", "sft"))
    assert (pt - base).abs().max() > 1e-3 and (sft - pt).abs().max() > 1e-3


def test_base_and_adapter_apart_continue_the_same_chain(outputs, tmp_path):
    root = outputs.parent
    flags = (*FAST, "--data_cache_dir", root / "cache", "--train_file_dir", root / "chats")
    run_script(
        "supervised_finetuning.py",
        *(
            *flags,
            "--model_name_or_path",
            outputs / "base",
            "--peft_path",
            outputs / "pt",
            "--output_dir",
            tmp_path / "sft",
        ),
    )
    assert torch.equal(logits(tmp_path / "sft"), logits(outputs / "sft"))


def test_an_adapter_of_another_base_is_refused_by_name(outputs, tmp_path):
    other = build_model(tmp_path / "other", seed=1)
    result = run_script(
        "supervised_finetuning.py",
        *(*FAST, "--train_file_dir", outputs.parent / "chats", "--output_dir", tmp_path / "sft"),
        *("--model_name_or_path", other, "--peft_path", outputs / "pt"),
        check=False,
    )
    assert result.returncode == 2
    assert f"adapter {outputs / 'pt'} was trained on {outputs / 'base'}, not on {other}" in result.stderr


def test_outputs_can_be_moved_as_a_whole(outputs, tmp_path):
    shutil.copytree(outputs, tmp_path / "moved")
    assert torch.equal(logits(tmp_path / "moved" / "sft"), logits(outputs / "sft"))


def test_a_changed_parent_file_is_named(outputs, tmp_path):
    shutil.copytree(outputs, tmp_path / "outputs")
    path = tmp_path / "outputs" / "sft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 99}))
    with pytest.raises(ValueError, match="adapter_config.json: changed after the stage was saved"):
        logits(tmp_path / "outputs" / "sft")


def test_prompts_an_ancestor_trained_on_are_found(outputs, tmp_path):
    """The held-out conversation was trained on by the parent, not by this run."""
    root = outputs.parent
    write_jsonl(tmp_path / "new" / "a.jsonl", conversations(8, prefix="new"))
    result = run_script(
        "supervised_finetuning.py",
        *("--do_train", "--do_eval", "--max_steps", "1", "--train_file_dir", tmp_path / "new"),
        *(
            "--validation_file_dir",
            root / "chats",
            "--model_name_or_path",
            outputs / "sft",
            "--output_dir",
            tmp_path / "sft",
        ),
        check=False,
    )
    assert result.returncode == 2 and "of them by an earlier stage" in result.stderr


def dpo_flags(outputs, output_dir, *parent):
    write_jsonl(outputs.parent / "pairs" / "a.jsonl", preferences(12, prefix="pair"))
    flags = ("--train_file_dir", outputs.parent / "pairs", "--data_cache_dir", outputs.parent / "cache")
    return (*flags, "--max_steps", "2", "--learning_rate", "1e-2", "--output_dir", output_dir, *parent)


@pytest.fixture(scope="module")
def dpo(outputs):
    """outputs/sft -> outputs/dpo, by the stage directory alone."""
    train(dpo_training, *dpo_flags(outputs, outputs / "dpo", "--model_name_or_path", outputs / "sft"))
    return outputs / "dpo"


def test_preferences_continue_the_adapter_of_fine_tuning_without_a_merge(outputs, dpo):
    stage, parent = stage_of(dpo), stage_of(outputs / "sft")
    assert stage["parent"] == {"path": "../sft", "stage": "sft", "fingerprint": stage_fingerprint(parent)}
    assert stage["base_model"] == parent["base_model"] == stage_of(outputs / "pt")["base_model"]
    assert "merged" not in stage["base_model"] and stage["tuning"]["continued"] is True
    assert stage["template"] == parent["template"]
    assert (logits(dpo) - logits(outputs / "sft")).abs().max() > 1e-3


def test_preferences_are_held_to_the_fine_tuned_model(outputs, dpo):
    before = stage_of(dpo)["metrics"]["before"]
    assert before["rewards/margins"] == 0 and before["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert stage_of(dpo)["checks"]["reference_is_parent"]["passed"]


def test_base_and_adapter_apart_lead_to_the_same_preferences(outputs, dpo, tmp_path):
    parent = ("--model_name_or_path", outputs / "base", "--peft_path", outputs / "sft")
    train(dpo_training, *dpo_flags(outputs, tmp_path / "dpo", *parent))
    assert torch.equal(logits(tmp_path / "dpo"), logits(dpo))
    apart, whole = stage_of(tmp_path / "dpo"), stage_of(dpo)
    assert apart["parent"]["fingerprint"] == whole["parent"]["fingerprint"]
    assert apart["base_model"]["fingerprint"] == whole["base_model"]["fingerprint"]
    assert apart["metrics"] == whole["metrics"]


def test_preferences_remember_the_prompts_of_all_their_ancestors(outputs, dpo):
    pt, sft, seen = (np.load(outputs / name / SEEN_PROMPTS) for name in ("pt", "sft", "dpo"))
    own = stage_of(dpo)["data"]["train"]["used"]
    assert set(pt) < set(sft) < set(seen) and len(seen) == len(sft) + own


@pytest.mark.parametrize("by_directory", [True, False], ids=["model_name_or_path", "peft_path"])
def test_held_out_preferences_that_an_ancestor_trained_on_are_found(outputs, tmp_path, capsys, by_directory):
    """Fine-tuning held one of its twelve questions out, so it trained on eleven; nobody did on the other four."""
    asked = [row["conversations"][0]["value"] for row in conversations(12)]
    rows = [{"prompt": prompt, "chosen": "Rest.", "rejected": "No idea."} for prompt in asked]
    write_jsonl(tmp_path / "held_out.jsonl", [*preferences(4, prefix="held out"), *rows])
    parent = ("--model_name_or_path", outputs / "sft")
    if not by_directory:
        parent = ("--model_name_or_path", outputs / "base", "--peft_path", outputs / "sft")
    flags = dpo_flags(outputs, tmp_path / "dpo", *parent, "--validation_file_dir", tmp_path / "held_out.jsonl")
    error = refused(dpo_training, capsys, *flags)
    assert "check leakage failed: 11 of 16 held-out prompts seen in training, 11 of them by an earlier stage" in error
    assert f"{tmp_path / 'held_out.jsonl'}:8" in error
