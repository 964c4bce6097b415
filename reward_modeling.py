r"""Reward model: learn to score answers from pairs of a better and a worse one (Bradley-Terry).

Reads   --model_name_or_path   the directory of the fine-tuning stage, or a base model
        --train_file_dir       preferences (chosen and rejected, or ranked answers); README lists the forms
Writes  --output_dir           adapter with its score head, tokenizer, stage.json, scores.png

Run it through scripts/run_rm.sh, or:

    python reward_modeling.py --model_name_or_path outputs/sft --train_file_dir data/reward \
        --output_dir outputs/rm --do_train --do_eval

An answer is scored at its end-of-turn token, where generation stops. python -m tools.score_answers scores files.
"""

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from trl import RewardConfig, RewardTrainer

from stagekit import checks
from stagekit.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    PairArguments,
    PromptArguments,
    RunArguments,
    StageTrainingArguments,
    parse_args,
)
from stagekit.modeling import (
    add_adapter,
    load_config,
    load_model,
    load_tokenizer,
    prepare_for_training,
    prepare_to_score,
)
from stagekit.pair_metrics import by_length, calibration, correlation, draw_scores, pair_accuracy, weighted_mean
from stagekit.pairs import PairCollator, padding_id
from stagekit.run import check_memory, finish_run, load_pairs, print_preview, run_stage, start_run
from stagekit.tokenization import prepare_chat
from stagekit.trainers import PairMixin, add_settings, exact_adapters

logger = logging.getLogger(__name__)


@dataclass
class RewardArguments:
    """What only this stage asks for."""

    _argument_group_name = "reward model"

    use_margin: bool = field(
        default=True,
        metadata={"help": "Ask for scores that differ by the pair's 'margin', where the data has that field."},
    )
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={"help": "Weight of a penalty that keeps scores around zero (arXiv:2312.09244), e.g. 0.01."},
    )


ARGUMENTS = (
    ModelArguments,
    DataArguments,
    PromptArguments,
    LoraArguments,
    PairArguments,
    RewardArguments,
    RunArguments,
    StageTrainingArguments,
)


def bradley_terry_loss(chosen, rejected, margins, center: float | None = None) -> torch.Tensor:
    """Negative log-likelihood of every preference under the Bradley-Terry model, (pairs,).

    Eq. 1 of arXiv:2203.02155; with margins Eq. 2 of arXiv:2307.09288; `center` adds the penalty of arXiv:2312.09244.

    Args:
        chosen, rejected: scores, (pairs,).
        margins: by how much the better answer is better, (pairs,).
        center: weight of the squared sum of both scores.
    """
    losses = -torch.nn.functional.logsigmoid(chosen - rejected - margins)
    return losses if center is None else losses + center * (chosen + rejected) ** 2


class RewardModelTrainer(PairMixin, RewardTrainer):
    """TRL's RewardTrainer with rankings whose prompts count once, exact means, and a report on the scores."""

    def __init__(self, run, reward_args, **kwargs):
        with exact_adapters(kwargs["model"]):
            super().__init__(run, **kwargs)
        self.reward_args = reward_args

    def _score_pairs(self, model, inputs):
        """Loss and both scores of every pair."""
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        chosen, rejected = model(**batch, use_cache=False).logits.squeeze(-1).float().chunk(2)
        margins = inputs["margins"] * self.reward_args.use_margin
        losses = bradley_terry_loss(chosen, rejected, margins, self.reward_args.center_rewards_coefficient)
        return {"loss": losses, "chosen": chosen, "rejected": rejected}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean Bradley-Terry loss over the prompts of the global batch."""
        rows = self._score_pairs(model, inputs)
        chosen, rejected = rows["chosen"], rows["rejected"]
        right = (chosen > rejected) + 0.5 * (chosen == rejected)
        self.observe({"accuracy": right, "margin": chosen - rejected, "score": chosen + rejected}, inputs["weights"])
        loss = self.global_mean(rows["loss"], inputs["weights"], num_items_in_batch)
        return (loss, rows) if return_outputs else loss

    def measure(self, model, inputs):
        """Loss, scores and lengths of both answers; the weight of a pair is its share of a prompt."""
        lengths = inputs["completion_mask"].sum(dim=1).chunk(2)
        rows = {**self._score_pairs(model, inputs), "chosen_length": lengths[0], "rejected_length": lengths[1]}
        return rows, inputs["weights"]

    def held_out_metrics(self, rows, weights):
        """Accuracy with its interval, margin, calibration, and how much the score follows the length."""
        chosen, rejected = rows["chosen"], rows["rejected"]
        lengths = np.concatenate([rows["chosen_length"], rows["rejected_length"]])
        return {
            "loss": weighted_mean(rows["loss"], weights),
            **pair_accuracy(chosen, rejected, weights),
            "margin": weighted_mean(chosen - rejected, weights),
            "score_chosen": weighted_mean(chosen, weights),
            "score_rejected": weighted_mean(rejected, weights),
            "calibration_error": calibration(chosen, rejected, weights)[0],
            "length_correlation": correlation(lengths, np.concatenate([chosen, rejected])),
            "pairs": len(chosen),
        }

    def describe(self, metrics):
        """Accuracy with its interval, margin, loss."""
        return (
            "accuracy {accuracy:.3f} (95 % interval {accuracy_low:.3f} to {accuracy_high:.3f}, {pairs} pairs), "
            "margin {margin:+.3f}, loss {loss:.4f}, score follows length with r = {length_correlation:+.2f}"
        ).format(**metrics)

    def report(self, output_dir):
        """Write scores.png; say how accuracy depends on length, and what length alone would get right."""
        rows, weights = self.rows, self.row_weights
        sides = [rows[name] for name in ("chosen", "rejected", "chosen_length", "rejected_length")]
        bins = calibration(*sides[:2], weights)[1]
        draw_scores(*sides, bins, output_dir / "scores.png", "held-out scores")
        groups = by_length(*sides, weights)
        for group in groups:
            logger.info("  %-22s %3d pairs, accuracy %.3f (%.3f to %.3f)", *(group[name] for name in group))
        longer = pair_accuracy(*sides[2:], weights)["accuracy"]
        logger.info("  always preferring the longer answer: accuracy %.3f", longer)
        return {"by_length": groups, "calibration": bins, "longer_is_better_accuracy": longer}

    def prove(self, model, inputs):
        """Scores are read at the end-of-turn token."""
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        self.run.checks.run("score_position", checks.score_position, model, batch, self.run.chat.stop_ids[0])


@run_stage
def main():
    parsed = parse_args(*ARGUMENTS, description=__doc__)
    model_args, data_args, prompt_args, lora_args, pair_args, reward_args, run_args, training_args = parsed
    training_args.do_train = training_args.do_train and not pair_args.preview
    add_settings(training_args, RewardConfig, max_length=None, disable_dropout=False)
    own = (data_args, prompt_args, pair_args, reward_args)
    run = start_run("rm", model_args, lora_args, run_args, training_args, *own)

    tokenizer = load_tokenizer(run.source, model_args)
    run.chat = chat = prepare_chat(tokenizer, prompt_args.template_name)
    config = load_config(run.source, model_args, longest=pair_args.max_length, scores=True)
    tokenizer.pad_token_id = padding_id(tokenizer, chat.stop_ids)  # Trainer hands it on to the model
    prepare_to_score(config, tokenizer.pad_token_id)
    datasets, probes = load_pairs(run, data_args, chat, pair_args.max_length, whole_answers=True)
    if pair_args.preview:
        return print_preview(chat, probes, pair_args.preview)

    check_memory(run, config, model_args, lora_args, 2 * pair_args.max_length, scores=True)
    model = load_model(run.source, model_args, training_args, config, scores=True)
    model, run.tuning = add_adapter(model, run.source, lora_args, training_args)
    prepare_for_training(model, training_args)
    trainer = RewardModelTrainer(
        run,
        reward_args,
        model=model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=PairCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    finish_run(trainer, run, tokenizer)


if __name__ == "__main__":
    main()
