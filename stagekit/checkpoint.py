"""What a stage leaves on disk and the next one reads: stage.json, fingerprints, checkpoints, whole or absent."""

import functools
import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

STAGE_FILE = "stage.json"
MARKER = "complete.json"  # written last into a checkpoint: the files it must hold and their sizes
SAVING = ".saving"  # checkpoints are written below this directory and renamed when they are whole
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
EXTENDED_VOCABULARY = "extended_vocabulary.json"  # what tools.extend_vocabulary added to a base
# What a stage directory is: everything the next stage or inference reads.
DELIVERED = re.compile(
    WEIGHTS.pattern
    + r"|adapter_(config\.json|model\.safetensors)$|(generation_)?config\.json$|chat_template\.jinja$"
    + r"|tokenizer.*|special_tokens_map\.json$|added_tokens\.json$|vocab\..*|merges\.txt$|spiece\.model$"
)

# What a run writes beside that.
WRITTEN = {
    STAGE_FILE,
    "seen_prompts.npy",
    "rejected_rows.jsonl",
    "curves.png",
    "scores.png",
    "samples.jsonl",
    "trainer_state.json",
    "training_args.bin",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "README.md",
    EXTENDED_VOCABULARY,
}


@dataclass
class Source:
    """What a run starts from.

    Attributes:
        base: directory or hub name of the base weights.
        adapter: directory of the adapter to continue, or None.
        tokenizer: directory or hub name that holds the tokenizer.
        stage: the stage.json of the parent, or None when the start is a plain model.
        directory: the parent's directory, or None.
        merged: directories of adapters to merge into the base, in this order, before the adapter is put on it.
    """

    base: str
    adapter: str | None = None
    tokenizer: str | None = None
    stage: dict | None = None
    directory: str | None = None
    merged: list[str] = field(default_factory=list)


# -- fingerprints ----------------------------------------------------------------------------------------------------


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's contents, hex; read once as long as the file stays as it is."""
    status = os.stat(path)
    return _sha256(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256(path, size, changed):
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def directory_files(directory: str | Path, pattern: re.Pattern) -> dict[str, str]:
    """{file name: sha256} of the files directly in a directory whose names match."""
    names = sorted(path.name for path in Path(directory).iterdir() if path.is_file() and pattern.match(path.name))
    return {name: file_sha256(Path(directory, name)) for name in names}


def fingerprint(files: dict[str, str]) -> str:
    """One sha256 over {file name: sha256}."""
    return (
        "sha256:" + hashlib.sha256("".join(f"{name}\0{files[name]}\n" for name in sorted(files)).encode()).hexdigest()
    )


def base_fingerprint(base: str) -> str:
    """Fingerprint of base weights: a directory's weights and config, or what the hub cache holds under that name."""
    directory = base if os.path.isdir(base) else _hub_snapshot(base)
    if directory is None:
        return f"name:{base}"
    pattern = re.compile(WEIGHTS.pattern + r"|config\.json$")
    return fingerprint(directory_files(directory, pattern))


def _hub_snapshot(name):
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    return str(Path(config).parent) if isinstance(config, str) else None


# -- the chain -------------------------------------------------------------------------------------------------------


def read_stage(directory: str | Path) -> dict | None:
    """Read a stage.json; None when the directory has none.

    Raises:
        ValueError: it is damaged or of a later format.
    """
    path = Path(directory, STAGE_FILE)
    if not path.is_file():
        return None
    try:
        stage = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged ({error}); restore it or run the stage again") from None
    if stage.get("format") != 1:
        raise ValueError(f"{path}: format {stage.get('format')!r} is not known here; update this toolkit")
    return stage


def verify_stage(directory: str | Path, stage: dict) -> None:
    """Compare a stage's files with the hashes its stage.json recorded.

    Raises:
        ValueError: a file is missing or was changed; it is named.
    """
    for name, expected in stage.get("files", {}).items():
        path = Path(directory, name)
        if not path.is_file():
            raise ValueError(
                f"{path}: missing, though {directory}/{STAGE_FILE} lists it; restore it or run the stage again"
            )
        if file_sha256(path) != expected:
            raise ValueError(
                f"{path}: changed after the stage was saved (its sha256 differs from {STAGE_FILE}); restore "
                "it, or remove "
                f"{STAGE_FILE} to use the directory as a plain model"
            )


def resolve(model_name_or_path: str, peft_path: str | None = None, verify: bool = True) -> Source:
    """Find base, adapter and tokenizer behind a name: a model, a stage directory, or a model and an adapter.

    Args:
        model_name_or_path: what --model_name_or_path or --base_model names.
        peft_path: adapter directory to use on it.
        verify: recompute the parent's fingerprints (reads every file once).

    Raises:
        ValueError: no weights there; the adapter was trained on another base; the parent's files were changed.
        FileNotFoundError: a directory that does not exist.
    """
    if peft_path:
        adapter = resolve_adapter(peft_path, verify)
        below = resolve(model_name_or_path, verify=verify)
        if below.adapter is not None:
            raise ValueError(
                f"{model_name_or_path} is itself an adapter on {below.base}; give that base beside {peft_path}, or "
                "one of the two adapters alone"
            )
        recorded = adapter.stage["base_model"] if adapter.stage else None
        if recorded and recorded.get("fingerprint", "").startswith("sha256:"):
            same = recorded["fingerprint"] == base_fingerprint(below.base)
        else:
            same = os.path.realpath(adapter.base) == os.path.realpath(below.base) or adapter.base == below.base
            if not same and os.path.isdir(below.base) and not os.path.isdir(adapter.base):
                logger.warning(
                    "adapter %s was trained on %s, which is not here; that %s is the same cannot be checked",
                    peft_path,
                    adapter.base,
                    below.base,
                )
                same = True
        if not same:
            why = _vocabulary_differs(below.base, adapter.base) or _vocabulary_differs(adapter.base, below.base)
            raise ValueError(f"adapter {peft_path} was trained on {adapter.base}, not on {model_name_or_path}{why}")
        return Source(below.base, adapter.adapter, adapter.tokenizer, adapter.stage, adapter.directory, adapter.merged)
    path = Path(model_name_or_path)
    if not path.is_dir():
        if path.exists() or model_name_or_path.startswith((".", "/", "~")) or model_name_or_path.count("/") > 1:
            raise FileNotFoundError(f"{model_name_or_path}: no such model directory")
        return Source(model_name_or_path, tokenizer=model_name_or_path)
    if (path / ADAPTER[0]).is_file():
        return resolve_adapter(model_name_or_path, verify)
    stage = read_stage(path)
    if not any(WEIGHTS.match(item.name) for item in path.iterdir()):
        checkpoints = [item.name for item in path.glob("checkpoint-*")]
        more = f"; it holds {', '.join(sorted(checkpoints)[:3])} of an unfinished run" if checkpoints else ""
        raise ValueError(
            f"{model_name_or_path}: no weights in this directory (expected *.safetensors or adapter_config.json){more}"
        )
    if stage is not None and verify:
        verify_stage(path, stage)
    return Source(str(path), None, str(path), stage, str(path) if stage else None)


def check_base(source: Source, way_out: str = "; name its new place with --base_model") -> None:
    """Raise FileNotFoundError where the directory of base weights that an adapter was trained on is gone."""
    if not os.path.isdir(source.base) and source.base.startswith((".", "/")):
        raise FileNotFoundError(f"{source.adapter} was trained on {source.base}, which is not there{way_out}")


def extended_vocabulary(base: str) -> dict | None:
    """What tools.extend_vocabulary noted down in a base directory; None for any other base.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(base, EXTENDED_VOCABULARY)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); restore it, or extend the base again") from None


def _vocabulary_differs(extended, base):
    """Say that one base is another one with more tokens; empty where it is not."""
    record = extended_vocabulary(extended)
    if record is None or not os.path.isdir(base) or record["base_model"]["fingerprint"] != base_fingerprint(base):
        return ""
    return (
        f"; the vocabulary differs: {extended} is {base} with {record['num_tokens']} tokens more, so each needs an "
        "adapter of its own"
    )


def resolve_adapter(directory: str, verify: bool = True) -> Source:
    """Find the base below an adapter directory, through stage.json or else adapter_config.json."""
    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"{directory}: no such adapter directory")
    for name in ADAPTER:
        if not (path / name).is_file():
            raise ValueError(f"{directory}: not an adapter directory, {name} is missing")
    stage = read_stage(path)
    if stage is None:
        base = json.loads((path / ADAPTER[0]).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise ValueError(f"{path / ADAPTER[0]}: does not say on which base model it was trained")
        if not os.path.isabs(base):  # as it was given where that run was started
            places = (parent / base for parent in [Path(), *path.resolve().parents])
            base = str(next((place for place in places if place.is_dir()), base))
    else:
        if verify:
            verify_stage(path, stage)
        base = absolute(stage["base_model"]["name_or_path"], path)
        recorded = stage["base_model"].get("fingerprint", "")
        if verify and recorded.startswith("sha256:") and os.path.isdir(base) and base_fingerprint(base) != recorded:
            raise ValueError(
                f"{base}: its weights are not the ones that {directory} was trained on (fingerprint differs)"
            )
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    merged = [_merged_adapter(path, part, verify) for part in (stage or {}).get("base_model", {}).get("merged", [])]
    return Source(base, str(path), str(path) if has_tokenizer else base, stage, str(path) if stage else None, merged)


def _merged_adapter(directory, part, verify):
    """Find an adapter that was merged into the base before the one in `directory` was trained."""
    path = absolute(part["path"], directory)
    stage = read_stage(path) if os.path.isdir(path) else None
    if stage is None:
        raise FileNotFoundError(f"{path}: {directory} was trained on a base with this adapter merged; it is not there")
    if verify:
        verify_stage(path, stage)
        if stage_fingerprint(stage) != part["fingerprint"]:
            raise ValueError(f"{path}: not the stage that {directory} was trained on (its fingerprint differs)")
    return path


def relative(target: str, directory: str | Path) -> str:
    """Write a path relative to a stage directory when both stand side by side, so that they can move together."""
    if not os.path.isdir(target):
        return target
    here, there = Path(directory).resolve(), Path(target).resolve()
    return os.path.relpath(there, here) if there.parent == here.parent else str(there)


def absolute(target: str, directory: str | Path) -> str:
    """Inverse of relative."""
    return os.path.normpath(os.path.join(directory, target)) if target.startswith(".") else target


def write_stage(directory: str | Path, stage: dict) -> None:
    """Write stage.json, last of all files and in one rename: a directory that has it is whole."""
    stage = {**stage, "files": directory_files(directory, DELIVERED)}
    path = Path(directory, STAGE_FILE)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(stage, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def stage_fingerprint(stage: dict) -> str:
    """Fingerprint of a finished stage."""
    return fingerprint(stage.get("files", {}))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def mark_complete(directory: str | Path) -> None:
    """Write the marker that lists every file of a checkpoint and its size."""
    root = Path(directory)
    sizes = {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.rglob("*")) if path.is_file()}
    temporary = root / (MARKER + ".tmp")
    temporary.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, root / MARKER)


def why_incomplete(directory: str | Path) -> str | None:
    """Say what a checkpoint lacks; None when it is whole."""
    root = Path(directory)
    try:
        sizes = json.loads((root / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return f"{MARKER} is missing, so saving was interrupted"
    for name, size in sizes.items():
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint directories, oldest step first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(output_dir: str | Path, wanted: str | None) -> str | None:
    """Choose the checkpoint to resume from.

    Args:
        output_dir: where the run writes.
        wanted: value of --resume_from_checkpoint: None or "False" for none, "True" for the newest whole one, a path.

    Raises:
        ValueError: the named checkpoint is incomplete, or there is none.
    """
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        return None
    if str(wanted).lower() != "true":
        if not Path(wanted).is_dir():
            raise FileNotFoundError(f"--resume_from_checkpoint {wanted}: no such directory")
        reason = why_incomplete(wanted)
        if reason:
            raise ValueError(f"--resume_from_checkpoint {wanted}: incomplete checkpoint ({reason})")
        return str(wanted)
    for path in reversed(list_checkpoints(output_dir)):
        reason = why_incomplete(path)
        if reason is None:
            return str(path)
        logger.warning("%s is ignored: incomplete checkpoint (%s)", path, reason)
    raise ValueError(f"--resume_from_checkpoint True: no complete checkpoint in {output_dir}; start without the flag")


def check_output_dir(output_dir: str | Path, overwrite: bool, resume: bool, source: Source) -> None:
    """Look, before any work is done, whether a run may write there. Nothing is changed yet.

    Raises:
        ValueError: it cannot be written; it is what the run starts from; checkpoints of an interrupted run stand there
            and neither resuming nor overwriting was asked for.
    """
    path = Path(output_dir)
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--output_dir {output_dir} cannot be written ({existing} is no directory, or read-only)")
    places = (source.directory, source.adapter, source.base, *source.merged)
    origins = [place for place in places if place and os.path.isdir(place)]
    if path.exists() and any(path.samefile(place) for place in origins):
        raise ValueError(f"--output_dir {output_dir} is what the run starts from; write somewhere else, to keep both")
    unfinished = list_checkpoints(path) if not (path / STAGE_FILE).is_file() else []
    if unfinished and not resume and not overwrite:
        raise ValueError(
            f"{output_dir} holds {unfinished[-1].name} of an interrupted run: continue it with "
            "--resume_from_checkpoint True, or start over with --overwrite_output_dir True"
        )


def prepare_output_dir(output_dir: str | Path, overwrite: bool, resume: bool) -> None:
    """Make room for a run, when everything before it went well, without losing an earlier one.

    A finished run is moved aside, to <output_dir>.1, .2, …; under --overwrite_output_dir what a run wrote is deleted,
    and nothing else: the directory may hold more than that.
    """
    path = Path(output_dir)
    if path.is_dir() and not resume:
        if overwrite:
            for item in path.iterdir():
                if item.is_dir() and (item.name.startswith("checkpoint-") or item.name in ("runs", SAVING)):
                    shutil.rmtree(item)
                elif item.is_file() and (DELIVERED.match(item.name) or item.name in WRITTEN):
                    item.unlink()
        elif (path / STAGE_FILE).is_file():
            number = 1
            while (aside := path.with_name(f"{path.name}.{number}")).exists():
                number += 1
            path.rename(aside)
            logger.warning("%s held a finished run; it is kept as %s", output_dir, aside)
    if (path / SAVING).is_dir():
        logger.warning("%s is removed: a checkpoint that was being written when an earlier run stopped", path / SAVING)
        shutil.rmtree(path / SAVING)
    path.mkdir(parents=True, exist_ok=True)
