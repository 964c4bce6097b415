"""Datasets of the hubs as the files they consist of: which ones a configuration and a split mean, and where they lie.

The datasets library only says which files; stagekit/files.py reads them, since its own tables cannot hold what many of
them mix in one field (null and text, strings and lists).
"""

import glob
import logging
import os
import re
from pathlib import Path

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"hf://datasets/[^@]+@[^/]+/(.+)")  # name, commit, and the path in the repository


def fetch_dataset(
    name: str, split: str = "train", hub: str = "huggingface", cache_dir: str | None = None
) -> list[Path]:
    """Find the data files of a dataset, and download those that are not here yet.

    Args:
        name: NAME or NAME:CONFIG, where NAME is a dataset of the hub, or a folder with what such a repository holds:
            data files, and a README.md that may say which of them belong to which configuration and split.
        split: train, validation, test, or as the dataset calls it.
        hub: "huggingface" or "modelscope", for names that are no folder.
        cache_dir: where downloads are kept; default the hub's own cache.

    Returns:
        Paths that end in the names the files have in the repository, in its order.

    Raises:
        ValueError: there is no such dataset, configuration or split, the hub cannot be reached, or the dataset is made
            by a script.
    """
    name, config = (name, "") if Path(name).is_dir() else (name.partition(":")[0], name.partition(":")[2])
    if Path(name).is_dir():
        return _files_of_folder(Path(name), name, config, split)
    if hub == "modelscope":
        return _files_of_folder(_fetch_from_modelscope(name, cache_dir), name, config, split)
    try:
        addresses = _resolve(name, name, config, split)
    except ConnectionError:
        downloaded = _downloaded(name, cache_dir)
        if downloaded is None:
            raise _no_answer(name) from None
        logger.warning("--dataset_name %s: the hub cannot be reached; using what was downloaded before", name)
        return _files_of_folder(downloaded, name, config, split)
    return _download(name, addresses, cache_dir)


def _resolve(path, name, config, split):
    """The addresses of the files of a split.

    Raises:
        ConnectionError: the hub does not answer.
        ValueError: there are none.
    """
    from datasets import get_dataset_config_names, load_dataset_builder

    shown = f"--dataset_name {name}" + (f":{config}" if config else "")
    try:
        found = load_dataset_builder(path, config or None).config.data_files
    except ConnectionError:
        raise
    except Exception as error:  # of all kinds: this library's, huggingface_hub's, yaml's, those of the connection
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "scripts are no longer supported" in reason:
            raise ValueError(
                f"{shown}: a Python script makes this dataset, and scripts are not run; download its files "
                f"(hf download {name} --repo-type dataset --local-dir DIR) and give --train_file_dir DIR"
            ) from None
        if isinstance(error, ValueError) and ("Config name is missing" in reason or "not found" in reason):
            known = get_dataset_config_names(path)
            which = "it has no such configuration" if config else "it has several configurations"
            raise ValueError(f"{shown}: {which}; name one: {', '.join(f'{name}:{one}' for one in known)}") from None
        if type(error).__name__ == "DatasetNotFoundError":
            raise ValueError(
                f"{shown}: no such dataset on {_endpoint()}, or it is private or gated: mind the spelling "
                "(OWNER/NAME), or set the environment variable HF_TOKEN after asking for access on its page"
            ) from None
        raise ValueError(f"{shown}: its files cannot be told ({reason}); give --train_file_dir") from error
    if not found:  # known only from what load_dataset() once left in its cache
        raise ConnectionError(name)
    splits = {str(key): list(files) for key, files in found.items()}
    if split not in splits:
        raise ValueError(f"{shown}: it has no split {split!r}; known: {', '.join(splits)} (--dataset_split)")
    return splits[split]


def _files_of_folder(folder, name, config, split):
    real = folder.resolve()
    try:
        addresses = _resolve(str(real), name, config, split)
    except ConnectionError:
        raise ValueError(f"--dataset_name {name}: no data files in {folder}") from None
    files = [Path(os.path.normpath(address)) for address in addresses]  # links are kept: they bear the names
    for address, file in zip(addresses, files, strict=True):
        if not file.is_relative_to(real):
            raise ValueError(f"--dataset_name {name}: its README names {address}, which is not in {folder}")
    return [folder / file.relative_to(real) for file in files]


def _download(name, addresses, cache_dir):
    """Download files of a dataset of the Hugging Face hub; the paths at the commit that was found."""
    from huggingface_hub import snapshot_download

    matches = [_ADDRESS.fullmatch(address) for address in addresses]
    if not all(matches):
        foreign = addresses[matches.index(None)]
        raise ValueError(f"--dataset_name {name}: it consists of {foreign}; download that, give --train_file_dir")
    paths = [match[1] for match in matches]
    patterns = [*map(glob.escape, paths), "README.md"]
    try:
        root = snapshot_download(name, repo_type="dataset", cache_dir=cache_dir, allow_patterns=patterns)
    except Exception as error:  # of all kinds, as above
        raise _no_answer(name) from error
    files = [Path(root, path) for path in paths]
    missing = [path for path, file in zip(paths, files, strict=True) if not file.is_file()]
    if missing:
        raise ValueError(f"--dataset_name {name}: {missing[0]} could not be downloaded; start again")
    return files


def _downloaded(name, cache_dir):
    """The folder with what was downloaded of a dataset before, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        options = {"repo_type": "dataset", "cache_dir": cache_dir, "allow_patterns": ["README.md"]}
        return Path(snapshot_download(name, local_files_only=True, **options))
    except (OSError, HFValidationError):
        return None


def _fetch_from_modelscope(name, cache_dir):
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError:
        raise ValueError("--dataset_hub modelscope needs the package modelscope: pip install modelscope") from None
    try:
        return Path(dataset_snapshot_download(name, cache_dir=cache_dir))
    except Exception as error:  # of all kinds, as above
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--dataset_name {name}: ModelScope does not give it ({reason})") from error


def _endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _no_answer(name):
    return ValueError(
        f"--dataset_name {name}: it is no folder here, and the hub {_endpoint()} cannot be reached; three ways out: a "
        "mirror (HF_ENDPOINT=https://…), --dataset_hub modelscope, or local files (--train_file_dir)"
    )
