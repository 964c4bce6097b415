"""Pretraining as a user runs it, the starter model, and a command line of earlier years."""

import json
import math
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, log_of, run_script, stage_of, write_jsonl
from transformers import AutoTokenizer

from stagekit.arguments import free_port

# The command that users of this layout bring along, word for word but for the model and the data.
OLD_COMMAND = """pretraining.py --model_type bloom --model_name_or_path {model} --train_file_dir
{data} --validation_file_dir {data} --per_device_train_batch_size 4 --per_device_eval_batch_size 4
--do_train --do_eval --use_peft True --seed 42 --max_train_samples 10000 --max_eval_samples 10 --num_train_epochs 0.5
--learning_rate 2e-4 --warmup_ratio 0.05 --weight_decay 0.01 --logging_strategy steps --logging_steps 10
--eval_steps 50 --evaluation_strategy steps --save_steps 500 --save_strategy steps --save_total_limit 3
--gradient_accumulation_steps 1
--preprocessing_num_workers 1 --block_size 1024 --output_dir outputs-pt-v1 --overwrite_output_dir --ddp_timeout 30000
--logging_first_step True --target_modules all --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --torch_dtype float32
--device_map auto --report_to tensorboard --ddp_find_unused_parameters False --gradient_checkpointing True"""


def documents(count):
    return [
        {"text": f"Document {n}: 发烧是体温升高。What is a fever? " + "Drink water and rest. " * (n % 7)}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with .jsonl, gzipped .json and .txt documents."""
    import gzip

    root = tmp_path_factory.mktemp("texts")
    write_jsonl(root / "a.jsonl", documents(30))
    (root / "sub").mkdir()
    (root / "sub" / "b.json.gz").write_bytes(gzip.compress(json.dumps(documents(50)[30:]).encode()))
    (root / "c.txt").write_text("First paragraph,\nsecond line.\n\nAnother document. 多喝水。\n", encoding="utf-8")
    return root


def pretrain(model, texts, output_dir, *flags, **kwargs):
    return run_script(
        "pretraining.py",
        *(
            "--model_name_or_path",
            model,
            "--train_file_dir",
            texts,
            "--output_dir",
            output_dir,
            "--do_train",
            "--do_eval",
        ),
        *("--block_size", "64", "--logging_steps", "1", "--learning_rate", "1e-3", "--report_to", "none"),
        *("--data_cache_dir", output_dir.parent / "cache", *flags),
        **kwargs,
    )


def test_every_token_of_every_document_is_used(tiny_qwen3, texts, tmp_path):
    pretrain(tiny_qwen3, texts, tmp_path / "pt", "--max_steps", "3", "--validation_split_percentage", "10")
    data = stage_of(tmp_path / "pt")["data"]
    assert data["train"]["read"] + data["validation"]["read"] == 52 and data["train"]["dropped"] == {}
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    whole = [row["text"] for row in documents(50)] + ["First paragraph,\nsecond line.", "Another document. 多喝水。"]
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in whole)  # each with its EOS
    assert data["train"]["tokens"]["used"] + data["validation"]["tokens"]["used"] == tokens


def test_perplexity_is_reported_before_and_after_on_held_out_documents(tiny_qwen3, texts, tmp_path):
    pretrain(tiny_qwen3, texts, tmp_path / "pt", "--max_steps", "8", "--use_peft", "False")
    metrics = stage_of(tmp_path / "pt")["metrics"]
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]
    assert metrics["after"]["perplexity"] == pytest.approx(math.exp(metrics["after"]["loss"]))


def test_padded_rows_give_the_same_loss_as_packed_ones(tiny_qwen3, texts, tmp_path):
    common = ("--max_steps", "1", "--per_device_train_batch_size", "200", "--lora_dropout", "0")
    for name, packing in (("packed", "True"), ("padded", "False")):
        pretrain(tiny_qwen3, texts, tmp_path / name, *common, "--packing", packing)
    assert log_of(tmp_path / "packed") == pytest.approx(log_of(tmp_path / "padded"), rel=1e-5)


def test_two_processes_pretrain_as_one(tiny_llama, texts, tmp_path):
    common = ("--max_steps", "3", "--lora_dropout", "0", "--modules_to_save", "embed_tokens,lm_head")
    pretrain(tiny_llama, texts, tmp_path / "one", *common, "--per_device_train_batch_size", "4")
    pretrain(tiny_llama, texts, tmp_path / "two", *common, "--per_device_train_batch_size", "2", processes=2)
    assert log_of(tmp_path / "two") == pytest.approx(log_of(tmp_path / "one"), rel=1e-5)
    assert stage_of(tmp_path / "one")["tuning"]["modules_to_save"] == ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_a_command_of_earlier_years_runs(request, texts, tmp_path, architecture):
    model = request.getfixturevalue(f"tiny_{architecture}")
    flags = shlex.split(OLD_COMMAND.format(model=model, data=texts))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "1",
        "--nproc_per_node",
        "1",
        "--master_port",
        str(free_port()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        [*command, str(ROOT / flags[0]), *flags[1:]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for flag in ("evaluation_strategy", "warmup_ratio", "overwrite_output_dir", "model_type", "device_map"):
        assert result.stderr.count(f"note: --{flag} ") == 1
    assert "are held out instead" in result.stderr
    stage = stage_of(tmp_path / "outputs-pt-v1")
    assert stage["data"]["validation"]["used"] >= 1 and all(check["passed"] for check in stage["checks"].values())


def test_the_starter_model_is_built_and_is_the_first_link(tmp_path):
    """A small one from the shipped data: the builder's course is the same."""
    for name in ("one", "two"):
        subprocess.run(
            [
                *(sys.executable, "-m", "tools.build_starter_model", "--output_dir", tmp_path / name),
                *("--vocab_size", "600", "--hidden_size", "96", "--num_layers", "1", "--max_steps", "2"),
                *("--per_device_train_batch_size", "2", "--max_train_samples", "20", "--max_eval_samples", "2"),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
    stage = stage_of(tmp_path / "one")
    assert stage["stage"] == "pt" and stage["parent"] is None and stage["base_model"]["name_or_path"] == "."
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and "generation" in tokenizer.chat_template
    assert tokenizer.decode(tokenizer.encode("感冒了 what 37.5℃ 怎么办？")) == "感冒了 what 37.5℃ 怎么办？"
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1], "two builds differ"
