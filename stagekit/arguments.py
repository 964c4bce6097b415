"""Command-line arguments every stage shares, declared once, and the parser that reads them.

A stage adds its own dataclass for what only it needs. A name that TrainingArguments owns (seed, learning_rate, ...)
is never declared again: the parser refuses duplicates.
"""

import argparse
import difflib
import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments

from stagekit.commandline import LEAST_TEMPERATURE
from template import get_template


@dataclass
class ModelArguments:
    """Which model to start from and how to load it."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "What to start from: a hub name, a model directory, or a directory an earlier stage wrote "
            "(its base, adapter, tokenizer and template are then found through its stage.json)."
        },
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub model."})
    model_hub: str = field(
        default="huggingface",
        metadata={"help": "Where a model name is looked up.", "choices": ["huggingface", "modelscope"]},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the hub are kept."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the loaded weights; auto: bfloat16 under --bf16, else what the checkpoint holds.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    flash_attn: bool = field(
        default=False, metadata={"help": "FlashAttention 2 (needs the package flash-attn and a GPU)."}
    )
    rope_scaling: str | None = field(
        default=None,
        metadata={
            "help": "Stretch rotary positions so that longer texts fit; the factor follows from the longest "
            "text asked "
            "for and what the model was trained on.",
            "choices": ["linear", "dynamic", "yarn"],
        },
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the frozen base to NF4 (QLoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the frozen base to int8."})
    qlora: bool = field(default=False, metadata={"help": "Same as --load_in_4bit True."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model. Off unless you trust its author."}
    )

    def __post_init__(self):
        if not self.model_name_or_path:
            raise ValueError("--model_name_or_path is missing: name a hub model, a directory or an earlier stage")
        self.load_in_4bit = self.load_in_4bit or self.qlora
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("--load_in_4bit and --load_in_8bit exclude each other; give one")


@dataclass
class LoraArguments:
    """Which adapter to train, and which one to continue."""

    _argument_group_name = "adapter"

    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter; False trains all the weights."})
    peft_path: str | None = field(
        default=None,
        metadata={"help": "Adapter directory of the previous stage, to be continued on --model_name_or_path."},
    )
    new_adapter: bool = field(
        default=False,
        metadata={
            "help": "Merge the parent's adapter into the base in memory and train a fresh one on that; stage.json "
            "records what is merged, and whatever loads this stage merges it again. Not on quantised bases."
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the update (arXiv:2106.09685)."})
    lora_alpha: float = field(default=16.0, metadata={"help": "The update is scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    target_modules: str = field(
        default="all", metadata={"help": "Comma-separated module names, or 'all' for every linear layer but the head."}
    )
    modules_to_save: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated modules trained whole beside the adapter, e.g. embed_tokens,lm_head after the "
            "vocabulary grew."
        },
    )
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA (arXiv:2402.09353)."})
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_rank) instead (arXiv:2312.03732)."}
    )
    init_lora_weights: str = field(
        default="True",
        metadata={
            "help": "How the adapter starts. Kinds that also change the base's weights (pissa, olora, corda) are not "
            "offered: their adapters do not load on the base as it is.",
            "choices": ["True", "gaussian", "orthogonal"],
        },
    )

    def __post_init__(self):
        if self.peft_path and not self.use_peft:
            raise ValueError("--peft_path continues an adapter, so it needs --use_peft True")
        if self.new_adapter and not self.use_peft:
            raise ValueError("--new_adapter True trains an adapter, so it needs --use_peft True")
        if self.lora_rank < 1:
            raise ValueError(f"--lora_rank must be at least 1, got {self.lora_rank}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be in [0, 1), got {self.lora_dropout}")


@dataclass
class DataArguments:
    """Where the examples are and how many of them to use."""

    _argument_group_name = "data"

    train_file_dir: str | None = field(
        default=None,
        metadata={"help": "Training data: a file, or a directory searched recursively; several with commas."},
    )
    validation_file_dir: str | None = field(
        default=None,
        metadata={"help": "Held-out data, same forms. Without it a share of the training data is held out."},
    )
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "How large that share is, in percent of the rows."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A dataset of the hub, NAME or NAME:CONFIG, or a folder that holds such a repository; beside "
            "--train_file_dir or in its place."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Which of its splits to train on."})
    dataset_hub: str = field(
        default="huggingface",
        metadata={"help": "Where --dataset_name is looked up.", "choices": ["huggingface", "modelscope"]},
    )
    data_format: str = field(
        default="auto",
        metadata={
            "help": "Form of the records; auto recognises it row by row. The names of docs/data.md (conversation, "
            "instruction, preference, ranking, question, choice, tree, …) force one reading."
        },
    )
    mixing_weights: str | None = field(
        default=None,
        metadata={
            "help": "Shares of the parts of --train_file_dir, with commas, e.g. 0.9,0.1: an epoch holds rows of each "
            "in this proportion. Without it an epoch is every row once."
        },
    )
    mixing_epoch: str = field(
        default="first_exhausted",
        metadata={
            "help": "How long an epoch of a mixture is. first_exhausted: until one part is used up, no row twice; "
            "all_exhausted: until every row was seen, smaller parts repeated.",
            "choices": ["first_exhausted", "all_exhausted"],
        },
    )
    dedup: str = field(
        default="none",
        metadata={
            "help": "Leave out rows that repeat an earlier one. exact: the same record; near: also nearly the same "
            "text.",
            "choices": ["none", "exact", "near"],
        },
    )
    columns: str | None = field(
        default=None,
        metadata={"help": "Your fields for the names that are looked for, e.g. prompt=问题,chosen=好,rejected=坏."},
    )
    first_option: int | None = field(
        default=None,
        metadata={
            "help": "Number of option A in the field cop of multiple choice (MedMCQA); default: as the file says.",
            "choices": [0, 1],
        },
    )
    txt_documents: str = field(
        default="blank_line",
        metadata={
            "help": "What separates the documents of a .txt file.",
            "choices": ["blank_line", "line", "file"],
        },
    )
    on_bad_row: str = field(
        default="stop",
        metadata={
            "help": "stop: name the unreadable rows and exit before any model is loaded; skip: go on and "
            "write them to "
            "<output_dir>/rejected_rows.jsonl.",
            "choices": ["stop", "skip"],
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use at most this many training rows, drawn with --seed."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for the held-out rows."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenise; default one for each core (one below 2,000 rows)."}
    )
    data_cache_dir: str | None = field(
        default=None, metadata={"help": "Where tokenised data is kept; default below the datasets library's cache."}
    )
    max_leaked_percentage: float = field(
        default=1.0,
        metadata={"help": "Stop when more than this share of the held-out prompts was trained on, here or earlier."},
    )

    def __post_init__(self):
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"--validation_split_percentage must be between 0 and 100, got {self.validation_split_percentage}"
            )
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not (self.train_file_dir or self.dataset_name):
            raise ValueError("--train_file_dir is missing: name a file or directory with training data")


@dataclass
class PromptArguments:
    """How conversations are written out; every stage but pretraining asks."""

    _argument_group_name = "prompt"

    template_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompt template by name (template.py lists them), for a tokenizer that brings none or to replace "
            "its own; it is saved with the checkpoint."
        },
    )

    def __post_init__(self):
        if self.template_name:
            get_template(self.template_name)


@dataclass
class PairArguments:
    """How pairs of answers are cut and looked at; reward modelling, DPO and ORPO ask."""

    _argument_group_name = "pairs"

    max_length: int = field(
        default=1024,
        metadata={
            "help": "Longest sequence, prompt and answer, in tokens. A prompt too long loses its oldest turns, then "
            "its beginning; an answer is cut (a reward model: left out) only if it does not fit beside that."
        },
    )
    preview: int | None = field(
        default=None, metadata={"help": "Print this many pairs, answers in colour, and exit without training."}
    )

    def __post_init__(self):
        if self.max_length < 16:
            raise ValueError(f"--max_length must be at least 16 tokens, got {self.max_length}")


@dataclass
class RolloutArguments:
    """How the policy answers while it is trained, and what judges the answers; PPO and GRPO ask."""

    _argument_group_name = "answers and their reward"

    reward_functions: str | None = field(
        default=None,
        metadata={
            "help": "Functions that score answers, with commas: names of stagekit/rewards.py (accuracy, format, "
            "language, repetition, length, math), or path/to/file.py:function."
        },
    )
    reward_weights: str | None = field(
        default=None, metadata={"help": "One number for each function, e.g. 1,0.2; default 1 each."}
    )
    max_prompt_length: int = field(
        default=512,
        metadata={"help": "Longest prompt in tokens; the oldest exchanges give way, longer ones are left out."},
    )
    max_completion_length: int = field(default=256, metadata={"help": "Longest answer in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampler; 1 samples from the policy itself."})
    show_samples: int = field(default=2, metadata={"help": "Answers shown at every log; more are in samples.jsonl."})
    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "Sample with vLLM (pip install trl[vllm], GPUs only). It gets the policy's weights after every "
            "update, which a check proves each time: its log-probabilities must be the trainer's."
        },
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "colocate: on the GPUs that train; server: a server that `trl vllm-serve` runs on others.",
            "choices": ["colocate", "server"],
        },
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of a GPU's memory for vLLM (colocate)."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs one copy is split over (colocate)."})
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Where the server is."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Its port."})

    def __post_init__(self):
        for name in ("max_prompt_length", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature >= LEAST_TEMPERATURE:
            raise ValueError(
                f"--temperature must be at least {LEAST_TEMPERATURE}, got {self.temperature}; greedy answers explore "
                "nothing"
            )
        if self.use_vllm and not importlib.util.find_spec("vllm"):
            raise ValueError("--use_vllm True needs vLLM, which is not installed: pip install 'trl[vllm]' (GPUs only)")


@dataclass
class AnswerArguments:
    """Questions answered whenever the model is measured."""

    _argument_group_name = "answers to held-out questions"

    eval_generation_samples: int = field(
        default=0,
        metadata={
            "help": "Held-out questions answered at every evaluation: eval_bleu4, eval_rouge_l, eval_answer_accuracy "
            "(where a reference is letters, yes or no, or a number), eval_stop_rate, eval_answer_tokens, and three "
            "answers in the log. --metric_for_best_model eval_rouge_l chooses a checkpoint by them."
        },
    )
    eval_max_new_tokens: int = field(default=256, metadata={"help": "Longest such answer in tokens."})

    def __post_init__(self):
        if not 0 <= self.eval_generation_samples <= 500:
            raise ValueError(f"--eval_generation_samples must be 0 to 500, got {self.eval_generation_samples}")
        if self.eval_max_new_tokens < 1:
            raise ValueError(f"--eval_max_new_tokens must be at least 1, got {self.eval_max_new_tokens}")


@dataclass
class RunArguments:
    """What happens around the training."""

    _argument_group_name = "run"

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete what --output_dir holds. Without it a finished run there is moved aside and kept."},
    )
    skip_checks: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated names of checks not to run (stage.json records that), e.g. memory,leakage."
        },
    )


@dataclass
class StageTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults this toolkit needs; everything else is as in transformers."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "One or more of tensorboard, wandb, swanlab, ..., or none; logs go to <output_dir>/runs."},
    )
    # The filter replaces a NaN loss by the running mean, which hides exactly what the "finite" check looks for.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Keep off: it hides NaN losses."})
    # Columns are chosen by this project's own collator.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep off: the collator picks the columns."})


# Flags of earlier years -> (today's flag or None when nothing is needed, what to say). Old commands keep running.
OLD_FLAGS = {
    "evaluation_strategy": ("eval_strategy", "is --eval_strategy today"),
    "warmup_ratio": ("warmup_steps", "is --warmup_steps today, which reads a value below 1 as a share of all steps"),
    "torch_dtype": ("dtype", "is --dtype today"),
    "no_cuda": ("use_cpu", "is --use_cpu today"),
    "gradient_checkpointing": ("activation_checkpointing", "is --activation_checkpointing today"),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", "is --per_device_train_batch_size today"),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", "is --per_device_eval_batch_size today"),
    "model_max_length": ("max_length", "is --max_length here"),
    "max_seq_length": ("max_length", "is --max_length here"),
    "cutoff_len": ("max_length", "is --max_length here"),
    "use_lora": ("use_peft", "is --use_peft here"),
    "lora_r": ("lora_rank", "is --lora_rank here"),
    "lora_target": ("target_modules", "is --target_modules here"),
    "lora_target_modules": ("target_modules", "is --target_modules here"),
    "lora_path": ("peft_path", "is --peft_path here"),
    "adapter_name_or_path": ("peft_path", "is --peft_path here"),
    "additional_target": ("modules_to_save", "is --modules_to_save here"),
    "use_flash_attention_2": ("flash_attn", "is --flash_attn here"),
    "model_type": (None, "is not needed: the architecture is read from the model"),
    "device_map": (
        None,
        "is not needed: every process loads on its own device (DEEPSPEED=scripts/zero3.json splits a large model)",
    ),
    "save_safetensors": (None, "is not needed: weights are always saved as safetensors"),
    "low_cpu_mem_usage": (None, "is not needed: loading is always sparing"),
    "group_by_length": (None, "is not needed: packing leaves no padding to save"),
    "logging_dir": (None, "is not needed: logs go to <output_dir>/runs"),
}


def translate_old_flags(argv: list[str], known: set[str]) -> tuple[list[str], list[str]]:
    """Rewrite flags of earlier years into today's.

    Args:
        argv: the command line without the program name.
        known: flags (without dashes) that this script declares; those are never touched.

    Returns:
        (argv, notes): the new command line and one line for each flag that was rewritten.

    Raises:
        ValueError: an old flag that carries a secret.
    """
    tokens, notes, lengths, index = [], [], {}, 0
    while index < len(argv):
        flag, equals, value = argv[index].partition("=")
        index += 1
        if not flag.startswith("--"):
            tokens.append(argv[index - 1])
            continue
        name, values = flag.removeprefix("--"), [value] if equals else []
        while not equals and index < len(argv) and not argv[index].startswith("--"):
            values.append(argv[index])
            index += 1
        if name == "overwrite_output_dir":
            notes.append("--overwrite_output_dir left transformers; this toolkit still honours it")
        if name == "hf_hub_token":
            raise ValueError(
                "--hf_hub_token would be logged with the arguments; set the environment variable HF_TOKEN"
            )
        if name in ("max_source_length", "max_target_length") and name not in known and values:
            lengths[name] = values[0]
            continue
        if name in OLD_FLAGS and name not in known:
            today, note = OLD_FLAGS[name]
            notes.append(f"--{name} {note}")
            if today is None:
                continue
            if today == "max_length" and today not in known and "block_size" in known:
                today = "block_size"
                notes[-1] = f"--{name} is --block_size here"
            flag = f"--{today}"
        tokens += [f"{flag}={value}"] if equals else [flag, *values]
    if lengths:
        try:
            total = sum(int(value) for value in lengths.values())
        except ValueError:
            raise ValueError(
                f"--{' and --'.join(lengths)} must be whole numbers, got {list(lengths.values())}"
            ) from None
        notes.append(f"--{' + --'.join(lengths)} is --max_length {total} here: one limit for prompt and answer")
        tokens += ["--max_length", str(total)]
    return tokens, notes


def flags_of_file(path: Path) -> list[str]:
    """Read a .json file of arguments as the command line that says the same; null leaves the default.

    Raises:
        ValueError: not JSON, or not one object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected one object with the names of flags, got {type(values).__name__}")
    argv = []
    for name, value in values.items():
        if isinstance(value, list) and value:
            argv += [f"--{name}", *map(str, value)]
        elif value not in (None, []):
            argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the script's docstring as it is written."""


class StageParser(HfArgumentParser):
    """HfArgumentParser whose errors are one line instead of the usage of 200 flags."""

    def error(self, message):
        print(f"{self.prog}: error: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


def unknown_flag_message(unknown: list[str], known: set[str]) -> str:
    """Name the first unknown flag and the nearest known one."""
    flag = next((token.partition("=")[0] for token in unknown if token.startswith("--")), None)
    if flag is None:
        return f"unexpected argument {unknown[0]!r}; flags start with --"
    nearest = difflib.get_close_matches(flag.removeprefix("--"), sorted(known), n=1, cutoff=0.5)
    return f"unknown flag {flag}" + (f"; did you mean --{nearest[0]}?" if nearest else "")


def parse_args(*dataclass_types: type, description: str | None = None, args: list[str] | None = None) -> tuple:
    """Parse the command line, or one .json file, into one instance per dataclass.

    Unknown flags and abbreviations end the program with exit code 2 and the nearest known flag; flags of earlier years
    are translated, with one line each.

    Raises:
        ValueError: a value that a dataclass refuses.
    """
    argv = list(sys.argv[1:] if args is None else args)
    parser = StageParser(
        dataclass_types,
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        usage=f"{Path(sys.argv[0]).name} --flag VALUE ... (or one FILE.json with the same names)",
    )
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = flags_of_file(Path(argv[0]))
    known = {option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")}
    argv, notes = translate_old_flags(argv, known)
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(unknown_flag_message(unknown, known))
    given = {token.partition("=")[0].removeprefix("--") for token in argv if token.startswith("--")}
    argv += prepare_devices(argv, namespace)
    parsed = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    for item in parsed:  # stage.json stores what the user chose, not what the libraries made of it
        names = {each.name for each in fields(item)}
        item.given = sorted(name for name in names if name in given or f"no_{name}" in given)
    return parsed


def prepare_devices(argv: list[str], namespace) -> list[str]:
    """Do what must be done before TrainingArguments looks at the hardware; return flags to add.

    Without an accelerator --use_cpu is not a wish but the truth: without it, torchrun starts N runs that know nothing
    of each other, and write into one directory. ZeRO-3 on CPU needs the process group before the weights.
    """
    import torch

    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja, for DeepSpeed
    )
    has_accelerator = torch.accelerator.is_available()
    if has_accelerator:
        return []
    if getattr(namespace, "fp16", False):
        raise ValueError("--fp16 True needs a GPU and none was found; leave it out (fp32), or use --bf16 True")
    os.environ.pop("ACCELERATE_USE_CPU", None)  # it would switch DeepSpeed off in silence; the flag does not
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if getattr(namespace, "deepspeed", None):
        import deepspeed

        if "WORLD_SIZE" not in os.environ:  # a single process without launcher: the same, with a group of one
            os.environ.update(
                RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
            )
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return ["--use_cpu", "True"]


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
