"""The GRPO stage: what it learns, what it proves, its reference, resume in mid-round, several processes."""

import json
import math
import shutil
import sys

import pytest
import torch
from conftest import build_tokenizer, kill_at, log_of, run_script, stage_of, write_jsonl
from safetensors.torch import load_file

SUMS = [(a, b) for a in range(5) for b in range(5)]


@pytest.fixture(scope="module")
def chain(tiny_qwen3, tmp_path_factory):
    """A policy that has half learnt to add, and questions."""
    root = tmp_path_factory.mktemp("grpo")
    talks = [
        {"conversations": [{"from": "human", "value": f"{a}+{b}=?"}, {"from": "gpt", "value": str(a + b)}]}
        for a, b in SUMS * 8
    ]
    write_jsonl(root / "talks.jsonl", talks)
    questions = [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a, b in SUMS]
    write_jsonl(root / "questions.jsonl", questions * 4)
    write_jsonl(root / "held_out.jsonl", questions)
    flags = (
        "--train_file_dir",
        root / "talks.jsonl",
        "--output_dir",
        root / "sft",
        "--do_train",
        "--lora_dropout",
        "0",
    )
    more = ("--modules_to_save", "embed_tokens", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant")
    most = ("--num_train_epochs", "25", "--per_device_train_batch_size", "25", "--report_to", "none")
    run_script("supervised_finetuning.py", "--model_name_or_path", tiny_qwen3, *flags, *more, *most)
    return root


def settings(chain, model=None):
    """The flags of a short run: two prompts a round, four answers each."""
    return (
        *("--model_name_or_path", model or chain / "sft", "--train_file_dir", chain / "questions.jsonl"),
        *("--validation_file_dir", chain / "held_out.jsonl", "--do_train", "--max_completion_length", "4"),
        *(
            "--per_device_train_batch_size",
            "8",
            "--num_generations",
            "4",
            "--logging_steps",
            "1",
            "--report_to",
            "none",
        ),
        *("--learning_rate", "2e-3", "--lr_scheduler_type", "constant", "--max_leaked_percentage", "100"),
    )


def grpo(chain, output_dir, *flags, model=None, **how):
    """Run the stage."""
    return run_script("grpo_training.py", *settings(chain, model), "--output_dir", output_dir, *flags, **how)


def test_accuracy_rises_on_sums(chain, tmp_path):
    """From about one answer in three; compared are the first and the last 1,280 sampled answers."""
    flags = ("--do_eval", "--max_steps", "120", "--per_device_train_batch_size", "64", "--num_generations", "8")
    grpo(chain, tmp_path / "grpo", *flags, "--logging_steps", "20", "--eval_generation_samples", "25")
    rewards = log_of(tmp_path / "grpo", "reward")
    first, last = rewards[0], rewards[-1]
    error = math.sqrt((first * (1 - first) + last * (1 - last)) / 1280)
    assert 0.2 < first < 0.5 and last - first > 10 * error
    metrics = stage_of(tmp_path / "grpo")["metrics"]
    assert metrics["before"]["prompts"] == 25 and metrics["before"]["reward/accuracy"] == metrics["before"]["score"]
    assert metrics["after"]["score"] > metrics["before"]["score"]
    for measured in metrics.values():  # the same questions, asked by the two ways that there are
        assert measured["answer_accuracy"] == pytest.approx(measured["reward/accuracy"])
        assert measured["answer_tokens"] == pytest.approx(measured["length"])


def test_a_run_proves_itself_and_leaves_a_policy_that_goes_on(chain, tmp_path):
    flags = (
        "--beta",
        "0.1",
        "--reward_functions",
        "accuracy,length",
        "--reward_weights",
        "1,-0.5",
        "--max_steps",
        "3",
    )
    grpo(chain, tmp_path / "grpo", *flags, "--do_eval")
    stage = stage_of(tmp_path / "grpo")
    wanted = {"sampler_is_policy", "reference_is_parent", "no_forged_turns", "gradients_flow", "saved_is_loaded"}
    assert wanted <= set(stage["checks"]) and all(check["passed"] for check in stage["checks"].values())
    assert "28 tensors" not in stage["checks"]["reference_is_parent"]["value"]  # the embedding is compared, too
    assert stage["parent"]["stage"] == "sft" and stage["metrics"]["before"]["kl"] == pytest.approx(0, abs=1e-6)
    assert stage["metrics"]["after"]["kl"] > 1e-6
    before = stage["metrics"]["before"]
    assert before["score"] == pytest.approx(before["reward/accuracy"] - 0.5 * before["reward/length"])
    assert not (tmp_path / "grpo" / "ref").exists() and not (tmp_path / "grpo" / "checkpoint-3" / "ref").exists()
    samples = [json.loads(line) for line in (tmp_path / "grpo/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 and {sample["prompt"] for sample in samples} <= {f"{a}+{b}=?" for a, b in SUMS}
    flags = ("--lora_model", tmp_path / "grpo", "--data_file", chain / "held_out.jsonl")
    run_script("inference.py", *flags, "--output_file", tmp_path / "out", "--max_new_tokens", "4")
    assert len((tmp_path / "out").read_text().splitlines()) == 25


def test_a_run_killed_in_mid_round_goes_on_exactly(chain, tmp_path):
    """A round serves two passes of two steps: the checkpoint after step 3 lies inside of it."""
    flags = ("--num_iterations", "2", "--steps_per_generation", "2", "--max_steps", "7", "--beta", "0.1")
    flags = (*flags, "--save_strategy", "steps", "--save_steps", "3")
    grpo(chain, tmp_path / "whole", *flags)
    kill_at(tmp_path / "again" / "checkpoint-3", "grpo_training.py", *settings(chain), *flags)
    grpo(chain, tmp_path / "again", *flags, "--resume_from_checkpoint", "True")
    for key in ("loss", "grad_norm", "entropy", "kl"):
        assert log_of(tmp_path / "again", key) == log_of(tmp_path / "whole", key), key
    assert len(set(log_of(tmp_path / "whole"))) == 7
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


SMALL = """
def small(prompts, completions, answers):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]
"""
# Each answer follows from its prompt and its place in the group, whichever process writes it.
QUANTILES = """
import torch
torch.multinomial = lambda probs, num_samples, **_: torch.stack([
    (row.cumsum(-1) < 0.1 + 0.2 * (index % 4)).sum(-1, keepdim=True).clamp(max=len(row) - 1)
    for index, row in enumerate(probs)
])
"""


@pytest.mark.parametrize(
    "deepspeed", [None, "scripts/zero2.json", "scripts/zero3.json"], ids=["ddp", "zero2", "zero3"]
)
def test_two_processes_train_what_one_trains(chain, tiny_qwen3, tmp_path, deepspeed):
    (tmp_path / "toy.py").write_text(QUANTILES + SMALL)
    flags = ("--reward_functions", f"{tmp_path / 'toy.py'}:small", "--max_steps", "3", "--target_modules", "all")
    flags = (*flags, "--beta", "0.1", "--lora_dropout", "0")
    one, two = tmp_path / "one", tmp_path / "two"
    grpo(chain, one, *flags, "--per_device_train_batch_size", "16", model=tiny_qwen3)
    more = ("--deepspeed", deepspeed) if deepspeed else ()
    grpo(chain, two, *flags, *more, "--per_device_train_batch_size", "8", model=tiny_qwen3, processes=2)
    assert all(check["passed"] for check in stage_of(two)["checks"].values())
    assert len(set(log_of(one, "reward"))) > 1
    for key in ("reward", "completions/mean_length", "entropy", "kl", "grad_norm"):
        assert log_of(two, key) == pytest.approx(log_of(one, key), rel=1e-3, abs=1e-5), key
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-4


def test_all_weights_are_trained_beside_a_reference_of_its_own(chain, tiny_qwen3, tmp_path):
    (tmp_path / "toy.py").write_text(SMALL)
    flags = ("--use_peft", "False", "--beta", "0.1", "--max_steps", "2", "--do_eval")
    grpo(chain, tmp_path / "grpo", *flags, "--reward_functions", f"{tmp_path / 'toy.py'}:small", model=tiny_qwen3)
    stage = stage_of(tmp_path / "grpo")
    assert stage["tuning"] == {"method": "full"} and stage["checks"]["reference_is_parent"]["passed"]
    assert stage["metrics"]["before"]["kl"] == pytest.approx(0, abs=1e-6) and stage["metrics"]["after"]["kl"] > 1e-6


# -- numbers and faults, in this process -----------------------------------------------------------------------------


def in_process(chain, output_dir, monkeypatch, *flags, model=None):
    """Run main() here, where parts of it can be looked at or replaced."""
    import grpo_training

    arguments = [*settings(chain, model), "--output_dir", output_dir, *flags, "--disable_tqdm", "True"]
    monkeypatch.setattr(sys, "argv", ["grpo_training.py", *map(str, arguments)])
    grpo_training.main()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_the_loss_is_the_formula_of_its_paper(chain, tmp_path, monkeypatch, loss_type):
    """Eq. 3 of arXiv:2402.03300 (grpo), Eq. 8 of arXiv:2503.14476 (dapo), arXiv:2503.20783 (dr_grpo), by hand.

    The KL is k3 times the ratio (arXiv:2512.02556).
    """
    import grpo_training

    seen = []
    compute = grpo_training.GroupTrainer._compute_loss

    def spy(self, model, inputs):
        loss = compute(self, model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        width = inputs["completion_ids"].shape[1]
        chosen = logits[:, -width - 1 : -1].log_softmax(-1).gather(-1, ids[:, -width:].unsqueeze(-1)).squeeze(-1)
        seen.append((loss.item(), chosen.double(), inputs))
        return loss

    monkeypatch.setattr(grpo_training.GroupTrainer, "_compute_loss", spy)
    flags = ("--loss_type", loss_type, "--beta", "0.3", "--num_iterations", "2", "--max_steps", "4")
    in_process(chain, tmp_path / "grpo", monkeypatch, *flags, "--learning_rate", "1e-2", "--scale_rewards", "none")
    moved = 0
    for loss, logps, inputs in seen:
        rows = []
        for row, length in enumerate(inputs["completion_mask"].sum(dim=1).tolist()):
            advantage, tokens = inputs["advantages"][row].item(), []
            for t in range(length):
                ratio = math.exp(logps[row, t] - inputs["old_per_token_logps"][row, t])
                moved += abs(ratio - 1) > 0.01
                clipped = min(max(ratio, 0.8), 1.2)
                log_ratio = float(inputs["ref_per_token_logps"][row, t] - logps[row, t])
                kl = math.exp(log_ratio) - log_ratio - 1
                tokens.append(-min(ratio * advantage, clipped * advantage) + 0.3 * kl * ratio)
            rows.append(tokens)
        flat = [value for tokens in rows for value in tokens]
        wanted = {
            "grpo": sum(sum(tokens) / len(tokens) for tokens in rows) / len(rows),
            "dapo": sum(flat) / len(flat),
            "bnpo": sum(flat) / len(flat),
            "dr_grpo": sum(flat) / (len(rows) * 4),  # --max_completion_length
        }[loss_type]
        assert loss == pytest.approx(wanted, abs=1e-5)
    assert len(seen) == 4 and moved > 4


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "luspo", "vespo"])
def test_the_other_losses_of_trl_run(chain, tmp_path, monkeypatch, loss_type):
    in_process(chain, tmp_path / "grpo", monkeypatch, "--loss_type", loss_type, "--max_steps", "2")
    assert all(map(math.isfinite, log_of(tmp_path / "grpo")))


def test_a_reference_that_is_not_the_parent_stops_the_run(chain, tmp_path, monkeypatch, capfd):
    import grpo_training

    monkeypatch.setattr(grpo_training, "copy_adapter", lambda *args: None)
    with pytest.raises(SystemExit) as stop:
        in_process(chain, tmp_path / "grpo", monkeypatch, "--beta", "0.1", "--max_steps", "1")
    assert stop.value.code == 2
    assert "reference_is_parent failed" in capfd.readouterr().err


def test_a_sampler_with_other_weights_stops_the_run(chain, tmp_path, monkeypatch, capfd):
    """The adapter is switched off while answers are sampled, as in the incidents with stale weights in vLLM."""
    import contextlib

    import grpo_training

    whole = grpo_training.GroupTrainer.policy_to_sample

    @contextlib.contextmanager
    def base_only(self):
        with whole(self) as model, model.disable_adapter():
            yield model

    monkeypatch.setattr(grpo_training.GroupTrainer, "policy_to_sample", base_only)
    with pytest.raises(SystemExit) as stop:
        in_process(chain, tmp_path / "grpo", monkeypatch, "--max_steps", "1")
    assert stop.value.code == 2
    assert "sampler_is_policy failed" in capfd.readouterr().err


@pytest.mark.parametrize("counted", [True, False])
def test_learnt_positions_begin_at_the_first_token_of_a_padded_prompt(tmp_path, monkeypatch, capfd, counted):
    """TRL's forward pass counts padding, generate() does not: without this project's positions the check fails."""
    from transformers import GPT2Config, GPT2LMHeadModel

    import grpo_training

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes))
    model.transformer.wpe.weight.data.mul_(50)
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    words = [{"question": "why? " * (1 + number), "answer": "yes"} for number in range(8)]
    write_jsonl(tmp_path / "questions.jsonl", words)
    write_jsonl(tmp_path / "held_out.jsonl", words[:1])
    if not counted:
        monkeypatch.setattr(grpo_training, "takes_position_ids", lambda config: False)
    flags = ("--max_steps", "1", "--reward_functions", "length", "--target_modules", "c_attn")
    flags = (*flags, "--max_prompt_length", "64")
    if counted:
        in_process(tmp_path, tmp_path / "grpo", monkeypatch, *flags, model=tmp_path / "gpt2")
        return
    with pytest.raises(SystemExit):
        in_process(tmp_path, tmp_path / "grpo", monkeypatch, *flags, model=tmp_path / "gpt2")
    assert "sampler_is_policy failed" in capfd.readouterr().err


# -- vLLM ------------------------------------------------------------------------------------------------------------


class Engine:
    """Stands in for trl's VLLMGeneration, which needs a GPU: weights of its own, as stale as it is told."""

    def __init__(self, model, stale, **settings):
        self.model, self.stale, self.settings, self.synced, self.weights = model, stale, settings, 0, None

    def sync_weights(self):
        self.synced += 1
        if self.weights is None or not self.stale:
            self.weights = {name: value.detach().clone() for name, value in self.model.named_parameters()}

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler=None):
        newest = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self._put(self.weights)
        answers = [self._answer(torch.tensor([prompt]), seed) for seed, prompt in enumerate(prompts)]
        self._put(newest)
        return None, [tokens for tokens, _ in answers], [logps for _, logps in answers], None

    def _put(self, weights):
        for name, value in self.model.named_parameters():
            value.data.copy_(weights[name])

    def _answer(self, prompt, seed):
        torch.manual_seed(seed)
        out = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.settings["max_completion_length"],
            do_sample=True,
            top_k=0,
            eos_token_id=self.settings["generation_kwargs"]["stop_token_ids"],
            pad_token_id=3,
        )
        answer = out[:, prompt.shape[1] :]
        logits = self.model(input_ids=out, use_cache=False).logits[:, prompt.shape[1] - 1 : -1]
        logps = logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1))
        return answer[0].tolist(), logps[0].tolist()


def with_engine(monkeypatch, stale):
    """Put the stand-in where both stages look for vLLM."""
    import importlib.util

    import trl.generation.vllm_generation
    import trl.trainer.grpo_trainer

    engines, find = [], importlib.util.find_spec

    def build(model, **settings):
        engines.append(Engine(model, stale, **settings))
        return engines[-1]

    monkeypatch.setattr(trl.generation.vllm_generation, "VLLMGeneration", build)
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", build, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "vllm" or find(name, *rest))
    return engines


def run_stage_with_vllm(stage, chain, output_dir, monkeypatch):
    toy = output_dir.with_suffix(".py")
    toy.write_text(SMALL)
    flags = ["--use_vllm", "True", "--max_steps", "3", "--learning_rate", "3e-2", "--output_dir", output_dir]
    flags += ["--reward_functions", f"{toy}:small"]
    if stage == "grpo":
        return in_process(chain, output_dir, monkeypatch, *flags)
    import ppo_training

    arguments = ["--model_name_or_path", chain / "sft", "--train_file_dir", chain / "questions.jsonl", "--do_train"]
    arguments += ["--per_device_train_batch_size", "4", "--report_to", "none"]
    arguments += ["--max_completion_length", "4", "--num_ppo_epochs", "1", "--max_leaked_percentage", "100", *flags]
    monkeypatch.setattr(sys, "argv", ["ppo_training.py", *map(str, arguments)])
    ppo_training.main()


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_answers_of_vllm_are_trained_on_as_long_as_its_weights_follow(chain, tmp_path, monkeypatch, stage):
    engines = with_engine(monkeypatch, stale=False)
    run_stage_with_vllm(stage, chain, tmp_path / stage, monkeypatch)
    assert [engine.synced for engine in engines] == [3]
    assert stage_of(tmp_path / stage)["checks"]["rollout_is_policy"]["passed"]


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_a_copy_in_vllm_that_stays_behind_stops_the_run(chain, tmp_path, monkeypatch, capfd, stage):
    with_engine(monkeypatch, stale=True)
    with pytest.raises(SystemExit) as stop:
        run_stage_with_vllm(stage, chain, tmp_path / stage, monkeypatch)
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert "rollout_is_policy failed" in error and "its weights are not the policy's" in error


def test_without_vllm_its_flag_is_refused(chain, tmp_path):
    assert "pip install 'trl[vllm]'" in refusal(chain, tmp_path, "--use_vllm", "True")


# -- refusals and warnings -------------------------------------------------------------------------------------------


def refusal(chain, tmp_path, *flags):
    result = grpo(chain, tmp_path / "grpo", *flags, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert not (tmp_path / "grpo" / "stage.json").exists()
    return next(line for line in result.stderr.splitlines() if "error: " in line)


def test_groups_that_do_not_fit_are_refused(chain, tmp_path):
    line = refusal(chain, tmp_path, "--num_generations", "3")
    assert "8 answers a round" in line and "torn apart" in line
    few = write_jsonl(tmp_path / "few.jsonl", [{"question": "1+1=?", "answer": "2"}])
    line = refusal(chain, tmp_path, "--train_file_dir", few)
    assert "1 prompts are fewer than one round takes (2)" in line


def test_what_teaches_nothing_is_said_and_does_not_stop_the_run(chain, tmp_path):
    (tmp_path / "toy.py").write_text(
        "def one(prompts, completions, answers):\n    return [0.2 for _ in completions]\n"
    )
    flags = ("--reward_functions", f"{tmp_path / 'toy.py'}:one", "--max_steps", "2", "--max_completion_length", "1")
    error = grpo(chain, tmp_path / "grpo", *flags).stderr
    assert error.count("warning: step 0: 100 % of the prompts have answers of one score") == 1
    assert "warning: step 0: 100 % of the answers were cut" in error
    assert "gradients_flow" not in stage_of(tmp_path / "grpo")["checks"]
    shutil.rmtree(tmp_path / "grpo")


def test_unread_answers_are_counted(chain, tmp_path):
    (tmp_path / "base.jsonl").write_text(json.dumps({"question": "Yes or no?", "answer": "yes"}) + "\n")
    flags = ("--max_steps", "1", "--validation_file_dir", tmp_path / "base.jsonl", "--do_eval")
    grpo(chain, tmp_path / "grpo", *flags, "--train_file_dir", chain / "questions.jsonl")
    assert stage_of(tmp_path / "grpo")["metrics"]["before"]["unread/accuracy"] == 1.0
    assert log_of(tmp_path / "grpo", "unread/accuracy")[0] < 0.5
