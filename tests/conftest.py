"""Tiny models and tokenizers, built in-process: no test reaches the network or a GPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
CORPUS = [
    "What is a fever? A fever is a raised body temperature. Drink water and rest.",
    "发烧是体温升高，要多喝水、多休息，持续高热要及时就医。",
    "感冒了怎么办？多休息，多喝温水。",
    "user assistant system tool_call name arguments",
] * 4


def build_tokenizer(vocab_size=400, chat=True):
    """A byte-level BPE tokenizer with ChatML control tokens; pad differs from eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from template import get_template

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[0], pad_token=SPECIAL[3])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:3]})
    if chat:
        tokenizer.chat_template = get_template("chatml").chat_template()
    return tokenizer


def build_model(directory, architecture="qwen3", seed=0, scale=4.0, chat=True):
    """Write a two-layer model; weights are scaled up so that attention matters and leaks would show."""
    import torch
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MambaConfig,
        MambaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    tokenizer = build_tokenizer(chat=chat)
    torch.manual_seed(seed)
    ids = {"vocab_size": 448, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    common = {
        **ids,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
    }
    if architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=32, tie_word_embeddings=True))
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=False))
    elif architecture == "mistral":  # with a window that any prompt passes
        model = MistralForCausalLM(MistralConfig(**common, head_dim=32, sliding_window=8))
    elif architecture == "mamba":
        model = MambaForCausalLM(MambaConfig(**ids, hidden_size=64, num_hidden_layers=2, state_size=8))
    else:
        model = BloomForCausalLM(BloomConfig(**ids, hidden_size=64, n_layer=2, n_head=2, bos_token_id=None))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(scale)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("models") / "llama", "llama", chat=False)


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("models") / "bloom", "bloom", chat=False)


QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; skips, or fails under REQUIRE_CHROMIUM=1, where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    missing = None if path else f"none of {', '.join(names)} is installed and CHROMIUM names none"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "the package playwright is not installed"
    if missing:
        (pytest.fail if os.environ.get("REQUIRE_CHROMIUM") == "1" else pytest.skip)(f"no browser: {missing}")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield started
        started.close()


def spooled(rows):
    """Rows as the stages read them, from a list of rows.Row."""
    import numpy as np

    from stagekit.rows import Rows, Spool
    from stagekit.seen_prompts import prompt_hash

    spool = Spool()
    for number, row in enumerate(rows):
        prompt = prompt_hash(row.record)
        spool.append(row.packed(), prompt, 0, [number], prompt)
    spool.flush()
    return Rows(spool, np.arange(len(rows)))


def encoded(rows, encode_chunk, ledger=None, num_workers=None, skip=False):
    """What write_dataset makes of a list of rows: (columns, probes, ledger)."""
    import tempfile

    import datasets

    from stagekit.encoding import write_dataset
    from stagekit.ledger import Ledger, Rejected

    ledger = ledger or Ledger(read=len(rows), files=["file"])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "data.arrow")
        probes = write_dataset(spooled(rows), ledger, encode_chunk, path, Rejected(skip), num_workers)
        return datasets.Dataset.from_file(str(path), in_memory=True).to_dict(), probes, ledger


def write_jsonl(path, rows):
    """Write rows as JSON lines and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def conversations(count, turns=1, prefix="q"):
    """Conversations that all differ."""
    return [
        {
            "conversations": [
                message
                for turn in range(turns)
                for message in (
                    {"from": "human", "value": f"{prefix} {number}.{turn}: what is a fever? 发烧怎么办"},
                    {"from": "gpt", "value": f"Answer {number * 7 % 10}: rest and drink water. 多休息。"},
                )
            ]
        }
        for number in range(count)
    ]


def run_script(script, *flags, cwd=None, processes=1, env=None, check=True, timeout=600):
    """Run a script of the project as a user would; with more processes through torchrun. Returns CompletedProcess."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / script), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(env or {})}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    if check and result.returncode != 0:
        raise AssertionError(
            f"{command} ended with {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
        )
    return result


def kill_at(checkpoint, script, *flags):
    """Run a script and end it with SIGKILL once this checkpoint stands; what the race left behind it is removed."""
    command = [sys.executable, ROOT / script, *flags, "--output_dir", checkpoint.parent]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(list(map(str, command)), env=environment, **quiet)
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists(), "it ended before"
    for path in checkpoint.parent.iterdir():
        if path.is_dir() and path != checkpoint:
            later = path.name.startswith("checkpoint-") and int(path.name[11:]) > int(checkpoint.name[11:])
            if later or path.name == ".saving":
                shutil.rmtree(path)
        elif path.name == "stage.json":
            path.unlink()


def log_of(output_dir, key="loss"):
    """The logged series of a finished run."""
    state = json.loads(Path(output_dir, "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


def stage_of(output_dir):
    """The stage.json of a finished run."""
    return json.loads(Path(output_dir, "stage.json").read_text(encoding="utf-8"))
