r"""Direct preference optimization: learn from pairs of a better and a worse answer (arXiv:2305.18290).

Reads   --model_name_or_path   the directory of the fine-tuning stage, or a base model
        --train_file_dir       preferences (chosen and rejected, or ranked answers); README lists the forms
Writes  --output_dir           adapter (or weights), tokenizer, stage.json: all inference.py needs

Run it through scripts/run_dpo.sh, or:

    python dpo_training.py --model_name_or_path outputs/sft --train_file_dir data/reward \
        --output_dir outputs/dpo --do_train --do_eval

The reference is the policy of the stage the run starts from: a frozen copy of its adapter on the same base, in one
memory; for a fresh adapter the base itself. The first step shows it: log-ratios 0, loss ln 2.
"""

from dataclasses import dataclass, field

import torch
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

from stagekit import checks
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
from stagekit.modeling import add_adapter, copy_adapter, load_config, load_model, load_tokenizer, prepare_for_training
from stagekit.pair_metrics import pair_accuracy, weighted_mean
from stagekit.pairs import PairCollator
from stagekit.run import check_memory, finish_run, load_pairs, plan_questions, print_preview, run_stage, start_run
from stagekit.tokenization import prepare_chat
from stagekit.trainers import PairMixin, ReferenceMixin, add_settings, exact_adapters

LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)


@dataclass
class DPOArguments:
    """What only this stage asks for; the losses are TRL's."""

    _argument_group_name = "direct preferences"

    beta: float = field(
        default=0.1, metadata={"help": "How closely the policy is held to the reference; larger is closer."}
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "One loss or several: sigmoid is the paper's; ipo and sigmoid_norm normalise by length; robust "
            f"expects flipped labels; sft is the likelihood alone. Known: {', '.join(LOSSES)}."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight for each loss; default 1 each."}
    )
    rpo_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the better answer's negative log-likelihood per token beside the loss "
            "(arXiv:2404.19733); keeps its likelihood from falling, e.g. 1.0."
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Assumed share of flipped labels, for robust (0.1) and exo_pair (0.001)."}
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the tokens beyond the shorter answer's length (arXiv:2409.06411), 0 to 1."},
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence that holds the policy to the reference (arXiv:2309.16240).",
            "choices": ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
        },
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "Alpha of alpha_divergence."})
    use_weighting: bool = field(
        default=False, metadata={"help": "Weight pairs by their likelihood under the policy (arXiv:2406.11827)."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of discopop (arXiv:2406.08414)."})
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference's log-probabilities once before training and free its adapter."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Switch --lora_dropout off, so that policy and reference differ by training alone."},
    )

    def __post_init__(self):
        unknown = [name for name in self.loss_type if name not in LOSSES]
        if unknown:
            raise ValueError(f"--loss_type {unknown[0]!r} is not a loss; known: {', '.join(LOSSES)}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"--loss_weights needs one number for each of the {len(self.loss_type)} losses, "
                f"got {len(self.loss_weights)}"
            )
        if self.beta <= 0:
            raise ValueError(f"--beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"--label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        smoothed = {"robust", "exo_pair", "aot", "aot_unpaired"}
        if self.label_smoothing and not smoothed & set(self.loss_type):
            raise ValueError(
                f"--label_smoothing is read by the losses {', '.join(sorted(smoothed))}, not by {self.loss_type[0]}; "
                "robust is the paper's loss for flipped labels"
            )
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ValueError("--loss_type exo_pair needs --label_smoothing above 0, e.g. 0.001")
        if self.use_weighting and {"aot", "aot_unpaired"} & set(self.loss_type):
            raise ValueError("--use_weighting True weighs pairs, which aot and aot_unpaired sort and so lose")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"--ld_alpha must be in [0, 1], got {self.ld_alpha}")

    def is_plain(self) -> bool:
        """Whether the loss is Eq. 7 of arXiv:2305.18290 and nothing else, which is ln 2 before the first step."""
        changes = (
            self.rpo_alpha,
            self.use_weighting,
            self.loss_weights not in (None, [1.0]),
            self.ld_alpha is not None,
        )
        return self.loss_type == ["sigmoid"] and self.f_divergence_type == "reverse_kl" and not any(changes)


ARGUMENTS = (
    ModelArguments,
    DataArguments,
    PromptArguments,
    LoraArguments,
    PairArguments,
    DPOArguments,
    AnswerArguments,
    RunArguments,
    StageTrainingArguments,
)


class Recorder:
    """Passes calls on to a model and keeps the token log-probabilities of the last one, (2 * pairs, seq_len - 1)."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        outputs = self.model(*args, **kwargs)
        self.logps = outputs.log_probs
        return outputs


class PolicyTrainer(ReferenceMixin, PairMixin, DPOTrainer):
    """TRL's DPOTrainer with the right reference, exact means over the global batch, and one adapter on disk.

    TRL's losses are means over a batch, so here every pair counts once, the pairs of a ranking too.
    """

    def __init__(self, run, dpo_args, **kwargs):
        self.dpo_args = dpo_args
        self.compared = None  # what compare_reference found, if the reference is gone by the first step
        args = kwargs["args"]
        has_adapter = isinstance(kwargs["model"], PeftModel)
        # TRL would compute them in __init__, before its incomplete copy of the adapter is completed below
        args.precompute_ref_log_probs = dpo_args.precompute_ref_log_probs and not has_adapter
        with exact_adapters(kwargs["model"]):
            super().__init__(run, **kwargs)
        if has_adapter and run.source.adapter:
            copy_adapter(self.model, "default", "ref")
        elif has_adapter:  # a fresh adapter changes nothing yet: the base itself is the reference
            self.model.delete_adapter("ref")
        if has_adapter and dpo_args.precompute_ref_log_probs:
            self._precompute()

    def _precompute(self):
        from trl.trainer.utils import hash_module

        self._precompute_model_hash = f"{hash_module(self.model)} {self.ld_alpha}"  # what TRL's cache depends on
        size = self.args.per_device_train_batch_size
        self.compared = self.compare_reference()
        self.model.eval()
        self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", size)
        self.eval_dataset = self._precompute_ref_logps(self.eval_dataset, "eval", size)
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def _prepare_dataset(self, dataset, *args):
        return dataset  # load_pairs has tokenised it

    def count_items(self, batch):
        """Every pair counts once."""
        return torch.tensor(float(len(batch["weights"])))

    def _evaluate_pairs(self, model, inputs):
        """TRL's mean loss over the pairs of a batch, what is known of each pair, and token log-probabilities."""
        inputs = {name: value for name, value in inputs.items() if name not in ("weights", "margins")}
        if "ref_chosen_logps" not in inputs:
            was_training = self.model.training
            self.model.eval()  # no dropout in the reference, whatever the policy has
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            self.model.train(was_training)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference
        self.precompute_ref_logps = True  # from here on TRL finds them in the batch
        recorder = Recorder(model)
        loss = super().compute_loss(recorder, inputs)
        mask = inputs["completion_mask"][:, 1:]
        token_logps = recorder.logps[:, -mask.shape[1] :] * mask
        policy = (token_logps * self._token_weights(mask)).sum(dim=1).chunk(2)
        if self.dpo_args.rpo_alpha:
            per_token = token_logps.sum(dim=1) / mask.sum(dim=1)
            loss = loss - self.dpo_args.rpo_alpha * per_token.chunk(2)[0].mean()
        rows = {
            "policy_chosen": policy[0],
            "policy_rejected": policy[1],
            "reference_chosen": inputs["ref_chosen_logps"],
            "reference_rejected": inputs["ref_rejected_logps"],
        }
        return loss, rows, token_logps

    def _token_weights(self, mask):
        """1, and --ld_alpha for an answer's tokens beyond the length of the other one."""
        if self.ld_alpha is None:
            return torch.ones_like(mask)
        shared = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2).unsqueeze(1)
        return torch.where(mask.cumsum(dim=1) <= shared, 1.0, self.ld_alpha)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the pairs of the global batch."""
        loss, rows, _ = self._evaluate_pairs(model, inputs)
        ones = torch.ones_like(rows["policy_chosen"])
        loss = self.global_mean(loss * ones, ones, num_items_in_batch)
        return (loss, rows) if return_outputs else loss

    def measure(self, model, inputs):
        """The loss and the log-probabilities of both answers under policy and reference."""
        loss, rows, _ = self._evaluate_pairs(model, inputs)
        self._metrics["eval"].clear()  # TRL's means over batches; held_out_metrics has the means over pairs
        ones = torch.ones_like(rows["policy_chosen"])
        losses = self.dpo_loss(rows) if self.dpo_args.is_plain() else loss * ones
        return {"loss": losses, **rows}, ones

    def dpo_loss(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """Eq. 7 of arXiv:2305.18290 for every pair, (pairs,); TRL gives the mean over a batch only."""
        better, worse = (rows[f"policy_{side}"] - rows[f"reference_{side}"] for side in ("chosen", "rejected"))
        return -torch.nn.functional.logsigmoid(self.beta * (better - worse))

    def held_out_metrics(self, rows, weights):
        """Implicit rewards of both answers (Eq. 5 of arXiv:2305.18290 up to a constant), their accuracy and margin."""
        chosen, rejected = (
            self.beta * (rows[f"policy_{side}"] - rows[f"reference_{side}"]) for side in ("chosen", "rejected")
        )
        accuracy = pair_accuracy(chosen, rejected, weights)
        return {
            "loss": weighted_mean(rows["loss"], weights),
            "rewards/chosen": weighted_mean(chosen, weights),
            "rewards/rejected": weighted_mean(rejected, weights),
            "rewards/margins": weighted_mean(chosen - rejected, weights),
            "rewards/accuracies": accuracy.pop("accuracy"),
            **{f"rewards/{name}": value for name, value in accuracy.items()},
            "logps/chosen": weighted_mean(rows["policy_chosen"], weights),
            "logps/rejected": weighted_mean(rows["policy_rejected"], weights),
            "pairs": len(weights),
        }

    def describe(self, metrics):
        """Loss, accuracy of the implicit rewards, margin, and the likelihood of the better answers."""
        values = {name.replace("/", "_"): value for name, value in metrics.items()}
        return (
            "loss {loss:.4f}, reward accuracy {rewards_accuracies:.3f} (95 % interval {rewards_accuracy_low:.3f} to "
            "{rewards_accuracy_high:.3f}, {pairs} pairs), margin {rewards_margins:+.4f}, log-likelihood of the better "
            "answers {logps_chosen:.1f}"
        ).format(**values)

    def prove(self, model, inputs):
        """The reference is the parent's policy."""
        with torch.no_grad():
            loss, rows, token_logps = self._evaluate_pairs(model, inputs)
            ids, attention, mask = (inputs[name][:1] for name in ("input_ids", "attention_mask", "completion_mask"))
            logits = model(
                input_ids=ids, attention_mask=attention, use_cache=False
            ).logits  # of one answer: they are large
        self._metrics["eval"].clear()
        plain = -torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
        difference = (plain * mask[0, 1:] - token_logps[0]).abs().max().item()
        eq7 = loss.item() if self.dpo_args.is_plain() else None
        compared = self.compared or self.compare_reference()
        resumed = self.run.resume is not None
        policy, reference = (
            torch.cat([rows[f"{name}_{side}"] for side in ("chosen", "rejected")]) for name in ("policy", "reference")
        )
        findings = (model, policy, reference, eq7, difference, *compared, resumed)
        self.run.checks.run("reference_is_parent", checks.reference_is_parent, *findings)


@run_stage
def main():
    parsed = parse_args(*ARGUMENTS, description=__doc__)
    model_args, data_args, prompt_args, lora_args, pair_args, dpo_args, answer_args, run_args, training_args = parsed
    training_args.do_train = training_args.do_train and not pair_args.preview
    settings = {name: value for name, value in vars(dpo_args).items() if name not in ("rpo_alpha", "given")}
    add_settings(training_args, DPOConfig, **settings, max_length=None)
    own = (data_args, prompt_args, pair_args, dpo_args, answer_args)
    run = start_run("dpo", model_args, lora_args, run_args, training_args, *own)

    tokenizer = load_tokenizer(run.source, model_args)
    run.chat = chat = prepare_chat(tokenizer, prompt_args.template_name)
    plan_questions(run, answer_args, pair_args.max_length // 2, pair_args.max_length // 2)
    config = load_config(run.source, model_args, longest=pair_args.max_length)
    datasets, probes = load_pairs(run, data_args, chat, pair_args.max_length, whole_answers=False)
    if pair_args.preview:
        return print_preview(chat, probes, pair_args.preview)

    full = not lora_args.use_peft
    check_memory(run, config, model_args, lora_args, 2 * pair_args.max_length, reference_model=full)
    model = load_model(run.source, model_args, training_args, config)
    reference = load_model(run.source, model_args, training_args, config).eval() if full else None
    model, run.tuning = add_adapter(model, run.source, lora_args, training_args)
    prepare_for_training(model, training_args)
    trainer = PolicyTrainer(
        run,
        dpo_args,
        model=model,
        ref_model=reference,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=PairCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    finish_run(trainer, run, tokenizer)


if __name__ == "__main__":
    main()
