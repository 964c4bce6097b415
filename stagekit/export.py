"""Directories made from a finished stage, merged or quantised: written beside their place, renamed when whole."""

import hashlib
import logging
import os
import platform
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stagekit.checkpoint import (
    DELIVERED,
    WEIGHTS,
    WRITTEN,
    Source,
    absolute,
    base_fingerprint,
    check_output_dir,
    relative,
    stage_fingerprint,
    write_stage,
)
from stagekit.commandline import command_line
from stagekit.seen_prompts import SEEN_PROMPTS

logger = logging.getLogger(__name__)

CHECKSUMS = "sha256sums.txt"
UNFINISHED = ".unfinished"  # behind the name of a directory that is being written
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "gguf")


def check_target(output_dir: str, overwrite: bool, source: Source) -> None:
    """Look, before any work is done, whether a directory may be written there.

    Raises:
        ValueError: it cannot be written, it is where the weights come from, it holds something and overwriting was
            not asked for, or something that neither a stage nor an export wrote and that would be lost.
    """
    check_output_dir(output_dir, True, False, source)
    path = Path(output_dir)
    found = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    if found and not overwrite:
        raise ValueError(
            f"--output_dir {output_dir} is not empty; name another directory, or replace it with "
            "--overwrite_output_dir True"
        )
    foreign = [name for name in found if not (path / name).is_file() or not _is_ours(name)]
    if foreign:
        raise ValueError(
            f"--output_dir {output_dir} holds {foreign[0]!r}, which --overwrite_output_dir would delete with it; name "
            "another directory"
        )


def _is_ours(name):
    return bool(DELIVERED.match(name)) or name in WRITTEN or name == CHECKSUMS or name.endswith(".gguf")


def check_room(output_dir: str, needed_bytes: int) -> None:
    """Compare the room on a disk with what will be written.

    Raises:
        ValueError: there is too little.
    """
    existing = next(place for place in (Path(output_dir), *Path(output_dir).absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise ValueError(
            f"--output_dir {output_dir} needs {size_text(needed_bytes)}, and {size_text(free)} are free on that disk"
        )


def size_text(num_bytes: float) -> str:
    """A size for people, in the units of --max_shard_size (powers of 1000)."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def weight_bytes(directory: str | Path) -> int:
    """Size of the weight files in a directory, GGUF included."""
    files = [path for path in Path(directory).iterdir() if WEIGHTS.match(path.name) or path.suffix == ".gguf"]
    return sum(path.stat().st_size for path in files)


@contextmanager
def staged(output_dir: str) -> Iterator[Path]:
    """Yield an empty directory beside the target; it takes the target's place at the end, or is removed on an error.

    What stood at the target is deleted last: check_target has found nothing there that could not be.
    """
    target = Path(output_dir).absolute()
    directory = target.with_name(target.name + UNFINISHED)
    if directory.exists():
        logger.warning("%s is removed: what an earlier run left when it was stopped", directory)
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    aside = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    try:
        yield directory
        if target.exists():
            target.rename(aside)
        directory.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(directory, ignore_errors=True)
        raise
    if aside.exists():
        shutil.rmtree(aside)


def finish(directory: Path, source: Source, record: dict) -> None:
    """Complete an exported directory: prompts its ancestors trained on, stage.json, checksums of every file."""
    if source.directory and Path(source.directory, SEEN_PROMPTS).is_file():
        shutil.copyfile(Path(source.directory, SEEN_PROMPTS), directory / SEEN_PROMPTS)
    write_stage(directory, record)
    write_checksums(directory)


def tensor_checksums(tensors: Iterable[tuple[str, object]]) -> dict[str, int]:
    """{name: CRC-32 of its bytes} of (name, tensor) pairs."""
    import torch

    return {name: zlib.crc32(tensor.cpu().flatten().view(torch.uint8).numpy()) for name, tensor in tensors}


def write_checksums(directory: Path) -> None:
    """Write sha256sums.txt over every other file of a directory, as sha256sum does; `sha256sum -c` reads it."""
    from tqdm import tqdm

    files = sorted(path for path in directory.iterdir() if path.name != CHECKSUMS)
    lines = []
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="checksums", leave=False) as progress:
        for path in files:
            digest = hashlib.sha256()
            with open(path, "rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
                    progress.update(len(block))
            lines.append(f"{digest.hexdigest()}  {path.name}\n")
    (directory / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def export_record(
    kind: str, program: str, source: Source, args, *, tuning: dict, checks: dict, metrics: dict, device: str
) -> dict:
    """stage.json of a directory made from a stage without training; its keys are those of any stage.

    Args:
        kind: what stands under "stage": "merge" or "quantize".
        program: which made it, as on the command line.
        source: where the weights came from; its base is the record's base.
        args: the program's flags, with output_dir.
        tuning: how it was made.
        checks, metrics: outcomes, and measures before and after.
        device: "cpu" or the accelerator's kind.
    """
    output_dir = args.output_dir
    stage = source.stage
    base = {"name_or_path": source.base, "revision": None}
    if stage:
        base = {name: value for name, value in stage["base_model"].items() if name != "merged"}
        if not source.adapter:  # the stage's own base, of which its whole weights were made
            base["name_or_path"] = absolute(base["name_or_path"], source.directory)
        else:
            base["name_or_path"] = source.base
    base["name_or_path"] = relative(base["name_or_path"], output_dir)
    base.setdefault("fingerprint", base_fingerprint(source.base))
    parent = stage and {
        "path": relative(source.directory, output_dir),
        "stage": stage["stage"],
        "fingerprint": stage_fingerprint(stage),
    }
    return {
        "format": 1,
        "stage": kind,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(program),
        "seed": (stage or {}).get("seed"),
        "base_model": base,
        "parent": parent,
        "tuning": tuning,
        "template": (stage or {}).get("template"),
        "arguments": {name: value for name, value in vars(args).items() if value not in (None, False)},
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {"device": device, "processes": 1, "cpu_cores": os.cpu_count()},
        "data": {},
        "checks": checks,
        "metrics": metrics,
    }


def _versions():
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
