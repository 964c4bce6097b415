"""DPO: its losses by hand, its reference for every kind of parent, and the script as a user runs it."""

import json
import logging
import math
import os
import shutil
import sys

import pytest
import torch
import trl.trainer.dpo_trainer
from conftest import ROOT, conversations, log_of, run_script, stage_of, write_jsonl
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import dpo_training
import inference
import supervised_finetuning
from dpo_training import LOSSES

COMMON = (
    "--do_train",
    "--do_eval",
    "--max_length",
    "128",
    "--logging_steps",
    "1",
    "--report_to",
    "none",
    "--save_strategy=no",
)
LN2 = math.log(2)


def preferences(count, prefix="p"):
    """Pairs that all differ; the better answers are all about rest and water, the worse ones are not."""
    return [
        {
            "prompt": f"{prefix} {number}: what is a fever? 发烧怎么办",
            "chosen": f"Rest and drink water{', and more water' * (number % 3)}, {number} times. 多休息。",
            "rejected": f"No idea about {number * 3 % 10}{' at all' * (number % 2)}.",
        }
        for number in range(count)
    ]


def train(script, *flags, build=False):
    """Run a script's main() in this process, which spares its imports; return its trainer, with `build` untrained."""
    trainers, finish_run = [], script.finish_run

    def keep(trainer, run, tokenizer):
        trainers.append(trainer)
        if not build:
            finish_run(trainer, run, tokenizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, (*COMMON, *flags))])
        patch.setattr(script, "finish_run", keep)
        patch.setattr(logging, "basicConfig", lambda **options: None)
        patch.setenv("PATH", os.environ["PATH"])
        script.main()
    return trainers[0]


def refused(script, capsys, *flags):
    """The line a script ends with when it refuses, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train(script, *flags)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().split("\n")[-1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations, training and held-out pairs, and one cache for all runs of this file."""
    root = tmp_path_factory.mktemp("data")
    write_jsonl(root / "chats.jsonl", conversations(16, prefix="chat"))
    write_jsonl(root / "pairs.jsonl", preferences(16))
    write_jsonl(root / "eleven.jsonl", preferences(11))
    write_jsonl(root / "held_out.jsonl", preferences(5, prefix="held out"))
    return root


def sft_flags(data, model, output_dir, *flags):
    given = ("--model_name_or_path", model, "--train_file_dir", data / "chats.jsonl", "--output_dir", output_dir)
    return (*given, "--data_cache_dir", data / "cache", "--max_steps", "3", "--learning_rate", "1e-2", *flags)


def dpo_flags(data, model, output_dir, *flags, pairs="pairs.jsonl"):
    given = ("--model_name_or_path", model, "--train_file_dir", data / pairs, "--output_dir", output_dir)
    held_out = ("--validation_file_dir", data / "held_out.jsonl", "--data_cache_dir", data / "cache")
    return (*given, *held_out, "--learning_rate", "1e-3", *flags)


@pytest.fixture(scope="module")
def sft(data, tiny_qwen3, tmp_path_factory):
    """A fine-tuning stage whose adapter has moved well away from the base."""
    output_dir = tmp_path_factory.mktemp("sft") / "sft"
    train(supervised_finetuning, *sft_flags(data, tiny_qwen3, output_dir))
    return output_dir


# -- by hand: plain logits in float64 --------------------------------------------------------------------------------

# Token ids: (prompt, better answer, worse answer). The prompts differ in length, so one row is padded.
FOUR_TOKENS = [
    ([11, 12, 13, 14, 15], [21, 22, 23, 24], [31, 32, 33, 34]),
    ([41, 42], [51, 52, 53, 54], [61, 62, 63, 64]),
]
UNEQUAL = [([11, 12, 13], [21, 22, 23, 24], [31, 32]), ([41, 42], [51], [61, 62, 63])]


def batch_of(trainer, pairs, weights=None):
    """The batch the trainer's collator makes of pairs of token ids."""
    rows = [
        {
            **{f"{side}_ids": prompt + answer for side, answer in (("chosen", chosen), ("rejected", rejected))},
            "chosen_labels": [-100] * len(prompt) + chosen,
            "rejected_labels": [-100] * len(prompt) + rejected,
            "weight": weights[number] if weights else 1.0,
            "margin": 0.0,
        }
        for number, (prompt, chosen, rejected) in enumerate(pairs)
    ]
    return trainer._prepare_inputs(trainer.data_collator(rows))


def load_by_hand(base, adapter=None, dtype=torch.float64, **options):
    """A model as transformers and PEFT load it."""
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval() if options else model.to(dtype).eval()


@torch.no_grad()
def token_logps(model, pairs):
    """{"chosen" and "rejected": one tensor of the answer's token log-probabilities a pair}, one sequence at a time."""
    found = {"chosen": [], "rejected": []}
    for prompt, *answers in pairs:
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            ids = torch.tensor([prompt + answer], device=model.device)
            logps = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            places = range(len(prompt), len(prompt) + len(answer))
            found[side].append(torch.stack([logps[place - 1, ids[0, place]] for place in places]).cpu())
    return found


def answer_logps(model, pairs):
    """{"chosen", "rejected"}: log-probabilities of whole answers, (pairs,)."""
    return {side: torch.stack([each.sum() for each in tokens]) for side, tokens in token_logps(model, pairs).items()}


def pairs_of(dataset, count):
    """The first pairs of a tokenised dataset as (prompt, better answer, worse answer)."""
    pairs = []
    for row in (dataset[number] for number in range(count)):
        start = sum(label == -100 for label in row["chosen_labels"])
        pairs.append((row["chosen_ids"][:start], row["chosen_ids"][start:], row["rejected_ids"][start:]))
    return pairs


def disturb(trainer):
    """Move the policy away from the reference, as training would."""
    torch.manual_seed(1)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))


def both_by_hand(trainer, base, sft):
    """(policy, reference) in float64: the parent's adapter twice, with the trained tensors in the first."""
    policy, reference = load_by_hand(base, sft), load_by_hand(base, sft)
    set_peft_model_state_dict(policy, get_peft_model_state_dict(trainer.model, adapter_name="default"))
    return policy, reference


@pytest.fixture(scope="module")
def untrained(data, sft, tmp_path_factory):
    """Function: a trainer of the script for given flags, its policy moved, and the differences Δ of its log-ratios."""

    def make(base, pairs, *flags):
        output_dir = tmp_path_factory.mktemp("untrained") / "dpo"
        trainer = train(dpo_training, *dpo_flags(data, sft, output_dir, *flags), build=True)
        disturb(trainer)
        policy, reference = both_by_hand(trainer, base, sft)
        ours, theirs = answer_logps(policy, pairs), answer_logps(reference, pairs)
        ratios = {side: ours[side] - theirs[side] for side in ours}
        assert min(ratio.abs().min() for ratio in ratios.values()) > 0.1
        return trainer, policy, reference, ratios

    return make


def test_the_loss_is_equation_7(untrained, tiny_qwen3):
    trainer, policy, reference, ratios = untrained(tiny_qwen3, FOUR_TOKENS, "--beta", "0.3")
    by_pair = [-math.log(1 / (1 + math.exp(-0.3 * delta))) for delta in (ratios["chosen"] - ratios["rejected"])]
    batch = batch_of(trainer, FOUR_TOKENS)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(sum(by_pair) / 2, rel=1e-5)
    rows, weights = trainer.measure(trainer.model, batch)
    assert rows["loss"].tolist() == pytest.approx(by_pair, rel=1e-5) and weights.tolist() == [1, 1]
    for name, model in (("policy", policy), ("reference", reference)):
        for side, expected in answer_logps(model, FOUR_TOKENS).items():
            assert rows[f"{name}_{side}"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


# Δ is the difference of the log-ratios, c and r those of the better and the worse answer, β 0.1, answers of 4 tokens.
FORMULAS = {
    "hinge": lambda delta, c, r: torch.relu(1 - 0.1 * delta),  # arXiv:2309.06657
    "ipo": lambda delta, c, r: (delta / 4 - 1 / (2 * 0.1)) ** 2,  # Eq. 17 of arXiv:2310.12036, per token
    "robust": lambda delta, c, r: (
        (-(1 - 0.1) * logsigmoid(0.1 * delta) + 0.1 * logsigmoid(-0.1 * delta)) / (1 - 2 * 0.1)
    ),  # Eq. 13 of arXiv:2403.00409
    "sigmoid_norm": lambda delta, c, r: -logsigmoid(0.1 * delta / 4),  # arXiv:2405.14734, with the reference kept
    "apo_zero": lambda delta, c, r: 1 - torch.sigmoid(0.1 * c) + torch.sigmoid(0.1 * r),  # arXiv:2408.06266
    "nca_pair": lambda delta, c, r: (
        -logsigmoid(0.1 * c) - 0.5 * logsigmoid(-0.1 * c) - 0.5 * logsigmoid(-0.1 * r)
    ),  # arXiv:2402.05369
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_finite_gradients(untrained, tiny_qwen3, name):
    smoothing = {"robust": ("--label_smoothing", "0.1"), "exo_pair": ("--label_smoothing", "0.001")}.get(name, ())
    trainer, policy, _, ratios = untrained(tiny_qwen3, FOUR_TOKENS, "--loss_type", name, *smoothing)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, FOUR_TOKENS))
    loss.backward()
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert torch.isfinite(loss) and all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    if name in FORMULAS:
        expected = FORMULAS[name](ratios["chosen"] - ratios["rejected"], ratios["chosen"], ratios["rejected"])
        assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    if name == "sft":
        nll = -torch.cat(token_logps(policy, FOUR_TOKENS)["chosen"]).mean()
        assert loss.item() == pytest.approx(nll.item(), rel=1e-5)


def test_weighted_losses_add_up(untrained, tiny_qwen3):
    flags = ("--loss_type", "sigmoid", "hinge", "--loss_weights", "0.25", "2")
    trainer, _, _, ratios = untrained(tiny_qwen3, FOUR_TOKENS, *flags)
    delta = ratios["chosen"] - ratios["rejected"]
    expected = (-0.25 * logsigmoid(0.1 * delta) + 2 * torch.relu(1 - 0.1 * delta)).mean().item()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, FOUR_TOKENS)).item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_rpo_alpha_adds_the_likelihood_of_the_better_answers_per_token(untrained, tiny_qwen3):
    trainer, policy, _, ratios = untrained(tiny_qwen3, UNEQUAL, "--rpo_alpha", "0.7")
    dpo = -logsigmoid(0.1 * (ratios["chosen"] - ratios["rejected"])).mean()
    nll = -torch.stack([tokens.mean() for tokens in token_logps(policy, UNEQUAL)["chosen"]])
    assert trainer.compute_loss(trainer.model, batch_of(trainer, UNEQUAL)).item() == pytest.approx(
        (dpo + 0.7 * nll.mean()).item(), rel=1e-5
    )


def test_ld_alpha_weighs_policy_and_reference_alike(data, sft, tiny_qwen3, tmp_path):
    """Eq. 7 of arXiv:2409.06411 on answers of 4 and 2, and of 1 and 3 tokens: the surplus counts a quarter."""
    trainer = train(dpo_training, *dpo_flags(data, sft, tmp_path, "--ld_alpha", "0.25"), build=True)
    batch = batch_of(trainer, UNEQUAL)
    rows, _ = trainer.measure(trainer.model, batch)
    for side in ("chosen", "rejected"):
        assert rows[f"policy_{side}"].tolist() == pytest.approx(rows[f"reference_{side}"].tolist(), abs=1e-5)
    disturb(trainer)
    rows, _ = trainer.measure(trainer.model, batch)
    kept, ratios = {"chosen": (2, 1), "rejected": (2, 1)}, {}
    for name, model in zip(("policy", "reference"), both_by_hand(trainer, tiny_qwen3, sft), strict=True):
        for side, answers in token_logps(model, UNEQUAL).items():
            weighed = [
                (tokens[:shared].sum() + 0.25 * tokens[shared:].sum()).item()
                for tokens, shared in zip(answers, kept[side], strict=True)
            ]
            assert rows[f"{name}_{side}"].tolist() == pytest.approx(weighed, rel=1e-5)
            ratios[side] = torch.tensor(weighed).double() - ratios.get(side, 0)
    delta = ratios["rejected"] - ratios["chosen"]  # reference minus policy, so the sign is turned round
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx(-logsigmoid(0.1 * delta).mean().item(), rel=1e-5)


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--rpo_alpha", "0.5", "--loss_type", "ipo")], ids=["sigmoid", "ipo_rpo"])
def test_the_split_of_a_batch_does_not_matter(data, sft, tmp_path, flags):
    """Eleven pairs in steps of eight, so the second one has three; with SGD the update is the gradient."""
    sgd = ("--optim", "sgd", "--learning_rate", "0.01", "--lr_scheduler_type", "constant", "--max_grad_norm", "1e9")
    runs = []
    for size, accumulation in ((8, 1), (1, 8), (2, 4)):
        output_dir = tmp_path / f"{size}x{accumulation}"
        split = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation)
        given = (*split, *sgd, "--num_train_epochs", "1", *flags)
        train(dpo_training, *dpo_flags(data, sft, output_dir, *given, pairs="eleven.jsonl"))
        runs.append((log_of(output_dir), load_file(output_dir / "adapter_model.safetensors")))
    start = load_file(sft / "adapter_model.safetensors")
    (losses, tensors), *others = runs
    assert len(losses) == 2
    for other_losses, other_tensors in others:
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for name, tensor in tensors.items():
            moved = (tensor - start[name]).abs().max()
            assert moved > 1e-6 and (other_tensors[name] - tensor).abs().max() < 1e-3 * moved


# -- the script ------------------------------------------------------------------------------------------------------

ASKED = ("--eval_generation_samples", "3", "--eval_max_new_tokens", "8")
FOUR_STEPS = (
    "--max_steps",
    "4",
    "--per_device_train_batch_size",
    "2",
    "--save_strategy",
    "steps",
    "--save_steps",
    "2",
)


@pytest.fixture(scope="module")
def one_process(data, sft, tmp_path_factory):
    """The run the others are compared with, as a user starts it: a global batch of four pairs."""
    output_dir = tmp_path_factory.mktemp("one") / "dpo"
    flags = dpo_flags(data, sft, output_dir, *COMMON, *FOUR_STEPS, "--gradient_accumulation_steps", "2", *ASKED)
    run_script("dpo_training.py", *flags)
    return output_dir


def test_a_run_starts_at_ln_2_and_the_margin_rises(one_process):
    stage = stage_of(one_process)
    before, after = stage["metrics"]["before"], stage["metrics"]["after"]
    assert before["rewards/margins"] == before["rewards/chosen"] == before["rewards/rejected"] == 0
    assert before["rewards/accuracies"] == 0.5 and before["pairs"] == 5
    assert before["loss"] == pytest.approx(LN2, abs=1e-7)
    assert log_of(one_process)[0] == pytest.approx(LN2, abs=1e-6)
    assert after["rewards/margins"] > 0.01 and after["loss"] < LN2 and after["rewards/accuracies"] == 1.0
    assert 0 < after["answer_tokens"] <= 8 and after.keys() >= {"bleu4", "rouge_l", "stop_rate"}


def test_all_checks_passed(one_process):
    outcomes = stage_of(one_process)["checks"]
    assert all(outcome["passed"] for outcome in outcomes.values())
    assert set(outcomes) == {
        *("leakage", "loss_mask", "template_parity", "no_forged_turns", "memory", "reference_is_parent"),
        *("processes_share_gradients", "gradients_flow", "finite", "saved_is_loaded"),
    }


def one_adapter_each(output_dir, *checkpoints):
    """A stage and its checkpoints hold one adapter, the policy's."""
    places = {path.parent for path in output_dir.rglob("adapter_model.safetensors")}
    assert places == {output_dir, *(output_dir / name for name in checkpoints)}
    assert not list(output_dir.rglob("ref"))
    assert not any(".ref" in name for name in load_file(output_dir / "adapter_model.safetensors"))


def test_a_stage_and_its_checkpoints_hold_one_adapter(one_process):
    one_adapter_each(one_process, "checkpoint-2", "checkpoint-4")


def test_the_held_out_numbers_are_those_of_the_saved_policy(one_process, sft, data, tiny_qwen3):
    """By hand, in float64, from the files alone: the rewards of arXiv:2305.18290, section 4, at β = 0.1."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    pairs = []
    for line in (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        answers = (f"{row[side]}<|im_end|>" for side in ("chosen", "rejected"))
        pairs.append((tokenizer.encode(prompt), *map(tokenizer.encode, answers)))
    policy, reference = (answer_logps(load_by_hand(tiny_qwen3, adapter), pairs) for adapter in (one_process, sft))
    rewards = {side: 0.1 * (policy[side] - reference[side]) for side in policy}
    after = stage_of(one_process)["metrics"]["after"]
    assert after["rewards/chosen"] == pytest.approx(rewards["chosen"].mean().item(), abs=1e-5)
    assert after["rewards/rejected"] == pytest.approx(rewards["rejected"].mean().item(), abs=1e-5)
    margins = rewards["chosen"] - rewards["rejected"]
    assert after["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-5)
    assert after["loss"] == pytest.approx(-logsigmoid(margins).mean().item(), abs=1e-6)
    assert after["logps/chosen"] == pytest.approx(policy["chosen"].mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "deepspeed", [None, "scripts/zero2.json", "scripts/zero3.json"], ids=["torchrun", "zero2", "zero3"]
)
def test_two_processes_train_as_one_with_twice_the_accumulation(one_process, data, sft, tmp_path, deepspeed):
    flags = (*COMMON, *FOUR_STEPS, *(("--deepspeed", ROOT / deepspeed) if deepspeed else ()))
    run_script("dpo_training.py", *dpo_flags(data, sft, tmp_path / "dpo", *flags), processes=2)
    assert log_of(tmp_path / "dpo") == pytest.approx(log_of(one_process), rel=1e-5)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "dpo", one_process))
    assert set(ours) == set(theirs) and all(tensor.numel() for tensor in ours.values())
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 2e-5
    one_adapter_each(tmp_path / "dpo", "checkpoint-2", "checkpoint-4")
    stage = stage_of(tmp_path / "dpo")
    assert all(outcome["passed"] for outcome in stage["checks"].values())
    assert stage["metrics"]["before"]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    expected = stage_of(one_process)["metrics"]["after"]["rewards/margins"]
    assert stage["metrics"]["after"]["rewards/margins"] == pytest.approx(expected, rel=1e-3)


def reference_tensors(trainer):
    """Tensors of the reference adapter under the names a file of an adapter gives them."""
    return {
        name.replace(".ref", ""): parameter.detach().cpu()
        for name, parameter in trainer.model.named_parameters()
        if ".ref" in name
    }


def same_tensors(ours, theirs):
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def interrupt(finished, target, checkpoint):
    """What is left of a run that was killed behind a checkpoint."""
    target.mkdir()
    shutil.copytree(finished / checkpoint, target / checkpoint)


def test_a_resumed_run_is_exact_and_keeps_the_parent_as_reference(one_process, data, sft, tmp_path):
    interrupt(one_process, tmp_path / "dpo", "checkpoint-2")
    flags = (*FOUR_STEPS, "--gradient_accumulation_steps", "2", *ASKED, "--resume_from_checkpoint", "True")
    trainer = train(dpo_training, *dpo_flags(data, sft, tmp_path / "dpo", *flags))
    assert log_of(tmp_path / "dpo") == log_of(one_process)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "dpo", one_process))
    assert same_tensors(ours, theirs)
    assert stage_of(tmp_path / "dpo")["metrics"]["after"] == stage_of(one_process)["metrics"]["after"]
    parent, checkpoint = (
        load_file(path / "adapter_model.safetensors") for path in (sft, tmp_path / "dpo" / "checkpoint-2")
    )
    assert same_tensors(reference_tensors(trainer), parent) and not same_tensors(checkpoint, parent)
    one_adapter_each(tmp_path / "dpo", "checkpoint-2", "checkpoint-4")


def test_a_second_round_is_held_to_the_first(one_process, data, tiny_qwen3, tmp_path):
    write_jsonl(tmp_path / "new.jsonl", preferences(8, prefix="new"))
    flags = ("--max_steps", "2", "--train_file_dir", tmp_path / "new.jsonl")
    trainer = train(dpo_training, *dpo_flags(data, one_process, tmp_path / "second", *flags))
    parent = load_file(one_process / "adapter_model.safetensors")
    assert same_tensors(reference_tensors(trainer), parent)
    stage = stage_of(tmp_path / "second")
    assert stage["parent"]["stage"] == "dpo" and stage["metrics"]["before"]["loss"] == pytest.approx(LN2, abs=1e-7)
    rows, _ = trainer.measure(trainer.model, batch_of(trainer, FOUR_TOKENS))
    expected = answer_logps(load_by_hand(tiny_qwen3, one_process), FOUR_TOKENS)
    assert rows["reference_chosen"].tolist() == pytest.approx(expected["chosen"].tolist(), rel=1e-5)


def test_inference_answers_with_the_trained_policy(one_process, tiny_qwen3, tmp_path):
    question, output = "How do I treat a fever?", tmp_path / "out.jsonl"
    write_jsonl(tmp_path / "questions.jsonl", [{"question": question}])
    flags = ("--base_model", one_process, "--data_file", tmp_path / "questions.jsonl", "--output_file", output)
    inference.main(inference.parse_args([*map(str, flags), "--max_new_tokens", "8", "--only_cpu"]))
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_qwen3), load_by_hand(tiny_qwen3, one_process)
    ids = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    prompt_length = len(ids)
    with torch.no_grad():
        for _ in range(8):
            likeliest = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            if likeliest in tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]):
                break
            ids.append(likeliest)
    expected = tokenizer.decode(ids[prompt_length:], skip_special_tokens=True)
    assert expected and json.loads(output.read_text(encoding="utf-8"))["prediction"].strip() == expected.strip()


# -- every kind of parent --------------------------------------------------------------------------------------------

KINDS = {
    "lora": ("qwen3", ()),
    "dora": ("qwen3", ("--use_dora", "True")),
    "rslora": ("qwen3", ("--use_rslora", "True")),
    "lora_on_embeddings": ("qwen3", ("--target_modules", "q_proj,v_proj,embed_tokens")),
    "whole_tied_embeddings": ("qwen3", ("--modules_to_save", "embed_tokens")),
    "whole_embeddings_and_head": ("llama", ("--modules_to_save", "embed_tokens,lm_head")),
}


@pytest.fixture
def bases(tiny_qwen3, tiny_llama):
    return {"qwen3": tiny_qwen3, "llama": tiny_llama}


def held_to_the_parent(trainer, base, parent, trained, limit=1e-5):
    """After training: the reference answers like the parent by hand, the policy like the saved stage, not alike."""
    pairs = pairs_of(trainer.train_dataset, 3)
    rows, _ = trainer.measure(trainer.model, batch_of(trainer, pairs))
    expected = {"reference": answer_logps(parent, pairs), "policy": answer_logps(trained, pairs)}
    for name, sides in expected.items():
        for side, values in sides.items():
            assert rows[f"{name}_{side}"].tolist() == pytest.approx(values.tolist(), rel=limit)
    visible = max(0.1, 2 * limit * expected["reference"]["chosen"].abs().max().item())
    assert (expected["reference"]["chosen"] - expected["policy"]["chosen"]).abs().max() > visible
    if parent is not base:
        assert (answer_logps(base, pairs)["chosen"] - expected["reference"]["chosen"]).abs().max() > visible


def passed(output_dir):
    outcomes = stage_of(output_dir)["checks"]
    return outcomes["reference_is_parent"]["passed"] and all(outcome["passed"] for outcome in outcomes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_parent_whatever_its_adapter(data, bases, tmp_path, kind):
    # Fails for dora today: _changed_reference looks for lora_magnitude_vector.weight, files say lora_magnitude_vector.
    architecture, flags = KINDS[kind]
    base, template = bases[architecture], ("--template_name", "chatml") if architecture == "llama" else ()
    train(supervised_finetuning, *sft_flags(data, base, tmp_path / "sft", *flags, *template))
    few = ("--max_steps", "2", "--learning_rate", "1e-2")
    trainer = train(dpo_training, *dpo_flags(data, tmp_path / "sft", tmp_path / "dpo", *few))
    assert passed(tmp_path / "dpo")
    stages = (load_by_hand(base), load_by_hand(base, tmp_path / "sft"), load_by_hand(base, tmp_path / "dpo"))
    held_to_the_parent(trainer, *stages)
    one_adapter_each(tmp_path / "dpo")


def test_the_reference_of_a_quantised_base_is_the_parent(data, tiny_qwen3, tmp_path):
    # Fails today: TRL rounds the policy to bf16 in __init__, and .float() behind it does not bring the parent back.
    qlora = ("--qlora", "True", "--learning_rate", "1e-2")
    train(supervised_finetuning, *sft_flags(data, tiny_qwen3, tmp_path / "sft", *qlora))
    flags = ("--max_steps", "2", *qlora)
    trainer = train(dpo_training, *dpo_flags(data, tmp_path / "sft", tmp_path / "dpo", *flags))
    assert passed(tmp_path / "dpo")
    parent = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert same_tensors(reference_tensors(trainer), parent)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    stages = [
        load_by_hand(tiny_qwen3, adapter, quantization_config=nf4)
        for adapter in (None, tmp_path / "sft", tmp_path / "dpo")
    ]
    held_to_the_parent(trainer, *stages, limit=5e-3)  # products in bf16


def test_full_weights_are_held_to_a_second_model(data, tiny_qwen3, tmp_path):
    full = ("--use_peft", "False")
    train(supervised_finetuning, *sft_flags(data, tiny_qwen3, tmp_path / "sft", *full))
    flags = ("--max_steps", "2", "--learning_rate", "1e-2", *full)
    trainer = train(dpo_training, *dpo_flags(data, tmp_path / "sft", tmp_path / "dpo", *flags))
    assert trainer.ref_model is not None and passed(tmp_path / "dpo")
    assert not any(
        parameter.requires_grad and parameter.grad is not None for parameter in trainer.ref_model.parameters()
    )
    stages = [load_by_hand(path) for path in (tiny_qwen3, tmp_path / "sft", tmp_path / "dpo")]
    held_to_the_parent(trainer, *stages)


def test_a_fresh_adapter_is_held_to_the_base(data, tiny_qwen3, tmp_path):
    flags = ("--max_steps", "2", "--learning_rate", "1e-2")
    trainer = train(dpo_training, *dpo_flags(data, tiny_qwen3, tmp_path / "dpo", *flags))
    assert list(trainer.model.peft_config) == ["default"] and passed(tmp_path / "dpo")
    assert stage_of(tmp_path / "dpo")["parent"] is None
    base = load_by_hand(tiny_qwen3)
    held_to_the_parent(trainer, base, base, load_by_hand(tiny_qwen3, tmp_path / "dpo"))


def test_a_new_adapter_is_held_to_the_merged_parent(data, sft, tiny_qwen3, tmp_path):
    flags = ("--max_steps", "2", "--learning_rate", "1e-2", "--new_adapter", "True")
    trainer = train(dpo_training, *dpo_flags(data, sft, tmp_path / "dpo", *flags))
    assert list(trainer.model.peft_config) == ["default"] and passed(tmp_path / "dpo")
    stage = stage_of(tmp_path / "dpo")
    assert len(stage["base_model"]["merged"]) == 1 and stage["tuning"]["continued"] is False
    merged = load_by_hand(tiny_qwen3, sft).merge_and_unload()
    trained = PeftModel.from_pretrained(merged, str(tmp_path / "dpo")).double().eval()
    held_to_the_parent(trainer, load_by_hand(tiny_qwen3), load_by_hand(tiny_qwen3, sft), trained)


# -- log-probabilities of the reference beforehand -------------------------------------------------------------------


@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "full"])
def test_the_reference_may_be_computed_beforehand(data, sft, tiny_qwen3, tmp_path, use_peft):
    parent = sft if use_peft else tiny_qwen3
    flags = ("--max_steps", "3", "--use_peft", use_peft)
    train(dpo_training, *dpo_flags(data, parent, tmp_path / "plain", *flags))
    beforehand = ("--precompute_ref_log_probs", "True")
    trainer = train(dpo_training, *dpo_flags(data, parent, tmp_path / "beforehand", *flags, *beforehand))
    assert log_of(tmp_path / "beforehand") == pytest.approx(log_of(tmp_path / "plain"), rel=1e-6)
    plain, stage = stage_of(tmp_path / "plain"), stage_of(tmp_path / "beforehand")
    assert stage["metrics"]["after"] == pytest.approx(plain["metrics"]["after"], rel=1e-5, abs=1e-6)
    assert passed(tmp_path / "beforehand")
    if use_peft:  # the reference is freed before the first step
        assert list(trainer.model.peft_config) == ["default"] and not reference_tensors(trainer)
    expected = answer_logps(load_by_hand(tiny_qwen3, sft if use_peft else None), pairs_of(trainer.train_dataset, 3))
    for side, values in expected.items():
        found = [trainer.train_dataset[number][f"ref_{side}_logps"] for number in range(3)]
        assert found == pytest.approx(values.tolist(), rel=1e-5)


def test_what_was_computed_beforehand_is_not_taken_for_other_settings(data, sft, tmp_path):
    """The same data and reference, but --ld_alpha changes what a reference's log-probability is."""
    # Fails today: TRL's cache key holds the dataset and the weights, not --ld_alpha.
    beforehand = ("--max_steps", "1", "--precompute_ref_log_probs", "True", "--data_cache_dir", tmp_path / "cache")
    train(dpo_training, *dpo_flags(data, sft, tmp_path / "plain", *beforehand))
    train(dpo_training, *dpo_flags(data, sft, tmp_path / "ld", *beforehand, "--ld_alpha", "0.25"))
    assert passed(tmp_path / "ld")


def test_what_is_computed_beforehand_is_without_dropout(data, sft, tmp_path):
    # Fails today: _precompute runs before anything has called model.eval().
    flags = ("--max_steps", "1", "--precompute_ref_log_probs", "True", "--disable_dropout", "False")
    train(dpo_training, *dpo_flags(data, sft, tmp_path / "dpo", *flags, "--data_cache_dir", tmp_path / "cache"))
    assert passed(tmp_path / "dpo")


# -- planted faults --------------------------------------------------------------------------------------------------


def test_a_bare_base_as_reference_is_caught(data, sft, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dpo_training, "copy_adapter", lambda model, source, target: model.delete_adapter(target))
    error = refused(dpo_training, capsys, *dpo_flags(data, sft, tmp_path / "dpo", "--max_steps", "1"))
    assert "check reference_is_parent failed: before the first step policy and reference differ by" in error


def nudge(model):
    """Change one tensor of the reference by less than its log-probabilities would show."""
    name, parameter = next(each for each in model.named_parameters() if ".ref." in each[0] and "lora_B" in each[0])
    parameter.data.flatten()[0] += 1e-7
    return name.replace(".ref", "")


def test_a_changed_reference_is_caught(data, sft, tmp_path, monkeypatch, capsys):
    copy, changed = dpo_training.copy_adapter, []

    def copy_and_change(model, source, target):
        copy(model, source, target)
        changed.append(nudge(model))

    monkeypatch.setattr(dpo_training, "copy_adapter", copy_and_change)
    error = refused(dpo_training, capsys, *dpo_flags(data, sft, tmp_path / "dpo", "--max_steps", "1"))
    assert f"1 tensors of the reference are not those of the parent stage, e.g. {changed[0]}" in error


def test_a_changed_reference_of_a_resumed_run_is_caught(one_process, data, sft, tmp_path, monkeypatch, capsys):
    """As when the checkpoint, and not the parent, were copied into it."""
    copy = dpo_training.copy_adapter
    monkeypatch.setattr(dpo_training, "copy_adapter", lambda *args: (copy(*args), nudge(args[0])))
    interrupt(one_process, tmp_path / "dpo", "checkpoint-2")
    flags = (*FOUR_STEPS, "--gradient_accumulation_steps", "2", *ASKED, "--resume_from_checkpoint", "True")
    error = refused(dpo_training, capsys, *dpo_flags(data, sft, tmp_path / "dpo", *flags))
    assert "1 tensors of the reference are not those of the parent stage" in error


def test_a_reference_changed_before_it_is_computed_beforehand_is_caught(data, sft, tmp_path, monkeypatch, capsys):
    copy = dpo_training.copy_adapter
    monkeypatch.setattr(dpo_training, "copy_adapter", lambda *args: (copy(*args), nudge(args[0])))
    flags = ("--max_steps", "1", "--precompute_ref_log_probs", "True", "--data_cache_dir", tmp_path / "cache")
    error = refused(dpo_training, capsys, *dpo_flags(data, sft, tmp_path / "dpo", *flags))
    assert "1 tensors of the reference are not those of the parent stage" in error


def test_the_incomplete_copy_of_trl_is_caught(data, tiny_qwen3, tmp_path, monkeypatch, capsys):
    flags = ("--target_modules", "q_proj,v_proj,embed_tokens")
    train(supervised_finetuning, *sft_flags(data, tiny_qwen3, tmp_path / "sft", *flags))
    monkeypatch.setattr(dpo_training, "copy_adapter", lambda model, source, target: None)
    error = refused(dpo_training, capsys, *dpo_flags(data, tmp_path / "sft", tmp_path / "dpo", "--max_steps", "1"))
    assert "tensors of the reference are not those of the parent stage, e.g." in error and "lora_embedding" in error


def test_wrong_log_probabilities_of_the_fused_head_are_caught(data, sft, tmp_path, monkeypatch, capsys):
    """Policy and reference are wrong alike, so neither the log-ratios nor the loss can show it."""
    add = trl.trainer.dpo_trainer.add_fused_lm_head

    def add_wrong(model, **options):
        add(model, **options)
        forward = model.forward

        def wrong(*args, fused_lm_head=False, **kwargs):
            result = forward(*args, fused_lm_head=fused_lm_head, **kwargs)
            if fused_lm_head:
                result.log_probs = result.log_probs * 1.05
            return result

        model.forward = wrong

    monkeypatch.setattr(trl.trainer.dpo_trainer, "add_fused_lm_head", add_wrong)
    error = refused(dpo_training, capsys, *dpo_flags(data, sft, tmp_path / "dpo", "--max_steps", "1"))
    assert "check reference_is_parent failed: token log-probabilities differ from those of the model's logits" in error


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--label_smoothing", "0.1"), "--label_smoothing is read by the losses aot, aot_unpaired, exo_pair, robust"),
        (("--loss_type", "robust", "--label_smoothing", "0.5"), "--label_smoothing must be in [0, 0.5), got 0.5"),
        (("--loss_type", "sigmod"), "--loss_type 'sigmod' is not a loss; known: sigmoid, hinge"),
        (
            ("--loss_type", "sigmoid", "ipo", "--loss_weights", "1"),
            "--loss_weights needs one number for each of the 2 losses, got 1",
        ),
        (("--beta", "0"), "--beta must be positive, got 0"),
        (("--ld_alpha", "1.5"), "--ld_alpha must be in [0, 1], got 1.5"),
        (("--loss_type", "exo_pair"), "--label_smoothing"),
        (("--loss_type", "aot", "--use_weighting", "True"), "--use_weighting"),
        (("--loss_type", "bco_pair", "--f_divergence_type", "js_divergence"), "f_divergence_type"),
        (("--f_divergence_type", "kl"), "invalid choice: 'kl'"),
    ],
)
def test_values_that_make_no_sense_are_refused(data, sft, tmp_path, capsys, flags, message):
    assert message in refused(dpo_training, capsys, *dpo_flags(data, sft, tmp_path / "dpo", *flags))


def test_identical_answers_are_left_out_and_counted(data, sft, tmp_path):
    same = [{"prompt": f"same {number}", "chosen": "Rest.", "rejected": "Rest."} for number in range(2)]
    write_jsonl(tmp_path / "pairs.jsonl", [*preferences(4), *same])
    flags = ("--train_file_dir", tmp_path / "pairs.jsonl", "--max_steps", "1")
    trainer = train(dpo_training, *dpo_flags(data, sft, tmp_path / "dpo", *flags))
    ledger = stage_of(tmp_path / "dpo")["data"]["train"]
    assert (ledger["read"], ledger["used"], ledger["samples"]) == (6, 4, 4)
    assert ledger["dropped"] == {"identical answers": 2} and len(trainer.train_dataset) == 4


def test_an_answer_that_is_too_long_is_cut_and_counted(data, sft, tmp_path):
    long = {"prompt": "How long?", "chosen": "Rest and drink water. " * 40, "rejected": "No idea."}
    write_jsonl(tmp_path / "pairs.jsonl", [*preferences(4), long])
    flags = ("--train_file_dir", tmp_path / "pairs.jsonl", "--max_steps", "1")
    trainer = train(dpo_training, *dpo_flags(data, sft, tmp_path / "dpo", *flags))
    ledger = stage_of(tmp_path / "dpo")["data"]["train"]
    assert (ledger["used"], ledger["samples"], ledger["truncated"]) == (5, 5, 1)
    lengths = sorted(len(row["chosen_ids"]) for row in trainer.train_dataset)
    assert lengths[-1] == 128 and lengths[-2] < 128
    row = max(trainer.train_dataset, key=lambda row: len(row["chosen_ids"]))
    end_of_turn = trainer.processing_class.convert_tokens_to_ids("<|im_end|>")
    assert row["chosen_labels"][-1] != end_of_turn and row["rejected_labels"][-1] == end_of_turn


def test_data_without_preferences_is_named_by_file_and_line(data, sft, tmp_path, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", [*preferences(2), *conversations(1)])
    flags = ("--train_file_dir", tmp_path / "pairs.jsonl", "--max_steps", "1")
    with pytest.raises(SystemExit) as ended:
        train(dpo_training, *dpo_flags(data, sft, tmp_path / "dpo", *flags))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"{tmp_path / 'pairs.jsonl'}:3" in error
    assert "this stage compares answers (fields 'chosen' and 'rejected', or ranked 'answers')" in error
