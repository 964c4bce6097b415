"""The course of a run that is the same for every stage: start, train, save, measure, prove."""

import dataclasses
import functools
import hashlib
import inspect
import logging
import math
import os
import platform
import shutil
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging as transformers_logging

from stagekit import checks, data, memory
from stagekit.checkpoint import (
    SAVING,
    Source,
    base_fingerprint,
    check_output_dir,
    find_checkpoint,
    mark_complete,
    prepare_output_dir,
    relative,
    resolve,
    stage_fingerprint,
    write_stage,
)
from stagekit.curves import draw_curves
from stagekit.formats import Conversation
from stagekit.modeling import fetch_from_modelscope, generation_settings, stretched_positions
from stagekit.tokenization import IGNORE_INDEX, Probe, Sample, tokenize_rows

logger = logging.getLogger(__name__)

DATA_VERSION = 1  # of what tokenisation yields; raise it when that changes, so that old caches are not read
CHUNK_TOKENS = 1024  # tokens whose logits are held in fp32 at a time


@dataclass
class Run:
    """One run of a stage: where it comes from, what it found, what it will write into stage.json."""

    stage: str
    source: Source
    training_args: object
    arguments: dict
    checks: checks.Checks
    resume: str | None = None
    overwrite: bool = False
    rejected: list[dict] = field(default_factory=list)
    chat: object = None
    tuning: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    train_hashes: np.ndarray | None = None
    predicted_bytes: int | None = None
    bytes_before: int = 0
    started: float = field(default_factory=time.monotonic)


def run_stage(main):
    """Decorate a script's main(): what a user can mend is one line and exit code 2; --debug shows the traceback."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        debug = bool(os.environ.get("STAGEKIT_DEBUG"))
        for index, token in enumerate(sys.argv):
            # transformers has a --debug of its own, which takes a value
            if token == "--debug" and (index + 1 == len(sys.argv) or sys.argv[index + 1].startswith("--")):
                debug = bool(sys.argv.pop(index))
                break
        try:
            return main(*args, **kwargs)
        except (ValueError, OSError) as error:
            if debug:
                traceback.print_exc()
            rank = os.environ.get("RANK", "0")
            where = "" if rank == "0" else f" [rank {rank}]"
            print(f"{Path(sys.argv[0]).name}: error:{where} {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted; continue with --resume_from_checkpoint True", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped


def start_run(stage: str, model_args, lora_args, run_args, training_args, *other_args) -> Run:
    """Seed, let only rank 0 speak, find the parent, look whether --output_dir may be written.

    Raises:
        ValueError, FileNotFoundError: see checkpoint.resolve and checkpoint.check_output_dir.
    """
    set_seed(training_args.seed)
    logging.basicConfig(
        stream=sys.stderr,
        format="%(message)s"
        if training_args.process_index == 0
        else f"[rank {training_args.process_index}] %(message)s",
        level=logging.WARNING,
        force=True,
    )
    for speaker in ("stagekit", "__main__"):
        logging.getLogger(speaker).setLevel(logging.INFO if training_args.process_index == 0 else logging.ERROR)
    transformers_logging.set_verbosity_warning()
    arguments = {}
    for args in (model_args, lora_args, run_args, training_args, *other_args):
        arguments.update(given_arguments(args))
    outcome = checks.Checks.from_flag(run_args.skip_checks)
    name = model_args.model_name_or_path
    if model_args.model_hub == "modelscope" and not os.path.isdir(name):
        with training_args.main_process_first(desc="download"):
            name = fetch_from_modelscope(name, model_args.model_revision, model_args.cache_dir)
    with training_args.main_process_first(desc="verify the parent", local=False):
        source = resolve(name, lora_args.peft_path, verify=training_args.process_index == 0)
    resume = find_checkpoint(training_args.output_dir, training_args.resume_from_checkpoint)
    if training_args.do_train:
        check_output_dir(training_args.output_dir, run_args.overwrite_output_dir, bool(resume), source)
    parent = f", continues {source.directory} ({source.stage['stage']})" if source.stage else ""
    logger.info("%s: base %s%s", stage, source.base, parent)
    return Run(stage, source, training_args, arguments, outcome, resume, run_args.overwrite_output_dir)


def given_arguments(args) -> dict:
    """{flag: value} of what was given on the command line, for stage.json; secrets are left out."""
    plain = (int, float, str, bool, list, dict, type(None))
    values = {name: getattr(args, name) for name in args.given if "token" not in name or "tokenizer" in name}
    return {name: value if isinstance(value, plain) else str(value) for name, value in values.items()}


def load_data(run: Run, data_args, accept, encode, tokenizer, block_size: int, packing: bool, *settings):
    """Read, account for, tokenise and cache the data of a stage; check that nothing is measured on trained prompts.

    Args:
        run: what start_run returned; its data and hashes are filled in.
        data_args: DataArguments.
        accept: see data.load_rows.
        encode: function from a canonical record to (samples, number of answers that did not fit).
        tokenizer: part of the cache key, with its chat template.
        block_size: longest row in tokens.
        packing: see tokenization.pack.
        *settings: whatever else decides what encode yields; part of the cache key.

    Returns:
        (datasets, probes): {"train", "validation"} with columns input_ids, labels, lengths; probes for the checks.
    """
    seed = run.training_args.seed

    def build():
        splits = data.load_splits(data_args, accept, seed)
        columns, probes = {}, []
        parts = (
            ("train", splits.train, splits.train_ledger),
            ("validation", splits.validation, splits.validation_ledger),
        )
        for name, rows, ledger in parts:
            columns[name], found = tokenize_rows(
                rows, ledger, encode, block_size, packing, data_args.preprocessing_num_workers, f"tokenising {name}"
            )
            probes += found if name == "train" else found[:8]
        meta = {
            "ledgers": {name: data.ledger_dict(ledger) for name, _, ledger in parts},
            "rejected": splits.rejected,
            "train_hashes": data.prompt_hashes(splits.train).tolist(),
            "held_out": [(data.prompt_hash(row.record), row.origin) for row in splits.validation],
            "probes": [dataclasses.asdict(probe) for probe in probes],
        }
        return columns, meta

    files = data.find_files(data_args.train_file_dir)
    files += data.find_files(data_args.validation_file_dir) if data_args.validation_file_dir else []
    reading = {name: value for name, value in dataclasses.asdict(data_args).items() if "cache" not in name}
    kind = [run.stage, reading, seed, block_size, packing, settings, DATA_VERSION]
    key = data.cache_key(files, kind, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template)
    datasets, meta = data.cached(key, data_args.data_cache_dir, build)
    show_data(run, meta)
    held_out = [tuple(item) for item in meta["held_out"]]
    parent, limit = run.source.directory, data_args.max_leaked_percentage
    run.checks.run("leakage", checks.leakage, run.train_hashes, held_out, parent, limit)
    return datasets, [_probe(stored) for stored in meta["probes"]]


def _probe(stored):
    """A Probe from JSON, where dictionary keys are strings."""
    sample = stored["sample"]
    sample["turns"] = {int(turn): tuple(span) for turn, span in sample["turns"].items()}
    return Probe(Conversation(**stored["conversation"]), Sample(**sample), stored["origin"])


def show_data(run: Run, meta: dict) -> None:
    """Print the ledgers; note them and the rejected rows down for what the run writes."""
    run.data = meta["ledgers"]
    run.train_hashes = np.array(meta["train_hashes"], dtype=np.uint64)
    for split, title in (("train", "training"), ("validation", "held-out")):
        for line in data.ledger_from_dict(run.data[split]).lines(title):
            logger.info("%s", line)
    run.rejected = meta["rejected"]


def check_memory(run: Run, config, model_class, model_args, lora_args, max_tokens: int) -> None:
    """Predict the peak before anything large is loaded; stop when it cannot fit."""
    if model_class is None:  # code that came with the model: its size is known once it is loaded
        run.checks.outcomes["memory"] = {"passed": None, "value": "no prediction for remote code", "limit": ""}
        return
    parts = memory.predict_training_bytes(config, model_class, model_args, lora_args, run.training_args, max_tokens)
    use_cpu = run.training_args.use_cpu
    available = memory.available_bytes(use_cpu)
    run.predicted_bytes, run.bytes_before = parts["total"], memory.used_bytes(use_cpu, peak=False)

    def compare():
        value = f"predicted peak {parts['total'] / memory.GIB:.2f} GiB of {available / memory.GIB:.1f} GiB available"
        if parts["total"] > available:
            largest = max((name for name in parts if name != "total"), key=parts.get)
            raise checks.CheckError(
                f"{value}, most of it {largest}; try --load_in_4bit True, --activation_checkpointing True, a smaller "
                "batch or length, or DEEPSPEED=scripts/zero3.json on several GPUs"
            )
        return value, "available memory"

    run.checks.run("memory", compare)


# -- loss ------------------------------------------------------------------------------------------------------------


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


def _nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")


class StageTrainer(Trainer):
    """Trainer with an exact mean loss over tokens, checkpoints whole or absent, and proof on the first step."""

    def __init__(self, run: Run, *args, **kwargs):
        super().__init__(*args, compute_metrics=_language_metrics, **kwargs)
        self.run = run
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole global batch itself
        self._loss_shifts_labels = True
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.proved = False
        self.staging: str | None = None
        self.add_callback(FirstStep(self))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of token losses / tokens of the global batch, so that it does not matter how the batch is split."""
        labels = inputs.pop("labels")
        sums, counts = token_nll(model, inputs, labels, self.keeps_logits)
        loss = sums.sum() / (counts.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # data-parallel training averages gradients over processes
        return (loss, {"sums": sums}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the summed loss and the token count of each row, for an exact mean over all held-out tokens."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        if self.is_deepspeed_enabled:  # the engine gathers ZeRO-3's weights; the bare model holds empty ones
            model = self.model_wrapped
            model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            sums, counts = token_nll(model, inputs, labels, self.keeps_logits)
        return None, sums, counts

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Before the first step, check what needs the model as it will be trained, on the batch it will see."""
        if not self.proved:
            self.proved = True
            self.run.checks.run("processes_share_gradients", checks.processes_share_gradients, self)
            if "position_ids" in inputs:
                rows = [self.train_dataset[index] for index in range(min(3, len(self.train_dataset)))]
                samples = [row["input_ids"][: min(96, row["lengths"][0])] for row in rows]
                samples = samples if len(samples) > 1 else samples * 2
                with self.compute_loss_context_manager():
                    self.run.checks.run(
                        "packing_is_exact", checks.packing_is_exact, model, self.data_collator, samples
                    )
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
    """Looks at the first gradients and at every logged loss."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer
        self.seen = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.seen:
            self.seen = True
            self.trainer.run.checks.run("gradients_flow", checks.gradients_flow, self.trainer, model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if name in (logs or {}):
                self.trainer.run.checks.run("finite", checks.finite, logs[name], state.global_step, quiet=True)


def _language_metrics(prediction) -> dict[str, float]:
    """Mean loss over all tokens and its exponential, the perplexity."""
    loss = float(np.sum(prediction.predictions, dtype=np.float64) / np.sum(prediction.label_ids))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(np.sum(prediction.label_ids))}


# -- the course ------------------------------------------------------------------------------------------------------


def finish_run(trainer: StageTrainer, run: Run, tokenizer) -> None:
    """Train, save what the next stage needs, measure, and write stage.json last.

    Saving runs on every rank: under ZeRO-3 it gathers the weights, which is a collective call.
    """
    args = run.training_args
    metrics = {}
    if not args.do_train:
        metrics["after"] = _measures(trainer.evaluate())
        save_held_out(trainer, metrics)
        _print_metrics(metrics)
        return
    if run.resume:
        logger.info("resumes from %s", run.resume)
    if trainer.is_world_process_zero():
        prepare_output_dir(args.output_dir, run.overwrite, bool(run.resume))
        data.write_rejected(run.rejected, args.output_dir)
    trainer.accelerator.wait_for_everyone()
    args.eval_on_start = args.do_eval and run.resume is None
    result = trainer.train(resume_from_checkpoint=run.resume)
    first = next((entry for entry in trainer.state.log_history if "eval_loss" in entry), None)
    if args.do_eval:
        metrics["before"] = _measures(first or {})
        metrics["after"] = _measures(trainer.evaluate())
    trainer.save_metrics("train", result.metrics)
    if args.do_eval:
        save_held_out(trainer, metrics)
    trainer.save_state()
    measured = memory.used_bytes(args.use_cpu, peak=True) - (run.bytes_before if args.use_cpu else 0)
    save_final(trainer, run, tokenizer)
    if trainer.is_world_process_zero():
        draw_curves(trainer.state.log_history, Path(args.output_dir, "curves.png"), f"{run.stage}: loss")
        seen = np.union1d(data.load_seen_prompts(run.source.directory), run.train_hashes)
        np.save(Path(args.output_dir, data.SEEN_PROMPTS), seen)
        write_stage(args.output_dir, stage_record(run, trainer.model.config, metrics, measured))
        _print_metrics(metrics)
        if run.predicted_bytes:
            logger.info(
                "memory: predicted %.2f GiB, measured %.2f GiB",
                run.predicted_bytes / memory.GIB,
                measured / memory.GIB,
            )
        logger.info("saved: %s", args.output_dir)
    trainer.accelerator.wait_for_everyone()


def save_final(trainer: StageTrainer, run: Run, tokenizer) -> None:
    """Write weights, tokenizer and generation config beside the checkpoints, by rename, after reading them back."""
    output_dir = Path(trainer.args.output_dir)
    staging = output_dir / SAVING
    trainer.save_model(str(staging))
    reference = trained_tensors(trainer)
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(staging)
        stop_ids = run.chat.stop_ids if run.chat else [tokenizer.eos_token_id]
        generation_settings(stop_ids, tokenizer).save_pretrained(staging)
        (staging / "README.md").unlink(missing_ok=True)
        run.checks.run("saved_is_loaded", checks.saved_is_loaded, str(staging), reference, _reload(trainer, staging))
        for path in sorted(staging.iterdir()):
            target = output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        staging.rmdir()
    trainer.accelerator.wait_for_everyone()


def trained_tensors(trainer: StageTrainer) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint must hold, under the names its files use; gathered under ZeRO-3 (a collective call)."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    state = None
    if memory.zero_stage(trainer.args.deepspeed) == 3:
        state = trainer.accelerator.get_state_dict(trainer.deepspeed)
        if not trainer.is_world_process_zero():
            return {}
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model, state_dict=state, adapter_name="default")
    tensors, seen = {}, set()
    for name, tensor in (state or model.state_dict()).items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:  # tied weights are saved once
            tensors[name] = tensor
            seen.add(tensor.data_ptr())
    return tensors


def _reload(trainer, directory):
    """A function comparing logits of the adapter in memory with its reloaded copy; None where it cannot be done.

    That is full weights (their tensors are compared), ZeRO-3 (each process holds a part), and modules trained whole,
    which PEFT cannot hold twice when they are tied.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if not isinstance(model, PeftModel) or memory.zero_stage(trainer.args.deepspeed) == 3:
        return None
    if model.peft_config["default"].modules_to_save:
        return None
    row = trainer.train_dataset[0]
    ids = torch.tensor([row["input_ids"][: min(64, row["lengths"][0])]], device=model.device)

    @torch.no_grad()
    def compare():
        model.eval()
        with trainer.compute_loss_context_manager():
            trained = model(input_ids=ids, use_cache=False).logits.float()
            model.load_adapter(str(directory), "reloaded", is_trainable=False)
            model.set_adapter("reloaded")
            reloaded = model(input_ids=ids, use_cache=False).logits.float()
        model.set_adapter("default")
        model.delete_adapter("reloaded")
        return (trained - reloaded).abs().max().item()

    return compare


def stage_record(run: Run, config, metrics: dict, measured_bytes: int) -> dict:
    """What stage.json holds; the keys are a contract."""
    args, source = run.training_args, run.source
    template = None
    if run.chat is not None:
        template = {
            "name": run.chat.name,
            "sha256": hashlib.sha256(run.chat.tokenizer.chat_template.encode()).hexdigest(),
        }
    return {
        "format": 1,
        "stage": run.stage,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": args.seed,
        "base_model": {
            "name_or_path": relative(source.base, args.output_dir),
            "revision": getattr(config, "_commit_hash", None),  # of a hub model
            "fingerprint": base_fingerprint(source.base),
            **stretched_positions(config),
        },
        "parent": None
        if source.stage is None
        else {
            "path": relative(source.directory, args.output_dir),
            "stage": source.stage["stage"],
            "fingerprint": stage_fingerprint(source.stage),
        },
        "tuning": run.tuning,
        "template": template,
        "arguments": run.arguments,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "trl", "datasets", "accelerate")},
        },
        "hardware": {
            "device": "cpu" if args.use_cpu else torch.cuda.get_device_name(0),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "cpu_cores": os.cpu_count(),
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        },
        "data": run.data,
        "checks": run.checks.outcomes,
        "metrics": metrics,
        "memory": {"predicted_bytes": run.predicted_bytes, "measured_bytes": measured_bytes},
        "seconds": round(time.monotonic() - run.started, 1),
    }


def _measures(metrics):
    wanted = ("loss", "perplexity", "tokens")
    return {name: metrics[f"eval_{name}"] for name in wanted if f"eval_{name}" in metrics}


def save_held_out(trainer: StageTrainer, metrics: dict) -> None:
    """Write eval_results.json."""
    trainer.save_metrics("eval", {f"eval_{name}": value for name, value in metrics["after"].items()})


def _print_metrics(metrics):
    for when, values in metrics.items():
        if values:
            logger.info(
                "held-out loss %s training: %.4f (perplexity %.2f over %d tokens)",
                when,
                values["loss"],
                values["perplexity"],
                values["tokens"],
            )
