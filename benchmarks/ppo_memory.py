"""Peak memory and step time of PPO's four roles on one base model, against four separate models.

    python -m benchmarks.ppo_memory                    # a model of about 80 M parameters with random weights, on a CPU
    python -m benchmarks.ppo_memory --model Qwen/Qwen3-0.6B-Base --dtype bfloat16 --rounds 3

Both ways train the same adapters with the same arithmetic: answers are sampled, the four roles look at them, policy
and critic take one optimiser step each. Separate models hold a copy of the base for each role. Every measurement is a
process of its own, and the two ways take turns.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.table import hardware, publish

ROOT = Path(__file__).resolve().parents[1]
MIB = 1024**2


def parse_command_line():
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub name; default: random weights of the sizes below")
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--lora_rank", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4, help="answers in a step")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--answer_tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="of which the first is not timed")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way")
    parser.add_argument("--output", help="also write the table to this file")
    parser.add_argument("--measure", choices=["shared", "separate"], help=argparse.SUPPRESS)
    return parser.parse_args()


def build_base(args, device):
    """The base model: from --model, or one with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    dtype = getattr(torch, args.dtype)
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    heads = args.hidden_size // 64
    config = Qwen3Config(
        **{"hidden_size": args.hidden_size, "num_hidden_layers": args.num_layers, "vocab_size": args.vocab_size},
        **{"intermediate_size": 3 * args.hidden_size, "num_attention_heads": heads, "num_key_value_heads": heads},
        **{"head_dim": 64, "tie_word_embeddings": True},
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(device, dtype)


def build(args, device):
    """The roles, with one base or with four."""
    import torch
    from peft import LoraConfig, get_peft_model

    from stagekit.ppo import Roles, linear_head

    lora = LoraConfig(r=args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(build_base(args, device), lora)
    width = model.config.hidden_size
    heads = {name: linear_head(torch.zeros(1, width)).to(device) for name in ("critic", "reward")}
    heads["reward"].requires_grad_(False)
    if args.measure == "shared":
        for name in ("ref", "critic", "reward"):
            model.add_adapter(name, lora)
        return Roles(model, heads)
    apart = {name: get_peft_model(build_base(args, device), lora) for name in ("reference", "critic", "reward")}
    for name in ("reference", "reward"):
        apart[name].requires_grad_(False)
    return Roles(model, heads, apart)


def step(args, roles, optimizer, device):
    """One rollout and one update of policy and critic."""
    import torch

    from stagekit.ppo import generalized_advantages, kl_estimate, policy_losses, token_rewards, value_losses

    prompts = torch.randint(5, 1000, (args.batch_size, args.prompt_tokens), device=device)
    with torch.no_grad():
        length = args.answer_tokens
        policy = roles.activate("policy")
        ids = policy.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            **{"do_sample": True, "max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0},
        )
        seen, mask = torch.ones_like(ids), torch.ones_like(ids[:, -length:])
        logps, _ = roles("policy", ids, seen, length)
        reference, _ = roles("reference", ids, seen, length)
        values, scores = roles("critic", ids, seen, length), roles("reward", ids, seen, length)[:, -1]
        rewards = token_rewards(scores, kl_estimate(logps, reference, "k1"), mask, 0.05)
        advantages, returns = generalized_advantages(rewards, values, mask, 1.0, 0.95)
    new, _ = roles("policy", ids, seen, length)
    policy_losses(new, logps, advantages, 0.2)[0].mean().backward()
    new = roles("critic", ids, seen, length)
    value_losses(new, values, returns, 0.2)[0].mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(args):
    """Peak bytes above an idle process, bytes of distinct parameters, and the median seconds of a step."""
    import torch

    sys.path.insert(0, str(ROOT))
    import stagekit.ppo  # noqa: F401  (what it imports belongs to neither way)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    roles = build(args, device)
    gc.collect()
    sizes = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in roles.parameters()}
    optimizer = torch.optim.AdamW([value for value in roles.parameters() if value.requires_grad], lr=1e-4)
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step(args, roles, optimizer, device)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    found = {"peak": peak, "weights": sum(sizes.values()), "seconds": statistics.median(seconds[1:])}
    print(json.dumps({**found, "hardware": hardware(), "torch": torch.__version__}))


def main():
    """Measure both ways in turn and print a table of medians."""
    args = parse_command_line()
    if args.measure:
        return measure(args)
    found = {"shared": [], "separate": []}
    for _ in range(args.rounds):
        for way, results in found.items():
            command = [sys.executable, "-m", "benchmarks.ppo_memory", *sys.argv[1:], "--measure", way]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{way}: {results[-1]}", file=sys.stderr)
    last = found["shared"][-1]
    size = (
        args.model or f"{args.num_layers} layers of {args.hidden_size}, vocabulary {args.vocab_size:,}, random weights"
    )
    lines = [
        "# PPO: four roles on one base, against four models",
        "",
        f"{last['hardware']}, torch {last['torch']}; {size}, {args.dtype}; LoRA of rank {args.lora_rank}; "
        f"{args.batch_size} answers of {args.answer_tokens} tokens to prompts of {args.prompt_tokens}; medians of "
        f"{args.rounds} processes each, taken in turns (`python -m benchmarks.ppo_memory`).",
        "",
        "| | one base | four models | ratio |",
        "|---|---:|---:|---:|",
    ]
    for name, unit, scale in (("weights", "MiB", MIB), ("peak", "MiB", MIB), ("seconds", "s", 1)):
        one, four = (statistics.median(result[name] for result in found[way]) / scale for way in found)
        title = {"weights": "parameters", "peak": "peak memory", "seconds": "step"}[name]
        digits = 2 if unit == "s" else 0
        lines.append(f"| {title} ({unit}) | {one:,.{digits}f} | {four:,.{digits}f} | {four / one:.2f} |")
    publish(lines, args.output)


if __name__ == "__main__":
    main()
