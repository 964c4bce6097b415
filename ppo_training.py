r"""Proximal policy optimization: a policy learns from the scores of its own answers, with a critic, on one base model.

Reads   --model_name_or_path   the directory of the fine-tuning stage: policy, and frozen as the reference
        --reward_model_path    what reward_modeling.py wrote, best on the same base: the scores, and the critic's start
        --train_file_dir       prompts: conversations, questions or preferences (their answers are not looked at)
Writes  --output_dir           the policy's adapter, tokenizer, stage.json, samples.jsonl: all inference.py needs

Run it through scripts/run_ppo.sh, or:

    python ppo_training.py --model_name_or_path outputs/sft --reward_model_path outputs/rm \
        --train_file_dir data/finetune --output_dir outputs/ppo --do_train --do_eval

The algorithm is in stagekit/ppo.py, each equation with its number.
"""

import copy
import logging
import os
from dataclasses import dataclass, field

from peft import PeftModel

from stagekit import checks
from stagekit.arguments import (
    AnswerArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    PromptArguments,
    RolloutArguments,
    RunArguments,
    StageTrainingArguments,
    parse_args,
)
from stagekit.checkpoint import Source, base_fingerprint
from stagekit.memory import zero_stage
from stagekit.modeling import add_adapter, load_config, load_model, load_tokenizer, prepare_for_training
from stagekit.ppo import PPOTrainer, build_roles, build_separate_roles
from stagekit.rewards import load_rewards
from stagekit.rollouts import PromptCollator
from stagekit.run import check_memory, finish_run, load_prompts, plan_questions, run_stage, start_run
from stagekit.scoring import RewardModel, find_reward_model, load_reward_model
from stagekit.tokenization import prepare_chat

logger = logging.getLogger(__name__)


@dataclass
class PPOArguments:
    """What only this stage asks for; the symbols are those of arXiv:1707.06347 and arXiv:2009.01325."""

    _argument_group_name = "policy optimization"

    reward_model_path: str | None = field(
        default=None,
        metadata={
            "help": "Directory reward_modeling.py wrote. An adapter on the policy's base shares it: one base is in "
            "memory. A reward model of another base, size or architecture, or a whole one, is loaded beside it."
        },
    )
    allow_untrained_reward_model: bool = field(
        default=False, metadata={"help": "Go on although the reward model shows no accuracy above chance."}
    )
    num_mini_batches: int = field(
        default=1,
        metadata={"help": "Optimiser steps in one pass over a rollout; a rollout has as many global batches."},
    )
    num_ppo_epochs: int = field(default=2, metadata={"help": "Passes over a rollout."})
    cliprange: float = field(default=0.2, metadata={"help": "Epsilon of the clipped policy objective."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "How far a value may move from the rollout's in one rollout."}
    )
    vf_coef: float = field(default=0.5, metadata={"help": "Weight of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    kl_coef: float = field(default=0.05, metadata={"help": "Penalty on every token's KL to the reference."})
    kl_estimator: str = field(
        default="k1", metadata={"help": "How that KL is estimated from samples.", "choices": ["k1", "k2", "k3"]}
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "KL of a whole answer, in nats, towards which --kl_coef is driven."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Answers over which --kl_coef reacts to --target_kl."})
    max_kl: float = field(
        default=100.0, metadata={"help": "Stop when the mean KL of an answer to the reference passes this, in nats."}
    )
    min_entropy: float = field(
        default=0.01, metadata={"help": "Stop when the mean entropy of a token falls under this, in nats: a collapse."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Advantages of mean 0 and variance 1 in a rollout."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Rewards of variance 1 in a rollout."})
    score_clip: float | None = field(default=None, metadata={"help": "Limit scores to plus and minus this."})
    missing_eos_penalty: float = field(
        default=1.0, metadata={"help": "Taken from the score of an answer that did not end by itself."}
    )

    def __post_init__(self):
        for name in ("num_mini_batches", "num_ppo_epochs", "kl_horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be in [0, 1], got {getattr(self, name)}")


ARGUMENTS = (
    ModelArguments,
    DataArguments,
    PromptArguments,
    LoraArguments,
    RolloutArguments,
    PPOArguments,
    AnswerArguments,
    RunArguments,
    StageTrainingArguments,
)


def refuse_offload(training_args) -> None:
    """DeepSpeed's offload drops gradients: the optimiser gets those of a step's last micro-batch, the critic's."""
    if training_args.deepspeed and training_args.hf_deepspeed_config.is_offload():
        raise ValueError(
            f"--deepspeed {training_args.deepspeed}: offload would lose the policy's gradients, for policy and critic "
            "take turns; use scripts/zero2.json or zero3.json, or --load_in_4bit True"
        )


def shares_base(reward: Source, source: Source) -> bool:
    """Whether a reward model is an adapter on the policy's base."""
    if not reward.adapter or reward.merged != source.merged:
        return False
    same = os.path.realpath(reward.base) == os.path.realpath(source.base)
    return same or base_fingerprint(reward.base) == base_fingerprint(source.base)


def load_beside(reward: Source, why: str, longest: int, training_args) -> RewardModel:
    """Load a reward model that cannot be an adapter on the policy's base."""
    if zero_stage(training_args.deepspeed) == 3:
        raise ValueError("a reward model beside the policy must be whole on every process: use ZeRO-2, not ZeRO-3")
    logger.info("the reward model is loaded beside the policy: %s", why)
    model = load_reward_model(reward, training_args.use_cpu)
    if model.max_length < longest:
        raise ValueError(
            f"--reward_model_path {reward.directory} reads {model.max_length} tokens, and prompt and answer may have "
            f"{longest}; lower --max_prompt_length or --max_completion_length"
        )
    return model


def load_critic(reward: RewardModel | None, run, tokenizer, model_args, config):
    """The model a critic of its own starts from, and its head: the reward model if it reads the policy's tokens."""
    if reward is not None and reward.chat.tokenizer.get_vocab() == tokenizer.get_vocab():
        model = copy.deepcopy(reward.model)
        model = model.merge_and_unload() if isinstance(model, PeftModel) else model
        return model.float(), model.score.weight.detach()
    logger.info("the critic starts as the policy: there is no reward model that reads its tokens")
    return load_model(run.source, model_args, run.training_args, config).float(), None


@run_stage
def main():
    parsed = parse_args(*ARGUMENTS, description=__doc__)
    model_args, data_args, prompt_args, lora_args, rollout_args, ppo_args, answer_args, run_args, training_args = (
        parsed
    )
    if not ppo_args.reward_model_path and not rollout_args.reward_functions:
        raise ValueError(
            "--reward_model_path is missing: name the directory reward_modeling.py wrote, or --reward_functions"
        )
    refuse_offload(training_args)
    own = (data_args, prompt_args, rollout_args, ppo_args, answer_args)
    run = start_run("ppo", model_args, lora_args, run_args, training_args, *own)

    tokenizer = load_tokenizer(run.source, model_args)
    run.chat = prepare_chat(tokenizer, prompt_args.template_name)
    plan_questions(run, answer_args, rollout_args.max_prompt_length, rollout_args.max_completion_length)
    longest = rollout_args.max_prompt_length + rollout_args.max_completion_length
    config = load_config(run.source, model_args, longest=longest)
    rewards = load_rewards(rollout_args.reward_functions, rollout_args.reward_weights)
    reward = None
    if ppo_args.reward_model_path:
        reward = find_reward_model(ppo_args.reward_model_path, verify=training_args.process_index == 0)
        found = (reward.stage, reward.directory, ppo_args.allow_untrained_reward_model)
        run.checks.run("reward_model_is_trained", checks.reward_model_is_trained, *found)
    datasets = load_prompts(run, data_args, rollout_args.max_prompt_length)
    full = not lora_args.use_peft
    more = {"reference_model": full, "trained_models": 2 if full else 1}
    check_memory(run, config, model_args, lora_args, longest, **more)
    reward_model = None
    if reward and (full or not shares_base(reward, run.source)):
        why = "all weights are trained" if full else "another base"
        reward_model = load_beside(reward, why, longest, training_args)
    model = load_model(run.source, model_args, training_args, config)
    model, run.tuning = add_adapter(model, run.source, lora_args, training_args)
    if full:
        reference = load_model(run.source, model_args, training_args, config)
        critic = load_critic(reward_model, run, tokenizer, model_args, config)
        if training_args.activation_checkpointing:  # the Trainer sees to the policy's
            critic[0].gradient_checkpointing_enable(training_args.gradient_checkpointing_kwargs)
        roles = build_separate_roles(model, reference, *critic)
    else:
        roles = build_roles(model, run.source, None if reward_model else reward)
    prepare_for_training(model, training_args)
    trainer = PPOTrainer(
        run,
        roles,
        ppo_args,
        rollout_args,
        rewards,
        reward_model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=PromptCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    finish_run(trainer, run, tokenizer)


if __name__ == "__main__":
    main()
