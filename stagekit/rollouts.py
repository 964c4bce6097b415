"""Answers a policy writes while it is trained: sampling, judging, showing; what PPO and GRPO have in common.

Shapes: prompts are (batch, prompt_len), padded on the left so that answers begin in one column; answers are
(batch, response_len), padded on the right, and `mask` is 1 on an answer's tokens up to and including the one that
ends it.
"""

import json
import logging
from pathlib import Path

import torch
from transformers import GenerationConfig

from stagekit import checks
from stagekit.rewards import Reward
from stagekit.trainers import StageMixin

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
PROBE_TOKENS = 16  # of the check that the sampler is the policy


class PromptCollator:
    """Make a batch of prompts."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict:
        """Collate rows {"prompt_ids", ...}: input_ids and attention_mask, (batch, prompt_len), and the rows."""
        width = max(len(row["prompt_ids"]) for row in rows)
        padding = [width - len(row["prompt_ids"]) for row in rows]
        ids = [[self.pad_token_id] * pad + list(row["prompt_ids"]) for pad, row in zip(padding, rows, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "rows": rows}


def mask_answers(answers: torch.Tensor, stop_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Find where answers end.

    Args:
        answers: token ids, (batch, response_len).
        stop_ids: tokens that end an answer.

    Returns:
        (mask, stopped): (batch, response_len) int64, 1 up to and including the first stop token, or everywhere where
        there is none; (batch,) bool, whether there is one.
    """
    stops = torch.isin(answers, torch.tensor(stop_ids, device=answers.device))
    stopped = stops.any(dim=1)
    last = torch.where(stopped, stops.int().argmax(dim=1), answers.shape[1] - 1)
    positions = torch.arange(answers.shape[1], device=answers.device)
    return (positions <= last.unsqueeze(1)).long(), stopped


def repetition(tokens: list[int]) -> float:
    """Share of 4-grams of tokens that stood in the answer before."""
    grams = [tuple(tokens[start : start + 4]) for start in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class VLLMSampler:
    """A copy of the policy in vLLM, given the policy's weights whenever they have changed."""

    def __init__(self, trainer, model):
        from trl.generation.vllm_generation import VLLMGeneration

        args = trainer.rollout_args
        self.pad_token_id, self.device = trainer.processing_class.pad_token_id, trainer.args.device
        self.width, self.synced_step = args.max_completion_length, None
        self.engine = VLLMGeneration(
            model=model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            mode=args.vllm_mode,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.max_prompt_length + args.max_completion_length,
            temperature=args.temperature,
            top_p=1.0,
            top_k=0,
            max_completion_length=args.max_completion_length,
            logprobs=0,  # of the sampled tokens alone
            generation_kwargs={"stop_token_ids": trainer.chat.stop_ids},
        )

    def __call__(self, rows: list[dict], step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer prompts.

        Args:
            rows: with "prompt_ids".
            step: optimiser steps so far; the weights are handed over when it has changed.

        Returns:
            (answers, log-probabilities): (rows, --max_completion_length) each; NaN where vLLM knows none.
        """
        if step != self.synced_step:
            self.engine.sync_weights()
            self.synced_step = step
        prompts = [list(row["prompt_ids"]) for row in rows]
        _, found, logps, _ = self.engine.generate(prompts=prompts, images=None, num_generations=1)
        answers = torch.full((len(rows), self.width), self.pad_token_id)
        values = torch.full((len(rows), self.width), float("nan"))
        for row, (tokens, known) in enumerate(zip(found, logps, strict=True)):
            answers[row, : len(tokens)] = torch.tensor(tokens)
            values[row, : len(tokens)] = torch.tensor([float("nan") if x[0] is None else x[0] for x in known])
        return answers.to(self.device), values.to(self.device)


class RolloutMixin(StageMixin):
    """A trainer whose policy writes answers that are judged afterwards.

    Beside what StageMixin asks for, such a trainer gives

        policy_to_sample()                     a context manager: the policy, ready for generate()
        policy_logps(ids, attention, width)    log-probabilities of the last `width` tokens, as training computes them
    """

    def __init__(self, run, rollout_args, rewards: list[Reward], **kwargs):
        self.rollout_args, self.rewards = rollout_args, rewards
        self.chat = run.chat
        self.samples: list[dict] = []
        super().__init__(run, **kwargs)

    # -- sampling --

    def generation_settings(self, greedy: bool, **others) -> GenerationConfig:
        """How the policy answers: from its own distribution, or the likeliest tokens."""
        settings = {
            "max_new_tokens": self.rollout_args.max_completion_length,
            "do_sample": not greedy,
            "temperature": None if greedy else self.rollout_args.temperature,
            "top_k": None if greedy else 0,
            "top_p": None if greedy else 1.0,
            "pad_token_id": self.processing_class.pad_token_id,
            "eos_token_id": self.chat.stop_ids,
        }
        return GenerationConfig(**{**settings, **others})

    @torch.no_grad()
    def sample_answers(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, greedy: bool) -> torch.Tensor:
        """Let the policy answer, prompts of like length together.

        Args:
            input_ids, attention_mask: prompts, (batch, prompt_len).
            greedy: take the likeliest tokens (held-out prompts) instead of sampling.

        Returns:
            Answers, (batch, --max_completion_length).
        """
        config, lengths = self.generation_settings(greedy), attention_mask.sum(dim=1)
        shape = (len(input_ids), config.max_new_tokens)
        answers = input_ids.new_full(shape, self.processing_class.pad_token_id)
        with self.policy_to_sample() as model:
            for rows in torch.argsort(lengths, stable=True).split(self.args.per_device_eval_batch_size):
                width = int(lengths[rows].max())
                ids, attention = input_ids[rows, -width:], attention_mask[rows, -width:]
                with self.accelerator.autocast():  # generate() does not pass through the forward that has it
                    whole = model.generate(input_ids=ids, attention_mask=attention, generation_config=config)
                answers[rows, : whole.shape[1] - width] = whole[:, width:]
        return answers

    @torch.no_grad()
    def check_sampler(self, model) -> None:
        """Check that generate(), with its cache and padding, uses the probabilities that training computes."""
        rows = list(self.train_dataset.select(range(min(8, len(self.train_dataset)))))
        rows.sort(key=lambda row: len(row["prompt_ids"]))
        batch = PromptCollator(self.processing_class.pad_token_id)([rows[0], rows[-1]])  # one is padded
        ids, attention = (batch[name].to(self.args.device) for name in ("input_ids", "attention_mask"))
        more = {"max_new_tokens": PROBE_TOKENS, "output_logits": True, "return_dict_in_generate": True}
        config = self.generation_settings(greedy=True, **more)
        with self.policy_to_sample() as policy, self.accelerator.autocast():
            out = policy.generate(input_ids=ids, attention_mask=attention, generation_config=config)
        answers = out.sequences[:, ids.shape[1] :]
        mask, _ = mask_answers(answers, self.chat.stop_ids)
        logits = torch.stack(out.logits, dim=1).float() / self.rollout_args.temperature
        sampled = logits.log_softmax(dim=-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1)
        trained = self.policy_logps(out.sequences, torch.cat([attention, mask], dim=1), answers.shape[1])
        self.run.checks.run("sampler_is_policy", checks.sampler_is_policy, model, sampled, trained, mask)

    def trim_answers(self, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cut a batch of answers to its longest one, with padding behind every end.

        Returns:
            (answers, mask, stopped): see mask_answers.
        """
        mask, stopped = mask_answers(answers, self.chat.stop_ids)
        width = int(mask.sum(dim=1).max())
        answers, mask = answers[:, :width], mask[:, :width]
        return torch.where(mask.bool(), answers, self.processing_class.pad_token_id), mask, stopped

    def answer_texts(self, answers: torch.Tensor, mask: torch.Tensor) -> list[str]:
        """Answers as their reader sees them."""
        return [self.answer_text(row[own.bool()].tolist()) for row, own in zip(answers, mask, strict=True)]

    def answer_text(self, ids: list[int]) -> str:
        """An answer as its reader sees it."""
        kept = [token for token in ids if token not in self.chat.stop_ids]
        return self.processing_class.decode(kept, clean_up_tokenization_spaces=False).strip()

    # -- judging --

    def judge(self, rows: list[dict], texts: list[str]) -> dict[str, torch.Tensor]:
        """Judge answers by the functions of --reward_functions.

        Args:
            rows: with "prompt" and "reference".
            texts: the answers.

        Returns:
            {"reward/<name>": (rows,), "unread/<name>": (rows,)} for each function; unread is 1 where it found nothing
            to judge, which scores 0.
        """
        prompts, references = ([row[name] for row in rows] for name in ("prompt", "reference"))
        found = {}
        for reward in self.rewards:
            judged = reward.score_all(prompts, texts, references)
            found[f"reward/{reward.label}"] = torch.tensor([item.score for item in judged], device=self.args.device)
            unread = [float(not item.parsed) for item in judged]
            found[f"unread/{reward.label}"] = torch.tensor(unread, device=self.args.device)
        return found

    def weigh(self, found: dict[str, torch.Tensor], num_rows: int) -> torch.Tensor:
        """Weighted sum of what judge() found, (rows,)."""
        total = torch.zeros(num_rows, device=self.args.device)
        for reward in self.rewards:
            total = total + reward.weight * found[f"reward/{reward.label}"]
        return total

    # -- held-out prompts --

    def held_out_metrics(self, rows, weights):
        """Means over the held-out prompts; the score with its 95 % interval."""
        score, count = rows["score"], len(weights)
        half = 1.96 * float(score.std(ddof=1)) / count**0.5 if count > 1 else float("nan")
        means = {name: float(values.mean()) for name, values in rows.items()}
        return {**means, "score_low": means["score"] - half, "score_high": means["score"] + half, "prompts": count}

    def describe(self, metrics):
        """Score with its interval, what each function says, KL where there is a reference, length, stop rate."""
        parts = [
            "score {score:+.3f} (95 % interval {score_low:+.3f} to {score_high:+.3f}, {prompts} prompts)".format(
                **metrics
            )
        ]
        for name in (name.removeprefix("reward/") for name in metrics if name.startswith("reward/")):
            parts.append(f"{name} {metrics[f'reward/{name}']:.3f} ({metrics[f'unread/{name}']:.0%} unread)")
        if "kl" in metrics:
            parts.append(f"KL {metrics['kl']:.3f} nats an answer")
        return ", ".join([*parts, f"{metrics['length']:.1f} tokens", f"{metrics['stopped']:.0%} end by themselves"])

    # -- showing --

    def note_samples(self, prompts: list[str], texts: list[str], scores: list[float]) -> None:
        """Keep answers for the next log."""
        step = self.state.global_step
        self.samples = [
            {"step": step, "prompt": prompt, "answer": text, "score": score}
            for prompt, text, score in zip(prompts, texts, scores, strict=True)
        ]

    def log(self, logs, start_time=None):
        """Show sample answers with the numbers, and keep them in samples.jsonl."""
        super().log(logs, start_time)
        if "loss" in logs and self.samples and self.is_world_process_zero():
            for sample in self.samples[: self.rollout_args.show_samples]:
                shown = " ".join(f"{sample['prompt']} → {sample['answer']}".split())
                logger.info("  %+.3f  %s", sample["score"], shown[:160])
            with open(Path(self.args.output_dir, SAMPLES_FILE), "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.samples)
            self.samples = []
