"""PPO's arithmetic against hand-worked numbers and NumPy, its roles on one base, and whole runs of the stage."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, kill_at, log_of, run_script, stage_of, write_jsonl
from safetensors.torch import load_file
from torch.testing import assert_close

from stagekit.ppo import (
    KLController,
    generalized_advantages,
    kl_estimate,
    policy_losses,
    token_rewards,
    value_losses,
    whiten,
)

# -- the algorithm ---------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """Two tokens, gamma 0.5, lambda 0.5: delta_1 = 2 - 1 = 1, delta_0 = 1 + 0.5 * 1 - 2 = -0.5, A_0 = -0.5 + 0.25."""
    rewards, values = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[2.0, 1.0, 7.0]])
    advantages, returns = generalized_advantages(rewards, values, torch.tensor([[1, 1, 0]]), 0.5, 0.5)
    assert_close(advantages, torch.tensor([[-0.25, 1.0, 0.0]]))
    assert_close(returns, torch.tensor([[1.75, 2.0, 0.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_discounted_sum_of_the_temporal_differences(gamma, lam):
    """Eq. 16 of arXiv:1506.02438 as it is written: a sum over the future, in NumPy."""
    random = np.random.default_rng(0)
    rewards, values = random.normal(size=(5, 7)), random.normal(size=(5, 7))
    lengths = [7, 1, 4, 6, 2]
    mask = np.array([[int(t < length) for t in range(7)] for length in lengths])
    wanted = np.zeros((5, 7))
    for row, length in enumerate(lengths):
        following = [*values[row, 1:length], 0.0]
        deltas = [rewards[row, t] + gamma * following[t] - values[row, t] for t in range(length)]
        for t in range(length):
            wanted[row, t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
    tensors = (torch.tensor(array) for array in (rewards, values, mask))
    advantages, returns = generalized_advantages(*tensors, gamma, lam)
    assert_close(advantages, torch.tensor(wanted))
    assert_close(returns, torch.tensor((wanted + values) * mask))


def test_with_lambda_one_the_returns_are_the_rewards_to_come():
    rewards, values = torch.tensor([[0.1, 0.2, 3.0]]), torch.tensor([[5.0, -2.0, 0.7]])
    _, returns = generalized_advantages(rewards, values, torch.ones(1, 3), 1.0, 1.0)
    assert_close(returns, torch.tensor([[3.3, 3.2, 3.0]]))


def test_the_score_stands_at_the_last_token_and_every_token_pays_its_kl():
    kl, mask = torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    rewards = token_rewards(torch.tensor([10.0, -1.0]), kl, mask, 0.5)
    assert_close(rewards, torch.tensor([[-0.5, 9.0, 0.0], [-0.5, -0.5, -1.5]]))


def test_kl_estimators_by_hand():
    logps, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert_close(kl_estimate(logps, reference, "k1"), torch.tensor([math.log(2)]))
    assert_close(kl_estimate(logps, reference, "k2"), torch.tensor([math.log(2) ** 2 / 2]))
    assert_close(kl_estimate(logps, reference, "k3"), torch.tensor([0.5 - 1 + math.log(2)]))


@pytest.mark.parametrize(("kind", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_the_mean_of_an_estimator_over_all_tokens_is_the_kl(kind, unbiased):
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = (policy * (policy / reference).log()).sum()
    mean = (policy * kl_estimate(policy.log(), reference.log(), kind)).sum()
    assert torch.isclose(mean, exact) == unbiased
    assert kind == "k1" or (kl_estimate(policy.log(), reference.log(), kind) >= 0).all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 1.0, -1.2, True),
        (1.5, -1.0, 1.5, False),
        (0.5, 1.0, -0.5, False),
        (0.5, -1.0, 0.8, True),
        (1.1, 2, -2.2, 0),
    ],
)
def test_the_clipped_objective_by_hand(ratio, advantage, loss, clipped):
    """The four corners of Figure 1 of arXiv:1707.06347, with epsilon 0.2."""
    logps = torch.tensor([math.log(ratio)], requires_grad=True)
    losses, was_clipped = policy_losses(logps, torch.zeros(1), torch.tensor([float(advantage)]), 0.2)
    assert_close(losses, torch.tensor([loss]))
    assert bool(was_clipped) == bool(clipped)
    losses.sum().backward()
    assert (logps.grad == 0).all() == bool(clipped)


def test_the_clipped_value_loss_by_hand():
    """Moved from 0 to 1 with clip 0.2: the clipped value 0.2 is further from 1.5 (0.845), and nearer to 0 (0.5)."""
    values, old, returns = torch.ones(2), torch.zeros(2), torch.tensor([1.5, 0.0])
    losses, clipped = value_losses(values, old, returns, 0.2)
    assert_close(losses, torch.tensor([0.845, 0.5]))
    assert clipped.tolist() == [True, False]
    assert_close(value_losses(values, old, returns, None)[0], torch.tensor([0.125, 0.5]))


def test_whitening_is_over_all_processes_and_blind_to_padding():
    values, mask = torch.tensor([[1.0, 2.0, 50.0], [4.0, 9.0, 2.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    kept = np.array([1.0, 2.0, 4.0, 9.0, 2.0])
    wanted = (kept - kept.mean()) / kept.std()
    whole = whiten(values, mask, lambda tensor: tensor)
    assert_close(whole[mask.bool()], torch.tensor(wanted, dtype=torch.float32))
    assert whole[0, 2] == 0
    unshifted = whiten(values, mask, lambda tensor: tensor, shift_mean=False)
    assert_close(unshifted[mask.bool()], torch.tensor(wanted + kept.mean(), dtype=torch.float32))
    # two processes with a row each, which add up what they know
    sums = iter([torch.tensor([18.0, 5.0]), torch.tensor(float(((kept - kept.mean()) ** 2).sum()))])
    assert_close(whiten(values[:1], mask[:1], lambda tensor: next(sums)), whole[:1])


def test_the_kl_coefficient_follows_its_target_within_bounds():
    """Section 2.2 of arXiv:1909.08593: the error is clipped at 0.2; 100 answers of a horizon of 1,000."""
    controller = KLController(0.1, target=4.0, horizon=1000)
    controller.update(8.0, 100)
    assert controller.coef == pytest.approx(0.1 * 1.02)
    controller.update(3.8, 100)
    assert controller.coef == pytest.approx(0.1 * 1.02 * (1 - 0.05 * 0.1))
    fixed = KLController(0.1)
    fixed.update(1e9, 10_000)
    assert fixed.coef == 0.1


# -- roles and runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tiny_qwen3, tmp_path_factory):
    """A fine-tuned stage and a reward model on it that has learnt to prefer water."""
    root = tmp_path_factory.mktemp("ppo")
    asked = [f"question {number}: what helps? 怎么办" for number in range(48)]
    talks = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "Rest and drink water."}]}
        for text in asked
    ]
    pairs = [{"prompt": text, "chosen": "Drink water.", "rejected": "I do not know."} for text in asked]
    write_jsonl(root / "talks.jsonl", talks)
    write_jsonl(root / "pairs.jsonl", pairs)
    common = ("--do_train", "--do_eval", "--logging_steps", "1", "--report_to", "none", "--lora_dropout", "0")
    sft = ("--train_file_dir", root / "talks.jsonl", "--output_dir", root / "sft", "--max_steps", "4")
    run_script(
        "supervised_finetuning.py", "--model_name_or_path", tiny_qwen3, *sft, *common, "--learning_rate", "3e-3"
    )
    rm = ("--train_file_dir", root / "pairs.jsonl", "--output_dir", root / "rm", "--learning_rate", "3e-3")
    more = ("--max_leaked_percentage", "100", "--validation_split_percentage", "40", "--num_train_epochs", "3")
    run_script("reward_modeling.py", "--model_name_or_path", root / "sft", *rm, *common, *more)
    assert stage_of(root / "rm")["metrics"]["after"]["accuracy_low"] > 0.5
    return root


def settings(chain, model=None):
    """The flags of a short run."""
    return (
        *("--model_name_or_path", model or chain / "sft", "--train_file_dir", chain / "talks.jsonl"),
        *("--do_train", "--do_eval", "--max_completion_length", "8", "--per_device_train_batch_size", "4"),
        *("--eval_generation_samples", "3"),
        *("--logging_steps", "1", "--learning_rate", "1e-3", "--report_to", "none", "--max_leaked_percentage", "100"),
    )


def ppo(chain, output_dir, *flags, model=None, **how):
    """Run the stage for a few steps."""
    return run_script("ppo_training.py", *settings(chain, model), "--output_dir", output_dir, *flags, **how)


def roles_of(chain):
    """The roles as the stage builds them, with the trained reward model."""
    from stagekit.arguments import LoraArguments, ModelArguments
    from stagekit.checkpoint import resolve
    from stagekit.modeling import add_adapter, load_config, load_model
    from stagekit.ppo import build_roles

    source, reward = resolve(str(chain / "sft")), resolve(str(chain / "rm"))
    args = ModelArguments(model_name_or_path=str(chain / "sft"))
    settings = SimpleNamespace(bf16=False, fp16=False, use_cpu=True, deepspeed=None, activation_checkpointing=False)
    model = load_model(source, args, settings, load_config(source, args))
    model, _ = add_adapter(model, source, LoraArguments(), settings)
    return build_roles(model, source, reward)


def batch():
    """Two rows, the first padded on the left, with answers of 3 and 2 tokens."""
    ids = torch.tensor([[3, 3, 40, 41, 42, 50, 51, 2], [60, 61, 62, 63, 64, 70, 2, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])
    return ids, mask


def test_all_roles_share_the_storage_of_one_base(chain):
    """Distinct storages add up to one base, four adapters (policy, reference, critic, reward) and two heads."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    roles = roles_of(chain)
    held = {parameter.untyped_storage().data_ptr(): parameter.numel() for parameter in roles.parameters()}
    base = AutoModelForCausalLM.from_pretrained(stage_of(chain / "sft")["base_model"]["name_or_path"])
    weights = {parameter.data_ptr(): parameter.numel() for parameter in base.parameters()}
    adapter = sum(tensor.numel() for tensor in load_file(chain / "sft" / "adapter_model.safetensors").values())
    scorer = load_file(chain / "rm" / "adapter_model.safetensors")
    critic = sum(tensor.numel() for name, tensor in scorer.items() if "score" not in name)
    heads = 2 * sum(tensor.numel() for name, tensor in scorer.items() if "score" in name)
    assert sum(held.values()) == sum(weights.values()) + 2 * adapter + 2 * critic + heads


def test_the_reward_role_scores_as_the_reward_model_does(chain):
    from stagekit.scoring import load_reward_model

    roles, reward = roles_of(chain).eval(), load_reward_model(str(chain / "rm"))
    ids, mask = batch()
    with torch.no_grad():
        scores = roles("reward", ids, mask, 3)
        first = reward.model(input_ids=ids[:1, 2:], attention_mask=mask[:1, 2:]).logits
        second = reward.model(input_ids=ids[1:, :7], attention_mask=mask[1:, :7]).logits
        values = roles("critic", ids, mask, 3)
    assert_close(scores[0, 2], first[0, 0], atol=1e-5, rtol=1e-5)
    assert_close(scores[1, 1], second[0, 0], atol=1e-5, rtol=1e-5)
    assert_close(values[:, 1:], scores[:, :-1], atol=1e-6, rtol=1e-6)  # the critic starts as it, one token earlier


def test_policy_and_reference_are_the_parent_and_stay_apart(chain):
    from stagekit.generation import find_source, load_chat, load_for_generation

    roles = roles_of(chain).eval()
    source = find_source(None, str(chain / "sft"))
    parent = load_for_generation(source, load_chat(source), only_cpu=True).model
    ids, mask = batch()
    with torch.no_grad():
        logits = parent(input_ids=ids[1:, :7]).logits[0].log_softmax(-1)
        wanted = logits[4:6].gather(-1, ids[1, 5:7].unsqueeze(-1)).squeeze(-1)
        for role in ("policy", "reference"):
            logps, entropy = roles(role, ids, mask, 3)
            assert_close(logps[1, :2], wanted, atol=1e-5, rtol=1e-5)
            assert_close(entropy[1, 0], -(logits[4].exp() * logits[4]).sum(), atol=1e-5, rtol=1e-5)
        before = roles("reference", ids, mask, 3)[0]
        for name, parameter in roles.named_parameters():
            if ".default." in name or ".critic." in name:
                parameter.add_(0.05)
        assert torch.equal(roles("reference", ids, mask, 3)[0], before)
        assert not torch.allclose(roles("policy", ids, mask, 3)[0], before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_pass_trains_its_own_role_and_nothing_else(chain, checkpointing):
    roles = roles_of(chain).train()
    if checkpointing:
        roles.model.enable_input_require_grads()
        roles.model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, mask = batch()
    gradients = {}
    for role, part in (("policy", 0), ("critic", None)):
        roles.zero_grad()
        out = roles(role, ids, mask, 3)
        (out if part is None else out[part]).sum().backward()
        touched = {
            name for name, value in roles.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0
        }
        gradients[role] = {name: value.grad.clone() for name, value in roles.named_parameters() if name in touched}
        wanted = ".default." if role == "policy" else ".critic."
        assert touched and all(wanted in name or name == "heads.critic.weight" for name in touched), role
    assert "heads.critic.weight" in gradients["critic"]


def test_gradients_do_not_depend_on_how_a_minibatch_is_split(chain):
    """The losses of a rollout in one part and in four parts of one row: the same gradients of both roles."""
    from stagekit.ppo import PPOTrainer

    roles = roles_of(chain).train()
    torch.manual_seed(0)
    ids, mask = (tensor.repeat(2, 1) for tensor in batch())
    answers = mask[:, -3:]
    state = {
        **{"input_ids": ids, "attention_mask": mask, "mask": answers, "num_tokens": answers.sum()},
        **{name: torch.randn(4, 3) for name in ("values", "advantages", "returns")},
    }
    with torch.no_grad():
        state["logps"] = roles("policy", ids, mask, 3)[0] + 0.1 * torch.randn(4, 3)
    stub = SimpleNamespace(
        rollout_args=SimpleNamespace(temperature=1.0),
        ppo=SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=0.5, entropy_coef=0.01),
        accelerator=SimpleNamespace(num_processes=1),
        observe=lambda rows, weights: None,
    )
    found = []
    for parts in ([slice(0, 4)], [slice(row, row + 1) for row in range(4)]):
        roles.zero_grad()
        for role in ("policy", "critic"):
            for part in parts:
                inputs = {name: value if name == "num_tokens" else value[part] for name, value in state.items()}
                PPOTrainer.compute_loss(stub, roles, {**inputs, "role": role}).backward()
        found.append({name: value.grad.clone() for name, value in roles.named_parameters() if value.grad is not None})
    assert set(found[0]) == set(found[1])
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_a_run_proves_itself_and_leaves_a_policy_that_goes_on(chain, tmp_path):
    ppo(chain, tmp_path / "ppo", "--reward_model_path", chain / "rm", "--num_mini_batches", "2", "--max_steps", "8")
    stage = stage_of(tmp_path / "ppo")
    wanted = {
        "reward_model_is_trained",
        "sampler_is_policy",
        "rollout_is_policy",
        "reference_is_parent",
        "policy_is_sane",
        "saved_is_loaded",
    }
    assert wanted <= set(stage["checks"]) and all(check["passed"] for check in stage["checks"].values())
    assert stage["parent"]["stage"] == "sft" and stage["metrics"]["before"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < stage["metrics"]["after"]["answer_tokens"] <= 8 and "rouge_l" in stage["metrics"]["before"]
    ratios = log_of(tmp_path / "ppo", "ratio")
    assert ratios[0] == 1 and len(ratios) == 8
    assert {"score", "kl", "entropy", "explained_variance"} <= set(
        json.loads((tmp_path / "ppo/trainer_state.json").read_text())["log_history"][1]
    )
    assert not any((tmp_path / "ppo" / name).exists() for name in ("ref", "critic", "reward"))
    samples = [json.loads(line) for line in (tmp_path / "ppo/samples.jsonl").read_text().splitlines()]
    assert all(isinstance(sample["score"], float) for sample in samples)
    flags = ("--lora_model", tmp_path / "ppo", "--data_file", chain / "talks.jsonl", "--output_file", tmp_path / "out")
    run_script("inference.py", *flags, "--max_new_tokens", "4")
    assert len((tmp_path / "out").read_text().splitlines()) == 48


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_the_reward_of_a_known_optimum_is_reached(chain, tiny_qwen3, tmp_path, seed):
    """Reward: the share of an answer's characters that are ASCII letters; 1 is the optimum. From the bare base."""
    (tmp_path / "toy.py").write_text(
        "def letters(prompts, completions, answers):\n"
        "    return [sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text)) for text in completions]\n"
    )
    flags = ("--reward_functions", f"{tmp_path / 'toy.py'}:letters", "--kl_coef", "0", "--missing_eos_penalty", "0")
    more = ("--max_steps", "44", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", "--seed", seed)
    start = ("--model_name_or_path", tiny_qwen3, "--modules_to_save", "embed_tokens", "--logging_steps", "4")
    ppo(chain, tmp_path / "ppo", *flags, *more, *start, "--per_device_train_batch_size", "16")
    scores = log_of(tmp_path / "ppo", "score")
    assert scores[0] < 0.7
    assert scores[-1] > 0.9


def equal_runs(one, other, *keys):
    """Two runs logged the same numbers and saved the same bytes."""
    for key in keys:
        assert log_of(one, key) == log_of(other, key) and len(log_of(one, key)) > 1, key
    name = "adapter_model.safetensors" if (one / "adapter_model.safetensors").exists() else "model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    return True


def test_a_run_killed_in_the_middle_of_a_rollout_goes_on_exactly(chain, tmp_path):
    """Two passes over a rollout, two steps each: the checkpoint after step 3 lies inside of it."""
    flags = ("--reward_model_path", chain / "rm", "--num_mini_batches", "2", "--max_steps", "7", "--save_steps", "3")
    flags = (*flags, "--save_strategy", "steps", "--eval_strategy", "no")
    ppo(chain, tmp_path / "whole", *flags)
    kill_at(tmp_path / "again" / "checkpoint-3", "ppo_training.py", *settings(chain), *flags)
    ppo(chain, tmp_path / "again", *flags, "--resume_from_checkpoint", "True")
    assert equal_runs(tmp_path / "whole", tmp_path / "again", "loss", "policy_loss", "value_loss", "score", "kl")


# Always the same quantile of the distribution instead of a random one: answers no longer depend on who samples them.
QUANTILE = """
import torch
torch.multinomial = lambda probs, num_samples, **_: (probs.cumsum(-1) < 0.8).sum(-1, keepdim=True)

def letters(prompts, completions, answers):
    return [sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def one_process(chain, tmp_path_factory):
    """A run with one minibatch a rollout, whose answers depend on their prompts alone, and its flags."""
    root = tmp_path_factory.mktemp("one")
    (root / "quantile.py").write_text(QUANTILE)
    flags = ("--reward_model_path", chain / "rm", "--reward_functions", f"{root / 'quantile.py'}:letters")
    flags = (*flags, "--max_steps", "6", "--per_device_train_batch_size", "4")
    ppo(chain, root / "ppo", *flags, "--gradient_accumulation_steps", "2")
    assert len(set(log_of(root / "ppo", "score"))) > 1
    return root / "ppo", flags


@pytest.mark.parametrize(
    "deepspeed", [None, "scripts/zero2.json", "scripts/zero3.json"], ids=["ddp", "zero2", "zero3"]
)
def test_two_processes_train_what_one_trains(chain, one_process, tmp_path, deepspeed):
    expected, flags = one_process
    more = ("--deepspeed", deepspeed) if deepspeed else ()
    ppo(chain, tmp_path / "two", *flags, *more, processes=2)
    stage = stage_of(tmp_path / "two")
    assert all(check["passed"] for check in stage["checks"].values()) and stage["hardware"]["processes"] == 2
    for key in ("loss", "policy_loss", "value_loss", "score", "kl", "entropy", "grad_norm"):
        assert log_of(tmp_path / "two", key) == pytest.approx(log_of(expected, key), rel=1e-4, abs=1e-6), key
    one, two = (load_file(path / "adapter_model.safetensors") for path in (expected, tmp_path / "two"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 2e-5


def test_the_roles_share_a_quantised_base(chain, tmp_path):
    ppo(chain, tmp_path / "ppo", "--reward_model_path", chain / "rm", "--load_in_4bit", "True", "--max_steps", "2")
    assert all(check["passed"] for check in stage_of(tmp_path / "ppo")["checks"].values())
    assert stage_of(tmp_path / "ppo")["tuning"]["method"] == "qlora"


def test_a_reward_model_of_another_architecture_scores_beside_the_policy(chain, tmp_path, tiny_llama):
    """Its own tokenizer and template, the scores that score_answers gives for the answers written down."""
    from stagekit.scoring import load_reward_model, score_answers

    flags = ("--train_file_dir", chain / "pairs.jsonl", "--output_dir", tmp_path / "rm", "--template_name", "chatml")
    more = ("--do_train", "--max_steps", "2", "--report_to", "none", "--learning_rate", "1e-2")
    run_script("reward_modeling.py", "--model_name_or_path", tiny_llama, *flags, *more)
    flags = ("--reward_model_path", tmp_path / "rm", "--allow_untrained_reward_model", "True", "--max_steps", "3")
    result = ppo(chain, tmp_path / "ppo", *flags, "--missing_eos_penalty", "0", "--num_ppo_epochs", "1")
    assert "the reward model is loaded beside the policy: another base" in result.stderr
    assert "reward_model_is_trained" in stage_of(tmp_path / "ppo")["checks"]
    reward = load_reward_model(str(tmp_path / "rm"), only_cpu=True)
    samples = [json.loads(line) for line in (tmp_path / "ppo/samples.jsonl").read_text().splitlines()]
    asked = [[{"role": "user", "content": sample["prompt"]}] for sample in samples]
    items = [
        (prompt, [[{"role": "assistant", "content": sample["answer"]}]], None)
        for prompt, sample in zip(asked, samples, strict=True)
    ]
    scores = dict(score_answers(reward, items, 512, 4))
    assert len(samples) == 12 and len({sample["score"] for sample in samples}) > 4
    for index, sample in enumerate(samples):
        assert sample["score"] == pytest.approx(scores[index, 0], abs=1e-4)


def test_all_weights_of_policy_and_critic_are_trained_and_go_on_exactly(chain, tiny_qwen3, tmp_path):
    """The critic starts as the reward model, the reference is the parent, a checkpoint holds what is trained."""
    flags = ("--reward_model_path", chain / "rm", "--use_peft", "False", "--max_steps", "5", "--save_steps", "3")
    flags = (*flags, "--save_strategy", "steps", "--eval_strategy", "no", "--learning_rate", "1e-4")
    ppo(chain, tmp_path / "whole", *flags, model=tiny_qwen3)
    stage = stage_of(tmp_path / "whole")
    assert stage["tuning"] == {"method": "full"} and stage["checks"]["reference_is_parent"]["passed"]
    assert stage["metrics"]["before"]["kl"] == pytest.approx(0, abs=1e-6) and stage["metrics"]["after"]["kl"] > 1e-6
    start, end = load_file(tiny_qwen3 / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert sum(not torch.equal(start[name], end[name]) for name in end) >= len(end) - 2
    critic = load_file(tmp_path / "whole" / "checkpoint-3" / "critic.safetensors")
    head = load_file(chain / "rm" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert 0 < (critic.pop("value_head.weight") - head).abs().max() < 1e-3  # three steps from the reward model's
    assert all((critic[name.removeprefix("model.")] != end[name]).any() for name in end if name.startswith("model."))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    ppo(chain, tmp_path / "again", *flags, "--resume_from_checkpoint", "True", model=tiny_qwen3)
    assert equal_runs(tmp_path / "whole", tmp_path / "again", "loss", "value_loss", "score", "kl")
    asked = (
        "--base_model",
        tmp_path / "whole",
        "--data_file",
        chain / "talks.jsonl",
        "--output_file",
        tmp_path / "out",
    )
    run_script("inference.py", *asked, "--max_new_tokens", "4")


# -- refusals --------------------------------------------------------------------------------------------------------


def refusal(chain, tmp_path, *flags):
    result = ppo(chain, tmp_path / "ppo", *flags, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert not (tmp_path / "ppo" / "stage.json").exists()
    return next(line for line in result.stderr.splitlines() if "error: " in line)


def test_an_untrained_reward_model_is_refused_unless_it_is_insisted_on(chain, tmp_path):
    shutil.copytree(chain / "rm", tmp_path / "rm")
    shutil.copytree(chain / "sft", tmp_path / "sft")
    stage = stage_of(tmp_path / "rm")
    stage["metrics"]["after"]["accuracy_low"] = 0.49
    (tmp_path / "rm" / "stage.json").write_text(json.dumps(stage))
    flags = ("--reward_model_path", tmp_path / "rm", "--max_steps", "1")
    assert "its scores may be chance" in refusal(chain, tmp_path, *flags)
    ppo(chain, tmp_path / "ppo", *flags, "--allow_untrained_reward_model", "True")


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_offload_is_refused_which_would_lose_the_gradients_of_the_policy(name):
    from transformers.integrations import HfDeepSpeedConfig

    from ppo_training import refuse_offload

    config = HfDeepSpeedConfig(str(ROOT / f"scripts/{name}.json"))
    args = SimpleNamespace(deepspeed=name, hf_deepspeed_config=config)
    if "offload" not in name:
        return refuse_offload(args)
    with pytest.raises(ValueError, match="offload would lose"):
        refuse_offload(args)


def test_what_is_no_reward_model_on_this_base_is_refused(chain, tmp_path, tiny_llama):
    assert "no reward model" in refusal(chain, tmp_path, "--reward_model_path", chain / "sft")
    assert "--reward_model_path is missing" in refusal(chain, tmp_path)
    for temperature in ("0", "1e-40"):
        flags = ("--reward_model_path", chain / "rm", "--temperature", temperature)
        assert "--temperature must be at least 0.0001" in refusal(chain, tmp_path, *flags)


@pytest.mark.parametrize(
    ("limit", "said"), [(("--max_kl", "1e-6"), "away from its reference"), (("--min_entropy", "9"), "has collapsed")]
)
def test_a_policy_that_runs_away_or_collapses_is_stopped_with_a_reason(chain, tmp_path, limit, said):
    line = refusal(
        chain, tmp_path, "--reward_model_path", chain / "rm", "--max_steps", "8", "--num_ppo_epochs", "1", *limit
    )
    assert "policy_is_sane failed" in line and said in line and "raise --kl_coef" in line
