r"""Print the arguments with which vLLM serves a stage directory, one a line; scripts/vllm_deployment.sh runs them.

Reads   a directory that a stage wrote (adapter or whole weights): base, adapter, tokenizer, chat template, stop tokens
Prints  the arguments; what is worth knowing about them goes to stderr

    python -m tools.vllm_command outputs/sft --port 8001

What follows the directory is handed on to vLLM and comes last, so it wins. An adapter that vLLM would refuse, or serve
as another model than was trained, ends with the reason and exit code 2.

vLLM itself is not needed for this, and was not at hand when it was written. The flags are those of its documentation
(engine arguments, "stable"; --max-model-len auto stands in 0.29) and of its sources: vllm/config/lora.py for ranks,
vllm/lora/peft_helper.py for what adapters may be, vllm/config/model.py for the generation settings.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from stagekit.checkpoint import ADAPTER, Source, check_base, resolve
from stagekit.commandline import Parser, run

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; --debug stands before the directory, for what follows that is vLLM's."""
    parser = Parser("vllm_command", __doc__)
    parser.add_argument("directory", help="what a stage wrote, such as outputs/sft")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="more arguments for vLLM, as they are")
    return parser.parse_args(argv)


def command(directory: str) -> tuple[list[str], list[str]]:
    """The arguments of vllm, and notes about them.

    Raises:
        FileNotFoundError: the directory, or a base that it names, is not there.
        ValueError: it holds no weights, or vLLM cannot serve them.
    """
    if not os.path.isdir(directory):
        raise FileNotFoundError(f"{directory}: no such directory; name what a stage wrote, such as outputs/sft")
    source = resolve(directory)
    path = Path(directory).resolve()
    base = str(Path(source.base).resolve()) if os.path.isdir(source.base) else source.base
    check_base(source, way_out="")
    config = read(Path(base, "config.json"))
    if source.adapter:
        arguments, notes = adapter_arguments(directory, path, base, source)
    elif any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or []):
        raise ValueError(f"{directory} is a reward model: it scores answers and cannot write any")
    else:
        arguments, notes = ["--served-model-name", path.name], [f"requests call the model {path.name!r}"]
    if (path / "chat_template.jinja").is_file():
        arguments += ["--chat-template", str(path / "chat_template.jinja")]
    else:
        notes.append("the directory has no chat template of its own; /v1/chat/completions depends on the base's")
    arguments += stop_arguments(path)
    # "auto" would make fp16 of fp32, whose large numbers that cannot hold
    arguments += ["--dtype", "bfloat16" if config.get("dtype", config.get("torch_dtype")) == "float32" else "auto"]
    arguments += ["--max-model-len", "auto", *stretched(source), "--host", "127.0.0.1", "--port", "8000"]
    return ["serve", base, *arguments], notes


def adapter_arguments(directory: str, path: Path, base: str, source: Source) -> tuple[list[str], list[str]]:
    """The arguments that put an adapter on its base, and notes about them."""
    adapter = read(path / ADAPTER[0])
    refuse_adapter(directory, source, adapter)
    stage, arguments, notes = source.stage or {}, [], []
    revision = stage.get("base_model", {}).get("revision")
    if revision and not os.path.isdir(base):
        arguments += ["--revision", revision]
    base_name = Path(base).name if os.path.isdir(base) else base
    base_name += "-base" * (base_name == path.name)
    arguments += ["--served-model-name", base_name, "--enable-lora", "--lora-modules", lora_module(path.name, path)]
    arguments += ["--max-lora-rank", str(next(rank for rank in RANKS if rank >= adapter["r"]))]
    if (path / "tokenizer_config.json").is_file():
        arguments += ["--tokenizer", str(path)]
    if stage.get("tuning", {}).get("method") == "qlora":
        notes.append(
            "trained on a 4-bit or 8-bit base; vLLM puts the adapter on the original weights, so answers can differ a "
            "little (--quantization bitsandbytes serves a 4-bit base)"
        )
    return arguments, [*notes, f"requests call the trained model {path.name!r}, and its base {base_name!r}"]


def read(path: Path) -> dict:
    """A JSON file; empty where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def lora_module(name: str, path: Path) -> str:
    """NAME=DIR, or as JSON where vLLM would take a path with these characters apart."""
    if any(mark in f"{name}{path}" for mark in "=,"):
        return json.dumps({"name": name, "path": str(path)})
    return f"{name}={path}"


def refuse_adapter(directory: str, source: Source, adapter: dict) -> None:
    """Raise ValueError for an adapter that vLLM refuses, or that it would take for something else."""
    if adapter.get("task_type") == "SEQ_CLS":
        raise ValueError(f"{directory} is a reward model: it scores answers and cannot write any")
    whole = ", ".join(sorted({name.rpartition(".")[2] for name in adapter.get("modules_to_save") or []}))
    initial = str(adapter.get("init_lora_weights")).lower()
    reasons = [
        (source.merged, "it was trained on a base with other adapters merged into it, which vLLM does not have"),
        (adapter.get("peft_type") != "LORA", f"it is no LoRA adapter ({adapter.get('peft_type')})"),
        (whole, f"{whole} was trained whole (modules_to_save), and vLLM serves LoRA matrices alone"),
        (adapter.get("trainable_token_indices"), "rows of the embedding were trained (trainable_token_indices)"),
        (adapter.get("use_dora"), "vLLM has no DoRA"),
        ((adapter.get("bias") or "none") != "none" or adapter.get("lora_bias"), "biases were trained"),
        (adapter.get("rank_pattern") or adapter.get("alpha_pattern"), "vLLM scales all modules alike"),
        (adapter.get("layer_replication"), "layers are repeated (layer_replication)"),
        (initial.startswith(("pissa", "olora", "corda")), f"its start changed the base ({initial})"),
        (adapter.get("r", 0) > RANKS[-1], f"its rank {adapter.get('r')} is above {RANKS[-1]}"),
    ]
    for applies, reason in reasons:
        if applies:
            merged = f"{directory.rstrip('/')}-merged"
            raise ValueError(
                f"{directory}: vLLM cannot serve this adapter on its base: {reason}. Merge it into one model and "
                f"serve that: python -m tools.merge_adapter --lora_model {directory} --output_dir {merged}"
            )


def stop_arguments(path: Path) -> list[str]:
    """The stage's own generation settings, above all its stop tokens: vLLM would read those of the base.

    --override-generation-config cannot carry them, for vLLM takes eos_token_id from the --generation-config directory
    alone. And max_new_tokens, inference.py's usual length, would be a ceiling there for all requests.
    """
    settings = read(path / "generation_config.json")
    if not settings:
        return []
    ceiling = "max_new_tokens" in settings
    return ["--generation-config", str(path)] + ["--override-generation-config", '{"max_new_tokens": null}'] * ceiling


def stretched(source: Source) -> list[str]:
    """Positions that --rope_scaling stretched in training, which the base's config.json does not know."""
    trained = (source.stage or {}).get("base_model", {})
    names = [name for name in ("rope_parameters", "max_position_embeddings") if name in trained]
    return ["--hf-overrides", json.dumps({name: trained[name] for name in names})] if source.adapter and names else []


def main(args: argparse.Namespace) -> None:
    """Print the arguments, and the notes about them."""
    arguments, notes = command(args.directory)
    arguments += args.arguments
    if any("\n" in argument for argument in arguments):
        raise ValueError("an argument has a line break in it; they are printed one a line")
    for note in notes:
        print(f"vllm_command: {note}", file=sys.stderr)
    print("\n".join(arguments))


if __name__ == "__main__":
    run(main, parse_args(), "vllm_command", "")
