"""The course of a run that is the same for every stage: start, train, save, measure, prove."""

import dataclasses
import functools
import hashlib
import json
import logging
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
from transformers import set_seed
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging as transformers_logging

from stagekit import checks, data, memory
from stagekit.checkpoint import (
    SAVING,
    Source,
    base_fingerprint,
    check_output_dir,
    find_checkpoint,
    prepare_output_dir,
    read_stage,
    relative,
    resolve,
    stage_fingerprint,
    write_stage,
)
from stagekit.commandline import command_line
from stagekit.curves import draw_curves
from stagekit.encoding import Probe, write_dataset
from stagekit.held_out import METRICS, choose_questions, describe_answers
from stagekit.ledger import Ledger
from stagekit.modeling import (
    fetch_from_modelscope,
    generation_settings,
    has_score_head,
    model_class,
    stretched_positions,
    whole_modules,
)
from stagekit.pairs import encode_pairs, encode_preference
from stagekit.prompts import accept_prompt, encode_prompts
from stagekit.records import Conversation
from stagekit.seen_prompts import SEEN_PROMPTS, load_seen_prompts
from stagekit.tokenization import Sample, preview, settle_thinking
from stagekit.trainers import StageMixin

logger = logging.getLogger(__name__)

DATA_VERSION = 5  # of what tokenisation yields; raise it when that changes, so that old caches are not read


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
    cache_dir: str | None = None  # of downloads
    rejected_rows: Path | None = None  # file of rows that were left out, where there are such
    chat: object = None
    tuning: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    train_hashes: np.ndarray | None = None
    num_questions: int | None = None  # asked whenever the model is measured; None: this stage answers none
    question_tokens: int = 0
    answer_tokens: int = 0
    questions: list[dict] = field(default_factory=list)
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
            main(*args, **kwargs)
            if torch.distributed.is_initialized():  # a thread left running would abort the process at its end
                torch.distributed.destroy_process_group()
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
    if lora_args.new_adapter and source.adapter:
        source = dataclasses.replace(source, adapter=None, merged=[*source.merged, source.adapter])
    resume = find_checkpoint(training_args.output_dir, training_args.resume_from_checkpoint)
    if training_args.do_train:
        check_output_dir(training_args.output_dir, run_args.overwrite_output_dir, bool(resume), source)
    parent = f", continues {source.directory} ({source.stage['stage']})" if source.stage else ""
    logger.info("%s: base %s%s", stage, source.base, parent)
    overwrite, cache_dir = run_args.overwrite_output_dir, model_args.cache_dir
    return Run(stage, source, training_args, arguments, outcome, resume, overwrite, cache_dir)


def given_arguments(args) -> dict:
    """{flag: value} of what was given on the command line, for stage.json; secrets are left out."""
    plain = (int, float, str, bool, list, dict, type(None))
    values = {name: getattr(args, name) for name in args.given if "token" not in name or "tokenizer" in name}
    return {name: value if isinstance(value, plain) else str(value) for name, value in values.items()}


def load_data(run: Run, data_args, accept, encode_chunk, tokenizer, *settings):
    """Read, account for, tokenise and cache the data of a stage; check that nothing is measured on trained prompts.

    Args:
        run: what start_run returned; its data and hashes are filled in.
        data_args: DataArguments.
        accept: see reading.load_rows.
        encode_chunk: see encoding.write_dataset.
        tokenizer: part of the cache key, with its chat template.
        *settings: whatever decides what encode_chunk yields (lengths, switches); part of the cache key.

    Returns:
        (datasets, probes): {"train", "validation"} with the columns encode_chunk yields; probes for the checks.
    """
    from datasets import Dataset

    seed = run.training_args.seed

    def settle(ledger):
        if not (run.chat and ledger.tokens["trained"]):  # only prompts were read
            return ""
        return settle_thinking(run.chat, ledger.turns["with thoughts"], ledger.turns["trained"] or ledger.samples)

    def build(directory):
        splits = data.load_splits(data_args, accept, seed, sources)
        probes = []
        parts = (
            ("train", splits.train, splits.train_ledger),
            ("validation", splits.validation, splits.validation_ledger),
        )
        for name, rows, ledger in parts:
            path, workers = directory / f"{name}.arrow", data_args.preprocessing_num_workers
            found = write_dataset(rows, ledger, encode_chunk, path, splits.rejected, workers, f"tokenising {name}")
            if name == "train":
                settle(ledger)  # held-out questions are asked in the way that is trained
            probes += found if name == "train" else found[:8]
        np.save(directory / SEEN_PROMPTS, np.unique(splits.train.column("prompts")))
        splits.rejected.save(directory / data.REJECTED_ROWS)
        hashes = splits.validation.column("prompts").tolist()
        meta = {
            "ledgers": {name: ledger.to_dict() for name, _, ledger in parts},
            "held_out": [(prompt, row.origin) for prompt, row in zip(hashes, splits.validation, strict=True)],
            "probes": [dataclasses.asdict(probe) for probe in probes],
            "questions": []
            if run.num_questions is None
            else choose_questions(splits.validation, run.chat, run.question_tokens, seed),
        }
        (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    sources = data.find_sources(data_args, run.cache_dir)  # by every process: the hub's own locks let one download
    without_effect = ("data_cache_dir", "preprocessing_num_workers", "max_leaked_percentage")
    reading = {name: value for name, value in vars(data_args).items() if name not in without_effect}
    kind = [run.stage, reading, seed, settings, DATA_VERSION]
    files, vocabulary = [*sources.train, *sources.validation], tokenizer.backend_tokenizer.to_str()
    key = data.cache_key(files, kind, vocabulary, tokenizer.chat_template)
    directory = data.cached(key, data_args.data_cache_dir, build)
    meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    datasets = {name: Dataset.from_file(str(directory / f"{name}.arrow")) for name in meta["ledgers"]}
    show_data(run, meta)
    run.train_hashes = load_seen_prompts(directory)
    run.rejected_rows = directory / data.REJECTED_ROWS
    if said := settle(Ledger.from_dict(run.data["train"])):
        logger.info("%s", said)
    held_out = [tuple(item) for item in meta["held_out"]]
    parent, limit = run.source.directory, data_args.max_leaked_percentage
    run.checks.run("leakage", checks.leakage, run.train_hashes, held_out, parent, limit)
    run.questions = take_questions(meta["questions"], run.num_questions or 0)
    return datasets, [_probe(stored) for stored in meta["probes"]]


def plan_questions(run: Run, answer_args, question_tokens: int, answer_tokens: int) -> None:
    """Note how many held-out questions the model answers whenever it is measured, before the data is loaded.

    Args:
        run: what start_run returned.
        answer_args: AnswerArguments.
        question_tokens, answer_tokens: most that prompt and answer may have.

    Raises:
        ValueError: a checkpoint is to be chosen by answers that nobody asks for.
    """
    best, num_questions = run.training_args.metric_for_best_model or "", answer_args.eval_generation_samples
    if best.removeprefix("eval_") in METRICS and not num_questions:
        raise ValueError(f"--metric_for_best_model {best} needs --eval_generation_samples, e.g. 50")
    run.num_questions, run.question_tokens = num_questions, question_tokens
    run.answer_tokens = min(answer_args.eval_max_new_tokens, answer_tokens)


def take_questions(questions: list[dict], count: int) -> list[dict]:
    """The first of the held-out questions that load_data chose.

    Raises:
        ValueError: there are none with an answer.
    """
    if count and not questions:
        raise ValueError("--eval_generation_samples: no held-out row has a question and an answer to compare with")
    if len(questions) < count:
        logger.warning("--eval_generation_samples %d: the held-out data has %d with an answer", count, len(questions))
    return questions[:count]


def load_pairs(run: Run, data_args, chat, max_length: int, whole_answers: bool):
    """load_data for preferences, and the checks of what is compared; see pairs.encode_preference.

    Returns:
        (datasets, probes): see load_data; the columns are those of pairs.encode_pairs.
    """

    def encode(record):
        return encode_preference(chat, record, max_length, whole_answers)

    def encode_chunk(rows):
        return encode_pairs(rows, encode)

    settings = (max_length, whole_answers)
    datasets, probes = load_data(run, data_args, data.accept_preference, encode_chunk, chat.tokenizer, *settings)
    run.checks.run("loss_mask", checks.loss_mask, chat, probes, False)
    run.checks.run("template_parity", checks.template_parity, chat, probes)
    run.checks.run("no_forged_turns", checks.no_forged_turns, chat)
    return datasets, probes


def load_prompts(run: Run, data_args, max_prompt_length: int):
    """load_data for prompts that a policy answers itself.

    Returns:
        Datasets with the columns of prompts.encode_prompts.
    """

    def encode_chunk(rows):
        return encode_prompts(rows, run.chat, max_prompt_length)

    datasets, _ = load_data(run, data_args, accept_prompt, encode_chunk, run.chat.tokenizer, max_prompt_length)
    run.checks.run("no_forged_turns", checks.no_forged_turns, run.chat)
    return datasets


def print_preview(chat, probes: list[Probe], count: int) -> None:
    """Print samples with what is learnt, or compared, in colour."""
    for probe in probes[:count]:
        print(f"--- {probe.origin}\n{preview(chat.tokenizer, probe.sample, color=sys.stdout.isatty())}")


def _probe(stored):
    """A Probe from JSON, where dictionary keys are strings."""
    sample = stored["sample"]
    sample["turns"] = {int(turn): tuple(span) for turn, span in sample["turns"].items()}
    return Probe(Conversation(**stored["conversation"]), Sample(**sample), stored["origin"])


def show_data(run: Run, meta: dict) -> None:
    """Print the ledgers; note them down for what the run writes."""
    run.data = meta["ledgers"]
    for split, title in (("train", "training"), ("validation", "held-out")):
        for line in Ledger.from_dict(run.data[split]).lines(title):
            logger.info("%s", line)


def check_memory(
    run: Run,
    config,
    model_args,
    lora_args,
    max_tokens: int,
    reference_model: bool = False,
    scores: bool = False,
    trained_models: int = 1,
) -> None:
    """Predict the peak before anything large is loaded; stop when it cannot fit.

    Args:
        run, config, model_args, lora_args: the run's.
        max_tokens: tokens of the longest row of a batch, both answers of a pair counted.
        reference_model: a frozen copy of all the weights is held beside the trained ones.
        scores: the model scores sequences, so that there are no logits of a vocabulary.
        trained_models: models of this size that are trained, one at a time (PPO of all weights has a critic).

    Raises:
        CheckError: the prediction is more than there is.
    """
    if model_class(config) is None:  # code that came with the model: its size is known once it is loaded
        run.checks.outcomes["memory"] = {"passed": None, "value": "no prediction for remote code", "limit": ""}
        return
    whole = whole_modules(run.source, lora_args)
    parts = memory.predict_training_bytes(
        config, model_class(config), model_args, lora_args, run.training_args, max_tokens, whole
    )
    if scores:
        parts = {**parts, "logits": 0}
    held = {name: trained_models * parts[name] for name in ("weights", "gradients", "optimizer")}
    held["weights"] += parts["weights"] * reference_model
    parts = {**parts, **held}
    parts["total"] = sum(size for name, size in parts.items() if name != "total")
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


# -- the course ------------------------------------------------------------------------------------------------------


def finish_run(trainer: StageMixin, run: Run, tokenizer) -> None:
    """Train, save what the next stage needs, measure, and write stage.json last.

    Saving runs on every rank: under ZeRO-3 it gathers the weights, which is a collective call.
    """
    args = run.training_args
    metrics = {}
    if not args.do_train:
        trainer.remove_callback(TensorBoardCallback)  # without training it would write to ./runs
        metrics["after"] = _measures(trainer.evaluate())
        save_held_out(trainer, metrics)
        _print_metrics(trainer, metrics)
        return
    if run.resume:
        logger.info("resumes from %s", run.resume)
    if trainer.is_world_process_zero():
        prepare_output_dir(args.output_dir, run.overwrite, bool(run.resume))
        if run.rejected_rows.is_file():
            copied = shutil.copy(run.rejected_rows, args.output_dir)
            logger.warning("rows that were left out, and why: %s", copied)
    trainer.accelerator.wait_for_everyone()
    args.eval_on_start = args.do_eval and run.resume is None
    result = trainer.train(resume_from_checkpoint=run.resume)
    first = next((entry for entry in trainer.state.log_history if "eval_runtime" in entry), None)
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
        draw_curves(trainer.state.log_history, Path(args.output_dir, "curves.png"), run.stage)
        seen = np.union1d(load_seen_prompts(run.source.directory), run.train_hashes)
        np.save(Path(args.output_dir, SEEN_PROMPTS), seen)
        if args.do_eval:
            metrics["after"].update(trainer.report(Path(args.output_dir)))
        write_stage(args.output_dir, stage_record(run, trainer.model.config, metrics, measured))
        _print_metrics(trainer, metrics)
        if run.predicted_bytes:
            logger.info(
                "memory: predicted %.2f GiB, measured %.2f GiB",
                run.predicted_bytes / memory.GIB,
                measured / memory.GIB,
            )
        logger.info("saved: %s", args.output_dir)
    trainer.accelerator.wait_for_everyone()


def save_final(trainer: StageMixin, run: Run, tokenizer) -> None:
    """Write weights, tokenizer and generation config beside the checkpoints, by rename, after reading them back."""
    output_dir = Path(trainer.args.output_dir)
    staging = output_dir / SAVING
    trainer.save_model(str(staging))
    reference = trained_tensors(trainer)
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(staging)
        if not has_score_head(base_model(trainer)):
            stop_ids = run.chat.stop_ids if run.chat else [tokenizer.eos_token_id]
            generation_settings(stop_ids, tokenizer).save_pretrained(staging)
        (staging / "README.md").unlink(missing_ok=True)
        reload, scores = _reload(trainer, staging), has_score_head(base_model(trainer))
        run.checks.run("saved_is_loaded", checks.saved_is_loaded, str(staging), reference, reload, scores)
        for path in sorted(staging.iterdir()):
            target = output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        staging.rmdir()
    trainer.accelerator.wait_for_everyone()


def base_model(trainer: StageMixin):
    """The model without its wrappers and its adapter."""
    model = trainer.saved_model()
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trained_tensors(trainer: StageMixin) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint must hold, under the names its files use; gathered under ZeRO-3 (a collective call)."""
    model = trainer.saved_model()
    state = None
    if memory.zero_stage(trainer.args.deepspeed) == 3:
        state = trainer.saved_state(trainer.accelerator.get_state_dict(trainer.deepspeed))
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

    That is full weights (their tensors are compared), ZeRO-3 (each process holds a part), and embeddings trained whole
    that are tied to the head, which PEFT cannot hold twice. Of a reward model the logits are the scores.
    """
    model = trainer.saved_model()
    if not isinstance(model, PeftModel) or memory.zero_stage(trainer.args.deepspeed) == 3:
        return None
    lora = model.peft_config["default"]
    if lora.modules_to_save and lora.ensure_weight_tying:
        return None
    row = trainer.train_dataset[0]
    sequence = next((row[name] for name in ("chosen_ids", "prompt_ids") if name in row), None)
    sequence = row["input_ids"][: row["lengths"][0]] if sequence is None else sequence
    ids = torch.tensor([sequence[:64]], device=model.device)

    @torch.no_grad()
    def compare():
        model.eval()
        with trainer.accelerator.autocast():
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
        "command": command_line(f"python {Path(sys.argv[0]).name}"),
        "seed": args.seed,
        "base_model": {
            "name_or_path": relative(source.base, args.output_dir),
            "revision": getattr(config, "_commit_hash", None),  # of a hub model
            "fingerprint": base_fingerprint(source.base),
            **({"merged": [_merged(path, args.output_dir) for path in source.merged]} if source.merged else {}),
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
            "device": torch.cuda.get_device_name(0) if args.device.type == "cuda" else args.device.type,
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


def _merged(directory, output_dir):
    return {"path": relative(directory, output_dir), "fingerprint": stage_fingerprint(read_stage(directory))}


def _measures(metrics):
    """What was measured on the held-out rows; how long that took is left out."""
    names = [name for name in metrics if name.startswith("eval_") and not name.endswith(("_second", "_runtime"))]
    return {name.removeprefix("eval_"): metrics[name] for name in names}


def save_held_out(trainer: StageMixin, metrics: dict) -> None:
    """Write eval_results.json."""
    trainer.save_metrics("eval", {f"eval_{name}": value for name, value in metrics["after"].items()})


def _print_metrics(trainer, metrics):
    for when, values in metrics.items():
        if values:
            logger.info("held-out %s training: %s", when, trainer.describe(values))
            if trainer.run.questions and "rouge_l" in values:
                logger.info("held-out %s training: %s", when, describe_answers(values))
