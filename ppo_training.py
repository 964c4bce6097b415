r"""Proximal policy optimization: a policy learns from the scores of its own answers, with a critic, on one base model.

Reads   --model_name_or_path   the directory of the fine-tuning stage: policy, and frozen as the reference
        --reward_model_path    what reward_modeling.py wrote on the same base: the scores, and where the critic starts
        --train_file_dir       prompts: conversations, questions or preferences (their answers are not looked at)
Writes  --output_dir           the policy's adapter, tokenizer, stage.json, samples.jsonl: all inference.py needs

Run it through scripts/run_ppo.sh, or:

    python ppo_training.py --model_name_or_path outputs/sft --reward_model_path outputs/rm \
        --train_file_dir data/finetune --output_dir outputs/ppo --do_train --do_eval

The algorithm is in stagekit/ppo.py, each equation with its number.
"""

import os
from dataclasses import dataclass, field

from stagekit import checks
from stagekit.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    PromptArguments,
    RunArguments,
    StageTrainingArguments,
    parse_args,
)
from stagekit.checkpoint import Source, base_fingerprint, resolve
from stagekit.memory import zero_stage
from stagekit.modeling import (
    add_adapter,
    is_reward_model,
    load_config,
    load_model,
    load_tokenizer,
    prepare_for_training,
)
from stagekit.ppo import PPOTrainer, PromptCollator, build_roles
from stagekit.prompts import accept_prompt, tokenize_prompts
from stagekit.rewards import load_rewards
from stagekit.run import check_memory, finish_run, load_data, run_stage, start_run
from stagekit.tokenization import prepare_chat


@dataclass
class PPOArguments:
    """What only this stage asks for; the symbols are those of arXiv:1707.06347 and arXiv:2009.01325."""

    _argument_group_name = "policy optimization"

    reward_model_path: str | None = field(
        default=None,
        metadata={
            "help": "Directory reward_modeling.py wrote, on the same base as the policy: one base is in memory."
        },
    )
    reward_functions: str | None = field(
        default=None,
        metadata={
            "help": "Functions that score answers, beside a reward model or without one: names of stagekit/rewards.py "
            "with commas (accuracy, format, language, repetition, length, math), or path/to/file.py:function."
        },
    )
    reward_weights: str | None = field(
        default=None, metadata={"help": "One number for each function; default 1 each."}
    )
    allow_untrained_reward_model: bool = field(
        default=False, metadata={"help": "Go on although the reward model shows no accuracy above chance."}
    )
    max_prompt_length: int = field(
        default=512,
        metadata={"help": "Longest prompt in tokens; the oldest exchanges give way, longer ones are left out."},
    )
    max_completion_length: int = field(default=256, metadata={"help": "Longest answer in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampler; 1 samples from the policy itself."})
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
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Advantages of mean 0 and variance 1 in a rollout."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Rewards of variance 1 in a rollout."})
    score_clip: float | None = field(default=None, metadata={"help": "Limit scores to plus and minus this."})
    missing_eos_penalty: float = field(
        default=1.0, metadata={"help": "Taken from the score of an answer that did not end by itself."}
    )
    show_samples: int = field(default=2, metadata={"help": "Answers shown at every log; all are in samples.jsonl."})

    def __post_init__(self):
        if not self.reward_model_path and not self.reward_functions:
            raise ValueError(
                "--reward_model_path is missing: name the directory reward_modeling.py wrote, or --reward_functions"
            )
        for name in ("max_prompt_length", "max_completion_length", "num_mini_batches", "num_ppo_epochs", "kl_horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"--temperature must be positive, got {self.temperature}; greedy answers explore nothing")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be in [0, 1], got {getattr(self, name)}")


ARGUMENTS = (
    ModelArguments,
    DataArguments,
    PromptArguments,
    LoraArguments,
    PPOArguments,
    RunArguments,
    StageTrainingArguments,
)


def find_reward_model(path: str, source: Source, model_args) -> Source:
    """Find the reward model, which must stand on the base of the policy.

    Raises:
        ValueError: it is not there, writes answers, or was trained on another base.
    """
    if not os.path.isdir(path):
        raise ValueError(f"--reward_model_path {path}: no such directory; sh scripts/run_rm.sh trains a reward model")
    reward = resolve(path)
    if not is_reward_model(reward, load_config(reward, model_args, scores=True)):
        raise ValueError(f"--reward_model_path {path} is no reward model (it writes answers)")
    same = base_fingerprint(reward.base) == base_fingerprint(source.base) and reward.merged == source.merged
    if not same or not reward.adapter:
        raise ValueError(
            f"--reward_model_path {path} must be an adapter on the policy's base, {source.base}, and is one on "
            f"{reward.base}; train it from the same stage"
        )
    return reward


@run_stage
def main():
    parsed = parse_args(*ARGUMENTS, description=__doc__)
    model_args, data_args, prompt_args, lora_args, ppo_args, run_args, training_args = parsed
    if not lora_args.use_peft or zero_stage(training_args.deepspeed) == 3:
        raise ValueError(
            "PPO puts its roles on one base as adapters, so it needs --use_peft True, and a base that is whole on "
            "every process: ZeRO-2 instead of ZeRO-3"
        )
    own = (data_args, prompt_args, ppo_args)
    run = start_run("ppo", model_args, lora_args, run_args, training_args, *own)

    tokenizer = load_tokenizer(run.source, model_args)
    run.chat = chat = prepare_chat(tokenizer, prompt_args.template_name)
    longest = ppo_args.max_prompt_length + ppo_args.max_completion_length
    config = load_config(run.source, model_args, longest=longest)
    functions = load_rewards(ppo_args.reward_functions, ppo_args.reward_weights) if ppo_args.reward_functions else []
    reward = None
    if ppo_args.reward_model_path:
        reward = find_reward_model(ppo_args.reward_model_path, run.source, model_args)
        found = (reward.stage, reward.directory, ppo_args.allow_untrained_reward_model)
        run.checks.run("reward_model_is_trained", checks.reward_model_is_trained, *found)

    def tokenize(rows, ledger, **progress):
        return tokenize_prompts(rows, ledger, chat, ppo_args.max_prompt_length, **progress)

    datasets, _ = load_data(run, data_args, accept_prompt, tokenize, tokenizer, ppo_args.max_prompt_length)
    run.checks.run("no_forged_turns", checks.no_forged_turns, chat)
    check_memory(run, config, model_args, lora_args, longest)
    model = load_model(run.source, model_args, training_args, config)
    model, run.tuning = add_adapter(model, run.source, lora_args, training_args)
    prepare_for_training(model, training_args)
    trainer = PPOTrainer(
        run,
        build_roles(model, run.source, reward),
        ppo_args,
        functions,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=PromptCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    finish_run(trainer, run, tokenizer)


if __name__ == "__main__":
    main()
