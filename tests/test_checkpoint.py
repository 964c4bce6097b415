"""A stage can be moved but not changed unnoticed; a checkpoint is whole or absent; no run deletes another."""

import json
import logging
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch

from stagekit.checkpoint import (
    Source,
    base_fingerprint,
    check_output_dir,
    file_sha256,
    find_checkpoint,
    list_checkpoints,
    mark_complete,
    prepare_output_dir,
    read_stage,
    relative,
    resolve,
    stage_fingerprint,
    verify_stage,
    why_incomplete,
    write_stage,
)


def write(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def make_model(directory, weights="weights"):
    write(directory / "config.json", "{}")
    write(directory / "model.safetensors", weights)
    write(directory / "tokenizer_config.json", "{}")
    return directory


def make_stage(directory, base, parent=None, name="sft", full=False):
    """A stage as the end of a run leaves it: an adapter (or weights), a tokenizer, a record."""
    if full:
        make_model(directory, "trained")
    else:
        write(directory / "adapter_model.safetensors", f"adapter {directory.name}")
        write(directory / "adapter_config.json", json.dumps({"base_model_name_or_path": str(base)}))
        write(directory / "tokenizer_config.json", "{}")
    record = {
        "format": 1,
        "stage": name,
        "base_model": {"name_or_path": relative(str(base), directory), "fingerprint": base_fingerprint(str(base))},
        "parent": None if parent is None else {"path": relative(str(parent), directory)},
        "metrics": {"after": {"loss": 1.25}},
    }
    write_stage(directory, record)
    return directory


@pytest.fixture
def outputs(tmp_path):
    """outputs/base and, on it, outputs/pt and outputs/sft."""
    base = make_model(tmp_path / "outputs" / "base")
    parent = make_stage(tmp_path / "outputs" / "pt", base, name="pt")
    make_stage(tmp_path / "outputs" / "sft", base, parent)
    return tmp_path / "outputs"


# -- stage.json ------------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(outputs):
    stage = read_stage(outputs / "sft")
    assert stage["stage"] == "sft" and stage["metrics"] == {"after": {"loss": 1.25}}
    assert sorted(stage["files"]) == ["adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"]
    assert stage["files"]["adapter_model.safetensors"] == (
        # printf 'adapter sft' | sha256sum
        "f32a87566e216fa183e85ab02e6122fe6e0495c3d32e7bfd223256feca3501ba"
    )
    assert not (outputs / "sft" / "stage.tmp").exists()
    verify_stage(outputs / "sft", stage)


def test_only_what_the_next_stage_reads_is_in_the_record(outputs):
    for name in ("curves.png", "notes.txt", "trainer_state.json", "checkpoint-5/adapter_model.safetensors"):
        write(outputs / "sft" / name)
    for name in (
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "vocab.json",
        "special_tokens_map.json",
    ):
        write(outputs / "sft" / name)
    write_stage(outputs / "sft", read_stage(outputs / "sft"))
    assert sorted(read_stage(outputs / "sft")["files"]) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_a_directory_without_a_record_has_none(tmp_path):
    assert read_stage(tmp_path) is None


@pytest.mark.parametrize(
    "text, message", [("{", "damaged"), ('{"format": 2}', "format 2 is not known here"), ("{}", "format None")]
)
def test_a_record_that_cannot_be_read_is_refused(tmp_path, text, message):
    write(tmp_path / "stage.json", text)
    with pytest.raises(ValueError, match=f"stage.json: {message}"):
        read_stage(tmp_path)


def test_a_file_that_was_changed_is_named(outputs):
    write(outputs / "sft" / "tokenizer_config.json", '{"a": 1}')
    with pytest.raises(ValueError, match=r"sft/tokenizer_config.json: changed after the stage was saved"):
        resolve(str(outputs / "sft"))
    resolve(str(outputs / "sft"), verify=False)


def test_a_file_that_is_missing_is_named(outputs):
    (outputs / "sft" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"sft/tokenizer_config.json: missing, though .*stage.json lists it"):
        resolve(str(outputs / "sft"))


def test_a_base_that_was_changed_is_named(outputs):
    write(outputs / "base" / "model.safetensors", "others")
    with pytest.raises(ValueError, match=r"outputs/base: its weights are not the ones that .*sft was trained on"):
        resolve(str(outputs / "sft"))


def test_hashes_are_sha256_of_the_contents(tmp_path):
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert file_sha256(write(tmp_path / "empty", "")) == empty
    same, other = make_model(tmp_path / "a"), make_model(tmp_path / "b")
    assert base_fingerprint(str(same)) == base_fingerprint(str(other))
    write(other / "README.md")
    assert base_fingerprint(str(same)) == base_fingerprint(str(other))
    write(other / "config.json", '{"rope": 1}')
    assert base_fingerprint(str(same)) != base_fingerprint(str(other))


def test_a_base_on_the_hub_is_known_by_its_name():
    assert base_fingerprint("nobody/has-this-model") == "name:nobody/has-this-model"


@pytest.mark.parametrize(("device", "named"), [("cpu", "cpu"), ("mps", "mps"), ("xpu", "xpu"), ("cuda", "Card 9")])
def test_a_run_records_its_device_and_a_command_that_can_be_run_again(device, named, tmp_path, monkeypatch):
    from stagekit.run import Run, stage_record

    argv = ["--train_file_dir", "my data/a.jsonl", "--system_prompt", 'It\'s $5; "stop".', "--run_name="]
    monkeypatch.setattr("sys.argv", ["/where/it/stands/supervised_finetuning.py", *argv])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card 9")
    args = SimpleNamespace(use_cpu=device == "cpu", device=torch.device(device), output_dir=str(tmp_path / "run"))
    args.seed, args.bf16, args.fp16 = 42, False, False
    run = Run("sft", Source(str(make_model(tmp_path / "base"))), args, {}, SimpleNamespace(outcomes={}))
    record = stage_record(run, SimpleNamespace(), {}, 0)
    assert record["hardware"]["device"] == named
    assert shlex.split(record["command"]) == ["python", "supervised_finetuning.py", *argv]


# -- the chain -------------------------------------------------------------------------------------------------------


def test_a_stage_leads_to_its_base_its_adapter_and_its_tokenizer(outputs):
    source = resolve(str(outputs / "sft"))
    assert source.base == str(outputs / "base")
    assert source.adapter == source.tokenizer == source.directory == str(outputs / "sft")
    assert source.stage["stage"] == "sft"


def test_outputs_can_be_moved_as_a_whole(outputs, tmp_path):
    assert read_stage(outputs / "sft")["base_model"]["name_or_path"] == "../base"
    assert read_stage(outputs / "sft")["parent"] == {"path": "../pt"}
    moved = tmp_path / "elsewhere" / "models"
    moved.parent.mkdir()
    shutil.move(outputs, moved)
    source = resolve(str(moved / "sft"))
    assert (source.base, source.adapter) == (str(moved / "base"), str(moved / "sft"))


def test_outputs_are_found_from_another_directory(outputs, monkeypatch):
    monkeypatch.chdir(outputs.parent)
    assert resolve("outputs/sft").base == "outputs/base"
    monkeypatch.chdir(outputs)
    assert resolve("sft").base == "base" and resolve("./sft").base == "base"


def test_a_base_that_stands_elsewhere_keeps_its_place(outputs, tmp_path):
    base = make_model(tmp_path / "models" / "base")
    make_stage(outputs / "dpo", base, outputs / "sft")
    assert read_stage(outputs / "dpo")["base_model"]["name_or_path"] == str(base)
    assert resolve(str(outputs / "dpo")).base == str(base)


def merge_parents(directory, *parents):
    """Note down in a stage's record, as a run with --new_adapter does, which adapters are merged into its base."""
    record = read_stage(directory)
    record["base_model"]["merged"] = [
        {"path": relative(str(parent), directory), "fingerprint": stage_fingerprint(read_stage(parent))}
        for parent in parents
    ]
    write_stage(directory, record)
    return directory


def test_adapters_that_were_merged_are_found_in_their_order(outputs):
    assert resolve(str(outputs / "sft")).merged == []
    make_stage(outputs / "rm", outputs / "base", outputs / "sft")
    merge_parents(outputs / "rm", outputs / "pt", outputs / "sft")
    assert [part["path"] for part in read_stage(outputs / "rm")["base_model"]["merged"]] == ["../pt", "../sft"]
    source = resolve(str(outputs / "rm"))
    assert (source.base, source.adapter) == (str(outputs / "base"), str(outputs / "rm"))
    assert source.merged == [str(outputs / "pt"), str(outputs / "sft")]
    beside = resolve(str(outputs / "base"), str(outputs / "rm"))  # with --peft_path, too
    assert beside.merged == source.merged


def test_merged_adapters_move_with_the_outputs(outputs, tmp_path):
    merge_parents(outputs / "sft", outputs / "pt")
    shutil.move(outputs, tmp_path / "moved")
    assert resolve(str(tmp_path / "moved" / "sft")).merged == [str(tmp_path / "moved" / "pt")]


def test_a_merged_adapter_that_stands_elsewhere_keeps_its_place(outputs, tmp_path):
    elsewhere = make_stage(tmp_path / "models" / "pt", outputs / "base", name="pt")
    merge_parents(outputs / "sft", elsewhere)
    assert read_stage(outputs / "sft")["base_model"]["merged"][0]["path"] == str(elsewhere)
    assert resolve(str(outputs / "sft")).merged == [str(elsewhere)]


@pytest.mark.parametrize("what", ["pt", "pt/stage.json"])
def test_a_merged_adapter_that_is_not_there_is_named(outputs, what):
    merge_parents(outputs / "sft", outputs / "pt")
    target = outputs / what
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    for verify in (True, False):
        with pytest.raises(FileNotFoundError) as refusal:
            resolve(str(outputs / "sft"), verify=verify)
        wanted = f"{outputs / 'pt'}: {outputs / 'sft'} was trained on a base with this adapter merged; it is not there"
        assert str(refusal.value) == wanted


def test_a_merged_adapter_whose_file_was_changed_is_named(outputs):
    merge_parents(outputs / "sft", outputs / "pt")
    write(outputs / "pt" / "adapter_model.safetensors", "changed")
    with pytest.raises(ValueError, match=r"pt/adapter_model.safetensors: changed after the stage was saved"):
        resolve(str(outputs / "sft"))
    assert resolve(str(outputs / "sft"), verify=False).merged == [str(outputs / "pt")]


def test_a_merged_adapter_that_was_trained_again_is_another_one(outputs):
    """Its files agree with its own record, but not with what was merged."""
    merge_parents(outputs / "sft", outputs / "pt")
    write(outputs / "pt" / "adapter_model.safetensors", "trained again")
    write_stage(outputs / "pt", read_stage(outputs / "pt"))
    verify_stage(outputs / "pt", read_stage(outputs / "pt"))
    with pytest.raises(ValueError) as refusal:
        resolve(str(outputs / "sft"))
    assert str(refusal.value) == (
        f"{outputs / 'pt'}: not the stage that {outputs / 'sft'} was trained on (its fingerprint differs)"
    )


def test_a_hub_name_is_not_taken_for_a_path(tmp_path):
    assert relative("Qwen/Qwen3-0.6B", tmp_path) == "Qwen/Qwen3-0.6B"
    source = resolve("Qwen/Qwen3-0.6B")
    assert (source.base, source.tokenizer, source.adapter, source.stage) == (
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-0.6B",
        None,
        None,
    )


def test_a_stage_of_full_weights_is_its_own_base(outputs):
    make_stage(outputs / "full", outputs / "base", full=True)
    source = resolve(str(outputs / "full"))
    assert source.base == source.tokenizer == source.directory == str(outputs / "full") and source.adapter is None
    write(outputs / "full" / "model.safetensors", "changed")
    with pytest.raises(ValueError, match="full/model.safetensors: changed after"):
        resolve(str(outputs / "full"))


def test_a_plain_model_and_a_plain_adapter_need_no_record(outputs, tmp_path):
    source = resolve(str(outputs / "base"))
    assert (source.base, source.adapter, source.stage) == (str(outputs / "base"), None, None)
    plain = tmp_path / "plain"
    write(plain / "adapter_model.safetensors")
    write(plain / "adapter_config.json", json.dumps({"base_model_name_or_path": str(outputs / "base")}))
    source = resolve(str(plain))
    assert (source.base, source.adapter, source.tokenizer) == (
        str(outputs / "base"),
        str(plain),
        str(outputs / "base"),
    )


def test_an_adapter_beside_its_own_base_is_taken(outputs, tmp_path):
    copy = make_model(tmp_path / "copy")  # the same contents in another place are the same base
    for base in (outputs / "base", copy):
        source = resolve(str(base), str(outputs / "sft"))
        assert (source.base, source.adapter, source.stage["stage"]) == (str(base), str(outputs / "sft"), "sft")


def test_an_adapter_on_another_base_is_refused_by_name(outputs, tmp_path):
    other = make_model(tmp_path / "other", "other weights")
    with pytest.raises(ValueError) as refusal:
        resolve(str(other), str(outputs / "sft"))
    assert str(refusal.value) == f"adapter {outputs / 'sft'} was trained on {outputs / 'base'}, not on {other}"
    plain = tmp_path / "plain"  # also where only PEFT's own file says what it was trained on
    write(plain / "adapter_model.safetensors")
    write(plain / "adapter_config.json", json.dumps({"base_model_name_or_path": str(outputs / "base")}))
    with pytest.raises(ValueError, match="was trained on .*base, not on .*other"):
        resolve(str(other), str(plain))


def test_an_adapter_on_an_adapter_is_refused(outputs):
    with pytest.raises(ValueError, match="is itself an adapter on .*base"):
        resolve(str(outputs / "pt"), str(outputs / "sft"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c"])
def test_a_directory_that_does_not_exist_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such model directory"):
        resolve(name)


def test_a_directory_without_weights_is_refused(tmp_path):
    write(tmp_path / "run" / "config.json", "{}")
    with pytest.raises(ValueError, match="run: no weights in this directory"):
        resolve(str(tmp_path / "run"))
    write(tmp_path / "run" / "checkpoint-20" / "adapter_config.json")
    with pytest.raises(ValueError, match="it holds checkpoint-20 of an unfinished run"):
        resolve(str(tmp_path / "run"))


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_is_refused(outputs, missing):
    (outputs / "sft" / missing).unlink()
    with pytest.raises(ValueError, match=f"not an adapter directory, {missing} is missing"):
        resolve(str(outputs / "base"), str(outputs / "sft"))


def test_an_adapter_that_does_not_say_its_base_is_refused(tmp_path):
    write(tmp_path / "a" / "adapter_model.safetensors")
    write(tmp_path / "a" / "adapter_config.json", "{}")
    with pytest.raises(ValueError, match="adapter_config.json: does not say on which base model"):
        resolve(str(tmp_path / "a"))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def make_checkpoint(directory, step):
    path = directory / f"checkpoint-{step}"
    write(path / "adapter_model.safetensors", "weights" * 10)
    write(path / "optimizer.pt", "state" * 10)
    write(path / "global_step5" / "rank0.pt", "part")
    mark_complete(path)
    return path


def damage(path, how):
    if how == "truncated":
        write(path / "optimizer.pt", "state")
    elif how == "file missing":
        (path / "global_step5" / "rank0.pt").unlink()
    elif how == "marker missing":
        (path / "complete.json").unlink()
    else:
        write(path / "complete.json", '{"optimizer.pt": ')


DAMAGES = [
    ("truncated", "optimizer.pt has 5 bytes instead of 50"),
    ("file missing", "global_step5/rank0.pt is missing"),
    ("marker missing", "complete.json is missing, so saving was interrupted"),
    ("marker cut", "complete.json is missing, so saving was interrupted"),
]


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    for step in (5, 90, 100):
        make_checkpoint(tmp_path, step)
    write(tmp_path / "checkpoint-best" / "x")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-90", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "True") == str(tmp_path / "checkpoint-100")
    assert why_incomplete(tmp_path / "checkpoint-100") is None


@pytest.mark.parametrize("how, reason", DAMAGES)
def test_an_incomplete_checkpoint_is_passed_over_aloud(tmp_path, caplog, how, reason):
    for step in (5, 90):
        make_checkpoint(tmp_path, step)
    damage(tmp_path / "checkpoint-90", how)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, "true") == str(tmp_path / "checkpoint-5")
    assert f"checkpoint-90 is ignored: incomplete checkpoint ({reason})" in caplog.text


@pytest.mark.parametrize("how, reason", DAMAGES)
def test_an_incomplete_checkpoint_that_was_named_is_refused(tmp_path, how, reason):
    path = make_checkpoint(tmp_path, 5)
    assert find_checkpoint(tmp_path, str(path)) == str(path)
    damage(path, how)
    with pytest.raises(ValueError) as refusal:
        find_checkpoint(tmp_path, str(path))
    assert reason in str(refusal.value)


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(tmp_path):
    damage(make_checkpoint(tmp_path, 5), "marker missing")
    with pytest.raises(ValueError, match="no complete checkpoint in .*; start without the flag"):
        find_checkpoint(tmp_path, "True")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("wanted", [None, "False", "false", ""])
def test_nobody_resumes_unasked(tmp_path, wanted):
    make_checkpoint(tmp_path, 5)
    assert find_checkpoint(tmp_path, wanted) is None


# -- the output directory --------------------------------------------------------------------------------------------


def test_a_fresh_directory_is_made(tmp_path):
    prepare_output_dir(tmp_path / "a" / "b", overwrite=False, resume=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    write(tmp_path / "a" / "b" / "notes.txt")
    prepare_output_dir(tmp_path / "a" / "b", overwrite=False, resume=False)  # what is no run does not disturb


def test_a_finished_run_is_moved_aside(outputs, caplog):
    for number in (1, 2):
        prepare_output_dir(outputs / "sft", overwrite=False, resume=False)
        assert list((outputs / "sft").iterdir()) == []
        assert resolve(str(outputs / f"sft.{number}")).base == str(outputs / "base")  # and can be used from there
        assert f"sft held a finished run; it is kept as {outputs / f'sft.{number}'}" in caplog.text
        make_stage(outputs / "sft", outputs / "base")


def tree(directory):
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


def test_looking_at_a_directory_changes_nothing(outputs, tmp_path):
    before = tree(tmp_path)
    for overwrite in (False, True):
        check_output_dir(outputs / "sft", overwrite, False, resolve(str(outputs / "pt")))
        check_output_dir(tmp_path / "new" / "run", overwrite, False, resolve(str(outputs / "pt")))
    assert tree(tmp_path) == before


def test_an_interrupted_run_is_neither_lost_nor_mixed_up(tmp_path):
    make_checkpoint(tmp_path / "run", 40)
    before, source = tree(tmp_path), Source("base")
    with pytest.raises(ValueError) as refusal:
        check_output_dir(tmp_path / "run", False, False, source)
    assert "holds checkpoint-40 of an interrupted run" in str(refusal.value)
    assert "--resume_from_checkpoint True" in str(refusal.value) and "--overwrite_output_dir" in str(refusal.value)
    for overwrite in (False, True):  # resuming wins: otherwise there would be nothing to resume from
        check_output_dir(tmp_path / "run", overwrite, True, source)
        prepare_output_dir(tmp_path / "run", overwrite, True)
    assert tree(tmp_path) == before
    check_output_dir(tmp_path / "run", True, False, source)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_does_not_write_where_it_starts_from(outputs, overwrite):
    make_stage(outputs / "full", outputs / "base", full=True)
    for name in ("sft", "full"):
        with pytest.raises(ValueError, match=f"--output_dir .*{name} is what the run starts from"):
            check_output_dir(outputs / name, overwrite, False, resolve(str(outputs / name)))
        with pytest.raises(ValueError, match="is what the run starts from"):
            check_output_dir(outputs / "pt" / ".." / name, overwrite, False, resolve(str(outputs / name)))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_does_not_write_where_an_adapter_stands_that_it_merges(outputs, overwrite):
    merge_parents(outputs / "sft", outputs / "pt")
    source = resolve(str(outputs / "sft"))
    with pytest.raises(ValueError, match="--output_dir .*pt is what the run starts from"):
        check_output_dir(outputs / "pt", overwrite, False, source)
    check_output_dir(outputs / "rm", overwrite, False, source)


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(outputs):
    run = outputs / "sft"
    make_checkpoint(run, 5)
    write(run / "checkpoint-half" / "weights")
    for name in ("runs/events", ".saving/x", "curves.png", "trainer_state.json", "seen_prompts.npy", "README.md"):
        write(run / name)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"):
        write(run / name)
    mine = ["notes.txt", "data/train.jsonl", "plots/runs/loss.png", "my_model.safetensors", ".env"]
    for name in mine:
        write(run / name, "mine")
    prepare_output_dir(run, overwrite=True, resume=False)
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert left == sorted(mine) and all((run / name).read_text() == "mine" for name in mine)
    assert not (outputs / "sft.1").exists() and (outputs / "pt" / "stage.json").is_file()


def test_a_checkpoint_that_was_being_written_is_removed(tmp_path, caplog):
    write(tmp_path / "run" / ".saving" / "checkpoint-5" / "weights")
    make_checkpoint(tmp_path / "run", 4)
    prepare_output_dir(tmp_path / "run", overwrite=False, resume=True)
    assert not (tmp_path / "run" / ".saving").exists() and (tmp_path / "run" / "checkpoint-4").is_dir()
    assert "is removed: a checkpoint that was being written" in caplog.text


@pytest.mark.parametrize("below", ["run", "run/sft"])
def test_a_file_in_place_of_the_directory_is_refused(tmp_path, below):
    write(tmp_path / "run")
    with pytest.raises(ValueError, match="--output_dir .* cannot be written .*run is no directory"):
        check_output_dir(tmp_path / below, True, False, Source("base"))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs the tests may be root
    with pytest.raises(ValueError, match="cannot be written .*read-only"):
        check_output_dir(tmp_path / "run", False, False, Source("base"))
