"""Seconds to the first token of each turn of a conversation, with the states of earlier turns kept and without.

    python -m benchmarks.prefix_cache --output benchmarks/results/prefix_cache_cpu.md
    python -m benchmarks.prefix_cache --model Qwen/Qwen3-0.6B-Base

Both ways see the same prompts in one process and take turns; the answers must be equal, token by token.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.table import hardware, publish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def parse_command_line():
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub name; default: random weights of the sizes below")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--question_tokens", type=int, default=60)
    parser.add_argument("--answer_tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3, help="conversations of which medians are taken")
    parser.add_argument("--output", help="also write the table to this file")
    return parser.parse_args()


def load(args):
    """A model behind generation.stream; its tokenizer writes token 17 as "17", so that answers can be read back."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

    from stagekit.generation import LoadedModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if args.model:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        heads = args.hidden_size // 64
        config = Qwen3Config(
            **{"hidden_size": args.hidden_size, "num_hidden_layers": args.num_layers, "vocab_size": 8000},
            **{"intermediate_size": 3 * args.hidden_size, "num_attention_heads": heads, "num_key_value_heads": heads},
            **{"head_dim": 64, "max_position_embeddings": 8192},
        )
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig()
    words = {str(token): token for token in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), pad_token="0")
    chat = SimpleNamespace(tokenizer=tokenizer)
    return LoadedModel(model.to(device).eval(), chat, None, None, [], GenerationConfig())


def converse(loaded, settings, args, kept: bool, seed: int) -> tuple[list[float], list[int], list[str]]:
    """(seconds to the first token of each turn, tokens of each prompt, answers)."""
    from stagekit.generation import PrefixCache, stream

    rng, cache = random.Random(seed), PrefixCache() if kept else None
    prompt, seconds, lengths, answers = [], [], [], []
    for _ in range(args.turns):
        prompt = prompt + [rng.randrange(1, 8000) for _ in range(args.question_tokens)]
        lengths.append(len(prompt))
        start, steps = time.perf_counter(), stream(loaded, prompt, settings, cache)
        next(steps)
        seconds.append(time.perf_counter() - start)
        (*_, answer) = steps
        answers.append(answer.text)
        prompt = prompt + [int(word) for word in answer.text.split()]
    return seconds, lengths, answers


def main():
    """Measure both ways in turn and print a table of medians."""
    args = parse_command_line()
    import torch

    from stagekit.generation import Settings

    loaded = load(args)
    settings = Settings(args.answer_tokens, 0.0, 1.0, 1.0, 0)
    found = {True: [], False: []}
    for number in range(args.rounds):
        kept, fresh = (converse(loaded, settings, args, way, number) for way in (True, False))
        if kept[2] != fresh[2]:
            sys.exit("the two ways gave different answers")
        found[True].append(kept[0])
        found[False].append(fresh[0])
        lengths = kept[1]
    kept, fresh = ([statistics.median(turn) for turn in zip(*found[way], strict=True)] for way in (True, False))
    size = args.model or f"{args.num_layers} layers of {args.hidden_size}, random weights, float32"
    lines = [
        "# Time to the first token in a growing conversation",
        "",
        f"{hardware()}, torch {torch.__version__}; {size}; questions of {args.question_tokens} tokens, answers of "
        f"{args.answer_tokens}; medians of {args.rounds} conversations, the two ways in turns; equal answers "
        "(`python -m benchmarks.prefix_cache`).",
        "",
        "| turn | tokens of the prompt | states kept (ms) | computed anew (ms) | ratio |",
        "|---:|---:|---:|---:|---:|",
    ]
    for turn in sorted({1, args.turns, *range(5, args.turns, 5)}):
        one, two = 1000 * kept[turn - 1], 1000 * fresh[turn - 1]
        lines.append(f"| {turn} | {lengths[turn - 1]:,} | {one:,.0f} | {two:,.0f} | {two / one:.1f} |")
    publish(lines, args.output)


if __name__ == "__main__":
    main()
