"""Fine-tuning as a user runs it: one process and two, DeepSpeed, interrupted and resumed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, conversations, kill_at, log_of, run_script, stage_of, write_jsonl
from safetensors.torch import load_file

COMMON = ("--do_train", "--do_eval", "--max_length", "128", "--learning_rate", "1e-3", "--logging_steps", "1")
ASKED = ("--eval_generation_samples", "6", "--eval_max_new_tokens", "8")  # all held-out questions


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training and held-out conversations, and one cache for all runs of this file."""
    root = tmp_path_factory.mktemp("data")
    write_jsonl(root / "train" / "a.jsonl", conversations(40, turns=2))
    write_jsonl(root / "held_out.jsonl", conversations(6, prefix="held out"))
    return root


def finetune(data, model, output_dir, *flags, **kwargs):
    return run_script(
        "supervised_finetuning.py",
        *("--model_name_or_path", model, "--train_file_dir", data / "train"),
        *("--validation_file_dir", data / "held_out.jsonl", "--output_dir", output_dir),
        *("--data_cache_dir", data / "cache", *COMMON, *flags),
        **kwargs,
    )


@pytest.fixture(scope="module")
def one_process(data, tiny_qwen3, tmp_path_factory):
    """The run the others are compared with: a global batch of four rows, without dropout."""
    output_dir = tmp_path_factory.mktemp("one") / "sft"
    flags = ("--lora_dropout", "0", "--max_steps", "4", *ASKED)
    finetune(
        data, tiny_qwen3, output_dir, *flags, "--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"
    )
    return output_dir


def test_a_finished_stage_is_self_sufficient(one_process, tiny_qwen3):
    names = {path.name for path in one_process.iterdir()}
    assert names >= {
        *("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "stage.json"),
        *("generation_config.json", "curves.png", "runs", "train_results.json", "eval_results.json"),
        *("trainer_state.json", "seen_prompts.npy"),
    }
    stage = stage_of(one_process)
    assert stage["stage"] == "sft" and stage["parent"] is None
    assert stage["base_model"]["fingerprint"].startswith("sha256:")
    assert all(check["passed"] for check in stage["checks"].values())
    assert set(stage["checks"]) == {
        *("leakage", "loss_mask", "template_parity", "no_forged_turns", "memory", "packing_is_exact"),
        *("processes_share_gradients", "gradients_flow", "finite", "saved_is_loaded"),
    }
    ledger = stage["data"]["train"]
    assert ledger["read"] == ledger["used"] == 40 and ledger["turns"] == {"trained": 80}
    assert json.loads((one_process / "generation_config.json").read_text())["eos_token_id"] == [
        2,
        0,
    ]  # <|im_end|> first


def test_held_out_loss_falls_and_is_the_mean_over_all_tokens(one_process, data, tiny_qwen3):
    metrics = stage_of(one_process)["metrics"]
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    # By hand, in float64, one unpacked conversation at a time, with the model as it was before training.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_qwen3).double(),
        AutoTokenizer.from_pretrained(tiny_qwen3),
    )
    total = count = 0
    for line in (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines():
        question, answer = (turn["value"] for turn in json.loads(line)["conversations"])
        prompt = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        ids = prompt + tokenizer.encode(f"{answer}<|im_end|>")
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logprobs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        count += len(ids) - len(prompt)
    assert metrics["before"]["tokens"] == count
    assert metrics["before"]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "deepspeed", [None, "scripts/zero2.json", "scripts/zero3.json"], ids=["torchrun", "zero2", "zero3"]
)
def test_two_processes_train_as_one_with_twice_the_accumulation(one_process, data, tiny_qwen3, tmp_path, deepspeed):
    flags = ["--lora_dropout", "0", "--max_steps", "4", "--per_device_train_batch_size", "2", *ASKED]
    flags += ["--deepspeed", ROOT / deepspeed] if deepspeed else []
    finetune(data, tiny_qwen3, tmp_path / "sft", *flags, processes=2)
    assert log_of(tmp_path / "sft") == pytest.approx(log_of(one_process), rel=1e-5)
    assert log_of(tmp_path / "sft", "grad_norm") == pytest.approx(log_of(one_process, "grad_norm"), rel=1e-3)
    for name in ("eval_bleu4", "eval_rouge_l", "eval_stop_rate", "eval_answer_tokens"):
        assert log_of(tmp_path / "sft", name) == pytest.approx(log_of(one_process, name))
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "sft", one_process))
    assert set(ours) == set(theirs) and all(tensor.numel() for tensor in ours.values())
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 2e-5
    expected = "DEEPSPEED" if deepspeed else "MULTI_CPU"
    assert stage_of(tmp_path / "sft")["checks"]["processes_share_gradients"]["value"] == f"2 process(es), {expected}"


def test_the_split_of_a_batch_does_not_matter(one_process, data, tiny_qwen3, tmp_path):
    flags = ("--lora_dropout", "0", "--max_steps", "4", "--per_device_train_batch_size", "4")
    finetune(data, tiny_qwen3, tmp_path / "sft", *flags)
    assert log_of(tmp_path / "sft") == pytest.approx(log_of(one_process), rel=1e-5)


def test_without_packing_the_same_tokens_are_learnt(data, tiny_qwen3, tmp_path):
    flags = ("--packing", "False", "--max_steps", "1", "--per_device_train_batch_size", "40", "--lora_dropout", "0")
    finetune(data, tiny_qwen3, tmp_path / "padded", *flags)
    flags = ("--packing", "True", "--max_steps", "1", "--per_device_train_batch_size", "40", "--lora_dropout", "0")
    finetune(data, tiny_qwen3, tmp_path / "packed", *flags)
    assert log_of(tmp_path / "padded") == pytest.approx(log_of(tmp_path / "packed"), rel=1e-5)


def test_a_run_killed_in_the_middle_continues_with_the_same_losses(data, tiny_qwen3, tmp_path):
    """Dropout and a decaying learning rate on: the state of everything must come back, not only the weights."""
    flags = ("--max_steps", "9", "--per_device_train_batch_size", "2", "--save_strategy", "steps", "--save_steps", "3")
    finetune(data, tiny_qwen3, tmp_path / "whole", *flags)
    fixed = (
        "--model_name_or_path",
        tiny_qwen3,
        "--train_file_dir",
        data / "train",
        "--data_cache_dir",
        data / "cache",
    )
    fixed = (*fixed, "--validation_file_dir", data / "held_out.jsonl", *COMMON)
    kill_at(tmp_path / "killed" / "checkpoint-6", "supervised_finetuning.py", *fixed, *flags)
    refused = finetune(data, tiny_qwen3, tmp_path / "killed", *flags, check=False)
    assert refused.returncode == 2 and "--resume_from_checkpoint True" in refused.stderr
    # A later checkpoint that was cut off while it was written must not be taken.
    shutil.copytree(tmp_path / "killed" / "checkpoint-6", tmp_path / "killed" / "checkpoint-7")
    broken = tmp_path / "killed" / "checkpoint-7" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:100])
    resumed = finetune(data, tiny_qwen3, tmp_path / "killed", *flags, "--resume_from_checkpoint", "True")
    assert "checkpoint-7 is ignored" in resumed.stderr and "resumes from" in resumed.stderr
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert stage_of(tmp_path / "killed")["metrics"] == stage_of(tmp_path / "whole")["metrics"]


def test_a_finished_run_is_moved_aside_and_kept(one_process, data, tiny_qwen3, tmp_path):
    shutil.copytree(one_process, tmp_path / "sft")
    before = (tmp_path / "sft" / "adapter_model.safetensors").read_bytes()
    result = finetune(data, tiny_qwen3, tmp_path / "sft", "--max_steps", "1", "--learning_rate", "1e-2")
    assert f"it is kept as {tmp_path / 'sft.1'}" in result.stderr
    assert (tmp_path / "sft.1" / "adapter_model.safetensors").read_bytes() == before
    assert (tmp_path / "sft" / "adapter_model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    "flags",
    [
        ("--use_peft", "False"),
        ("--qlora", "True"),
        ("--load_in_8bit", "True", "--use_rslora", "True"),
        ("--use_dora", "True", "--neft_alpha", "5", "--activation_checkpointing", "True"),
        ("--bf16", "True", "--init_lora_weights", "gaussian", "--lora_rank", "4", "--target_modules", "q_proj,v_proj"),
        ("--rope_scaling", "yarn", "--max_length", "4096", "--modules_to_save", "embed_tokens"),
    ],
    ids=["full", "qlora", "8bit", "dora_neftune_checkpointing", "bf16_gaussian", "yarn_embeddings"],
)
def test_every_way_of_tuning_trains_and_reloads(data, tiny_qwen3, tmp_path, flags):
    finetune(data, tiny_qwen3, tmp_path / "sft", "--max_steps", "3", *flags)
    stage = stage_of(tmp_path / "sft")
    assert all(check["passed"] for check in stage["checks"].values())
    assert stage["tuning"]["method"] == {"--use_peft": "full", "--qlora": "qlora", "--load_in_8bit": "qlora"}.get(
        flags[0], "lora"
    )


def test_preview_shows_what_is_learnt_and_trains_nothing(data, tiny_qwen3, tmp_path):
    result = finetune(data, tiny_qwen3, tmp_path / "sft", "--preview", "1")
    assert "⟦Answer 0: rest and drink water. 多休息。<|im_end|>⟧" in result.stdout
    assert "rows read" in result.stderr and not (tmp_path / "sft").exists()


def test_a_validation_row_in_training_stops_the_run(data, tiny_qwen3, tmp_path):
    rows = [json.loads(line) for line in (data / "train" / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    write_jsonl(tmp_path / "held_out.jsonl", conversations(6, prefix="held out") + rows[:1])
    flags = ("--validation_file_dir", tmp_path / "held_out.jsonl")
    result = finetune(data, tiny_qwen3, tmp_path / "sft", *flags, check=False)
    assert result.returncode == 2 and "check leakage failed: 1 of 7 held-out prompts seen in training" in result.stderr
    assert f"{tmp_path / 'held_out.jsonl'}:7" in result.stderr


def test_processes_that_do_not_share_gradients_are_stopped(data, tiny_qwen3, tmp_path):
    """Two processes started without a process group, as a wrong launcher would: each thinks it is alone."""
    result = finetune(data, tiny_qwen3, tmp_path / "sft", "--max_steps", "1", env={"SLURM": ""}, check=False)
    assert result.returncode == 0
    code = (
        "import os, types; from stagekit import checks; os.environ['WORLD_SIZE'] = '2';"
        "accelerator = types.SimpleNamespace(num_processes=1, distributed_type=types.SimpleNamespace(name='NO'));"
        "checks.processes_share_gradients(types.SimpleNamespace(accelerator=accelerator))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "2 processes were started, but the trainer sees 1" in result.stderr


def test_paths_of_the_repository_are_not_needed(one_process):
    assert not any(Path(name).is_absolute() and "stagekit" in name for name in stage_of(one_process)["files"])


def test_data_that_take_long_to_prepare_outlast_no_collective(data, tiny_qwen3, tmp_path):
    """The second process waits for the first one's files longer than any collective would."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, time\n"
        "rename = pathlib.Path.rename\n"
        "def slow(self, target):\n"
        "    time.sleep(8 if pathlib.Path(target).parent.name == 'slow_cache' else 0)\n"
        "    return rename(self, target)\n"
        "pathlib.Path.rename = slow\n"
    )
    flags = ("--data_cache_dir", tmp_path / "slow_cache", "--ddp_timeout", "5", "--max_steps", "1")
    finetune(data, tiny_qwen3, tmp_path / "sft", *flags, processes=2, env={"PYTHONPATH": str(tmp_path)})
    assert stage_of(tmp_path / "sft")["data"]["train"]["used"] == 40
