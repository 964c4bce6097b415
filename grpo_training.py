r"""Group relative policy optimization: a policy learns from how its answers to one prompt compare (arXiv:2402.03300).

Reads   --model_name_or_path   the directory of the fine-tuning stage: policy, and reference where --beta > 0
        --train_file_dir       questions with the answer that counts as right ({"question", "answer"}, data/grpo)
        --reward_functions     what judges an answer: accuracy, format, ... or path/to/file.py:function
Writes  --output_dir           the policy's adapter, tokenizer, stage.json, samples.jsonl: all inference.py needs

Run it through scripts/run_grpo.sh, or:

    python grpo_training.py --model_name_or_path outputs/sft --train_file_dir data/grpo \
        --validation_file_dir data/eval/verifiable.jsonl --output_dir outputs/grpo --do_train --do_eval \
        --reward_functions accuracy,format --reward_weights 1,0.2
"""

import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from trl import GRPOConfig, GRPOTrainer
from trl.models import prepare_deepspeed
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import add_fused_lm_head, use_adapter

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
from stagekit.modeling import (
    add_adapter,
    copy_adapter,
    count_positions,
    load_config,
    load_model,
    load_tokenizer,
    prepare_for_training,
    takes_position_ids,
)
from stagekit.rewards import load_rewards
from stagekit.rollouts import PromptCollator, RolloutMixin
from stagekit.run import check_memory, finish_run, load_prompts, plan_questions, run_stage, start_run
from stagekit.tokenization import prepare_chat
from stagekit.trainers import ReferenceMixin, add_settings, exact_adapters

logger = logging.getLogger(__name__)

LOSSES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
BUFFER_FILE = "answers_{rank}.pt"
WARNINGS = {  # TRL's metric, a share -> what more than half of a round means
    "frac_reward_zero_std": "prompts have answers of one score, from which nothing is learnt: ask easier or harder "
    "questions, raise --num_generations or --temperature",
    "completions/clipped_ratio": "answers were cut: raise --max_completion_length, or start from a policy that ends",
}


@dataclass
class GRPOArguments:
    """What only this stage asks for; the symbols are those of arXiv:2402.03300."""

    _argument_group_name = "group relative policy optimization"

    num_generations: int = field(default=8, metadata={"help": "G: answers to a prompt, which are compared."})
    beta: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL (k3, times the ratio: arXiv:2512.02556) to the reference, which is the parent's "
            "policy; 0 keeps none in memory."
        },
    )
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "How tokens are averaged: grpo over each answer (favours short ones), dapo over all tokens of the "
            "batch, dr_grpo by a constant, bnpo over a micro-batch's tokens; cispo, sapo, luspo, vespo see TRL.",
            "choices": LOSSES,
        },
    )
    epsilon: float = field(default=0.2, metadata={"help": "How far the ratio may fall, and rise, before clipping."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "How far it may rise, if other than --epsilon (arXiv:2503.14476 takes 0.28)."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over a batch of answers."})
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Micro-batches made from one round of sampling; default --gradient_accumulation_steps: new "
            "answers for every update."
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "Divide advantages by the deviation in a group or in the batch, or not (arXiv:2503.20783).",
            "choices": ["group", "batch", "none"],
        },
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "Normalise the sum of several rewards, or each of them before the sum (arXiv:2601.05242).",
            "choices": ["sum_then_normalize", "normalize_then_sum"],
        },
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "Ratio of a token, or of a whole answer (arXiv:2507.18071).",
            "choices": ["token", "sequence"],
        },
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Learn nothing from answers that were cut at --max_completion_length."}
    )
    top_entropy_quantile: float = field(
        default=1.0,
        metadata={"help": "Learn from this share of the tokens, the least certain ones (arXiv:2506.01939)."},
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of an entropy bonus."})

    def __post_init__(self):
        if self.num_generations < 2:
            raise ValueError(f"--num_generations must be at least 2, got {self.num_generations}: one has no others")
        if self.beta < 0:
            raise ValueError(f"--beta must not be negative, got {self.beta}")
        if self.num_iterations < 1:
            raise ValueError(f"--num_iterations must be at least 1, got {self.num_iterations}")
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(f"--top_entropy_quantile must be in (0, 1], got {self.top_entropy_quantile}")


ARGUMENTS = (
    ModelArguments,
    DataArguments,
    PromptArguments,
    LoraArguments,
    RolloutArguments,
    GRPOArguments,
    AnswerArguments,
    RunArguments,
    StageTrainingArguments,
)


def answers_per_round(training_args, grpo_args) -> int:
    """Answers of one round of sampling, over all processes; whole groups, or the user is told which numbers fit."""
    steps = grpo_args.steps_per_generation or training_args.gradient_accumulation_steps
    answers = training_args.per_device_train_batch_size * training_args.world_size * steps
    if answers % grpo_args.num_generations:
        raise ValueError(
            f"--per_device_train_batch_size x processes x micro-batches is {answers} answers a round, which is no "
            f"multiple of --num_generations {grpo_args.num_generations}: a prompt's answers would be torn apart"
        )
    return answers


class WithPositions:
    """A model that counts positions from the first real token, as generate() does and TRL's forward pass does not."""

    def __init__(self, model):
        self.model = model

    def __call__(self, attention_mask, **inputs):
        positions = count_positions(attention_mask)
        return self.model(attention_mask=attention_mask, position_ids=positions, **inputs)


class GroupTrainer(RolloutMixin, ReferenceMixin, GRPOTrainer):
    """TRL's GRPOTrainer with this project's prompts and rewards, the right reference, and resume in mid-round."""

    def __init__(self, run, grpo_args, rollout_args, rewards, reference=None, **kwargs):
        args, model = kwargs["args"], kwargs["model"]
        self.round_size = answers_per_round(args, grpo_args)
        self.has_positions = takes_position_ids(model.config)
        self.warned: set[str] = set()
        self.without_spread = 0.0  # share of the last round's prompts whose answers all score the same
        beta, args.beta = args.beta, 0.0  # TRL's own reference is the base, or an incomplete copy of the adapter
        with exact_adapters(model):
            functions = [self._reward_function(reward) for reward in rewards]
            super().__init__(run, rollout_args, rewards, reward_funcs=functions, **kwargs)
        self.beta = args.beta = beta
        self.lessons = torch.zeros((), device=args.device)  # advantages seen so far
        self.eos_token_ids = list(run.chat.stop_ids)
        if not self.use_vllm:
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids
        if beta and run.source.adapter:
            self.model.add_adapter("ref", self.model.peft_config["default"])
            copy_adapter(self.model, "default", "ref")
            self.model.set_requires_grad("ref", False)
        elif beta and reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            prepared = prepare_deepspeed(reference, self.accelerator) if self.is_deepspeed_enabled else None
            self.ref_model = prepared or self.accelerator.prepare_model(reference, evaluation_mode=True)

    # -- prompts and rewards, in place of TRL's --

    def get_train_dataloader(self):
        """TRL's, if there are prompts enough for a round."""
        prompts = self.round_size // self.num_generations
        if len(self.train_dataset) < prompts:
            raise ValueError(
                f"{len(self.train_dataset)} prompts are fewer than one round takes ({prompts}); lower "
                "--per_device_train_batch_size or --gradient_accumulation_steps, or raise --num_generations"
            )
        return super().get_train_dataloader()

    def _get_eval_sampler(self, eval_dataset):
        return torch.utils.data.SequentialSampler(eval_dataset)

    def _tokenize_prompts(self, prompts):
        return [list(row["prompt_ids"]) for row in self.rows], None, {}

    def _generate_and_score_completions(self, inputs):
        """TRL's round, with the sampler proved where it is another program, and warnings where nothing is learnt."""
        self.rows = inputs
        found = super()._generate_and_score_completions(inputs)
        shares = self._metrics["train"]
        shares["frac_reward_zero_std"][-1] = self.without_spread  # TRL finds a spread in the rounding error of 0.2
        if self.use_vllm:
            mask, trained = found["completion_mask"], found["old_per_token_logps"]
            compared = (self.model, found["sampling_per_token_logps"], trained, mask, True)
            self.run.checks.run("rollout_is_policy", checks.sampler_is_policy, *compared, quiet=True)
        for metric, text in WARNINGS.items():
            share = shares[metric][-1]
            if share > 0.5 and metric not in self.warned and self.is_world_process_zero():
                self.warned.add(metric)
                logger.warning("warning: step %d: %.0f %% of the %s", self.state.global_step, 100 * share, text)
        return found

    def _generate_single_turn(self, *args, **kwargs):
        with self.accelerator.autocast():  # generate() does not pass through the forward that has it
            return super()._generate_single_turn(*args, **kwargs)

    def _reward_function(self, reward):
        def function(prompts, completions, completion_ids, reference, log_metric, **columns):
            texts = [self.answer_text(ids) for ids in completion_ids]
            judged = reward.score_all(prompts, texts, reference)
            log_metric(f"unread/{function.__name__}", sum(not item.parsed for item in judged) / len(judged))
            return [item.score for item in judged]

        function.__name__ = reward.label
        return function

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        every = (found * self.reward_weights.to(found.device)).sum(dim=1)
        groups = every.view(-1, self.num_generations)
        spread = groups.max(dim=1).values - groups.min(dim=1).values
        self.without_spread = (spread < 1e-6).float().mean().item()
        totals = every[self.accelerator.process_index * len(prompts) :][: len(prompts)].tolist()
        first = range(0, len(prompts), self.num_generations)[:4]
        texts = [self.answer_text(completion_ids_list[index]) for index in first]
        self.note_samples([prompts[index] for index in first], texts, [totals[index] for index in first])
        return found

    # -- the policy --

    @contextlib.contextmanager
    def policy_to_sample(self):
        """The policy with its weights in one place."""
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            generation_kwargs=None if self.use_vllm else self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            yield model

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        model = WithPositions(model) if self.has_positions else model
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def policy_logps(self, input_ids, attention_mask, num_tokens):
        """See RolloutMixin."""
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        return self._get_per_token_logps_and_entropies(model, input_ids, attention_mask, num_tokens)[0]

    def _reference_logps(self, input_ids, attention_mask, num_tokens):
        if self.ref_model is not None:
            model = self.ref_model
            return self._get_per_token_logps_and_entropies(model, input_ids, attention_mask, num_tokens)[0]
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
            return self.policy_logps(input_ids, attention_mask, num_tokens)

    # -- training --

    def _prepare_inputs(self, inputs):
        """A round's rows become the part of it this micro-step trains on; held-out rows, and such parts, pass."""
        return inputs if isinstance(inputs, dict) or not self.model.training else super()._prepare_inputs(inputs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Prepare the part of a round that comes now; TRL counts micro-steps from 0, also in a run that goes on."""
        if not self._step:
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
        model.train()
        inputs = self._prepare_inputs(inputs)
        if self.without_spread < 1:
            self.lessons += (inputs["advantages"].abs() * inputs["completion_mask"].sum(dim=1)).sum()
        return super().training_step(model, inputs, num_items_in_batch)

    def expects_gradients(self):
        """Answers that all score the same teach nothing, and KL has no gradient where it is 0."""
        return self.accelerator.reduce(self.lessons, "sum").item() > 0

    def prove(self, model, inputs):
        """What samples is what is trained, and the reference is the parent's policy."""
        self.check_sampler(model)
        if not self.beta:
            return
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = inputs["completion_mask"]
        attention = torch.cat([inputs["prompt_mask"], mask], dim=1)
        with torch.no_grad():
            policy, reference = (
                (logps(ids, attention, mask.shape[1]) * mask).sum(dim=1)
                for logps in (self.policy_logps, self._reference_logps)
            )
        findings = (model, policy, reference, None, 0.0, *self.compare_reference(), self.run.resume is not None)
        self.run.checks.run("reference_is_parent", checks.reference_is_parent, *findings)

    # -- held-out prompts --

    def measure(self, model, inputs):
        """What a greedy answer to each held-out prompt scores, its length, whether it stopped; KL with a reference."""
        batch = PromptCollator(self.processing_class.pad_token_id)(inputs)
        ids, attention = (batch[name].to(self.args.device) for name in ("input_ids", "attention_mask"))
        answers, mask, stopped = self.trim_answers(self.sample_answers(ids, attention, greedy=True))
        judged = self.judge(inputs, self.answer_texts(answers, mask))
        rows = {"score": self.weigh(judged, len(inputs)), "length": mask.sum(dim=1), "stopped": stopped, **judged}
        if self.beta:
            whole = (torch.cat([ids, answers], dim=1), torch.cat([attention, mask], dim=1), answers.shape[1])
            ratio = self._reference_logps(*whole) - self.policy_logps(*whole)
            rows["kl"] = ((torch.expm1(ratio) - ratio) * mask).sum(dim=1)  # k3, Eq. 4 of arXiv:2402.03300
        return rows, torch.ones_like(rows["score"])

    # -- checkpoints --

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        in_mid_round = self._step % (self.args.steps_per_generation * self.num_iterations)
        path = Path(output_dir, BUFFER_FILE.format(rank=self.args.process_index))
        torch.save(self._buffered_inputs if in_mid_round else None, path)

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._buffered_inputs is None:
            path = Path(checkpoint, BUFFER_FILE.format(rank=self.args.process_index))
            answers = torch.load(path, map_location="cpu", weights_only=True)
            self._buffered_inputs = send_to_device(answers, self.args.device)


def settings_of(training_args, grpo_args, rollout_args, rewards, chat) -> None:
    """Give the training arguments what TRL's trainer reads beside them."""
    own = {name: value for name, value in vars(grpo_args).items() if name != "given"}
    shared = ("max_completion_length", "temperature", "use_vllm")
    own.update({name: getattr(rollout_args, name) for name in shared})
    own.update({name: value for name, value in vars(rollout_args).items() if name.startswith("vllm_")})
    steps = grpo_args.steps_per_generation or training_args.gradient_accumulation_steps
    own["reward_weights"] = [reward.weight for reward in rewards]
    own["steps_per_generation"] = steps
    own["generation_batch_size"] = answers_per_round(training_args, grpo_args)
    own["vllm_max_model_length"] = rollout_args.max_prompt_length + rollout_args.max_completion_length
    if rollout_args.use_vllm:
        own["generation_kwargs"] = {"stop_token_ids": chat.stop_ids}
    # dropout would make the sampler another policy than the one that is trained
    add_settings(training_args, GRPOConfig, **own, disable_dropout=True, pad_to_multiple_of=None)


@run_stage
def main():
    parsed = parse_args(*ARGUMENTS, description=__doc__)
    model_args, data_args, prompt_args, lora_args, rollout_args, grpo_args, answer_args, run_args, training_args = (
        parsed
    )
    rollout_args.reward_functions = rollout_args.reward_functions or "accuracy"
    rewards = load_rewards(rollout_args.reward_functions, rollout_args.reward_weights)
    answers_per_round(training_args, grpo_args)
    own = (data_args, prompt_args, rollout_args, grpo_args, answer_args)
    run = start_run("grpo", model_args, lora_args, run_args, training_args, *own)

    tokenizer = load_tokenizer(run.source, model_args)
    run.chat = chat = prepare_chat(tokenizer, prompt_args.template_name)
    plan_questions(run, answer_args, rollout_args.max_prompt_length, rollout_args.max_completion_length)
    settings_of(training_args, grpo_args, rollout_args, rewards, chat)
    longest = rollout_args.max_prompt_length + rollout_args.max_completion_length
    config = load_config(run.source, model_args, longest=longest)

    datasets = load_prompts(run, data_args, rollout_args.max_prompt_length)
    apart = bool(grpo_args.beta) and not lora_args.use_peft
    check_memory(run, config, model_args, lora_args, longest, reference_model=apart)
    model = load_model(run.source, model_args, training_args, config)
    reference = load_model(run.source, model_args, training_args, config).eval() if apart else None
    model, run.tuning = add_adapter(model, run.source, lora_args, training_args)
    prepare_for_training(model, training_args)
    trainer = GroupTrainer(
        run,
        grpo_args,
        rollout_args,
        rewards,
        reference,
        model=model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        processing_class=tokenizer,
    )
    finish_run(trainer, run, tokenizer)


if __name__ == "__main__":
    main()
