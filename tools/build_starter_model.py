"""Build the starter model: a tokenizer and a small Qwen3 model pretrained on data/, so that everything runs offline.

    python -m tools.build_starter_model

About three minutes on two CPU cores, once. It is deterministic, speaks in the manner of data/ and knows nothing else:
a stand-in for a real base model, to try the stages on. Its stage.json is the first link of the chain.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")


def build_parser() -> argparse.ArgumentParser:
    """Flags of this tool; what it does not know goes to pretraining.py."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.build_starter_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any other flag is passed to pretraining.py and wins, e.g. --num_train_epochs 2.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", default="outputs/starter", help="where the model goes (default: %(default)s)")
    parser.add_argument("--data_dir", default=str(ROOT / "data"), help="folder with pretrain/ and finetune/")
    parser.add_argument("--vocab_size", type=int, default=6000, help="tokens of the vocabulary (default: %(default)s)")
    parser.add_argument("--hidden_size", type=int, default=192, help="width of the model (default: %(default)s)")
    parser.add_argument("--num_layers", type=int, default=4, help="its depth (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seeds weights and data order (default: %(default)s)")
    return parser


def corpus(data_dir: Path):
    """Yield the texts the tokenizer learns from: documents, and what the conversations say."""
    from stagekit.files import find_files, read_records
    from stagekit.formats import to_canonical
    from stagekit.records import Conversation, Text

    for folder in ("pretrain", "finetune"):
        for path in find_files(str(data_dir / folder)):
            for record, _ in read_records(path):
                canonical, _ = to_canonical(record)
                if isinstance(canonical, Text):
                    yield canonical.text
                elif isinstance(canonical, Conversation):
                    yield from (message["content"] for message in canonical.messages)


def build_tokenizer(texts, vocab_size: int):
    """Train a byte-level BPE tokenizer with the ChatML template; padding is not the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from template import get_template

    bpe = Tokenizer(models.BPE())
    # Digits one by one; letters, Chinese text and punctuation apart, so that no token spans a full stop.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_pattern(), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=16,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[0], pad_token=SPECIAL[3])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:3])})
    tokenizer.chat_template = get_template("chatml").chat_template()
    return tokenizer


def _pattern():
    from tokenizers import Regex

    return Regex(r"\p{N}| ?[A-Za-z]+|[\p{L}&&[^A-Za-z]]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def build_model(tokenizer, hidden_size: int, num_layers: int, seed: int):
    """A Qwen3 model with random weights for this vocabulary."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 96),
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def main():
    args, more = build_parser().parse_known_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    data_dir, output_dir = Path(args.data_dir), Path(args.output_dir)
    building = output_dir.with_name(output_dir.name + ".building")
    if (output_dir / "stage.json").is_file():
        print(f"{output_dir} is there already; remove it to build it anew", file=sys.stderr)
        return
    shutil.rmtree(building, ignore_errors=True)  # of an attempt that was interrupted
    with tempfile.TemporaryDirectory(prefix="starter-") as temporary:
        print("starter model: training its tokenizer …", file=sys.stderr)
        tokenizer = build_tokenizer(corpus(data_dir), args.vocab_size)
        model = build_model(tokenizer, args.hidden_size, args.num_layers, args.seed)
        tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"starter model: {size / 1e6:.1f} M parameters, {len(tokenizer)} tokens; pretraining …", file=sys.stderr)
        flags = {
            "model_name_or_path": temporary,
            "train_file_dir": str(data_dir / "pretrain"),
            "output_dir": building,
            "do_train": True,
            "do_eval": True,
            "use_peft": False,
            "block_size": 512,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 10,
            "learning_rate": 2e-3,
            "adam_beta2": 0.95,
            "warmup_steps": 0.05,
            "lr_scheduler_type": "cosine",
            "weight_decay": 0.05,
            "logging_steps": 20,
            "save_strategy": "no",
            "use_cpu": True,  # the same weights everywhere; on several GPUs one process would split each batch
            "seed": args.seed,
        }
        command = [sys.executable, str(ROOT / "pretraining.py")]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        environment = {
            key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        result = subprocess.run([*command, *more], env=environment, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)
    forget_origin(building)
    building.rename(output_dir)  # last: a directory of that name is a finished model


def forget_origin(directory: Path) -> None:
    """The random weights it started from are gone: in stage.json the starter is its own base."""
    from stagekit.checkpoint import base_fingerprint, write_stage
    from stagekit.commandline import command_line

    stage = json.loads((directory / "stage.json").read_text(encoding="utf-8"))
    stage["base_model"] = {"name_or_path": ".", "revision": None, "fingerprint": base_fingerprint(str(directory))}
    stage["command"] = command_line("python -m tools.build_starter_model")
    write_stage(directory, stage)


if __name__ == "__main__":
    main()
