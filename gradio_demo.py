"""Talk to a trained model in the browser, or to two of them side by side.

Reads a directory that a stage wrote (or any model), and asks exactly what inference.py asks; with --docs it also
answers from a folder of documents, as chatpdf.py does. No conversation is stored: it ends with its page. Only this
machine reaches it, unless --host or --share says otherwise.

    python gradio_demo.py --lora_model outputs/sft
    python gradio_demo.py --lora_model outputs/dpo --compare outputs/sft
    python gradio_demo.py --lora_model outputs/sft --docs my_folder
    GRADIO_AUTH=ward:secret python gradio_demo.py --lora_model outputs/sft --host 0.0.0.0
"""

import argparse
import contextlib
import errno
import logging
import os
import socket
from pathlib import Path

from stagekit.commandline import (
    Parser,
    add_generation_flags,
    add_model_flags,
    add_switch,
    check_flags,
    check_model_is_named,
    choose_gpus,
    is_loopback,
    loading_options,
    run,
)
from stagekit.documents import check_docs
from template import get_template

logger = logging.getLogger(__name__)

FIRST_PORT, NUM_PORTS = 7860, 100
LOCAL = "127.0.0.1"
SLIDERS = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser("gradio_demo.py", __doc__)
    add_model_flags(parser.add_argument_group("model (--base_model or --lora_model is enough)"))
    chat = parser.add_argument_group("chat (where the page starts; generation as in inference.py)")
    chat.add_argument(
        "--compare",
        help="second model, such as outputs/sft, asked the same questions side by side; --template_name and the "
        "load_in flags hold for both",
    )
    chat.add_argument("--system_prompt", default="", help="system message")
    add_generation_flags(chat, temperature="0 takes the likeliest token; default: the checkpoint's, else 0.7")
    documents = parser.add_argument_group("documents (a second tab; the first model answers from them)")
    documents.add_argument("--docs", help="folder of documents, or one document: pdf, docx, md, txt, html")
    documents.add_argument("--index_dir", help="where their index is kept; default: as chatpdf.py, which can share it")
    documents.add_argument(
        "--embedding_model",
        help="sentence-transformers model that adds search by meaning; needs pip install sentence-transformers",
    )
    page = parser.add_argument_group("page")
    page.add_argument("--host", default=LOCAL, help="address to listen on, default 127.0.0.1: this machine alone")
    page.add_argument("--port", type=int, help=f"default: the first free one from {FIRST_PORT} on; 0: any free one")
    add_switch(page, "--share", "also make a public address through gradio.live (needs the network)")
    page.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="ask for these. Better set the environment variable GRADIO_AUTH: command lines are seen and logged",
    )

    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args, parser):
    check_flags(args, parser, ("max_new_tokens", "repetition_penalty"))
    check_model_is_named(args, parser)
    for name in ("index_dir", "embedding_model"):
        if getattr(args, name) and not args.docs:
            parser.error(f"--{name} belongs to --docs: name a folder of documents")
    if args.port is not None and not 0 <= args.port < 65536:
        parser.error(f"--port {args.port} must be from 0 (any free one) to 65535")
    name = "--auth" if args.auth else "GRADIO_AUTH"
    args.auth = args.auth or os.environ.get("GRADIO_AUTH")
    if args.auth:
        user, _, password = args.auth.partition(":")
        if not (user and password):
            parser.error(f"{name} must be user:password")
        args.auth = (user, password)


def main(args: argparse.Namespace) -> None:
    """Index the documents, load the models, build the page, serve it until Ctrl-C."""
    if args.template_name:
        get_template(args.template_name)
    if args.docs:
        check_docs(args.docs)
    port = find_port(args.host, args.port)  # before models load: that can take minutes
    choose_gpus(args.only_cpu, args.gpus)
    from stagekit.chat_tab import describe
    from stagekit.generation import choose_settings
    from stagekit.page import serve

    with open_documents(args) as index:
        models = load_models(args)
        chosen = {name: getattr(args, name) for name in SLIDERS}
        settings = choose_settings(models[0], **chosen)
        docs_settings = choose_settings(models[0], **{**chosen, "temperature": args.temperature or 0.0})
        docs = (Path(args.docs).resolve().name, index, docs_settings) if index else None
        demo = build_demo(models, settings, args.system_prompt, docs)
        if not args.auth and (args.share or not is_loopback(args.host)):
            use = "use it and read the documents" if docs else "use it"
            logger.warning("whoever reaches this address can %s; GRADIO_AUTH=user:password asks for a password", use)
        address = serve(demo, args.host, port, args.auth, args.share)
        logger.info("%s at %s, Ctrl-C ends it", " and ".join(describe(loaded)["model"] for loaded in models), address)
        demo.block_thread()


def open_documents(args: argparse.Namespace):
    """Context manager of the index of --docs, up to date; of None without them."""
    if not args.docs:
        return contextlib.nullcontext()
    from stagekit.indexing import open_and_update

    device = "cpu" if args.only_cpu else None
    return open_and_update(args.docs, args.index_dir, args.embedding_model, device=device)


def find_port(host: str, port: int | None) -> int:
    """Return the port, or without one the first free one from FIRST_PORT on; 0 stands for any.

    Raises:
        ValueError: it is taken, or the host is no address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror}") from None
    for candidate in range(FIRST_PORT, FIRST_PORT + NUM_PORTS) if port is None else [port]:
        try:
            found = _bind(family, address[0], candidate)
            _bind(socket.AF_INET, LOCAL, found)  # gradio looks there, whatever the host is
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ValueError(f"cannot listen on {host} port {candidate}: {error.strerror}") from None
            continue
        if candidate not in (FIRST_PORT, port):
            logger.info("port %d is in use, taking %d", FIRST_PORT, found)
        return found
    if port is None:
        raise ValueError(f"ports {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} are all in use; choose one with --port")
    raise ValueError(f"--port {port} is in use; choose another, or leave it out: then the first free one is taken")


def _bind(family, address, port):
    """Try to listen there, for a moment; return the port."""
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
        return probe.getsockname()[1]


# -- models ----------------------------------------------------------------------------------------------------------


def load_models(args: argparse.Namespace) -> list:
    """Load the model, and the one of --compare; what cannot work is told before any weights are read."""
    from stagekit.generation import find_source, load_chat, load_for_generation

    sources = [find_source(args.base_model, args.lora_model)]
    chats = [load_chat(sources[0], args.tokenizer_path, args.template_name)]
    if args.compare:
        sources.append(find_source(args.compare, None))
        chats.append(load_chat(sources[1], None, args.template_name))
    options = loading_options(args)
    models = [load_for_generation(source, chat, **options) for source, chat in zip(sources, chats, strict=True)]
    if args.compare:
        logger.info("the two share %.1f MiB of weights", share_weights(models[0].model, models[1].model) / 2**20)
    return models


def share_weights(first, second) -> int:
    """Let the second model use the first one's tensors where both hold the same; return the bytes that saves.

    Two adapters on one base then need its memory once (but while loading), and still answer at the same time.
    """

    def base_name(name):
        for part in ("base_model.model.", "base_layer.", "original_module."):
            name = name.replace(part, "")
        return name

    theirs = {base_name(name): parameter for name, parameter in first.named_parameters()}
    num_bytes = 0
    for name, parameter in second.named_parameters():
        other = theirs.get(base_name(name))
        if other is not None and (other.dtype, other.device) == (parameter.dtype, parameter.device):
            if other.equal(parameter):  # False where the shapes differ
                num_bytes += parameter.nbytes
                parameter.data = other.data
    return num_bytes


# -- page ------------------------------------------------------------------------------------------------------------


def build_demo(models: list, settings, system_prompt: str = "", docs: tuple | None = None):
    """Build the page: masthead, disclaimer, and a tab for each thing that can be done.

    Args:
        models: one, or two to compare, as load_models returns them.
        settings: where the sliders start.
        system_prompt: where its box starts.
        docs: (name of the folder, its index, settings of the answers) for a tab that answers from documents.

    Returns:
        gr.Blocks, for page.serve.
    """
    import gradio as gr

    from stagekit.chat_tab import ChatTab
    from stagekit.page import MAX_WAITING, TITLE, show_masthead

    with gr.Blocks(title=TITLE, analytics_enabled=False) as demo:
        show_masthead()
        with gr.Tabs():
            with gr.Tab("对话 Chat"):
                ChatTab(models, settings, system_prompt)
            if docs:
                from stagekit.docs_tab import DocsTab

                with gr.Tab("文档 Documents"):
                    DocsTab(models[0], *docs)
    return demo.queue(max_size=MAX_WAITING)


if __name__ == "__main__":
    run(main, parse_args(), "gradio_demo.py", "")
