r"""Quantise a model: smaller files and slightly other answers; perplexity before and after says how much other.

Reads   --model        a model that stands alone, such as outputs/sft-merged (an adapter is merged first:
                       python -m tools.merge_adapter)
        --text_file    held-out text for the perplexity, in any format of this project
Writes  --output_dir   bitsandbytes: a model directory that inference.py and every stage load by its name
                       gguf: one file for llama.cpp, Ollama and LM Studio, made by llama.cpp's own converter
                       and in both stage.json and sha256sums.txt

    python -m tools.quantize_model --model outputs/sft-merged --output_dir outputs/sft-4bit --bits 4
    python -m tools.quantize_model --model outputs/sft-merged --output_dir outputs/sft-gguf --format gguf \
        --gguf_type q4_k_m --llama_cpp ~/llama.cpp
"""

import argparse
import copy
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from stagekit.commandline import SHARD_SIZE, Parser, add_shard_flag, add_switch, check_flags, choose_gpus, run

logger = logging.getLogger(__name__)

PROGRAM = "python -m tools.quantize_model"
TEXTS = Path(__file__).resolve().parents[1] / "data" / "eval" / "questions.jsonl"  # held out, so no stage has seen it
CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # types the converter writes itself; llama-quantize makes the others
QUANTIZED = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m"),
    *("q6_k", "iq4_nl", "iq4_xs"),
)
INSTALL = "git clone https://github.com/ggml-org/llama.cpp && pip install gguf, then --llama_cpp llama.cpp"
BUILD = "cmake -B build && cmake --build build --target llama-quantize in llama.cpp, then --llama_cpp llama.cpp"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--model", required=True, help="model directory or hub name")
    parser.add_argument("--output_dir", required=True, help="where the quantised model goes")
    parser.add_argument("--format", choices=("bitsandbytes", "gguf"), default="bitsandbytes")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="bitsandbytes: 4 (NF4, the default) or 8 (int8)")
    parser.add_argument(
        "--gguf_type",
        choices=(*CONVERTED, *QUANTIZED),
        metavar="TYPE",
        help="gguf: f16 (default), f32, bf16, q8_0; made by llama-quantize q4_k_m, q5_k_m, q6_k and their kin",
    )
    parser.add_argument("--llama_cpp", help="gguf: directory of llama.cpp; default: its programs on PATH")
    parser.add_argument(
        "--text_file",
        default=str(TEXTS),
        help="text for the perplexity: file or directory, default data/eval/questions.jsonl",
    )
    parser.add_argument("--max_texts", type=int, default=200, help="read at most this many texts, default 200")
    parser.add_argument(
        "--context_length", type=int, default=1024, help="window of the perplexity in tokens, default 1024"
    )
    add_shard_flag(parser, "bitsandbytes: ")
    add_switch(parser, "--overwrite_output_dir", "replace what --output_dir holds, once this has succeeded")
    add_switch(parser, "--only_cpu", "use no GPU")
    parser.add_argument("--gpus", help='the GPU to use, such as "1"')
    args = parser.parse_args(argv)
    check_flags(args, parser, ("max_texts", "context_length"))
    foreign = ("bits", "max_shard_size") if args.format == "gguf" else ("gguf_type", "llama_cpp")
    for name in foreign:
        if getattr(args, name) is not None:
            parser.error(f"--{name} is not for --format {args.format}")
    args.bits = args.bits or (4 if args.format == "bitsandbytes" else None)
    args.gguf_type = args.gguf_type or ("f16" if args.format == "gguf" else None)
    return args


def main(args: argparse.Namespace) -> None:
    """Measure the model, quantise it, load what was written, measure that."""
    started = time.monotonic()
    programs = find_programs(args.llama_cpp, args.gguf_type) if args.format == "gguf" else None
    texts = read_texts(args.text_file, args.max_texts)
    choose_gpus(args.only_cpu, args.gpus)
    from stagekit.export import check_target, export_record, finish, staged, weight_bytes
    from stagekit.generation import model_arguments
    from stagekit.modeling import inference_device, load_tokenizer

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every int8 layer that is given fp32

    source, config = find_model(args.model)
    check_target(args.output_dir, args.overwrite_output_dir, source)
    predict_room(args, config)
    tokenizer = load_tokenizer(source, model_arguments(source))
    device, dtype = inference_device(args.only_cpu)

    def measure(title, **options):
        return perplexity_of(source, config, tokenizer, texts, args.context_length, device, title, **options)

    before = measure("before", dtype=dtype)
    kind = f"{args.bits}-bit {'NF4' if args.bits == 4 else 'int8'}" if args.bits else args.gguf_type
    with staged(args.output_dir) as directory:
        if args.format == "gguf":
            name = convert(source, config, directory, args.gguf_type, programs)
            after = measure("after", directory=directory, gguf_file=name)
        else:
            quantize(source, config, tokenizer, directory, args, device)
            after = measure("after", directory=directory, dtype=dtype)
        record = export_record(
            *("quantize", PROGRAM, source, args),
            tuning={"method": args.format, "type": kind},
            checks={},
            metrics={"before": before, **({"after": after} if after else {})},
            device=device,
        )
        finish(directory, source, {**record, "seconds": round(time.monotonic() - started, 1)})
    original = weight_bytes(source.base) if os.path.isdir(source.base) else None
    print(table(kind, original, weight_bytes(args.output_dir), before, after))
    logger.info("saved: %s", args.output_dir)


# -- what is read ----------------------------------------------------------------------------------------------------


def find_model(name: str):
    """(Source, config) of a causal model whose weights stand alone.

    Raises:
        ValueError: an adapter, a reward model, or a model that is quantised already.
    """
    from stagekit.checkpoint import resolve
    from stagekit.generation import model_arguments
    from stagekit.modeling import load_config

    source = resolve(name)
    if source.adapter:
        merged = f"{os.path.normpath(name)}-merged"
        raise ValueError(
            f"--model {name} is an adapter; merge it first: python -m tools.merge_adapter --lora_model {name} "
            f"--output_dir {merged}"
        )
    config = load_config(source, model_arguments(source))
    if getattr(config, "quantization_config", None):
        raise ValueError(f"--model {name} is quantised already; name the model it was made from")
    return source, config


def read_texts(path: str, limit: int) -> list[str]:
    """The first texts of a file or directory: documents, or what conversations and questions say.

    Raises:
        FileNotFoundError, ValueError: it is not there, or holds something else; named by file and line.
    """
    from stagekit.data import accept_text
    from stagekit.files import find_files, read_records
    from stagekit.formats import to_canonical
    from stagekit.records import RowError, Unused

    texts = []
    for file in find_files(path):
        for record, line in read_records(file):
            if len(texts) == limit:
                return texts
            try:
                if isinstance(record, RowError):
                    raise record
                texts.append(accept_text(to_canonical(record)[0]).text)
            except Unused:
                continue
            except RowError as error:
                raise ValueError(f"{file}:{line}: {error}") from None
    return texts


def perplexity_of(source, config, tokenizer, texts, context_length, device, title, directory=None, **options):
    """Measures of a model on the texts, as stage.json keeps them; None for a GGUF file that cannot be read back.

    Args:
        source, config: of the model that is quantised.
        directory: where the quantised one stands; None for the original.
        **options: of from_pretrained.
    """
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    from stagekit.perplexity import text_nll

    if directory is None:
        model = load(source, config, device, **options)
    elif "gguf_file" not in options:
        model = AutoModelForCausalLM.from_pretrained(directory, device_map={"": device}, **options)
    else:  # unpacked into fp32; of the file's own description transformers reads only a part
        try:
            shape = copy.deepcopy(config)
            model = AutoModelForCausalLM.from_pretrained(directory, config=shape, **options).to(device)
        except (ImportError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            logger.warning("transformers cannot read this GGUF file back (%s): its perplexity is not known", reason)
            return None
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or context_length
    with tqdm(desc=f"perplexity {title}", unit="token", leave=False) as progress:
        found = text_nll(model, tokenizer, texts, min(context_length, limit), progress=progress.update)
    return {**found._asdict(), "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}


def load(source, config, device, dtype, **quantization):
    """Load the model itself, in a number format or quantised."""
    from stagekit.generation import model_arguments
    from stagekit.modeling import load_model

    settings = SimpleNamespace(bf16=False, fp16=False, use_cpu=device == "cpu", deepspeed=None)
    model = load_model(source, model_arguments(source, dtype=dtype, **quantization), settings, config)
    return model if quantization else model.to(device)


# -- bitsandbytes ----------------------------------------------------------------------------------------------------


def predict_room(args, config) -> None:
    """Compare the disk with what will be written: linear layers shrink, embeddings do not.

    Raises:
        ValueError: there is too little room.
    """
    import torch

    from stagekit.export import check_room
    from stagekit.memory import count_parameters
    from stagekit.modeling import model_class

    if model_class(config) is None:  # code that came with the model: its size is known once it is loaded
        return
    weights, text = count_parameters(config, model_class(config))[0], config.get_text_config()
    whole = text.vocab_size * text.hidden_size * (1 if config.tie_word_embeddings else 2)
    stored = getattr(config, "dtype", None) or torch.float32
    size = getattr(torch, stored).itemsize if isinstance(stored, str) else stored.itemsize
    if args.format == "gguf":
        needed = weights * (4 if args.gguf_type == "f32" else 2)
        needed += 0 if args.gguf_type in CONVERTED else weights * size  # the file that llama-quantize reads
    else:
        needed = whole * size + (weights - whole) * (args.bits / 8 + 0.05)  # scales of blocks
    check_room(args.output_dir, int(1.02 * needed) + 2**25)


def quantize(source, config, tokenizer, directory, args, device) -> None:
    """Load with bitsandbytes and save; what is not a linear layer keeps the type of the original."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError("--format bitsandbytes needs the package bitsandbytes: pip install bitsandbytes") from None
    flag = "load_in_4bit" if args.bits == 4 else "load_in_8bit"
    model = load(source, copy.deepcopy(config), device, dtype="auto", **{flag: True})
    model.save_pretrained(directory, max_shard_size=args.max_shard_size or SHARD_SIZE)
    tokenizer.save_pretrained(directory)


# -- gguf ------------------------------------------------------------------------------------------------------------


def find_programs(llama_cpp: str | None, gguf_type: str) -> tuple[list[str], str | None]:
    """Find llama.cpp's converter and, for types that it does not write, llama-quantize.

    Returns:
        (the converter's command, path of llama-quantize or None)

    Raises:
        FileNotFoundError: no such directory.
        ValueError: they are not installed; the message says how to install them.
    """
    if llama_cpp and not Path(llama_cpp).is_dir():
        raise FileNotFoundError(f"--llama_cpp {llama_cpp}: no such directory")

    def find(names, folders):
        places = [Path(llama_cpp, folder, name) for folder in folders for name in names] if llama_cpp else []
        found = [str(place) for place in places if place.is_file()]
        return next(iter(found or filter(None, map(shutil.which, names))), None)

    where = f"in {llama_cpp} or on PATH" if llama_cpp else "on PATH"
    converter = find(CONVERTERS, ("",))
    if converter is None:
        raise ValueError(f"--format gguf needs llama.cpp's {CONVERTERS[0]}, which is not {where}: {INSTALL}")
    quantizer = None
    if gguf_type not in CONVERTED:
        quantizer = find(("llama-quantize",), ("build/bin", "bin", ""))
        if quantizer is None:
            raise ValueError(
                f"--gguf_type {gguf_type} needs llama.cpp's llama-quantize, which is not {where}: {BUILD}"
            )
    return [sys.executable, converter] if converter.endswith(".py") else [converter], quantizer


def convert(source, config, directory: Path, gguf_type: str, programs) -> str:
    """Write one GGUF file into the directory and return its name.

    Raises:
        ValueError: llama.cpp's programs cannot; with their last line.
    """
    if not os.path.isdir(source.base):
        raise ValueError(f"--format gguf reads a directory; download {source.base} first")
    converter, quantizer = programs
    stem = Path(source.base).resolve().name
    target = directory / f"{stem}-{gguf_type}.gguf"
    if quantizer is None:
        call([*converter, source.base, "--outfile", str(target), "--outtype", gguf_type])
        return target.name
    stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    exact = {"bfloat16": "bf16", "float16": "f16"}.get(stored, "f32")  # so that only the second step rounds
    between = directory / f"{stem}-{exact}.gguf"
    call([*converter, source.base, "--outfile", str(between), "--outtype", exact])
    call([quantizer, str(between), str(target), gguf_type.upper()])
    between.unlink()
    return target.name


def call(command: list[str]) -> None:
    """Run a program of llama.cpp, showing what it says.

    Raises:
        ValueError: it fails; the message has its last line.
    """
    logger.info("%s", " ".join(command))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = b""
    while block := process.stdout.read1(1 << 16):
        sys.stderr.write(block.decode("utf-8", "replace"))
        said = (said + block)[-(1 << 14) :]
    lines = [line for line in said.decode("utf-8", "replace").replace("\r", "\n").split("\n") if line.strip()]
    if process.wait() != 0:
        program = Path(next(part for part in command if part != sys.executable)).name
        reason, hint = (lines or ["without a word"])[-1], ""
        if "BPE pre-tokenizer was not recognized" in reason:
            hint = "; llama.cpp knows the tokenizers of published models only, not one trained here or extended"
        raise ValueError(f"{program} failed ({process.returncode}): {reason}{hint}")


# -- what is shown ---------------------------------------------------------------------------------------------------


def table(kind: str, size_before: int | None, size_after: int, before: dict, after: dict | None) -> str:
    """Sizes and perplexities before and after, for people."""
    from stagekit.export import size_text

    def row(title, first, second, note=""):
        return f"{title:<24}{first:>14}{second:>14}  {note}".rstrip()

    share = f"{size_after / size_before:.0%}" if size_before else ""
    change = f"{after['perplexity'] / before['perplexity'] - 1:+.2%}" if after else "could not be measured here"
    perplexities = [f"{found['perplexity']:.3f}" if found else "-" for found in (before, after)]
    bits = [f"{found['bits_per_byte']:.4f}" if found else "-" for found in (before, after)]
    return "\n".join(
        [
            row("", "original", kind),
            row("weights on disk", size_text(size_before) if size_before else "-", size_text(size_after), share),
            row("perplexity of a token", *perplexities, change),
            row("bits for a byte", *bits, f"{before['tokens']:,} tokens, {before['bytes']:,} bytes"),
        ]
    )


if __name__ == "__main__":
    run(main, parse_args(), PROGRAM, "; nothing was written to --output_dir")
