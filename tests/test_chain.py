"""The way through the stages: base -> PT -> SFT, by directory alone, moved, and on the wrong base."""

import json
import shutil

import pytest
import torch
from conftest import build_model, conversations, run_script, stage_of, write_jsonl

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
