r"""Odds-ratio preference optimization: fine-tuning and preferences in one, without a reference (arXiv:2403.07691).

Reads   --model_name_or_path   the directory of the fine-tuning stage, or a base model
        --train_file_dir       preferences (chosen and rejected, or ranked answers); README lists the forms
Writes  --output_dir           adapter (or weights), tokenizer, stage.json: all inference.py needs

Run it through scripts/run_orpo.sh, or:

    python orpo_training.py --model_name_or_path outputs/sft --train_file_dir data/reward \
        --output_dir outputs/orpo --do_train --do_eval

The loss is this project's own: TRL's experimental trainer adds a BOS and a second EOS to what inference sends, and
counts the prompt's tokens in its likelihood term.
"""

from dataclasses import dataclass, field

import torch
from transformers import Trainer

from stagekit.arguments import (
    AnswerArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    PairArguments,
    PromptArguments,
    RunArguments,
    StageTrainingArguments,
    parse_args,
)
from stagekit.modeling import add_adapter, load_config, load_model, load_tokenizer, prepare_for_training
from stagekit.pair_metrics import pair_accuracy, weighted_mean
from stagekit.pairs import PairCollator
from stagekit.run import check_memory, finish_run, load_pairs, plan_questions, print_preview, run_stage, start_run
from stagekit.tokenization import IGNORE_INDEX, prepare_chat
from stagekit.trainers import PairMixin, keeps_logits, token_nll


@dataclass
class ORPOArguments:
    """What only this stage asks for."""

    _argument_group_name = "odds ratio"

    orpo_beta: float = field(
        default=0.1, metadata={"help": "Weight of the odds-ratio term beside the likelihood, lambda in the paper."}
    )

    def __post_init__(self):
        if self.orpo_beta < 0:
            raise ValueError(f"--orpo_beta must not be negative, got {self.orpo_beta}")


ARGUMENTS = (
    ModelArguments,
    DataArguments,
    PromptArguments,
    LoraArguments,
    PairArguments,
    ORPOArguments,
    AnswerArguments,
    RunArguments,
    StageTrainingArguments,
)


def log_odds(mean_logps: torch.Tensor) -> torch.Tensor:
    """log(P / (1 - P)) of answers whose length-normalised log-likelihood log P is given (Eq. 4 of arXiv:2403.07691).

    log(1 - P) is computed as log(-expm1(log P)), exact where P is close to 1.
    """
    mean_logps = mean_logps.clamp(max=-1e-7)  # an answer that is certain has infinite odds
    return mean_logps - torch.log(-torch.expm1(mean_logps))


def odds_ratio_loss(chosen_logps: torch.Tensor, rejected_logps: torch.Tensor) -> torch.Tensor:
    """Eq. 7 of arXiv:2403.07691 for every pair, from mean log-probabilities per token, (pairs,)."""
    return -torch.nn.functional.logsigmoid(log_odds(chosen_logps) - log_odds(rejected_logps))


class ORPOTrainer(PairMixin, Trainer):
    """Mean over pairs of the better answer's negative log-likelihood and the weighted odds-ratio loss (Eq. 6)."""

    def __init__(self, run, orpo_beta: float, **kwargs):
        super().__init__(run, **kwargs)
        self.orpo_beta = orpo_beta
        self.keeps_logits = keeps_logits(self.model)

    def _parts(self, model, inputs):
        """Numbers of every pair; the likelihood is that of the answer alone, a mean over its tokens."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        sums, counts = token_nll(model, batch, labels, self.keeps_logits)
        chosen, rejected = (-sums / counts).chunk(2)
        odds_ratio = odds_ratio_loss(chosen, rejected)
        return {
            "loss": -chosen + self.orpo_beta * odds_ratio,
            "nll": -chosen,
            "odds_ratio_loss": odds_ratio,
            "chosen": chosen,
            "rejected": rejected,
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean ORPO loss over the pairs of the global batch."""
        parts = self._parts(model, inputs)
        shown = {name: parts[name] for name in ("nll", "odds_ratio_loss")}
        right = {"accuracy": parts["chosen"] > parts["rejected"], "margin": parts["chosen"] - parts["rejected"]}
        self.observe({**shown, **right}, inputs["weights"])
        loss = self.global_mean(parts["loss"], inputs["weights"], num_items_in_batch)
        return (loss, parts) if return_outputs else loss

    def measure(self, model, inputs):
        """The parts of the loss for every pair."""
        return self._parts(model, inputs), inputs["weights"]

    def held_out_metrics(self, rows, weights):
        """Means of the parts, and how often the better answer is the more likely one per token."""
        return {
            **{name: weighted_mean(rows[name], weights) for name in ("loss", "nll", "odds_ratio_loss")},
            **pair_accuracy(rows["chosen"], rows["rejected"], weights),
            "margin": weighted_mean(rows["chosen"] - rows["rejected"], weights),
            "pairs": len(weights),
        }

    def describe(self, metrics):
        """Loss with its parts, accuracy with its interval, margin."""
        return (
            "loss {loss:.4f} (likelihood {nll:.4f}, odds ratio {odds_ratio_loss:.4f}), accuracy {accuracy:.3f} "
            "(95 % interval {accuracy_low:.3f} to {accuracy_high:.3f}, {pairs} pairs), margin {margin:+.4f} a token"
        ).format(**metrics)


@run_stage
def main():
    parsed = parse_args(*ARGUMENTS, description=__doc__)
    model_args, data_args, prompt_args, lora_args, pair_args, orpo_args, answer_args, run_args, training_args = parsed
    training_args.do_train = training_args.do_train and not pair_args.preview
    own = (data_args, prompt_args, pair_args, orpo_args, answer_args)
    run = start_run("orpo", model_args, lora_args, run_args, training_args, *own)

    tokenizer = load_tokenizer(run.source, model_args)
    run.chat = chat = prepare_chat(tokenizer, prompt_args.template_name)
    plan_questions(run, answer_args, pair_args.max_length // 2, pair_args.max_length // 2)
    config = load_config(run.source, model_args, longest=pair_args.max_length)
    datasets, probes = load_pairs(run, data_args, chat, pair_args.max_length, whole_answers=False)
    if pair_args.preview:
        return print_preview(chat, probes, pair_args.preview)

    check_memory(run, config, model_args, lora_args, 2 * pair_args.max_length)
    model = load_model(run.source, model_args, training_args, config)
    model, run.tuning = add_adapter(model, run.source, lora_args, training_args)
    prepare_for_training(model, training_args)
    trainer = ORPOTrainer(
        run,
        orpo_args.orpo_beta,
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
