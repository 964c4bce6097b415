"""Ask questions about your own documents: pdf, docx, md, txt and html in a folder.

Indexes the folder (again only what has changed), finds the passages that fit a question, lets a model answer from them
and names their file and page. Where no passage fits, it says so and asks no model. Without --question and
--questions_file it talks in the terminal.

    python chatpdf.py --docs my_folder --lora_model outputs/sft
    python chatpdf.py --docs my_folder --lora_model outputs/sft --question "What is the dose for children?"
    python chatpdf.py --docs my_folder --api_base http://127.0.0.1:8000/v1 --api_model sft

The key of a server comes from the environment variable OPENAI_API_KEY.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from stagekit.commandline import (
    Parser,
    add_generation_flags,
    add_model_flags,
    add_switch,
    check_flags,
    choose_gpus,
    converse,
    loading_options,
    run,
    sampling_options,
)
from stagekit.documents import FILE_TYPES, Limits, check_docs
from template import get_template

logger = logging.getLogger(__name__)

NOT_FOR_SERVERS = "base_model lora_model tokenizer_path template_name resize_emb load_in_4bit load_in_8bit".split()
NOT_FOR_SERVERS.append("repetition_penalty")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser("chatpdf.py", __doc__)
    documents = parser.add_argument_group("documents")
    documents.add_argument("--docs", help="folder of documents, or one document; nothing outside of it is read")
    documents.add_argument(
        "--index_dir", help="where the index is kept, default outputs/chatpdf/ and a name made from --docs"
    )
    documents.add_argument(
        "--embedding_model",
        help="sentence-transformers model (directory or hub name) that adds search by meaning to search by words; "
        "needs pip install sentence-transformers",
    )
    default = Limits()
    documents.add_argument(
        "--file_types",
        default=",".join(FILE_TYPES),
        help=f"types that are read, default {','.join(FILE_TYPES)}",
    )
    documents.add_argument(
        "--max_file_mb",
        type=float,
        default=default.max_file_mb,
        help=f"leave out larger files, default {default.max_file_mb:g}",
    )
    documents.add_argument(
        "--max_pages", type=int, default=default.max_pages, help=f"and longer PDFs, default {default.max_pages}"
    )
    documents.add_argument(
        "--chunk_chars",
        type=int,
        default=default.chunk_chars,
        help=f"longest passage in characters, default {default.chunk_chars}",
    )
    documents.add_argument(
        "--overlap_chars",
        type=int,
        default=default.overlap_chars,
        help=f"of it, at most this much is repeated from the passage before, in whole sentences, default "
        f"{default.overlap_chars}",
    )
    search = parser.add_argument_group("search")
    search.add_argument("--top_k", type=int, help="passages given to the model, default 5")
    search.add_argument(
        "--min_score",
        type=float,
        help="least share of a question's words, weighted by rarity, that a passage must hold (0 to 1); below it the "
        "answer is not in the documents",
    )
    search.add_argument(
        "--min_cosine", type=float, help="or the least cosine to a passage; depends on the --embedding_model"
    )
    add_switch(search, "--search_only", "show the passages and ask no model")
    add_model_flags(parser.add_argument_group("model: a stage directory or any model …"))
    server = parser.add_argument_group("… or an OpenAI-compatible server")
    server.add_argument("--api_base", help="its address, such as http://127.0.0.1:8000/v1")
    server.add_argument("--api_model", help="name of the model there")
    server.add_argument("--context_length", type=int, help="tokens of prompt and answer that it holds, default 8192")
    task = parser.add_argument_group("task (default: chat; `clear` forgets it, `exit` leaves, Ctrl-C stops an answer)")
    task.add_argument("--question", help="answer this and end")
    task.add_argument(
        "--questions_file", help="answer the questions of a file: .txt, one a line, or .jsonl, {question}"
    )
    task.add_argument(
        "--output_file",
        help="where these answers go, default answers.jsonl (replaced if it exists). Until all are there they stand "
        "in OUTPUT_FILE.partial, from which the same command continues after an interruption",
    )
    tokens = parser.add_argument_group("generation (default: the checkpoint's or the server's, else as named here)")
    add_generation_flags(tokens, temperature="0 takes the likeliest token, default 0 (a server: its own)")

    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args, parser):
    positive = "max_file_mb max_pages chunk_chars top_k context_length max_new_tokens repetition_penalty"
    check_flags(args, parser, tuple(positive.split()))
    if not args.docs:
        parser.error("--docs is missing: name a folder of documents")
    if args.min_score is not None and not 0 <= args.min_score <= 1:
        parser.error(f"--min_score {args.min_score} must be from 0 to 1")
    if not 0 <= args.overlap_chars <= args.chunk_chars / 2:
        parser.error(f"--overlap_chars {args.overlap_chars} must be from 0 to half of --chunk_chars")
    unknown = [name for name in args.file_types.split(",") if name not in FILE_TYPES]
    if unknown:
        parser.error(f"--file_types {unknown[0]!r} cannot be read; known: {', '.join(FILE_TYPES)}")
    if args.question is not None and args.questions_file:
        parser.error("--question and --questions_file exclude each other; give one")
    if args.question is not None and not args.question.strip():
        parser.error("--question is empty")
    if args.output_file and not args.questions_file:
        parser.error("--output_file belongs to --questions_file; other answers are printed")
    args.output_file = args.output_file or "answers.jsonl"
    _check_model(args, parser)


def _check_model(args, parser):
    if args.min_cosine is not None and not args.embedding_model:
        parser.error("--min_cosine compares vectors; it needs --embedding_model")
    if bool(args.api_base) != bool(args.api_model):
        parser.error("--api_base and --api_model belong together: the server's address and the model's name there")
    if args.api_base:
        address = urlsplit(args.api_base)
        if address.scheme not in ("http", "https") or not address.netloc or "@" in address.netloc:
            parser.error(
                "--api_base must be http://HOST:PORT/v1 or https://HOST/v1; the key is read from OPENAI_API_KEY"
            )
        for name in NOT_FOR_SERVERS:
            if getattr(args, name):
                parser.error(f"--{name} and --api_base exclude each other: the server has its own model")
        args.context_length = args.context_length or 8192
        if args.max_new_tokens and args.max_new_tokens >= args.context_length:
            parser.error(f"--max_new_tokens {args.max_new_tokens} leaves no room in --context_length")
    elif args.context_length:
        parser.error("--context_length belongs to --api_base: a model on this machine knows its own")
    if not (args.base_model or args.lora_model or args.api_base or args.search_only):
        parser.error(
            "a model is missing: --lora_model or --base_model, or --api_base with --api_model, or --search_only"
        )


def main(args: argparse.Namespace) -> None:
    """Find the model, bring the index up to date, answer."""
    if args.template_name:
        get_template(args.template_name)
    check_docs(args.docs)
    questions = read_questions(args.questions_file) if args.questions_file else None
    local = not (args.search_only or args.api_base)
    if local or args.embedding_model:
        choose_gpus(args.only_cpu, args.gpus)
    from stagekit.indexing import open_and_update

    model = None if args.search_only else LocalModel(args) if local else Server(args)
    limits = Limits(
        max_file_mb=args.max_file_mb,
        max_pages=args.max_pages,
        file_types=tuple(args.file_types.split(",")),
        chunk_chars=args.chunk_chars,
        overlap_chars=args.overlap_chars,
    )
    device = "cpu" if args.only_cpu else None
    with open_and_update(args.docs, args.index_dir, args.embedding_model, limits, device) as index:
        assistant = Assistant(index, model, args)
        if args.question:
            assistant.answer(args.question, [])
        elif questions:
            answer_file(assistant, questions, args)
        else:
            talk(assistant)


# -- models ----------------------------------------------------------------------------------------------------------


class LocalModel:
    """A stage or any other model on this machine; its weights are loaded when the first question needs them.

    Attributes:
        escape: whether control tokens in the prompt have to be broken up; here the renderer encodes them as text.
    """

    escape = False

    def __init__(self, args: argparse.Namespace):
        from stagekit import generation

        self.args, self.loaded, self.settings, self.cache = args, None, None, generation.PrefixCache()
        self.source = generation.find_source(args.base_model, args.lora_model)
        self.chat = generation.load_chat(self.source, args.tokenizer_path, args.template_name)

    def name(self) -> str:
        return f"model {self.source.adapter or self.source.base}, base {self.source.base}"

    def fingerprint(self) -> list:
        from stagekit.generation import model_fingerprints

        template = hashlib.sha256(self.chat.tokenizer.chat_template.encode()).hexdigest()
        return [*model_fingerprints(self.source), template, self.args.load_in_4bit, self.args.load_in_8bit]

    def limit(self) -> int | None:
        """Longest prompt in tokens."""
        from stagekit import generation

        if self.loaded is None:
            self.loaded = generation.load_for_generation(self.source, self.chat, **loading_options(self.args))
            chosen = {**sampling_options(self.args), "temperature": self.args.temperature or 0.0}
            self.settings = generation.choose_settings(self.loaded, **chosen)
        return generation.prompt_limit(self.loaded, self.settings)

    def count(self, messages: list[dict]) -> int:
        from stagekit.tokenization import encode_prompt

        return len(encode_prompt(self.chat, messages))

    def stream(self, messages: list[dict]) -> Iterator[tuple[str, str | None]]:
        """Yield (the answer so far, why it ended or None)."""
        from stagekit.generation import stream
        from stagekit.tokenization import encode_prompt

        prompt = encode_prompt(self.chat, messages)
        with contextlib.closing(stream(self.loaded, prompt, self.settings, self.cache)) as answers:
            for answer in answers:
                yield answer.text, answer.finish_reason


class Server:
    """A model behind an OpenAI-compatible address."""

    escape = True

    def __init__(self, args: argparse.Namespace):
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ValueError("--api_base needs the openai package: pip install -r requirements.txt") from error
        self.args = args
        key = os.environ.get("OPENAI_API_KEY") or "none"  # servers on one's own machine mostly ask for none
        self.client = OpenAI(base_url=args.api_base, api_key=key, timeout=300, max_retries=2)

    def name(self) -> str:
        return f"model {self.args.api_model} at {self.args.api_base}"

    def fingerprint(self) -> list:
        return [self.args.api_base, self.args.api_model]

    def limit(self) -> int:
        return self.args.context_length - (self.args.max_new_tokens or min(1024, self.args.context_length // 2))

    def count(self, messages: list[dict]) -> int:
        from stagekit.grounding import estimate_tokens

        return estimate_tokens(messages)

    def stream(self, messages: list[dict]) -> Iterator[tuple[str, str | None]]:
        """Yield (the answer so far, why it ended or None).

        Raises:
            TooLong: the server finds it so.
            ValueError: it cannot be reached or refuses.
        """
        from openai import OpenAIError

        from stagekit.grounding import TooLong

        chosen = {
            "max_tokens": self.args.max_new_tokens,
            "temperature": self.args.temperature,
            "top_p": self.args.top_p,
        }
        chosen = {name: value for name, value in chosen.items() if value is not None}
        text, reason = "", None
        try:
            with self.client.chat.completions.create(
                model=self.args.api_model, messages=messages, stream=True, **chosen
            ) as chunks:
                for chunk in chunks:
                    if chunk.choices:
                        text += chunk.choices[0].delta.content or ""
                        reason = chunk.choices[0].finish_reason or reason
                        yield text.strip(), None
        except OpenAIError as error:
            line = " ".join(str(error).split())[:300]
            kind = TooLong if getattr(error, "code", None) == "context_length_exceeded" else ValueError
            raise kind(f"--api_base {self.args.api_base}: {line}") from error
        yield text.strip(), reason or "interrupted"


# -- answers ---------------------------------------------------------------------------------------------------------


class Assistant:
    """Answers questions from an index with a model."""

    def __init__(self, index, model, args: argparse.Namespace):
        from stagekit.grounding import MIN_COSINE, MIN_SCORE, TOP_K

        self.index, self.model, self.top_k = index, model, args.top_k or TOP_K
        self.min_score = MIN_SCORE if args.min_score is None else args.min_score
        self.min_cosine = MIN_COSINE if args.min_cosine is None else args.min_cosine

    def ask(self, question: str, history: list[dict]) -> tuple[list, Iterator[tuple[str, str | None]]]:
        """Search, and begin an answer: (the passages it is given, the answer as it grows and why it ended)."""
        from stagekit.grounding import ground

        if self.model is None:
            return self.index.search(question, self.top_k), iter([("", "search_only")])
        least = {"min_score": self.min_score, "min_cosine": self.min_cosine}
        count, limit, escape = self.model.count, self.model.limit, self.model.escape
        found = ground(self.index, question, history, count, limit, self.top_k, **least, escape=escape)
        if isinstance(found, str):
            return [], iter([(found, "not_in_documents")])
        messages, passages = found
        return passages, self.model.stream(messages)

    def answer(self, question: str, history: list[dict], begin: str = "") -> str | None:
        """Print the answer as it grows and the passages below it; return it, or None where no model was asked."""
        from stagekit.grounding import cite, cited_numbers

        passages, answers = self.ask(question, history)
        text, reason = "", None
        with contextlib.closing(answers) if hasattr(answers, "close") else contextlib.nullcontext():
            try:
                for grown, ended in answers:
                    print(begin + grown[len(text) :], end="", flush=True)
                    text, reason, begin = grown, ended, ""
            except KeyboardInterrupt:
                reason = "interrupted"
        if reason != "search_only":
            print(flush=True)
        if reason in ("length", "interrupted"):
            print("(cut off by --max_new_tokens)" if reason == "length" else "(stopped)", file=sys.stderr)
        cited = cited_numbers(text, len(passages))
        for number, passage in enumerate(passages, 1):
            line = f"[{number}] {cite(passage)}{' (cited)' * (number in cited)}"
            if reason == "search_only":
                cosine = "" if passage.cosine is None else f", cosine {passage.cosine:.2f}"
                line = f"{line} score {passage.score:.2f}{cosine}\n{passage.text}\n"
            print(line, flush=True)
        return None if reason in ("not_in_documents", "search_only") else text


def talk(assistant: Assistant) -> None:
    """Answer what is typed; a question may go on from the one before."""
    history = []

    def answer(line, say, terminal):
        try:
            text = assistant.answer(line, history, "Assistant: " if terminal else "")
        except ValueError as error:  # a server that fails, a question that does not fit: the next one may be answered
            say(f"({error})")
            return
        if text:
            history.extend([{"role": "user", "content": line}, {"role": "assistant", "content": text}])

    name = assistant.model.name() if assistant.model else "search only"
    converse(f"{name}. This is no medical advice.", answer, history.clear)


def read_questions(path: str) -> list[tuple[str, str]]:
    """Read (question, "file:line") of every question of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds none, or a row has no "question".
    """
    from stagekit.prediction import questions_of
    from stagekit.records import RowError

    def read(record):
        question = record.get("question") if isinstance(record, dict) else None
        if not isinstance(question, str) or not question.strip():
            raise RowError('expected a row with "question", a text')
        return question

    questions = questions_of(path, read)
    if not questions:
        raise ValueError(f"--questions_file {path} holds no question")
    return questions


def answer_file(assistant: Assistant, questions: list[tuple[str, str]], args: argparse.Namespace) -> None:
    """Answer every question that an interrupted run has not answered yet, and write the output file.

    Raises:
        ValueError: a question cannot be answered; it is named by file and line. One that is too long gets a row.
    """
    from tqdm import tqdm

    from stagekit.grounding import TooLong, cited_numbers
    from stagekit.journal import Journal

    if Path(args.output_file).is_dir():
        raise ValueError(f"--output_file {args.output_file} is a directory; name a file in it")
    Path(args.output_file).absolute().parent.mkdir(parents=True, exist_ok=True)
    names = ("search_only", "context_length", "max_new_tokens", "temperature", "top_p", "repetition_penalty")
    header = {
        "questions_file": hashlib.sha256(json.dumps([text for text, _ in questions]).encode()).hexdigest(),
        "docs": assistant.index.fingerprint(),
        "model": assistant.model.fingerprint() if assistant.model else None,
        **{name: getattr(assistant, name) for name in ("top_k", "min_score", "min_cosine")},
        **{name: getattr(args, name) for name in names},
    }
    journal = Journal(Path(f"{args.output_file}.partial"), header)
    for index, (question, origin) in enumerate(tqdm(questions, unit="question")):
        if index in journal.rows:
            continue
        try:
            passages, answers = assistant.ask(question, [])
            *_, (text, reason) = answers
        except TooLong:
            passages, text, reason = [], "", "prompt_too_long"
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
        cited = cited_numbers(text, len(passages))
        found = [{**asdict(passage), "cited": number in cited} for number, passage in enumerate(passages, 1)]
        row = {"index": index, "question": question, "answer": text, "finish_reason": reason, "passages": found}
        journal.add(row)
    reasons = Counter(row["finish_reason"] for row in journal.rows.values())
    journal.finish(args.output_file)
    missing, too_long = reasons["not_in_documents"], reasons["prompt_too_long"]
    logger.info("%s: %d answers, of them %d not in the documents", args.output_file, len(questions), missing)
    if too_long:
        logger.warning("%d not asked: longer than the model's context (finish_reason prompt_too_long)", too_long)


if __name__ == "__main__":
    arguments = parse_args()
    kept = "; what is indexed stays" + ("; the same command continues" if arguments.questions_file else "")
    run(main, arguments, "chatpdf.py", kept)
