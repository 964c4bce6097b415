"""ORPO: its loss by hand and against TRL's, its tokens, and the script as a user runs it."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, conversations, log_of, run_script, stage_of, write_jsonl
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from test_dpo_training import COMMON, batch_of, disturb, load_by_hand, preferences, refused, token_logps, train
from transformers import AutoTokenizer

import orpo_training
import supervised_finetuning
from orpo_training import log_odds, odds_ratio_loss


def ranking(number):
    """Three answers, best first: three pairs that weigh a third each."""
    answers = [f"Rest and drink water, {number} times.", f"Drink {number} glasses.", "No idea."]
    return {"question": f"ranking {number}: what is a fever?", "answers": answers}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations, training and held-out pairs, and one cache for all runs of this file."""
    root = tmp_path_factory.mktemp("data")
    write_jsonl(root / "chats.jsonl", conversations(16, prefix="chat"))
    write_jsonl(root / "pairs.jsonl", preferences(16))
    write_jsonl(root / "eleven.jsonl", [*preferences(8), ranking(0)])
    write_jsonl(root / "held_out.jsonl", preferences(5, prefix="held out"))
    return root


def orpo_flags(data, model, output_dir, *flags, pairs="pairs.jsonl"):
    given = ("--model_name_or_path", model, "--train_file_dir", data / pairs, "--output_dir", output_dir)
    held_out = ("--validation_file_dir", data / "held_out.jsonl", "--data_cache_dir", data / "cache")
    return (*given, *held_out, "--learning_rate", "1e-3", *flags)


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_log_odds_are_those_of_equation_4():
    """P = 1/2: odds 1; P = 0.8: odds 4; P = 1/4: odds 1/3."""
    found = log_odds(torch.tensor([0.5, 0.8, 0.25]).log())
    assert found.tolist() == pytest.approx([0, math.log(4), -math.log(3)], abs=1e-6)


def test_log_odds_are_exact_for_answers_that_are_nearly_certain():
    """In fp32 1 - P is off by 5 % at P = 1 - 10⁻⁶; log P is not."""
    for rest in (1e-3, 1e-5, 1e-6):
        found = log_odds(torch.tensor(math.log1p(-rest))).item()
        assert found == pytest.approx(math.log((1 - rest) / rest), rel=1e-5)


def test_an_answer_that_is_certain_has_a_finite_loss_and_gradient():
    chosen = torch.tensor([0.0, -1e-9, -1e-3, -50.0], requires_grad=True)
    rejected = torch.tensor([-50.0, 0.0, 0.0, -1e-9], requires_grad=True)
    losses = odds_ratio_loss(chosen, rejected)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()
    assert losses[0] < 1e-6 < 1 < losses[3]


def test_the_odds_ratio_loss_is_equation_7():
    """Odds 4 against odds 1: σ(log 4) = 4/5; the other way round 1/5; no difference: ln 2."""
    better, worse = torch.tensor([0.8, 0.5, 0.3]).log(), torch.tensor([0.5, 0.8, 0.3]).log()
    expected = [math.log(5 / 4), math.log(5), math.log(2)]
    assert odds_ratio_loss(better, worse).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_odds_ratio_loss_is_that_of_trl():
    from trl.experimental.orpo import ORPOTrainer

    torch.manual_seed(0)
    better, worse = -3 * torch.rand(64) - 0.01, -3 * torch.rand(64) - 0.01
    stub = SimpleNamespace(beta=1.0, accelerator=SimpleNamespace(device="cpu"))
    theirs = -ORPOTrainer.odds_ratio_loss(stub, better, worse)[0]
    torch.testing.assert_close(odds_ratio_loss(better, worse), theirs, rtol=1e-5, atol=1e-6)


# Token ids: (prompt, better answer of four tokens, worse answer); rows of different length, so some are padded.
PAIRS = [
    ([11, 12, 13, 14, 15], [21, 22, 23, 24], [31, 32, 33, 34]),
    ([41, 42], [51, 52, 53, 54], [61, 62]),
]


def parts_by_hand(model, pairs, beta):
    """Eq. 6 from plain logits in float64, with P the geometric mean of an answer's token probabilities (Eq. 1)."""
    tokens = token_logps(model, pairs)
    found = []
    for better, worse in zip(tokens["chosen"], tokens["rejected"], strict=True):
        p, q = (math.exp(sum(answer.tolist()) / len(answer)) for answer in (better, worse))
        ratio = (p / (1 - p)) / (q / (1 - q))
        odds_ratio = -math.log(ratio / (1 + ratio))
        found.append({"nll": -math.log(p), "odds_ratio_loss": odds_ratio, "margin": math.log(p) - math.log(q)})
        found[-1]["loss"] = found[-1]["nll"] + beta * odds_ratio
    return found


@pytest.fixture(scope="module")
def untrained(data, tiny_qwen3, tmp_path_factory):
    """Function: (an untrained trainer of the script, the same model by hand in float64)."""

    def make(*flags):
        output_dir = tmp_path_factory.mktemp("untrained") / "orpo"
        trainer = train(orpo_training, *orpo_flags(data, tiny_qwen3, output_dir, *flags), build=True)
        trainer.model.eval()  # no dropout
        disturb(trainer)
        trainer.model.save_pretrained(output_dir)
        model = load_by_hand(tiny_qwen3, output_dir)
        set_peft_model_state_dict(model, get_peft_model_state_dict(trainer.model))
        return trainer, model

    return make


def test_the_loss_is_equation_6(untrained):
    trainer, model = untrained("--orpo_beta", "0.4")
    expected = parts_by_hand(model, PAIRS, 0.4)
    batch = batch_of(trainer, PAIRS, weights=[1.0, 0.5])
    rows, weights = trainer.measure(trainer.model, batch)
    for name in ("loss", "nll", "odds_ratio_loss"):
        assert rows[name].tolist() == pytest.approx([pair[name] for pair in expected], rel=1e-5)
    assert weights.tolist() == [1.0, 0.5]
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx((expected[0]["loss"] + 0.5 * expected[1]["loss"]) / 1.5, rel=1e-5)


def test_the_likelihood_is_that_of_the_answer_alone(untrained):
    """TRL's own trainer would count the prompt's tokens in."""
    trainer, model = untrained()
    rows, _ = trainer.measure(trainer.model, batch_of(trainer, PAIRS))
    answers = [-tokens.mean().item() for tokens in token_logps(model, PAIRS)["chosen"]]
    whole = [([prompt[0]], prompt[1:] + better, worse) for prompt, better, worse in PAIRS]
    with_prompt = [-tokens.mean().item() for tokens in token_logps(model, whole)["chosen"]]
    assert rows["nll"].tolist() == pytest.approx(answers, rel=1e-5)
    assert max(abs(one - other) for one, other in zip(answers, with_prompt, strict=True)) > 0.01


def test_with_beta_0_the_loss_is_the_plain_likelihood(untrained):
    trainer, model = untrained("--orpo_beta", "0")
    nll = [-tokens.mean().item() for tokens in token_logps(model, PAIRS)["chosen"]]
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, PAIRS))
    assert loss.item() == pytest.approx(sum(nll) / 2, rel=1e-5)


def texts_of(path, tokenizer):
    """Rows of a file of preferences as (prompt, better answer, worse answer), written out by hand as ChatML."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        answers = (f"{row[side]}<|im_end|>" for side in ("chosen", "rejected"))
        pairs.append(tuple(tokenizer.encode(text, add_special_tokens=False) for text in (prompt, *answers)))
    return pairs


def test_the_tokens_are_what_inference_sends_and_the_answer_ends_once(data, tiny_qwen3, tmp_path):
    """Also with a tokenizer that has a BOS its template does not write; TRL's own trainer would add it."""
    shutil.copytree(tiny_qwen3, tmp_path / "base")
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "bos_token": "<|endoftext|>"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.bos_token == "<|endoftext|>"
    trainer = train(orpo_training, *orpo_flags(data, tmp_path / "base", tmp_path / "orpo"), build=True)
    expected = texts_of(data / "pairs.jsonl", tokenizer)
    assert len(trainer.train_dataset) == len(expected)
    for row, (prompt, better, worse) in zip(trainer.train_dataset, expected, strict=True):
        for side, answer in (("chosen", better), ("rejected", worse)):
            assert row[f"{side}_ids"] == prompt + answer
            assert row[f"{side}_labels"] == [-100] * len(prompt) + answer


# -- batches ---------------------------------------------------------------------------------------------------------


def test_the_split_of_a_batch_does_not_matter(data, tiny_qwen3, tmp_path):
    """Eight pairs and a ranking's three of a third each, in steps of eight; with SGD the update is the gradient."""
    sgd = ("--optim", "sgd", "--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--max_grad_norm", "1e9")
    runs = []
    for size, accumulation in ((8, 1), (1, 8), (2, 4)):
        output_dir = tmp_path / f"{size}x{accumulation}"
        split = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation)
        given = (*split, *sgd, "--num_train_epochs", "1", "--lora_dropout", "0", "--orpo_beta", "1")
        train(orpo_training, *orpo_flags(data, tiny_qwen3, output_dir, *given, pairs="eleven.jsonl"))
        logs = [log_of(output_dir, name) for name in ("loss", "nll", "odds_ratio_loss", "accuracy", "margin")]
        runs.append((logs, load_file(output_dir / "adapter_model.safetensors")))
    (logs, tensors), *others = runs
    assert all(len(series) == 2 for series in logs)
    for other_logs, other_tensors in others:
        for ours, theirs in zip(other_logs, logs, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)
        for name, tensor in tensors.items():
            if "lora_B" in name:  # they start at zero
                moved = tensor.abs().max()
                assert moved > 1e-5 and (other_tensors[name] - tensor).abs().max() < 1e-3 * moved


# -- the script ------------------------------------------------------------------------------------------------------

FOUR_STEPS = ("--max_steps", "4", "--lora_dropout", "0", "--per_device_train_batch_size", "2")


@pytest.fixture(scope="module")
def from_base(data, tiny_qwen3, tmp_path_factory):
    """A run from a base model: a global batch of four pairs."""
    output_dir = tmp_path_factory.mktemp("one") / "orpo"
    flags = (*FOUR_STEPS, "--gradient_accumulation_steps", "2", "--orpo_beta", "0.5")
    train(orpo_training, *orpo_flags(data, tiny_qwen3, output_dir, *flags))
    return output_dir


def learnt(stage):
    """The margin rose, the loss fell, and its parts add up (β = 0.5)."""
    before, after = stage["metrics"]["before"], stage["metrics"]["after"]
    for values in (before, after):
        assert values["loss"] == pytest.approx(values["nll"] + 0.5 * values["odds_ratio_loss"], rel=1e-5)
        assert 0 <= values["accuracy_low"] <= values["accuracy"] <= values["accuracy_high"] <= 1
        assert values["pairs"] == 5
    assert after["margin"] > before["margin"] and after["loss"] < before["loss"] and after["nll"] < before["nll"]
    assert after["odds_ratio_loss"] < before["odds_ratio_loss"]
    assert all(outcome["passed"] for outcome in stage["checks"].values())
    assert set(stage["checks"]) == {
        *("leakage", "loss_mask", "template_parity", "no_forged_turns", "memory"),
        *("processes_share_gradients", "gradients_flow", "finite", "saved_is_loaded"),
    }


def test_a_base_model_learns_the_answers_and_the_preference(from_base):
    stage = stage_of(from_base)
    assert stage["stage"] == "orpo" and stage["parent"] is None and stage["hardware"]["device"] == "cpu"
    assert stage["command"].startswith("python orpo_training.py --")
    learnt(stage)


def test_the_held_out_numbers_are_those_of_the_model(from_base, data, tiny_qwen3):
    """By hand, in float64, before training and after, from the files alone."""
    pairs = texts_of(data / "held_out.jsonl", AutoTokenizer.from_pretrained(tiny_qwen3))
    metrics = stage_of(from_base)["metrics"]
    for when, adapter in (("before", None), ("after", from_base)):
        expected = parts_by_hand(load_by_hand(tiny_qwen3, adapter), pairs, 0.5)
        for name in ("loss", "nll", "odds_ratio_loss", "margin"):
            mean = sum(pair[name] for pair in expected) / len(expected)
            assert metrics[when][name] == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert metrics[when]["accuracy"] == sum(pair["margin"] > 0 for pair in expected) / len(expected)


def test_answers_to_held_out_questions_do_not_replace_the_accuracy_of_pairs(data, tiny_qwen3, tmp_path):
    rows = [{"prompt": f"{n} mg + 1 mg = ? mg", "chosen": f"{n + 1} mg", "rejected": f"{n} mg"} for n in range(6)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    flags = ("--validation_file_dir", held_out, "--eval_generation_samples", "3", "--eval_max_new_tokens", "4")
    train(orpo_training, *orpo_flags(data, tiny_qwen3, tmp_path / "orpo", "--max_steps", "1", *flags))
    metrics = stage_of(tmp_path / "orpo")["metrics"]["before"]
    pairs = texts_of(held_out, AutoTokenizer.from_pretrained(tiny_qwen3))
    right = sum(pair["margin"] > 0 for pair in parts_by_hand(load_by_hand(tiny_qwen3, None), pairs, 0.1))
    assert right and metrics["accuracy"] == right / 6 and metrics["answer_accuracy"] == 0
    assert metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"]


def test_a_fine_tuned_model_learns_the_preference(data, tiny_qwen3, tmp_path):
    given = ("--model_name_or_path", tiny_qwen3, "--train_file_dir", data / "chats.jsonl", "--max_steps", "2")
    train(supervised_finetuning, *given, "--output_dir", tmp_path / "sft", "--learning_rate", "1e-2")
    flags = orpo_flags(data, tmp_path / "sft", tmp_path / "orpo", "--max_steps", "3", "--orpo_beta", "0.5")
    train(orpo_training, *flags)
    stage = stage_of(tmp_path / "orpo")
    assert stage["parent"]["stage"] == "sft" and stage["tuning"]["continued"] is True
    learnt(stage)


@pytest.mark.parametrize("deepspeed", [None, "scripts/zero3.json"], ids=["torchrun", "zero3"])
def test_two_processes_train_as_one_with_twice_the_accumulation(from_base, data, tiny_qwen3, tmp_path, deepspeed):
    flags = (*COMMON, *FOUR_STEPS, "--orpo_beta", "0.5", *(("--deepspeed", ROOT / deepspeed) if deepspeed else ()))
    run_script("orpo_training.py", *orpo_flags(data, tiny_qwen3, tmp_path / "orpo", *flags), processes=2)
    for name in ("loss", "nll", "odds_ratio_loss", "accuracy"):
        assert log_of(tmp_path / "orpo", name) == pytest.approx(log_of(from_base, name), rel=1e-5)
    assert log_of(tmp_path / "orpo", "margin") == pytest.approx(log_of(from_base, "margin"), abs=1e-5)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "orpo", from_base))
    assert set(ours) == set(theirs) and all(tensor.numel() for tensor in ours.values())
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 2e-5
    learnt(stage_of(tmp_path / "orpo"))


def test_a_resumed_run_is_exact(data, tiny_qwen3, tmp_path):
    """Dropout and a decaying learning rate on: the state of everything must come back, not only the weights."""
    flags = ("--max_steps", "4", "--per_device_train_batch_size", "4", "--save_strategy", "steps", "--save_steps", "2")
    train(orpo_training, *orpo_flags(data, tiny_qwen3, tmp_path / "whole", *flags))
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    resume = ("--resume_from_checkpoint", "True")
    train(orpo_training, *orpo_flags(data, tiny_qwen3, tmp_path / "killed", *flags, *resume))
    for name in ("loss", "nll", "odds_ratio_loss", "accuracy", "margin"):
        assert log_of(tmp_path / "killed", name) == log_of(tmp_path / "whole", name)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("killed", "whole"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert stage_of(tmp_path / "killed")["metrics"] == stage_of(tmp_path / "whole")["metrics"]


def test_a_negative_weight_is_refused(data, tiny_qwen3, tmp_path, capsys):
    flags = orpo_flags(data, tiny_qwen3, tmp_path, "--orpo_beta", "-0.1")
    assert "--orpo_beta must not be negative, got -0.1" in refused(orpo_training, capsys, *flags)


def test_data_without_preferences_is_named_by_file_and_line(data, tiny_qwen3, tmp_path, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", [*preferences(2), *conversations(1)])
    flags = orpo_flags(data, tiny_qwen3, tmp_path / "orpo", "--train_file_dir", tmp_path / "pairs.jsonl")
    with pytest.raises(SystemExit) as ended:
        train(orpo_training, *flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"{tmp_path / 'pairs.jsonl'}:3" in error
