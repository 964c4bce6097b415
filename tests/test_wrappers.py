"""The wrappers for real, from a base to answers and scores; on one process, on two, and under DeepSpeed."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, conversations, stage_of, write_jsonl


@pytest.mark.parametrize(
    ("processes", "deepspeed"), [("1", ""), ("2", ""), ("2", "scripts/zero3.json")], ids=["one", "two", "two_zero3"]
)
def test_the_wrappers_walk_from_a_base_to_an_answer(tiny_qwen3, tmp_path, processes, deepspeed):
    write_jsonl(tmp_path / "texts" / "a.jsonl", [{"text": f"Document {n}. Rest and drink water."} for n in range(20)])
    write_jsonl(tmp_path / "chats" / "a.jsonl", conversations(20))
    environment = {
        **os.environ,
        **{"PYTHON": sys.executable, "BASE_MODEL": str(tiny_qwen3), "OUTPUT_ROOT": str(tmp_path / "outputs")},
        **{"NPROC": processes, "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    }
    environment.pop("OMP_NUM_THREADS", None)
    if deepspeed:
        environment["DEEPSPEED"] = deepspeed

    def run(*command):
        result = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        return result

    few = ("--max_steps", "2", "--eval_steps", "1", "--save_steps", "1")
    run("sh", ROOT / "scripts/run_pt.sh", *few, "--train_file_dir", tmp_path / "texts")
    held_out = ("--train_file_dir", tmp_path / "chats", "--validation_file_dir", ROOT / "data/eval/questions.jsonl")
    tuned = run("sh", ROOT / "scripts/run_sft.sh", *few, *held_out, "--max_eval_samples", "8")
    assert "continues the stage found there" in tuned.stderr
    stage = stage_of(tmp_path / "outputs" / "sft")
    assert stage["parent"]["path"] == "../pt" and all(check["passed"] for check in stage["checks"].values())
    assert stage["hardware"]["processes"] == int(processes)
    kind = "DEEPSPEED" if deepspeed else "MULTI_CPU" if processes == "2" else "NO"
    assert stage["checks"]["processes_share_gradients"]["value"].endswith(kind)
    assert {path.name for path in (tmp_path / "outputs" / "sft").glob("checkpoint-*")} == {
        "checkpoint-1",
        "checkpoint-2",
    }
    few = (*few, "--validation_file_dir", ROOT / "data/eval/preferences.jsonl", "--max_eval_samples", "8")
    for name in ("rm", "dpo", "orpo"):
        result = run("sh", ROOT / f"scripts/run_{name}.sh", *few, "--max_train_samples", "24")
        assert "continues the stage found there" in result.stderr
        stage = stage_of(tmp_path / "outputs" / name)
        assert stage["parent"]["path"] == "../sft" and all(check["passed"] for check in stage["checks"].values())
        assert stage["data"]["train"]["files"][0].startswith("data/reward/")
    prompts = ("--train_file_dir", tmp_path / "chats", "--validation_file_dir", ROOT / "data/eval/questions.jsonl")
    small = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1")  # 20 prompts are not many
    few = (*few[:6], *prompts, *small, "--max_eval_samples", "8", "--max_completion_length", "8")
    for name, own in (("rl", ("--allow_untrained_reward_model", "True")), ("grpo", ("--num_generations", "2"))):
        run("sh", ROOT / f"scripts/run_{name}.sh", *few, *own)
        stage = stage_of(tmp_path / "outputs" / name.replace("rl", "ppo"))
        assert stage["parent"]["path"] == "../sft" and all(check["passed"] for check in stage["checks"].values())
    flags = (
        "--lora_model",
        tmp_path / "outputs" / "sft",
        "--max_new_tokens",
        "8",
        "--output_file",
        tmp_path / "out.jsonl",
    )
    run(sys.executable, ROOT / "inference.py", *flags, "--data_file", tmp_path / "chats" / "a.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [answer["index"] for answer in answers] == list(range(20))
    assert answers[0]["reference"] == "Answer 0: rest and drink water. 多休息。"
