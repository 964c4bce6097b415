"""What the trainers of all stages share: exact means, checkpoints whole or absent, proof on the first step."""

import contextlib
import dataclasses
import inspect
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from stagekit import checks
from stagekit.checkpoint import SAVING, mark_complete
from stagekit.held_out import measure_answers
from stagekit.modeling import changed_tensors
from stagekit.tokenization import IGNORE_INDEX

CHUNK_TOKENS = 1024  # tokens whose logits are held in fp32 at a time


def token_nll(model, inputs: dict, labels: torch.Tensor, keeps_logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of the labels, summed over each row.

    Logits are computed only where a label follows, and turned into fp32 in chunks that are recomputed in the backward
    pass: with answers of a third of the text and a vocabulary of 150,000, a small part of what the plain way takes.

    Args:
        model: a causal model.
        inputs: input_ids, position_ids or attention_mask, (batch, seq_len).
        labels: (batch, seq_len), IGNORE_INDEX where nothing is learnt.
        keeps_logits: the model takes logits_to_keep.

    Returns:
        (sums, counts): (batch,) fp32 and (batch,) int64.

    Raises:
        ValueError: no label in the batch.
    """
    targets = labels[:, 1:]
    learnt = targets != IGNORE_INDEX
    if not learnt.any():
        raise ValueError("a batch holds no token to learn; this is a fault of the data or of the length limit")
    kept = learnt.any(dim=0).nonzero().flatten()
    if keeps_logits:
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, kept]
    targets = targets[:, kept].to(logits.device)
    flat_logits, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    losses = [
        torch.utils.checkpoint.checkpoint(_nll, part, wanted, use_reentrant=False)
        for part, wanted in zip(flat_logits.split(CHUNK_TOKENS), flat_targets.split(CHUNK_TOKENS), strict=True)
    ]
    return torch.cat(losses).view(targets.shape).sum(dim=1), learnt.sum(dim=1)


def keeps_logits(model) -> bool:
    """Whether a model computes logits only where it is asked to (logits_to_keep)."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")


def add_settings(training_args, config_class: type, **values) -> None:
    """Give training arguments what one of TRL's trainers reads beside them: `values`, else TRL's own defaults.

    TRL's config classes would declare a hundred flags that nothing here reads, and other defaults for shared ones.
    """
    for item in dataclasses.fields(config_class):
        if item.name in values:
            setattr(training_args, item.name, values.pop(item.name))
        elif not hasattr(training_args, item.name):
            default = item.default_factory() if item.default is dataclasses.MISSING else item.default
            setattr(training_args, item.name, default)
    assert not values, f"{config_class.__name__} has no {sorted(values)}"


@contextlib.contextmanager
def exact_adapters(model):
    """Keep the trained tensors in fp32 while one of TRL's trainers is made, which rounds those on quantised bases."""
    exact = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in exact:
            parameter.data = exact[name]


class StageMixin:
    """What every stage adds to a Trainer, transformers' own or one of TRL's.

    A trainer of a stage gives

        compute_loss(model, inputs, ...)   divided by the items of the whole global batch
        measure(model, inputs)             numbers of held-out rows: {name: (rows,)}, and their weights, (rows,)
        held_out_metrics(rows, weights)    the summary of those numbers, for all held-out rows: {name: float}
        describe(metrics)                  the summary as the end of a sentence

    and, where it has something to show, prove (checks on the first step) and report (more about the held-out rows).
    """

    # transformers would divide by the accumulation steps, which is not exact when the last batch is smaller
    loss_is_scaled_for_ga = True

    def __init__(self, run, *args, **kwargs):
        self.observed: dict[str, torch.Tensor] = {}
        super().__init__(*args, **kwargs)
        self.compute_metrics = self._summarize
        self.run = run
        self.proved = False
        self.staging: str | None = None
        self.add_callback(FirstStep(self))

    @contextlib.contextmanager
    def policy_to_sample(self):
        """The model, ready for generate(): unwrapped, and under ZeRO-3 with its weights in one place."""
        from trl.models.utils import unwrap_model_for_generation

        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            yield model

    def report(self, output_dir: Path) -> dict:
        """Write more about the held-out rows beside the checkpoint; return what stage.json should hold of it."""
        return {}

    def prove(self, model, inputs: dict) -> None:
        """Run the checks that need the model as it will be trained, on the batch of the first step."""

    def expects_gradients(self) -> bool:
        """Whether the coming update must have gradients other than 0; asked until it says so once."""
        return True

    def saved_model(self):
        """What the stage delivers, without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def saved_state(self, state: dict | None) -> dict | None:
        """The tensors of saved_model(), by its own names, among those of the module that is trained."""
        return state

    def create_model_card(self, *args, **kwargs):
        """Write none: stage.json says where a stage comes from, and whose model it is the user says."""

    def observe(self, rows: dict[str, torch.Tensor], weights: torch.Tensor) -> None:
        """Add numbers of rows, (rows,) each, to what the next log shows as means."""
        for name, values in rows.items():
            sums = torch.stack([(values.detach().float() * weights).sum(), weights.sum()])
            self.observed[name] = self.observed.get(name, 0) + sums

    def log(self, logs, start_time=None):
        """Add the means of what was observed since the last log, over all processes."""
        if "loss" in logs and self.observed:
            sums = self.accelerator.reduce(torch.stack(list(self.observed.values())), "sum")
            logs.update(dict(zip(self.observed, (sums[:, 0] / sums[:, 1]).tolist(), strict=True)))
            self.observed = {}
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the numbers of each held-out row, for exact means over all of them."""
        inputs = self._prepare_inputs(inputs)
        if self.is_deepspeed_enabled:  # the engine gathers ZeRO-3's weights; the bare model holds empty ones
            model = self.model_wrapped
            model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            rows, weights = self.measure(model, inputs)
        self.measured = list(rows)
        return None, torch.stack([row.float() for row in rows.values()], dim=1), weights

    def _summarize(self, prediction):
        self.rows = dict(zip(self.measured, np.asarray(prediction.predictions, dtype=np.float64).T, strict=True))
        self.row_weights = np.asarray(prediction.label_ids, dtype=np.float64)
        found = self.held_out_metrics(self.rows, self.row_weights)
        if self.run.questions:
            found.update(measure_answers(self, self.run.questions, self.run.answer_tokens))
        return found

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Before the first step, check what needs the model as it will be trained, on the batch it will see."""
        if not self.proved:
            self.proved = True
            self.run.checks.run("processes_share_gradients", checks.processes_share_gradients, self)
            was_training = model.training
            model.eval()
            with self.compute_loss_context_manager():
                self.prove(model, self._prepare_inputs(inputs))
            model.train(was_training)
        return super().training_step(model, inputs, num_items_in_batch)

    def _run_epoch(self, *args, **kwargs):
        """A checkpoint of the last step has nothing left to train; transformers would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial):
        return self.staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Write the checkpoint below a temporary directory, mark it complete, rename it: it is whole or absent."""
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.staging = str(output_dir / SAVING)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.staging, self.args.save_total_limit = None, limit
        best = self.state.best_global_step
        if best:
            self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{best}")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = output_dir / SAVING / name
            self.state.save_to_json(str(written / "trainer_state.json"))
            (written / "README.md").unlink(missing_ok=True)
            mark_complete(written)
            shutil.rmtree(output_dir / name, ignore_errors=True)
            os.replace(written, output_dir / name)
            (output_dir / SAVING).rmdir()
            rotate_checkpoints(str(output_dir), limit, self.state.best_model_checkpoint, use_mtime=False)
        self.accelerator.wait_for_everyone()


class FirstStep(TrainerCallback):
    """Looks at the first gradients there must be, and at every logged loss."""

    def __init__(self, trainer: StageMixin):
        self.trainer = trainer
        self.seen = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.seen and self.trainer.expects_gradients():
            self.seen = True
            self.trainer.run.checks.run("gradients_flow", checks.gradients_flow, self.trainer, model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if name in (logs or {}):
                self.trainer.run.checks.run("finite", checks.finite, logs[name], state.global_step, quiet=True)


class LanguageTrainer(StageMixin, Trainer):
    """Trains on the labels of running text or conversations: the mean loss over tokens."""

    def __init__(self, run, *args, **kwargs):
        super().__init__(run, *args, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes transformers count the labels of the global batch
        self._loss_shifts_labels = True
        self.keeps_logits = keeps_logits(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of token losses / tokens of the global batch, so that it does not matter how the batch is split."""
        labels = inputs.pop("labels")
        sums, counts = token_nll(model, inputs, labels, self.keeps_logits)
        loss = sums.sum() / (counts.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # data-parallel training averages gradients over processes
        return (loss, {"sums": sums}) if return_outputs else loss

    def measure(self, model, inputs):
        """Summed loss of each row; its weight is its count of tokens."""
        labels = inputs.pop("labels")
        sums, counts = token_nll(model, inputs, labels, self.keeps_logits)
        return {"loss": sums}, counts

    def held_out_metrics(self, rows, weights):
        """Mean loss over all tokens and its exponential, the perplexity."""
        loss = float(rows["loss"].sum() / weights.sum())
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(weights.sum())}

    def describe(self, metrics):
        """Loss, perplexity, tokens."""
        return "loss {loss:.4f} (perplexity {perplexity:.2f} over {tokens} tokens)".format(**metrics)

    def prove(self, model, inputs):
        """Packed samples do not see each other."""
        if "position_ids" not in inputs:
            return
        rows = [self.train_dataset[index] for index in range(min(3, len(self.train_dataset)))]
        samples = [row["input_ids"][: min(96, row["lengths"][0])] for row in rows]
        samples = samples if len(samples) > 1 else samples * 2
        self.run.checks.run("packing_is_exact", checks.packing_is_exact, model, self.data_collator, samples)


class ReferenceMixin(StageMixin):
    """A trainer of a policy whose reference, if it is an adapter, is the adapter "ref" beside the policy's."""

    def compare_reference(self) -> tuple[list[str], int]:
        """(names of the reference adapter's tensors that differ from the parent's file, number of those compared)."""
        has_copy = isinstance(self.model, PeftModel) and "ref" in self.model.peft_config
        return changed_tensors(self.model, "ref", self.run.source.adapter) if has_copy else ([], 0)

    def _save(self, output_dir=None, state_dict=None):
        """The reference is the parent's adapter, which has its own directory: a stage holds one adapter."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            shutil.rmtree(Path(output_dir or self.args.output_dir, "ref"), ignore_errors=True)


class PairMixin(StageMixin):
    """A trainer of pairs of answers: the mean over pairs, in which every prompt counts once."""

    def _get_num_items_in_batch(self, batch_samples, device):
        if not batch_samples:
            return None
        total = sum(self.count_items(batch) for batch in batch_samples).to(device)
        return self.accelerator.gather(total.reshape(1)).sum() if self.args.world_size > 1 else total

    def count_items(self, batch: dict) -> torch.Tensor:
        """What a batch counts in the mean: a prompt is 1, however many pairs were made from it."""
        return batch["weights"].sum()

    def global_mean(self, losses: torch.Tensor, weights: torch.Tensor, num_items) -> torch.Tensor:
        """Weighted mean over the pairs of the global batch, so that it does not matter how the batch is split.

        Args:
            losses, weights: (pairs,) of this process and micro-batch.
            num_items: sum of the weights of the global batch; None stands for this micro-batch alone.
        """
        total = (losses * weights).sum()
        if num_items is None:
            return total / weights.sum()
        return total / num_items * self.accelerator.num_processes  # gradients are averaged over the processes
