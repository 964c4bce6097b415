r"""Extend the vocabulary of a base model by the words of a field, so that its texts become fewer tokens.

Reads   --base_model   a model that stands alone: a directory or hub name, with a BPE tokenizer (byte-level as of Qwen,
                       Llama 3 and GPT-2, or SentencePiece as of Llama 2, Mistral and Gemma)
        --corpus       texts of the field, in any format of this project
Writes  --output_dir   the extended base: weights, config, tokenizer with chat template, stage.json, sha256sums.txt;
                       extended_vocabulary.json has every new token, and what all of them save on held-out text

    python -m tools.extend_vocabulary --base_model Qwen/Qwen3-0.6B-Base --corpus data/pretrain \
        --output_dir outputs/extended --num_tokens 2000

The tokens are learnt as the tokenizer's own training would go on, and their merges stand behind the old ones: old ids
and control tokens stay, no text gets longer, one without a new word is read as before. Rows of the embeddings begin as
the mean of their old pieces; a matrix shared with the head stays shared, rows that fill the vocabulary up are used
first. All of that is checked on what was written. Then pretrain with the embeddings; the last line says how.
"""

import argparse
import hashlib
import heapq
import json
import logging
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

from stagekit.commandline import Parser, add_switch, choose_gpus, run

logger = logging.getLogger(__name__)

PROGRAM = "python -m tools.extend_vocabulary"
PASSAGE_CHARS = 20_000  # longer documents are cut at line ends
ROWS_MULTIPLE = 64  # new embeddings get rows to such a number, which GPUs multiply faster
SHOWN = 20  # new tokens that are printed
# Fields of records that hold no text of the field.
NO_TEXT = ("tools", "role", "id", "parent", "parent_id", "message_id", "tree_id", "lang")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--base_model", required=True, help="model directory or hub name; no adapter")
    parser.add_argument(
        "--corpus", required=True, help="texts to learn from: a file or directory, several with commas"
    )
    parser.add_argument("--output_dir", required=True, help="where the extended base goes")
    parser.add_argument("--num_tokens", type=int, default=2000, help="new tokens at most, default 2000")
    parser.add_argument(
        "--min_frequency", type=int, default=10, help="how often a token must stand in the corpus, default 10"
    )
    parser.add_argument(
        "--max_token_width",
        type=int,
        default=20,
        help="longest new token in columns, of which a Chinese character takes two; default 20",
    )
    parser.add_argument(
        "--max_corpus_chars",
        type=int,
        default=20_000_000,
        help="learn from at most this many characters, drawn from the whole corpus; default 20 million, which need "
        "about 2 GB of memory",
    )
    parser.add_argument("--validation_file_dir", help="held-out texts to measure on; default: a share of the corpus")
    parser.add_argument(
        "--validation_split_percentage",
        type=float,
        default=10.0,
        help="how large that share is, in percent of each language's characters; default 10",
    )
    parser.add_argument("--data_format", default="auto", help="force one reading of the records; README lists them")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn and held out, default 42")
    parser.add_argument("--max_shard_size", default="5GB", help="largest weight file, default 5GB")
    add_switch(parser, "--overwrite_output_dir", "replace what --output_dir holds, once this has succeeded")
    args = parser.parse_args(argv)
    for name, least in (("num_tokens", 1), ("min_frequency", 2), ("max_token_width", 2), ("max_corpus_chars", 1000)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} must be at least {least}")
    if not 0 < args.validation_split_percentage < 100:
        parser.error(f"--validation_split_percentage {args.validation_split_percentage:g} must be between 0 and 100")
    if not re.fullmatch(r"\d+(\.\d+)? ?([KMGT]I?)?B", args.max_shard_size.upper()):
        parser.error(f"--max_shard_size {args.max_shard_size!r} is no size such as 5GB or 500MB")
    return args


def main(args: argparse.Namespace) -> None:
    """Find the base, read the corpus, learn, write tokenizer and weights, load what was written, measure."""
    started = time.monotonic()
    choose_gpus(only_cpu=True, gpus=None)
    from stagekit.checkpoint import EXTENDED_VOCABULARY
    from stagekit.export import check_target, export_record, finish, staged
    from stagekit.vocabulary import measure

    source, config = find_base(args.base_model)
    check_target(args.output_dir, args.overwrite_output_dir, source)
    tokenizer, vocabulary = load_base_tokenizer(source)
    predict_room(args, config, vocabulary)
    learnt, held_out = read_corpus(args)
    tokens, occurrences = learn_tokens(args, tokenizer, vocabulary, learnt)
    with staged(args.output_dir) as directory:
        config.save_pretrained(directory)  # by which AutoTokenizer chooses the tokenizer's class
        extended = write_tokenizer(tokenizer, tokens, directory)
        checks = {"vocabulary_is_extended": vocabulary_is_extended(tokenizer, extended, tokens, held_out.texts)}
        with progress_bar("measuring", held_out) as progress:
            sizes = measure(plain(tokenizer), plain(extended), held_out.texts, progress.update)
        embeddings, checks["base_is_unchanged"] = write_model(args, source, config, vocabulary, tokens, directory)
        for name, check in checks.items():
            logger.info("check %s: passed (%s; limit: %s)", name, check["value"], check["limit"])
        record = export_record(
            *("extend_vocabulary", PROGRAM, source, args),
            tuning={"method": "extended", "kind": vocabulary.kind, "num_tokens": len(tokens)},
            checks=checks,
            metrics={},
            device="cpu",
        )
        made = {
            **origin(args, source, config, record["command"]),
            **{"kind": vocabulary.kind, "tokens_before": vocabulary.first_id, "num_tokens": len(tokens)},
            "corpus": learnt.summary(),
            "held_out": held_out.summary(),
            "held_out_sizes": {name: {**row, **ratios(row)} for name, row in sizes.items()},
            "embeddings": embeddings,
            "tokens": [describe(token, occurrences[token.id]) for token in tokens],
        }
        text = json.dumps(made, ensure_ascii=False, indent=1)
        (directory / EXTENDED_VOCABULARY).write_text(text + "\n", encoding="utf-8")
        finish(directory, source, {**record, "seconds": round(time.monotonic() - started, 1)})
    print(report(made, vocabulary))
    logger.info("saved: %s", args.output_dir)
    logger.warning(
        "%s has another vocabulary than %s: adapters trained on that do not fit it; train from here on",
        args.output_dir,
        args.base_model,
    )
    print(next_command(args, embeddings["modules"]))


# -- the base --------------------------------------------------------------------------------------------------------


def find_base(name: str):
    """(Source, config) of a causal model whose weights stand alone and are not quantised.

    Raises:
        ValueError: an adapter, a reward model, or quantised weights.
    """
    from stagekit.checkpoint import resolve
    from stagekit.generation import model_arguments
    from stagekit.modeling import load_config

    source = resolve(name)
    if source.adapter:
        raise ValueError(
            f"--base_model {name} is an adapter on {source.base}; extend that before anything is trained on it, or "
            f"merge the two first: python -m tools.merge_adapter --lora_model {name} --output_dir MERGED"
        )
    config = load_config(source, model_arguments(source))
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"--base_model {name} holds quantised weights, whose embeddings cannot grow; name the original model (a "
            "stage quantises it while loading: --load_in_4bit True)"
        )
    return source, config


def load_base_tokenizer(source):
    """(tokenizer, Vocabulary) of the base, its special tokens as they are.

    Raises:
        ValueError: there is none, or it is of a kind that cannot be extended.
    """
    from transformers import AutoTokenizer

    from stagekit.generation import model_arguments
    from stagekit.modeling import load_tokenizer
    from stagekit.vocabulary import read_vocabulary

    load_tokenizer(source, model_arguments(source))  # refuses what no stage could use, and chooses a token to pad with
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer or source.base)
    try:
        return tokenizer, read_vocabulary(json.loads(tokenizer.backend_tokenizer.to_str()))
    except ValueError as error:
        raise ValueError(f"{source.base}: {error}") from None


def plain(tokenizer):
    """The tokenizers.Tokenizer below a tokenizer, in a copy that neither truncates nor pads."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def predict_room(args, config, vocabulary) -> None:
    """Compare memory and disk with what the weights will need.

    Raises:
        ValueError: there is too little.
    """
    import torch

    from stagekit.export import check_room, size_text
    from stagekit.memory import available_bytes, count_parameters
    from stagekit.modeling import model_class

    if model_class(config) is None:  # code that came with the model: its size is known once it is loaded
        return
    text, stored = config.get_text_config(), getattr(config, "dtype", None) or torch.float32
    size = getattr(torch, stored).itemsize if isinstance(stored, str) else stored.itemsize
    grown = max(0, vocabulary.first_id + args.num_tokens + ROWS_MULTIPLE - text.vocab_size)
    weights = count_parameters(config, model_class(config))[0] + 2 * grown * text.hidden_size
    check_room(args.output_dir, int(1.02 * weights * size) + 2**25)  # and its tokenizer
    needed = weights * size + 2 * text.vocab_size * text.hidden_size * size  # old and new matrices stand side by side
    if needed > available_bytes(use_cpu=True):
        raise ValueError(
            f"{args.base_model} needs {size_text(needed)} of memory and {size_text(available_bytes(True))} are "
            "available; use a machine with more"
        )


# -- the corpus ------------------------------------------------------------------------------------------------------


@dataclass
class Documents:
    """Passages of texts, and where they come from.

    Attributes:
        texts: in an order that only their contents decide; no two are equal.
        files: where they stand.
        records, unreadable: how many were read, and how many of these could not be.
    """

    texts: list[str]
    files: list[str]
    records: int
    unreadable: int

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))

    def summary(self) -> dict:
        """What extended_vocabulary.json holds of them."""
        numbers = {"records": self.records, "unreadable": self.unreadable, "passages": len(self.texts)}
        return {"files": self.files, **numbers, "characters": self.characters}


def read_corpus(args) -> tuple[Documents, Documents]:
    """(texts to learn from, held-out texts).

    Raises:
        ValueError, FileNotFoundError: nothing there that can be read, or nothing to hold out.
    """
    corpus = read_documents("--corpus", args.corpus, args.data_format, args.max_corpus_chars, args.seed)
    if args.validation_file_dir:
        flag = "--validation_file_dir"
        held_out = read_documents(flag, args.validation_file_dir, args.data_format, args.max_corpus_chars, args.seed)
        both = set(held_out.texts)
        learnt = [text for text in corpus.texts if text not in both]
        if not learnt:
            raise ValueError(f"every text of --corpus stands in --validation_file_dir {args.validation_file_dir} too")
    else:
        learnt, kept = hold_out(corpus.texts, args.validation_split_percentage)
        if not kept:
            raise ValueError(
                f"--corpus {args.corpus} holds one text only, so that none is left to measure on; give "
                "--validation_file_dir"
            )
        held_out = Documents(kept, corpus.files, corpus.records, corpus.unreadable)
    return Documents(learnt, corpus.files, corpus.records, corpus.unreadable), held_out


def read_documents(flag: str, paths: str, data_format: str, max_chars: int, seed: int) -> Documents:
    """Read all the files, and keep passages up to a number of characters, each as likely as any other.

    A passage's place in the draw is a hash of the seed and its content, so the order of files does not matter, and
    what stands there twice counts once.
    """
    from tqdm import tqdm

    from stagekit.files import find_files, read_records
    from stagekit.formats import to_canonical
    from stagekit.records import RowError

    files = find_files(paths)
    kept: dict[int, str] = {}
    worst: list[int] = []
    size = records = 0
    unreadable = []
    with tqdm(desc=f"reading {flag}", unit="record", leave=False) as progress:
        for path in files:
            for record, line in read_records(path):
                progress.update()
                records += 1
                try:
                    if isinstance(record, RowError):
                        raise record
                    text = "\n".join(strings(to_canonical(record, data_format)[0]))
                except RowError as error:
                    unreadable.append(f"{path}:{line}: {error}")
                    continue
                for passage in passages(text):
                    place = int.from_bytes(hashlib.sha256(f"{seed}\0{passage}".encode()).digest()[:8], "big")
                    if place not in kept:
                        kept[place] = passage
                        heapq.heappush(worst, -place)
                        size += len(passage)
                    while size > max_chars and len(kept) > 1:
                        size -= len(kept.pop(-heapq.heappop(worst)))
    if not kept:
        reason = unreadable[0] if unreadable else f"{files[0]}: no text"
        raise ValueError(f"{flag} {paths}: none of the {records} records could be read; the first: {reason}")
    if unreadable:
        logger.warning("%s: %d of %d records are left out, e.g. %s", flag, len(unreadable), records, unreadable[0])
    return Documents([kept[place] for place in sorted(kept)], [str(path) for path in files], records, len(unreadable))


def strings(value) -> Iterator[str]:
    """Everything that a record says, whatever kind it is of."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in NO_TEXT:
                yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)
    elif is_dataclass(value):
        yield from strings({field.name: getattr(value, field.name) for field in fields(value)})


def passages(text: str) -> Iterator[str]:
    """Cut a text at line ends into parts of at most PASSAGE_CHARS; empty ones are left out."""
    start = 0
    while start < len(text):
        stop = start + PASSAGE_CHARS
        if stop < len(text):
            line_end = text.rfind("\n", start + 1, stop + 1)
            stop = line_end if line_end > 0 else stop
        if text[start:stop].strip():
            yield text[start:stop]
        start = stop + (text[stop : stop + 1] == "\n")


def hold_out(texts: list[str], percentage: float) -> tuple[list[str], list[str]]:
    """Split into (learnt, held out): the first of each language, up to a share of its characters."""
    from stagekit.vocabulary import language_of

    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(language_of(text), []).append(text)
    learnt, held_out = [], []
    for group in groups.values():
        left = percentage / 100 * sum(map(len, group))
        for number, text in enumerate(group, 1):
            taken = left > 0 and number < len(group)
            (held_out if taken else learnt).append(text)
            left -= len(text) if taken else 0
    return learnt, held_out


def progress_bar(title: str, documents: Documents):
    """A bar over the characters of documents."""
    from tqdm import tqdm

    return tqdm(total=documents.characters, desc=title, unit="char", unit_scale=True, leave=False)


# -- the tokenizer ---------------------------------------------------------------------------------------------------


def learn_tokens(args, tokenizer, vocabulary, corpus: Documents):
    """Learn from the corpus what vocabulary.learn returns.

    Raises:
        ValueError: nothing is frequent enough.
    """
    from tqdm import tqdm

    from stagekit.vocabulary import learn, read_pieces

    with progress_bar("encoding the corpus", corpus) as progress:
        ids = read_pieces(plain(tokenizer), vocabulary, corpus.texts, progress.update)
    with tqdm(total=args.num_tokens, desc="learning", unit="token", leave=False) as progress:
        limits = (args.num_tokens, args.min_frequency, args.max_token_width)
        tokens, occurrences = learn(ids, vocabulary, *limits, progress.update)
    if not tokens:
        raise ValueError(
            f"--corpus {args.corpus}: no two pieces of a word stand together {args.min_frequency} times in "
            f"{corpus.characters:,} characters; give more text, or a lower --min_frequency"
        )
    if len(tokens) < args.num_tokens:
        logger.warning(
            "%d tokens were found instead of %d: no other stands %d times in the corpus (--min_frequency)",
            *(len(tokens), args.num_tokens, args.min_frequency),
        )
    return tokens, occurrences


def write_tokenizer(tokenizer, tokens: list, directory: Path):
    """Write the tokenizer with the new tokens, and load it as any stage would."""
    from transformers import AutoTokenizer

    from stagekit.vocabulary import add_tokens

    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    add_tokens(spec, tokens)
    path.write_text(json.dumps(spec, ensure_ascii=False, indent=2), encoding="utf-8")
    return AutoTokenizer.from_pretrained(directory)


def vocabulary_is_extended(tokenizer, extended, tokens: list, texts: list[str]) -> dict:
    """Compare the written tokenizer with the base's; return the outcome for stage.json.

    Raises:
        CheckError: an old token has another id, a new one is never produced, or a text is read otherwise than by
            joining its old ids.
    """
    from stagekit.checks import CheckError
    from stagekit.vocabulary import BATCH, expand

    def fail(text):
        raise CheckError(f"check vocabulary_is_extended failed: {text}; nothing is left in --output_dir")

    old, new, by_id = plain(tokenizer), plain(extended), {token.id: token for token in tokens}
    before, after = old.get_vocab(with_added_tokens=True), new.get_vocab(with_added_tokens=True)
    moved = sorted(token for token, number in before.items() if after.get(token) != number)
    if moved or len(after) != len(before) + len(tokens):
        fail(f"{moved[0]!r} has the id {after.get(moved[0])}" if moved else f"{len(after)} tokens instead of more")
    for name in ("special_tokens_map", "chat_template", "added_tokens_decoder"):
        if getattr(tokenizer, name) != getattr(extended, name):
            fail(f"{name} has changed")
    for token in tokens:
        if [piece.id for piece in new.model.tokenize(token.token)] != [token.id]:
            fail(f"{token.token!r} is never produced")
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        pairs = [each.encode_batch(batch, add_special_tokens=False) for each in (old, new)]
        for text, first, second in zip(batch, *pairs, strict=True):
            same = new.decode(second.ids) == old.decode(first.ids)
            if expand(second.ids, by_id) != first.ids or not same:
                fail(f"a held-out text is read otherwise: {text[:60]!r}")
    value = f"{len(tokens)} tokens reachable, {len(before)} old ids in place, {len(texts)} texts are old ids joined"
    return {"passed": True, "value": value, "limit": "exact"}


# -- the weights -----------------------------------------------------------------------------------------------------


def write_model(args, source, config, vocabulary, tokens: list, directory: Path) -> tuple[dict, dict]:
    """Add the rows, write the weights, load them and compare; return (what the record holds, outcome of the check).

    Raises:
        ValueError: the base has fewer rows than tokens.
        CheckError: an old weight has changed, or input and head are no longer shared.
    """
    from transformers import AutoModelForCausalLM

    from stagekit.checks import CheckError
    from stagekit.export import tensor_checksums
    from stagekit.generation import model_arguments
    from stagekit.modeling import load_model

    def fail(text):
        raise CheckError(f"check base_is_unchanged failed: {text}; nothing is left in --output_dir")

    settings = SimpleNamespace(bf16=False, fp16=False, use_cpu=True, deepspeed=None)
    model = load_model(source, model_arguments(source, dtype="auto"), settings, config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows, width = embedding.weight.shape
    if rows < vocabulary.first_id:
        raise ValueError(
            f"{args.base_model}: its tokenizer has {vocabulary.first_id} tokens and its embeddings {rows} rows; this "
            "base is not whole"
        )
    tied = head.weight is embedding.weight
    wanted = tensor_checksums(old_parameters(model, vocabulary.first_id))
    add_rows(model, tokens)
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    modules = [model.get_input_embeddings()] if tied else [model.get_input_embeddings(), model.get_output_embeddings()]
    record = {
        "rows_before": rows,
        "rows_after": model.get_input_embeddings().weight.shape[0],
        "width": width,
        "tied": tied,
        "modules": [names[id(module)] for module in modules],
        "parameters_before": sum(parameter.numel() for parameter in model.parameters()),
        "initialised": "mean of the old pieces",
    }
    record["parameters_added"] = (record["rows_after"] - rows) * width * len(modules)
    if getattr(head, "bias", None) is not None:
        record["parameters_added"] += record["rows_after"] - rows
    record["parameters_before"] -= record["parameters_added"]
    dtype = embedding.weight.dtype
    model.save_pretrained(directory, max_shard_size=args.max_shard_size)
    del model, embedding, head, modules
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    found = tensor_checksums(old_parameters(model, vocabulary.first_id))
    changed = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if changed:
        fail(f"{changed[0]} is not the base's")
    if (model.get_output_embeddings().weight is model.get_input_embeddings().weight) != tied:
        fail("the head shares its matrix no longer" if tied else "the head shares the embedding's matrix")
    value = f"{len(found)} tensors of the base reloaded, {'one matrix' if tied else 'two matrices'} for the vocabulary"
    return record, {"passed": True, "value": value, "limit": "exact"}


def old_parameters(model, num_tokens: int) -> Iterator[tuple[str, object]]:
    """(name, values) of all parameters; of those with a row for each token, the rows of the old ones."""
    head = model.get_output_embeddings()
    by_token = {id(model.get_input_embeddings().weight), id(head.weight), id(getattr(head, "bias", None))}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter.detach()[:num_tokens] if id(parameter) in by_token else parameter.detach()


def add_rows(model, tokens: list) -> None:
    """Give every new token its row: the mean of the rows of its old pieces, summed in fp32.

    Rows that the base has beyond its tokenizer are used first; if they do not suffice, rows are added up to a multiple
    of ROWS_MULTIPLE. Those of them that are left over become the mean of all the old rows, which no token is near to.
    """
    import torch

    rows, needed = model.get_input_embeddings().weight.shape[0], tokens[-1].id + 1
    if needed > rows:
        model.resize_token_embeddings(needed, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = [embedding.weight, *([] if head.weight is embedding.weight else [head.weight])]
    matrices += [head.bias] if getattr(head, "bias", None) is not None else []
    with torch.no_grad():
        for matrix in matrices:
            if len(matrix) > rows:
                matrix[rows:] = matrix[: tokens[0].id].mean(dim=0, dtype=torch.float32).to(matrix.dtype)
            for token in tokens:
                matrix[token.id] = matrix[list(token.pieces)].mean(dim=0, dtype=torch.float32).to(matrix.dtype)


# -- what is told ----------------------------------------------------------------------------------------------------


def origin(args, source, config, command: str) -> dict:
    """How extended_vocabulary.json begins: when and from which base it was made."""
    from stagekit.checkpoint import base_fingerprint, relative

    return {
        "format": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "base_model": {
            "name_or_path": relative(source.base, args.output_dir),
            "revision": getattr(config, "_commit_hash", None),  # of a hub model
            "fingerprint": base_fingerprint(source.base),
        },
    }


def describe(token, occurrences: int) -> dict:
    """What extended_vocabulary.json holds of a token; each time it stands in the corpus, all its pieces but one are
    saved."""
    from stagekit.vocabulary import shown

    return {
        "id": token.id,
        "token": token.token,
        "text": shown(token.content),
        "pieces": list(token.pieces),
        "occurrences": occurrences,
        "saved": occurrences * (len(token.pieces) - 1),
    }


def ratios(row: dict) -> dict:
    """What is easier to compare than sums: units a token, and tokens a character."""
    found = {}
    for when in ("before", "after"):
        tokens = row[f"tokens_{when}"]
        found[f"tokens_per_character_{when}"] = round(tokens / row["characters"], 4)
        found[f"characters_per_token_{when}"] = round(row["characters"] / tokens, 4)
        found[f"bytes_per_token_{when}"] = round(row["bytes"] / tokens, 4)
    return found


def report(made: dict, vocabulary) -> str:
    """The outcome for people: sizes of held-out text, parameters, the best tokens."""
    from stagekit.vocabulary import shown

    best = sorted(made["tokens"], key=lambda token: (-token["saved"], token["id"]))
    used = [token for token in best if token["saved"]]
    head = ("held-out text", "characters", "tokens before", "after", "tokens/character before", "after", "change")
    lines = [
        f"{made['num_tokens']:,} new tokens ({made['kind']}, {made['tokens_before']:,} before), learnt from "
        f"{made['corpus']['characters']:,} characters; {made['num_tokens'] - len(used):,} only lead to longer ones",
        "",
        "{:<14}{:>12}{:>15}{:>10}{:>25}{:>8}{:>9}".format(*head),
    ]
    for name, row in made["held_out_sizes"].items():
        before, after = row["tokens_per_character_before"], row["tokens_per_character_after"]
        change = row["tokens_after"] / row["tokens_before"] - 1
        lines.append(
            f"{name:<14}{row['characters']:>12,}{row['tokens_before']:>15,}{row['tokens_after']:>10,}"
            f"{before:>25.3f}{after:>8.3f}{change:>9.1%}"
        )
    grown = made["embeddings"]
    share = grown["parameters_added"] / grown["parameters_before"]
    shared = "shared with the head" if grown["tied"] else "and as many of the head"
    lines += [
        "",
        f"embedding rows: {grown['rows_before']:,} before, {grown['rows_after']:,} after, {shared}; "
        f"{grown['parameters_added']:,} parameters added ({share:.2%})",
        "",
        f"{'saved':>10}{'times':>10}  token and the pieces it was",
    ]
    for token in used[:SHOWN]:
        pieces = "|".join(shown(vocabulary.contents[piece]) for piece in token["pieces"])
        lines.append(f"{token['saved']:>10,}{token['occurrences']:>10,}  {token['text']}  =  {pieces}")
    return "\n".join(lines)


def next_command(args, modules: list[str]) -> str:
    """The pretraining command that trains the new rows."""
    place = Path(args.output_dir)
    flags = {
        "model_name_or_path": args.output_dir,
        "train_file_dir": args.corpus,
        "output_dir": str(place.with_name(place.name + "-pt")),
        "modules_to_save": ",".join(modules),
        "learning_rate": "2e-4",
    }
    given = " ".join(f"--{name} {shlex.quote(value)}" for name, value in flags.items())
    return f"train the new rows: python pretraining.py {given} --do_train --do_eval"


if __name__ == "__main__":
    run(main, parse_args(), PROGRAM, "; nothing was written to --output_dir")
