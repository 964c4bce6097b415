"""Serve a trained model over HTTP, in the form of OpenAI's API.

Reads a directory that a stage wrote (or any model), and nothing else. Prompts are rendered as in training. Requests
that come together are answered together (transformers' continuous batching) where the model proves fit for it.

    python openai_api.py --lora_model outputs/sft
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "sft", "messages": [{"role": "user", "content": "What is a fever?"}]}'

Paths: /v1/chat/completions and /v1/completions (both also with "stream": true), /v1/models, /health. A parameter that
cannot be done right is refused, not ignored. For many users take scripts/vllm_deployment.sh. Nothing that is asked or
answered is logged.
"""

import argparse
import logging
import os
import re
import socket
from pathlib import Path

from stagekit.commandline import (
    Parser,
    add_model_flags,
    check_flags,
    check_model_is_named,
    choose_gpus,
    is_loopback,
    loading_options,
    run,
)
from template import get_template

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser("openai_api.py", __doc__)
    add_model_flags(parser.add_argument_group("model (--base_model or --lora_model is enough)"))
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1: only this machine reaches it"
    )
    server.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    server.add_argument("--served_model_name", help='what requests call the model; default: its directory, as "sft"')
    server.add_argument(
        "--api_key",
        help="key that requests must bring (Authorization: Bearer KEY). The environment variable API_KEY is safer: "
        "arguments stand in the list of processes and in the shell's history",
    )
    server.add_argument("--api_key_file", help="file with the key")
    server.add_argument(
        "--allowed_origins", help="web pages that browsers may call this server from, with commas; default: none"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max_new_tokens", type=int, help="longest answer a request may ask for; default: what the context leaves"
    )
    limits.add_argument(
        "--max_concurrent_requests", type=int, default=8, help="answers worked on together, default 8; 1: no batching"
    )
    limits.add_argument("--max_queue", type=int, default=32, help="requests that may wait, default 32; others get 429")
    limits.add_argument("--max_body_bytes", type=int, default=1 << 20, help="longest request, default 1 MiB")
    limits.add_argument(
        "--timeout_seconds", type=float, default=600.0, help="longest time for a request, waiting included: 600"
    )
    args = parser.parse_args(argv)
    check_flags(args, parser, ("max_new_tokens", "max_concurrent_requests", "max_body_bytes", "timeout_seconds"))
    check_model_is_named(args, parser)
    if args.max_queue < 0:
        parser.error(f"--max_queue {args.max_queue} must be 0 or more")
    if not 0 <= args.port < 1 << 16:
        parser.error(f"--port {args.port} must be between 0 and 65535")
    if args.api_key is not None and args.api_key_file:
        parser.error("--api_key and --api_key_file exclude each other; give one")
    return args


def main(args: argparse.Namespace) -> None:
    """Load the model, and answer until interrupted."""
    if args.template_name:
        get_template(args.template_name)
    key = read_key(args)
    listener = bind(args.host, args.port)
    choose_gpus(args.only_cpu, args.gpus)
    import torch
    import uvicorn

    from stagekit import generation, openai_server, serving

    source = generation.find_source(args.base_model, args.lora_model)
    chat = generation.load_chat(source, args.tokenizer_path, args.template_name)
    loaded = generation.load_for_generation(source, chat, **loading_options(args))
    torch.seed()  # torch starts every process with the same one, and the first answers would repeat with each start
    engine = serving.start_engine(loaded, args.max_concurrent_requests)
    try:
        server = openai_server.Server(loaded, engine, args, key)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        logger.info("model %s: http://%s:%d/v1%s", server.name, shown, port, " (key required)" if key else "")
        if key is None and not is_loopback(args.host):
            logger.warning("whoever reaches %s can use the model: set API_KEY", shown)
        uvicorn.Server(openai_server.uvicorn_config(server.app())).run(sockets=[listener])
    finally:
        engine.stop()


def read_key(args: argparse.Namespace) -> str | None:
    """Find the key: --api_key, --api_key_file or the variable API_KEY; None where there is none.

    Raises:
        ValueError: it is empty or holds what no header can.
        FileNotFoundError: --api_key_file is not there.
    """
    if args.api_key_file:
        name, key = "--api_key_file", Path(args.api_key_file).read_text(encoding="utf-8").strip()
    elif args.api_key is not None:
        name, key = "--api_key", args.api_key
    else:
        name, key = "API_KEY", os.environ.get("API_KEY")
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise ValueError(f"the key of {name} must be of printable ASCII characters without blanks, and not empty")
    return key


def bind(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded; listening begins with the server.

    Raises:
        ValueError: the address is not this machine's, or taken.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return listener


if __name__ == "__main__":
    run(main, parse_args(), "openai_api.py", "; the server has stopped")
