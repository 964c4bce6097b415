"""Proximal policy optimization with a critic, its four roles on one base model.

The algorithm is that of arXiv:1707.06347 (PPO) as arXiv:2009.01325 and arXiv:2203.02155 apply it to language models;
"N+" marks details that arXiv:2403.17031 found to matter. The first half of the file is arithmetic on tensors and can
be read (and is tested) without a model; the second half is the roles and the trainer.

Shapes: a rollout holds `batch` prompts padded on the left, each with an answer padded on the right; everything about
answers is (batch, response_len), and `mask` is 1 on an answer's tokens up to and including the one that ends it.
"""

import contextlib
import copy
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler

from stagekit import checks
from stagekit.checkpoint import Source
from stagekit.memory import zero_stage
from stagekit.modeling import changed_tensors, copy_adapter, count_positions, fitting_config, takes_position_ids
from stagekit.rollouts import RolloutMixin, VLLMSampler, repetition
from stagekit.scoring import RewardModel, score_answers

# -- the algorithm ---------------------------------------------------------------------------------------------------


def kl_estimate(logps: torch.Tensor, reference_logps: torch.Tensor, kind: str) -> torch.Tensor:
    """Estimate KL(policy, reference) from sampled tokens, (batch, response_len).

    k1 is unbiased and may be negative; k2 is biased with low variance; k3 is unbiased and never negative
    (http://joschu.net/blog/kl-approx.html).
    """
    ratio = logps - reference_logps
    if kind == "k1":
        return ratio
    if kind == "k2":
        return ratio**2 / 2
    assert kind == "k3", kind
    return torch.expm1(-ratio) + ratio


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Reward of every token: minus its KL penalty, and the score of the answer at its last token.

    Section 2.1 of arXiv:2009.01325 (R = r - beta log pi/pi_ref), with the penalty paid where it arises.

    Args:
        scores: of whole answers, (batch,).
        kl, mask: (batch, response_len).
        kl_coef: beta.
    """
    rewards = -kl_coef * kl * mask
    last = mask.sum(dim=1).long() - 1
    rewards[torch.arange(len(rewards), device=rewards.device), last] += scores
    return rewards


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, (batch, response_len) each; an answer's end is terminal.

    Eq. 11 and 12 of arXiv:1707.06347 (Eq. 16 of arXiv:1506.02438): A_t = sum_l (gamma lam)^l delta_{t+l} with
    delta_t = r_t + gamma V_{t+1} - V_t; the returns are A_t + V_t.
    """
    advantages, following, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # Eq. 12
        following = (delta + gamma * lam * following) * inside  # Eq. 11
        next_value = values[:, t] * inside
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def whiten(values: torch.Tensor, mask: torch.Tensor, reduce, shift_mean: bool = True) -> torch.Tensor:
    """Scale masked values to variance 1, and mean 0 unless shift_mean is off, over the batches of all processes.

    Args:
        values, mask: (batch, response_len).
        reduce: function that sums a tensor over the processes.
        shift_mean: False keeps the mean, as N+ does for rewards.
    """
    total, count = reduce(torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)]))
    mean = total / count
    variance = reduce((((values - mean) ** 2) * mask).sum()) / count
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def policy_losses(logps, old_logps, advantages, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate objective of every token, negated, and whether clipping took its gradient.

    Eq. 7 of arXiv:1707.06347: -min(r A, clip(r, 1 - eps, 1 + eps) A) with r = pi / pi_old.
    """
    ratio = torch.exp(logps - old_logps)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def value_losses(values, old_values, returns, clip: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error of every value, and whether clipping took its gradient.

    Clipped as N+ (detail 13 of the 37 details of PPO): values move at most `clip` from those of the rollout.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    return torch.maximum(plain, clipped) / 2, clipped > plain


@dataclass
class KLController:
    """The coefficient of the KL penalty: fixed, or driven towards a target (Section 2.2 of arXiv:1909.08593).

    Attributes:
        coef: the coefficient now.
        target: KL of a whole answer in nats; None keeps the coefficient.
        horizon: answers over which it reacts.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, num_answers: int) -> None:
        """React to the mean KL of num_answers answers."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * num_answers / self.horizon


# -- roles -----------------------------------------------------------------------------------------------------------


class Roles(nn.Module):
    """Policy, reference, critic and reward model behind one forward(role, ...).

    A role is an adapter on the one base (with a head, if it scores):

        policy      "default"   trained
        reference   "ref"       frozen copy of what the policy starts from; none if that is the base itself
        critic      "critic"    trained; starts as the reward model, or as the policy where there is none on this base
        reward      "reward"    frozen; none if scores come from elsewhere

    Where all weights are trained there is nothing to share, and reference and critic are models apart.

    The heads stand inside this module so that data-parallel training sees them used in forward(). One forward and
    backward pass has one role: under activation checkpointing the backward pass computes with whichever adapter is
    active then.
    """

    def __init__(self, model, heads: dict[str, nn.Linear], apart: dict[str, nn.Module] | None = None):
        super().__init__()
        self.model, self.heads, self.apart = model, nn.ModuleDict(heads), nn.ModuleDict(apart or {})
        self.config = unwrapped(model).config
        self.has_positions = takes_position_ids(self.config)
        self._hf_peft_config_loaded = isinstance(model, PeftModel)  # a Trainer asks a quantised model for it
        present = getattr(model, "peft_config", {})
        names = {"policy": "default", "reference": "ref", "critic": "critic", "reward": "reward"}
        self.adapters = {role: name if name in present else None for role, name in names.items()}
        self.activate("policy")

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a Trainer asks of a model is the policy's
            return getattr(super().__getattr__("model"), name)

    def compare_reference(self, source: Source) -> tuple[list[str], int]:
        """See modeling.changed_tensors; there is nothing to compare where the base is the reference."""
        name = self.adapters["reference"]
        return changed_tensors(self.model, name, source.adapter) if name else ([], 0)

    def activate(self, role: str):
        """Make the base compute as this role, and return it; or return the role's own model."""
        if role in self.apart:
            return self.apart[role]
        if not isinstance(self.model, PeftModel):
            assert role == "policy", role
            return self.model
        name = self.adapters[role]
        if name is None:
            assert role == "reference", role
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(name)
        # set_adapter() freezes the others; both trained adapters must stay trainable, whichever is active
        for names, trained in ((("policy", "critic"), True), (("reference", "reward"), False)):
            found = [self.adapters[other] for other in names if self.adapters[other]]
            if found:
                self.model.set_requires_grad(found, trained)
        return self.model

    def forward(self, role: str, input_ids, attention_mask, num_tokens: int, temperature: float = 1.0):
        """Compute what a role says about the last num_tokens tokens.

        Args:
            role: policy, reference, critic or reward.
            input_ids, attention_mask: (batch, seq_len), prompts padded on the left.
            num_tokens: response_len.
            temperature: of the sampler; log-probabilities are those of the distribution sampled from.

        Returns:
            policy, reference: (log-probabilities, entropies), (batch, num_tokens) each.
            critic: values of the states before each token, (batch, num_tokens).
            reward: scores at each token, (batch, num_tokens).
        """
        model = self.activate(role)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.has_positions:
            inputs["position_ids"] = count_positions(attention_mask)
        if role in ("policy", "reference"):
            logits = model(**inputs).logits[:, -num_tokens - 1 : -1].float() / temperature
            all_logps = logits.log_softmax(dim=-1)
            logps = all_logps.gather(-1, input_ids[:, -num_tokens:].unsqueeze(-1)).squeeze(-1)
            return logps, -(all_logps.exp() * all_logps).sum(dim=-1)
        hidden = backbone(model)(**inputs).last_hidden_state
        seen = hidden[:, -num_tokens - 1 : -1] if role == "critic" else hidden[:, -num_tokens:]
        head = self.heads[role]
        return head(seen.to(head.weight.dtype)).squeeze(-1).float()


def unwrapped(model):
    """The model below its adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model):
    """The layers below a model's head."""
    model = unwrapped(model)
    return getattr(model, model.base_model_prefix, model)


def mount_adapter(model: PeftModel, directory: str, name: str) -> torch.Tensor | None:
    """Put a stage's adapter on the policy's base under another name; return the weight of its score head, if any.

    The layers of a reward model's adapter are those of the causal model: only its head is not, which is read apart.
    """
    config = fitting_config(PeftConfig.from_pretrained(directory), model.get_base_model())
    state = load_peft_weights(directory, device="cpu")
    heads = [key for key in state if key.endswith("score.weight")]
    weight = state.pop(heads[0]) if heads else None
    model.add_adapter(name, config)
    unexpected = set_peft_model_state_dict(model, state, adapter_name=name).unexpected_keys
    if unexpected:
        raise ValueError(f"{directory}: this adapter does not fit the policy's base: {unexpected[0]}")
    return weight


def build_roles(model: PeftModel, source: Source, reward: Source | None) -> Roles:
    """Put reference, critic and reward model beside the policy.

    Args:
        model: the policy, its "default" adapter trained.
        source: what the policy starts from.
        reward: reward model on the same base; None when scores come from elsewhere.
    """
    heads = {}
    if source.adapter:
        model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
        copy_adapter(model, "default", "ref")
    if reward is not None:
        heads["reward"] = linear_head(mount_adapter(model, reward.adapter, "reward")).requires_grad_(False)
        heads["critic"] = linear_head(mount_adapter(model, reward.adapter, "critic"))
    else:
        model.add_adapter("critic", copy.deepcopy(model.peft_config["default"]))
        copy_adapter(model, "default", "critic")
        heads["critic"] = linear_head(torch.zeros(1, model.config.get_text_config().hidden_size))
    return Roles(model, heads)


def build_separate_roles(policy, reference, critic, critic_head: torch.Tensor | None) -> Roles:
    """Put models of their own beside a policy all of whose weights are trained.

    Args:
        policy, reference: causal models; the reference is what the policy starts from.
        critic: a reward model, or another copy of the policy; its layers are trained too.
        critic_head: weight of the reward model's score head, (1, hidden); None starts from 0.
    """
    if critic_head is None:
        critic_head = torch.zeros(1, policy.config.get_text_config().hidden_size)
    layers = backbone(critic).requires_grad_(True)
    apart = {"reference": reference.eval().requires_grad_(False), "critic": layers}
    return Roles(policy, {"critic": linear_head(critic_head)}, apart)


def linear_head(weight: torch.Tensor) -> nn.Linear:
    """A head without bias from its weight, (1, hidden)."""
    head = nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data.copy_(weight.float())
    return head


# -- rollouts --------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Answers of the policy and all that the updates need to know about them; see the module's shapes.

    Attributes:
        input_ids, attention_mask: (batch, prompt_len + response_len).
        mask, logps, values, advantages, returns: (batch, response_len), of the policy that sampled.
        order: (num_ppo_epochs, batch), which rows are trained on when.
        num_tokens: (num_ppo_epochs, minibatches), tokens of each minibatch over all processes.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor
    logps: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    order: torch.Tensor
    num_tokens: torch.Tensor


ROLLOUT_FILE = "rollout_{rank}.pt"
CRITIC_FILE = "critic.safetensors"
HEAD = "value_head.weight"  # its name in there


class PPOTrainer(RolloutMixin, Trainer):
    """Trains policy and critic on rollouts of the policy.

    transformers' loop sees micro-batches; this trainer decides what is in one. A rollout of
    per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches prompts a process is made first. Then
    each of num_ppo_epochs passes over it takes num_mini_batches optimiser steps, and each step consists of
    gradient_accumulation_steps micro-batches, seen once as the policy and once as the critic.

    Scores come from the reward role, from a reward model of its own (`reward_model`), or from functions.
    """

    def __init__(
        self,
        run,
        roles: Roles,
        ppo_args,
        rollout_args,
        rewards: list,
        reward_model: RewardModel | None = None,
        **kwargs,
    ):
        args = kwargs["args"]
        self.ppo, self.reward_model = ppo_args, reward_model
        self.chunks = args.gradient_accumulation_steps * ppo_args.num_mini_batches  # micro-batches of a rollout
        self.chunks_per_step = args.gradient_accumulation_steps
        args.gradient_accumulation_steps *= 2  # policy and critic
        _double_accumulation(args)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # a pass uses the parameters of one role
        for module in roles.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the ratio of new and old probabilities must say what training changed, nothing else
        super().__init__(run, rollout_args, rewards, model=roles, **kwargs)
        self.kl = KLController(ppo_args.kl_coef, ppo_args.target_kl, ppo_args.kl_horizon)
        self.rollout: Rollout | None = None
        self.micro: int | None = None  # micro-batches seen so far
        self.vllm = VLLMSampler(self, roles.model) if rollout_args.use_vllm else None

    @property
    def roles(self) -> Roles:
        """The roles without the wrappers of data-parallel training."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def saved_model(self):
        """What a stage delivers: the policy."""
        return self.roles.model

    # -- which prompts --

    def _rollout_size(self):
        return self._train_batch_size * self.chunks

    def get_train_dataloader(self):
        """Batches of prompts for a whole rollout, each repeated for all the micro-batches that are made from it."""
        size = self._rollout_size() * self.args.world_size
        if len(self.train_dataset) < size:
            raise ValueError(
                f"{len(self.train_dataset)} prompts are fewer than one rollout takes ({size}); lower "
                "--per_device_train_batch_size, --gradient_accumulation_steps or --num_mini_batches"
            )
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._rollout_size(),
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset=None):
        repeats = 2 * self.chunks * self.ppo.num_ppo_epochs
        size = self._rollout_size() * self.args.world_size
        return RepeatSampler(self.train_dataset, 1, batch_size=size, repeat_count=repeats, seed=self.args.seed)

    # -- rollouts --

    @contextlib.contextmanager
    def policy_to_sample(self):
        """The policy, with a cache, and under ZeRO-3 with its weights in one place."""
        sharded = zero_stage(self.args.deepspeed) == 3
        whole = unwrap_model_for_generation(self.model_wrapped, self.accelerator) if sharded else None
        with whole or contextlib.nullcontext(self.roles) as roles:
            model = roles.activate("policy")
            cache, model.config.use_cache = model.config.use_cache, True
            yield model
            model.config.use_cache = cache

    def _compute(self, role, input_ids, attention_mask, num_tokens):
        """See Roles.forward; under DeepSpeed through its engine, which gathers what ZeRO-3 shards."""
        roles = self.model_wrapped if self.is_deepspeed_enabled else self.roles
        return roles(role, input_ids, attention_mask, num_tokens, self.rollout_args.temperature)

    def policy_logps(self, input_ids, attention_mask, num_tokens):
        """Log-probabilities of the last num_tokens tokens, (batch, num_tokens)."""
        return self._compute("policy", input_ids, attention_mask, num_tokens)[0]

    @torch.no_grad()
    def _in_parts(self, role, input_ids, attention_mask, num_tokens):
        """A role's numbers for a whole rollout, a few rows at a time."""
        size, found = self.args.per_device_eval_batch_size, []
        for start in range(0, len(input_ids), size):
            part = slice(start, start + size)
            out = self._compute(role, input_ids[part], attention_mask[part], num_tokens)
            found.append(out if isinstance(out, tuple) else (out,))
        return [torch.cat(column) for column in zip(*found, strict=True)]

    def answer_prompts(self, inputs: dict, greedy: bool) -> dict[str, torch.Tensor]:
        """Answer prompts and judge the answers: tokens, log-probabilities, KL, scores.

        Args:
            inputs: what the collator returns: input_ids, attention_mask, rows.
            greedy: take the likeliest token (held-out prompts) instead of sampling.
        """
        prompts, prompt_mask, sampled = inputs["input_ids"], inputs["attention_mask"], None
        if self.vllm and not greedy:
            self.roles.activate("policy")
            answers, sampled = self.vllm(inputs["rows"], self.state.global_step)
        else:
            answers = self.sample_answers(prompts, prompt_mask, greedy)
        answers, mask, stopped = self.trim_answers(answers)
        width = answers.shape[1]
        ids, attention = torch.cat([prompts, answers], dim=1), torch.cat([prompt_mask, mask], dim=1)
        logps, entropies = self._in_parts("policy", ids, attention, width)
        if sampled is not None:
            compared = (self.model, sampled[:, :width], logps, mask, True)
            self.run.checks.run("rollout_is_policy", checks.sampler_is_policy, *compared, quiet=True)
        reference, _ = self._in_parts("reference", ids, attention, width)
        texts = self.answer_texts(answers, mask)
        judged = self.judge(inputs["rows"], texts)
        scores = self.weigh(judged, len(ids)) + self._model_scores(
            inputs["rows"], ids, attention, texts, mask, stopped
        )
        if self.ppo.score_clip is not None:
            scores = scores.clamp(-self.ppo.score_clip, self.ppo.score_clip)
        scores = scores - self.ppo.missing_eos_penalty * (~stopped)
        return {
            **{"input_ids": ids, "attention_mask": attention, "answers": answers, "mask": mask, "stopped": stopped},
            **{"logps": logps, "reference_logps": reference, "entropies": entropies, "scores": scores},
            **{"texts": texts, "judged": judged},
        }

    def _model_scores(self, rows, ids, attention, texts, mask, stopped):
        """Scores of the answers by the reward model, read at the end-of-turn token; 0 without one.

        An answer that was cut has no end to be scored at: the end-of-turn is put behind it, and the penalty says so.
        """
        if self.reward_model is not None:
            items = []
            for row, text in zip(rows, texts, strict=True):
                shown = json.loads(row["conversation"])
                items.append((shown["messages"], [[{"role": "assistant", "content": text}]], shown["tools"]))
            size = self.args.per_device_eval_batch_size
            found = dict(score_answers(self.reward_model, items, self.reward_model.max_length, size))
            scores = [found[index, 0] for index in range(len(items))]
            if None in scores:
                raise ValueError(
                    f"an answer is longer than the {self.reward_model.max_length} tokens the reward model reads; "
                    "lower --max_completion_length"
                )
            return torch.tensor(scores, device=ids.device)
        if "reward" not in self.roles.heads:
            return torch.zeros(len(ids), device=ids.device)
        longer = torch.cat([ids, ids.new_full((len(ids), 1), self.processing_class.pad_token_id)], dim=1)
        seen = torch.cat([attention, attention.new_zeros((len(ids), 1))], dim=1)
        end = ids.shape[1] - mask.shape[1] + mask.sum(dim=1)  # column behind the answer
        every = torch.arange(len(ids), device=ids.device)
        last = torch.where(stopped, end - 1, end)
        longer[every, last] = self.chat.stop_ids[0]  # one way of ending, whichever stop token the policy chose
        seen[every, last] = 1
        scores = self._in_parts("reward", longer, seen, mask.shape[1] + 1)[0]
        return scores[every, last - (ids.shape[1] - mask.shape[1])]

    def _sum(self, tensor):
        return self.accelerator.reduce(tensor.clone(), "sum") if self.args.world_size > 1 else tensor

    @torch.no_grad()
    def make_rollout(self, inputs: dict) -> Rollout:
        """Let the policy answer a batch of prompts, and work out rewards, advantages and returns."""
        found = self.answer_prompts(inputs, greedy=False)
        mask, ids, attention = found["mask"], found["input_ids"], found["attention_mask"]
        values = self._in_parts("critic", ids, attention, mask.shape[1])[0] * mask
        kl = kl_estimate(found["logps"], found["reference_logps"], self.ppo.kl_estimator)
        rewards = token_rewards(found["scores"], kl, mask, self.kl.coef)
        if self.ppo.whiten_rewards:
            rewards = whiten(rewards, mask, self._sum, shift_mean=False)  # N+ detail
        advantages, returns = generalized_advantages(rewards, values, mask, self.ppo.gamma, self.ppo.lam)
        if self.ppo.whiten_advantages:
            advantages = whiten(advantages, mask, self._sum)
        epochs, steps = self.ppo.num_ppo_epochs, self.ppo.num_mini_batches
        order = torch.stack([torch.randperm(len(ids)) for _ in range(epochs)])
        lengths = mask.sum(dim=1).cpu()
        num_tokens = torch.stack([lengths[row].view(steps, -1).sum(dim=1) for row in order]).float().to(ids.device)
        num_tokens = self._sum(num_tokens).cpu()
        rollout = Rollout(ids, attention, mask, found["logps"], values, advantages, returns, order, num_tokens)
        self._observe_rollout(inputs, found, kl, values, returns)
        return rollout

    def _observe_rollout(self, inputs, found, kl, values, returns):
        """Note what is logged about a rollout, adapt the KL coefficient, stop when the run has gone astray."""
        mask, ones = found["mask"], torch.ones_like(found["scores"])
        k1 = ((found["logps"] - found["reference_logps"]) * mask).sum(dim=1)
        lengths = mask.sum(dim=1).float()
        entropy = (found["entropies"] * mask).sum(dim=1) / lengths
        repeated = torch.tensor(
            [repetition(row[own.bool()].tolist()) for row, own in zip(found["answers"], mask, strict=True)]
        )
        answers = {
            "score": found["scores"],
            "kl": k1,
            "reward": found["scores"] - self.kl.coef * (kl * mask).sum(dim=1),
            "entropy": entropy,
            "length": lengths,
            "stopped": found["stopped"].float(),
            "repetition": repeated.to(ones.device),
            **found["judged"],
        }
        self.observe(answers, ones)
        sums = torch.stack([k1.sum(), entropy.sum(), (returns * mask).sum(), ((returns**2) * mask).sum()])
        errors = (((returns - values) * mask) ** 2).sum()
        totals = self._sum(torch.stack([*sums, errors, mask.sum().float(), ones.sum()])).tolist()
        kl_sum, entropy_sum, return_sum, return_squares, error_sum, tokens, count = totals
        variance = return_squares / tokens - (return_sum / tokens) ** 2
        self.observe({"explained_variance": ones * (1 - error_sum / tokens / max(variance, 1e-8))}, ones)
        self.observe({"kl_coef": ones * self.kl.coef}, ones)
        state = (kl_sum / count, self.ppo.max_kl, entropy_sum / count, self.ppo.min_entropy)
        self.run.checks.run("policy_is_sane", checks.policy_is_sane, *state, quiet=True)
        self.kl.update(kl_sum / count, int(count))
        asked = [row["prompt"] for row in inputs["rows"][:4]]
        self.note_samples(asked, found["texts"][:4], found["scores"][:4].tolist())

    # -- updates --

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Turn the prompts of this micro-batch into its part of the rollout, as policy or critic."""
        if self.micro is None:
            self.micro = self.state.global_step * self.args.gradient_accumulation_steps
        at = self.micro % (2 * self.chunks * self.ppo.num_ppo_epochs)
        self.at_rollout_start = at == 0
        if self.at_rollout_start:
            was_training = model.training
            model.eval()
            with self.compute_loss_context_manager():
                self.rollout = self.make_rollout(self._prepare_inputs(inputs))
            model.train(was_training)
        if self.micro % self.args.gradient_accumulation_steps == 0:
            self._forget_gradients()
        self.micro += 1
        return super().training_step(model, self._micro_batch(at), num_items_in_batch)

    def _forget_gradients(self):
        """ZeRO-3 overwrites the last step's gradients in a step's first micro-batch, which the critic is not in."""
        if zero_stage(self.args.deepspeed) == 3:
            self.deepspeed.optimizer.grad_partitions_flat_buffer.zero_()

    def _micro_batch(self, at):
        """The part of the rollout for micro-step `at`."""
        epoch, within = divmod(at, 2 * self.chunks)
        chunk, role = divmod(within, 2)
        rows = self.rollout.order[epoch].view(self.chunks, -1)[chunk].to(self.rollout.mask.device)
        part = {
            item.name: getattr(self.rollout, item.name)[rows]
            for item in fields(Rollout)
            if item.name not in ("order", "num_tokens")
        }
        total = self.rollout.num_tokens[epoch, chunk // self.chunks_per_step]
        return {**part, "role": ("policy", "critic")[role], "num_tokens": total.to(rows.device)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum over the tokens of this micro-batch / tokens of the global minibatch, however that is split."""
        mask, width = inputs["mask"], inputs["mask"].shape[1]
        temperature = self.rollout_args.temperature
        out = model(inputs["role"], inputs["input_ids"], inputs["attention_mask"], width, temperature)
        share = self.accelerator.num_processes / inputs["num_tokens"]
        lengths = mask.sum(dim=1).float()

        def mean(values):
            return (values * mask).sum(dim=1) / lengths

        if inputs["role"] == "critic":
            losses, clipped = value_losses(out, inputs["values"], inputs["returns"], self.ppo.cliprange_value)
            self.observe({"value_loss": mean(losses), "value_clipped": mean(clipped.float())}, lengths)
            return self.ppo.vf_coef * (losses * mask).sum() * share
        logps, entropies = out
        losses, clipped = policy_losses(logps, inputs["logps"], inputs["advantages"], self.ppo.cliprange)
        ratio = mean(torch.exp(logps.detach() - inputs["logps"]))
        shown = {"policy_loss": mean(losses), "policy_clipped": mean(clipped.float()), "ratio": ratio}
        self.observe(shown, lengths)
        return ((losses - self.ppo.entropy_coef * entropies) * mask).sum() * share

    def prove(self, model, inputs):
        """The policy that is trained is the policy that sampled: ratio 1 before the first step."""
        batch = (inputs["input_ids"], inputs["attention_mask"], inputs["mask"].shape[1])
        with torch.no_grad():
            logps, reference = (self._compute(role, *batch)[0] for role in ("policy", "reference"))
        mask = inputs["mask"]
        self.check_sampler(model)
        if self.at_rollout_start:  # a run that goes on in the middle of a rollout has trained on it already
            found = (model, logps, inputs["logps"], mask)
            self.run.checks.run("rollout_is_policy", checks.rollout_is_policy, *found)
        policy, reference = ((values * mask).sum(dim=1) for values in (logps, reference))
        compared = self.roles.compare_reference(self.run.source)
        findings = (model, policy, reference, None, 0.0, *compared, self.run.resume is not None)
        self.run.checks.run("reference_is_parent", checks.reference_is_parent, *findings)

    # -- held-out prompts --

    def measure(self, model, inputs):
        """Score, KL, length and whether it stopped, of a greedy answer to each held-out prompt."""
        found = self.answer_prompts(inputs, greedy=True)
        mask = found["mask"]
        kl = (kl_estimate(found["logps"], found["reference_logps"], "k3") * mask).sum(dim=1)
        rows = {"score": found["scores"], "kl": kl, "length": mask.sum(dim=1), "stopped": found["stopped"]}
        return {**rows, **found["judged"]}, torch.ones_like(found["scores"])

    # -- checkpoints --

    def _save(self, output_dir=None, state_dict=None):
        """Save the policy as any stage saves its model; in checkpoints also the critic."""
        if not self.args.should_save:
            return
        directory, policy = Path(output_dir or self.args.output_dir), self.roles.activate("policy")
        adapter = {"selected_adapters": ["default"]} if isinstance(policy, PeftModel) else {}
        policy.save_pretrained(directory, state_dict=self.saved_state(state_dict), **adapter)
        torch.save(self.args, directory / "training_args.bin")
        if directory.name.startswith("checkpoint-"):
            state = self._critic_state(state_dict or self.roles.state_dict())
            save_file({name: tensor.detach().clone() for name, tensor in state.items()}, directory / CRITIC_FILE)

    def saved_state(self, state):
        """The policy's tensors, under its own names."""
        return state and {
            name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")
        }

    def _critic_state(self, state):
        if "critic" in self.roles.apart:
            prefix = "apart.critic."
            layers = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        else:
            policy = self.saved_state(state)
            layers = get_peft_model_state_dict(self.roles.model, state_dict=policy, adapter_name="critic")
        return {HEAD: state["heads.critic.weight"], **layers}

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load policy and critic; reference and reward model are the run's own."""
        directory = Path(resume_from_checkpoint)
        critic = load_file(directory / CRITIC_FILE)
        self.roles.heads["critic"].load_state_dict({"weight": critic.pop(HEAD)})
        if "critic" in self.roles.apart:
            self.roles.apart["critic"].load_state_dict(critic)
            super()._load_from_checkpoint(resume_from_checkpoint, self.roles.model)
            return
        set_peft_model_state_dict(self.roles.model, critic, adapter_name="critic")
        policy = load_peft_weights(str(directory), device="cpu")
        set_peft_model_state_dict(self.roles.model, policy, adapter_name="default")

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        state = {"rollout": None if self.rollout is None else vars(self.rollout), "kl_coef": self.kl.coef}
        torch.save(state, Path(output_dir, ROLLOUT_FILE.format(rank=self.args.process_index)))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self.rollout is None:
            path = Path(checkpoint, ROLLOUT_FILE.format(rank=self.args.process_index))
            state = send_to_device(torch.load(path, map_location="cpu", weights_only=True), self.args.device)
            self.kl.coef = state["kl_coef"]
            self.rollout = None if state["rollout"] is None else Rollout(**state["rollout"])


def _double_accumulation(args):
    """DeepSpeed was told the number of micro-batches of a step when the arguments were read."""
    config = getattr(args.hf_deepspeed_config, "config", None) if getattr(args, "hf_deepspeed_config", None) else None
    if config is not None:
        config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        config["train_batch_size"] *= 2
