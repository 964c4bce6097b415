"""A dataset's name, configuration and split become local files under their own names; what fails is told in a line."""

import gzip
import json
import os
import re
import sys
import types

import datasets
import huggingface_hub
import pytest
from conftest import run_script

from stagekit import hub
from stagekit.files import read_records
from stagekit.hub import fetch_dataset

ROW = '{"text": "first", "parts": null}\n'
README = """---
configs:
- config_name: zh
  data_files:
  - split: train
    path: zh/*.jsonl
  - split: test
    path: zh_test.jsonl.gz
- config_name: en
  data_files: en.jsonl
{default}---
# A dataset
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The libraries leave locks in their caches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))


def fill(folder, default=""):
    """Write a dataset repository with two configurations."""
    contents = {"README.md": README.replace("{default}", default).encode(), "notes.txt": b"no data"}
    contents |= dict.fromkeys(("zh/b.jsonl", "zh/a.jsonl", "en.jsonl"), ROW.encode())
    for name, content in {**contents, "zh_test.jsonl.gz": gzip.compress(ROW.encode())}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def refusal(*args, **options):
    with pytest.raises(ValueError) as error:
        fetch_dataset(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- folders ---------------------------------------------------------------------------------------------------------


def test_configuration_and_split_say_which_files_of_a_folder_are_meant(tmp_path, monkeypatch):
    fill(tmp_path / "sets/medical")
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in fetch_dataset("sets/medical:zh")] == [
        "sets/medical/zh/a.jsonl",
        "sets/medical/zh/b.jsonl",
    ]
    (path,) = fetch_dataset("sets/medical:zh", split="test")
    assert str(path) == "sets/medical/zh_test.jsonl.gz"
    assert list(read_records(path)) == [({"text": "first", "parts": None}, 1)]
    assert fetch_dataset(str(tmp_path / "sets/medical:en")) == [tmp_path / "sets/medical/en.jsonl"]


def test_without_a_configuration_the_default_is_taken_or_the_names_are_said(tmp_path):
    many = fill(tmp_path / "many")
    assert (
        refusal(str(many)) == f"--dataset_name {many}: it has several configurations; name one: {many}:zh, {many}:en"
    )
    known = f"it has no such configuration; name one: {many}:zh, {many}:en"
    assert refusal(f"{many}:fr") == f"--dataset_name {many}:fr: {known}"
    one = fill(tmp_path / "one", default="  default: true\n")
    assert fetch_dataset(str(one)) == [one / "en.jsonl"]


def test_a_split_the_dataset_does_not_have_is_said_with_those_it_has(tmp_path):
    folder = fill(tmp_path / "medical")
    assert refusal(f"{folder}:zh", split="dev") == (
        f"--dataset_name {folder}:zh: it has no split 'dev'; known: train, test (--dataset_split)"
    )


def test_a_folder_without_a_readme_is_split_by_the_names_of_its_files(tmp_path):
    for name in ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"):
        path = tmp_path / "plain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROW)
    assert fetch_dataset(str(tmp_path / "plain")) == [tmp_path / "plain/data/train-00000-of-00001.jsonl"]
    assert fetch_dataset(str(tmp_path / "plain"), "test") == [tmp_path / "plain/data/test-00000-of-00001.jsonl"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"a": None}, {"a": "x"}, {"a": [1]}, {"b": {"c": 1}}],
        [{"value": "text"}, {"value": {"struct": 1}}],
    ],
)
def test_rows_that_no_column_of_arrow_can_hold_are_read_as_they_are(tmp_path, rows):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/train.json").write_text(json.dumps(rows))
    (path,) = fetch_dataset(str(tmp_path / "mixed"))
    assert [record for record, _ in read_records(path)] == rows


def test_a_folder_named_like_a_format_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json").mkdir()
    (tmp_path / "json/train.jsonl").write_text(ROW)
    (tmp_path / "train.jsonl").write_text(ROW)  # which the format of this name would take
    assert [str(path) for path in fetch_dataset("json")] == ["json/train.jsonl"]


def test_a_dataset_that_a_script_makes_is_to_be_downloaded_by_hand(tmp_path):
    folder = tmp_path / "medical"
    folder.mkdir()
    (folder / "medical.py").write_text("raise SystemExit('this must not run')")
    (folder / "train.jsonl").write_text(ROW)
    said = refusal(str(folder))
    assert said.startswith(f"--dataset_name {folder}: a Python script makes this dataset, and scripts are not run")
    assert said.endswith("and give --train_file_dir DIR")


def test_a_folder_without_data_and_one_with_a_broken_readme_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refusal(str(tmp_path / "empty")).startswith(f"--dataset_name {tmp_path}/empty: its files cannot be told (")
    broken = fill(tmp_path / "broken")
    (broken / "README.md").write_text("---\nconfigs: [\n---\n")
    assert refusal(str(broken)).startswith(f"--dataset_name {broken}: its files cannot be told (")


def test_a_readme_that_leads_out_of_the_folder_is_refused(tmp_path):
    folder = fill(tmp_path / "medical")
    (tmp_path / "other.jsonl").write_text(ROW)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: ../other.jsonl\n---\n")
    assert "which is not in" in refusal(str(folder))


# -- the Hugging Face hub --------------------------------------------------------------------------------------------


def test_a_hub_that_cannot_be_reached_is_told_with_three_ways_out(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert refusal("someone/medical:zh") == (
        "--dataset_name someone/medical: it is no folder here, and the hub https://huggingface.co cannot be reached; "
        "three ways out: a mirror (HF_ENDPOINT=https://…), --dataset_hub modelscope, or local files (--train_file_dir)"
    )
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert "the hub https://mirror.example cannot be reached" in refusal("someone/medical")


@pytest.mark.parametrize("given", ["cache_dir", None])
def test_what_was_downloaded_before_is_used_when_the_hub_cannot_be_reached(tmp_path, caplog, given):
    cache = tmp_path / ("elsewhere" if given else "hub_cache")
    repository = cache / "datasets--someone--medical"
    snapshot = fill(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    found = fetch_dataset("someone/medical:zh", cache_dir=str(cache) if given else None)
    assert found == [snapshot / "zh/a.jsonl", snapshot / "zh/b.jsonl"]
    assert "the hub cannot be reached; using what was downloaded before" in caplog.text


def test_a_stage_looks_for_datasets_where_its_downloads_are_kept(tiny_qwen3, tmp_path):
    """Offline, with what an earlier run left in --cache_dir; measured only, which leaves nothing where it is run."""
    repository, work = tmp_path / "cache" / "datasets--someone--medical", tmp_path / "work"
    fill(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    work.mkdir()
    (tmp_path / "held_out.txt").write_text("second")
    flags = ("--dataset_name", "someone/medical:zh", "--model_name_or_path", tiny_qwen3, "--block_size", "64")
    flags += ("--validation_file_dir", tmp_path / "held_out.txt", "--output_dir", tmp_path / "pt", "--use_cpu", "True")
    homes = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets_cache")}
    given = ("--cache_dir", tmp_path / "cache", "--do_eval")
    found = run_script("pretraining.py", *flags, *given, cwd=work, env=homes)
    assert "using what was downloaded before" in found.stderr and re.search(r"rows read +2\n", found.stderr)
    assert list(work.iterdir()) == []
    refused = run_script("pretraining.py", *flags, cwd=work, env={**homes, "HF_HOME": str(tmp_path)}, check=False)
    assert refused.returncode == 2 and "the hub https://huggingface.co cannot be reached" in refused.stderr


def test_the_files_of_a_split_are_downloaded_and_no_others(tmp_path, monkeypatch):
    """The hub is played: its listing through load_dataset_builder, its files through snapshot_download."""
    asked = {}
    listed = [f"hf://datasets/someone/medical@{COMMIT}/zh/{name}" for name in ("b[1].jsonl", "a.jsonl")]

    def load_dataset_builder(path, name):
        asked["builder"] = (path, name)
        files = {datasets.Split.TRAIN: listed, datasets.Split.TEST: ["x"]}
        return types.SimpleNamespace(config=types.SimpleNamespace(data_files=files))

    def snapshot_download(name, **options):
        asked["download"] = (name, options)
        for path in ("zh/b[1].jsonl", "zh/a.jsonl"):
            (tmp_path / "snapshot/zh").mkdir(parents=True, exist_ok=True)
            (tmp_path / "snapshot" / path).write_text(ROW)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = fetch_dataset("someone/medical:zh", cache_dir="c")
    assert found == [tmp_path / "snapshot/zh/b[1].jsonl", tmp_path / "snapshot/zh/a.jsonl"]
    assert asked["builder"] == ("someone/medical", "zh")
    name, options = asked["download"]
    assert (name, options["repo_type"], options["cache_dir"]) == ("someone/medical", "dataset", "c")
    kept = huggingface_hub.utils.filter_repo_objects(
        ["zh/a.jsonl", "zh/b[1].jsonl", "zh/b1.jsonl", "zh/c.jsonl", "README.md"],
        allow_patterns=options["allow_patterns"],
    )
    assert list(kept) == ["zh/a.jsonl", "zh/b[1].jsonl", "README.md"]
    listed[:] = ["https://elsewhere.example/a.jsonl"]
    assert "it consists of https://elsewhere.example/a.jsonl; download that" in refusal("someone/medical:zh")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (datasets.exceptions.DatasetNotFoundError("x doesn't exist\non the Hub"), "no such dataset on https://"),
        (RuntimeError("Dataset scripts are no longer supported, but found medical.py"), "a Python script makes this"),
        (OSError("500 Server Error\nand more"), "its files cannot be told (500 Server Error); give --train_file_dir"),
        (KeyError(), "its files cannot be told (KeyError); give --train_file_dir"),
        (ConnectionError("Couldn't reach"), "cannot be reached; three ways out"),
    ],
)
def test_whatever_the_hub_answers_becomes_one_line(monkeypatch, error, said):
    def fail(*args):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    assert said in refusal("someone/medical")


def test_a_download_that_breaks_off_is_one_line(monkeypatch):
    def fail(*args, **options):
        raise OSError("connection lost\nat byte 7")

    monkeypatch.setattr(hub, "_resolve", lambda *args: [f"hf://datasets/someone/medical@{COMMIT}/a.jsonl"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "cannot be reached; three ways out" in refusal("someone/medical")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: os.curdir)
    assert refusal("someone/medical").endswith("a.jsonl could not be downloaded; start again")


# -- ModelScope ------------------------------------------------------------------------------------------------------


def test_modelscope_downloads_a_repository_whose_readme_is_followed(tmp_path, monkeypatch):
    folder, asked = fill(tmp_path / "medical"), []

    def dataset_snapshot_download(dataset_id, cache_dir=None):
        asked.append((dataset_id, cache_dir))
        return str(folder)

    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("modelscope.hub.snapshot_download")
    module.dataset_snapshot_download = dataset_snapshot_download
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = fetch_dataset("someone/medical:zh", hub="modelscope", cache_dir="c")
    assert found == [folder / "zh/a.jsonl", folder / "zh/b.jsonl"] and asked == [("someone/medical", "c")]

    def fail(*args, **options):
        raise RuntimeError("no such dataset\nhere")

    module.dataset_snapshot_download = fail
    assert refusal("x/y", hub="modelscope") == "--dataset_name x/y: ModelScope does not give it (no such dataset)"


def test_modelscope_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert refusal("x/y", hub="modelscope") == (
        "--dataset_hub modelscope needs the package modelscope: pip install modelscope"
    )
