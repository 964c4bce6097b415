"""scripts/vllm_deployment.sh and tools/vllm_command.py: what vLLM is told about a stage, and what it is not asked."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_scripts import READ, SHELLS, write_program

from stagekit.checkpoint import base_fingerprint, write_stage
from tools.vllm_command import main, parse_args

SCRIPT = ROOT / "scripts/vllm_deployment.sh"
LORA = {
    **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "bias": "none", "use_dora": False},
    **{"modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True},
    **{"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "outputs/base"},
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.fixture
def base(tmp_path):
    """A directory that looks like a model."""
    write(tmp_path / "outputs/base/config.json", {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"})
    write(tmp_path / "outputs/base/model.safetensors", "weights")
    return tmp_path / "outputs/base"


def write_adapter(base, name="sft", adapter=None, base_model=None, tuning=None):
    """A stage directory with an adapter, as supervised_finetuning.py leaves it."""
    directory = base.parent / name
    write(directory / "adapter_config.json", {**LORA, **(adapter or {})})
    write(directory / "adapter_model.safetensors", "weights")
    write(directory / "tokenizer_config.json", {})
    write(directory / "chat_template.jinja", "{{ messages }}")
    write(directory / "generation_config.json", {"eos_token_id": [2, 0], "max_new_tokens": 512})
    trained = {"name_or_path": f"../{base.name}", "revision": None, "fingerprint": base_fingerprint(str(base))}
    stage = {"format": 1, "stage": "sft", "base_model": {**trained, **(base_model or {})}, "parent": None}
    write_stage(directory, {**stage, "tuning": tuning or {"method": "lora"}})
    return directory


def arguments(capsys, directory, *more):
    """(arguments, notes) that the tool prints."""
    main(parse_args([str(directory), *more]))
    printed = capsys.readouterr()
    return printed.out.splitlines(), printed.err


def value(words, flag):
    return words[words.index(flag) + 1]


# -- what vLLM is told -----------------------------------------------------------------------------------------------


def test_an_adapter_is_served_on_its_base_under_its_own_name(base, capsys):
    sft = write_adapter(base)
    words, notes = arguments(capsys, sft)
    assert words == [
        *("serve", str(base), "--served-model-name", "base"),
        *("--enable-lora", "--lora-modules", f"sft={sft}", "--max-lora-rank", "16"),
        *("--tokenizer", str(sft), "--chat-template", f"{sft}/chat_template.jinja"),
        *("--generation-config", str(sft), "--override-generation-config", '{"max_new_tokens": null}'),
        *("--dtype", "auto", "--max-model-len", "auto", "--host", "127.0.0.1", "--port", "8000"),
    ]
    assert notes == "vllm_command: requests call the trained model 'sft', and its base 'base'\n"


def test_whole_weights_are_served_as_they_are(base, capsys):
    write(base / "chat_template.jinja", "{{ messages }}")
    write(base / "generation_config.json", {"eos_token_id": 2})
    words, notes = arguments(capsys, base)
    assert words == [
        *("serve", str(base), "--served-model-name", "base", "--chat-template", f"{base}/chat_template.jinja"),
        *("--generation-config", str(base), "--dtype", "auto", "--max-model-len", "auto"),
        *("--host", "127.0.0.1", "--port", "8000"),
    ]
    assert "requests call the model 'base'" in notes


@pytest.mark.parametrize(
    ("rank", "served"),
    [(1, "1"), (2, "8"), (8, "8"), (17, "32"), (129, "256"), (257, "320"), (321, "512"), (512, "512")],
)
def test_the_rank_is_rounded_up_to_one_that_vllm_takes(rank, served, base, capsys):
    assert value(arguments(capsys, write_adapter(base, adapter={"r": rank}))[0], "--max-lora-rank") == served


def test_an_adapter_that_peft_wrote_is_understood(tiny_qwen3, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    lora = LoraConfig(task_type="CAUSAL_LM", r=12, target_modules="all-linear", use_rslora=True)
    get_peft_model(model, lora).save_pretrained(tmp_path / "mine")
    words, notes = arguments(capsys, tmp_path / "mine")  # without stage.json: the base stands in adapter_config.json
    assert words[1] == str(tiny_qwen3) and value(words, "--lora-modules") == f"mine={tmp_path}/mine"
    assert value(words, "--max-lora-rank") == "16" and value(words, "--dtype") == "bfloat16"  # of a base in fp32
    assert not {"--tokenizer", "--chat-template", "--generation-config"} & set(words)
    assert "no chat template of its own" in notes


def test_a_base_from_the_hub_keeps_its_name_and_revision(base, capsys):
    hub = {"name_or_path": "Qwen/Qwen3-0.6B", "revision": "abc123", "fingerprint": "name:Qwen/Qwen3-0.6B"}
    words, _ = arguments(capsys, write_adapter(base, base_model=hub))
    assert words[:6] == ["serve", "Qwen/Qwen3-0.6B", "--revision", "abc123", "--served-model-name", "Qwen/Qwen3-0.6B"]


def test_two_models_never_have_one_name_and_odd_paths_are_written_as_json(tmp_path, base, capsys):
    odd = shutil.copytree(base, tmp_path / "lr=1e-4,r=8/sft")
    directory = write_adapter(odd, name="runs")
    twin = directory.parent / "deeper" / "sft"
    shutil.copytree(directory, twin)
    (twin / "stage.json").unlink()
    write(twin / "adapter_config.json", {**LORA, "base_model_name_or_path": str(odd)})
    words, _ = arguments(capsys, twin)
    assert value(words, "--served-model-name") == "sft-base"
    assert json.loads(value(words, "--lora-modules")) == {"name": "sft", "path": str(twin)}


def test_positions_stretched_in_training_are_stretched_in_serving(base, capsys):
    positions = {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 4096}
    words, _ = arguments(capsys, write_adapter(base, base_model=positions))
    assert json.loads(value(words, "--hf-overrides")) == positions


def test_a_quantised_base_is_noted(base, capsys):
    _, notes = arguments(capsys, write_adapter(base, tuning={"method": "qlora"}))
    assert "vLLM puts the adapter on the original weights, so answers can differ a little" in notes


def test_more_arguments_come_last_whatever_they_look_like(base, capsys):
    more = ["--port", "8001", "--hf-overrides", '{"a": "b c"}', "-tp", "2", "--help"]
    assert arguments(capsys, write_adapter(base), *more)[0][-7:] == more


# -- what vLLM cannot do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"modules_to_save": ["embed_tokens", "model.embed_tokens"]}, "embed_tokens was trained whole"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "embed_tokens, lm_head was trained whole"),
        ({"trainable_token_indices": [5, 6]}, "rows of the embedding were trained"),
        ({"use_dora": True}, "vLLM has no DoRA"),
        ({"bias": "lora_only"}, "biases were trained"),
        ({"lora_bias": True}, "biases were trained"),
        ({"rank_pattern": {"q_proj": 4}}, "vLLM scales all modules alike"),
        ({"alpha_pattern": {"q_proj": 4}}, "vLLM scales all modules alike"),
        ({"r": 513}, "its rank 513 is above 512"),
        ({"init_lora_weights": "pissa_niter_4"}, "its start changed the base"),
        ({"peft_type": "IA3"}, "it is no LoRA adapter (IA3)"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_with_the_way_out(adapter, reason, base):
    sft = write_adapter(base, adapter=adapter)
    with pytest.raises(ValueError) as raised:
        main(parse_args([f"{sft}/"]))
    message = str(raised.value)
    assert f"vLLM cannot serve this adapter on its base: {reason}" in message and "\n" not in message
    assert message.endswith(f"python -m tools.merge_adapter --lora_model {sft}/ --output_dir {sft}-merged")


def test_an_adapter_on_a_merged_chain_is_refused(base):
    from stagekit.checkpoint import read_stage, stage_fingerprint

    first = write_adapter(base, name="pt")
    merged = [{"path": "../pt", "fingerprint": stage_fingerprint(read_stage(first))}]
    with pytest.raises(ValueError, match="other adapters merged into it.*python -m tools.merge_adapter"):
        main(parse_args([str(write_adapter(base, base_model={"merged": merged}))]))


def test_reward_models_are_refused_without_sending_anybody_to_the_merge_tool(base):
    reward = write_adapter(base, name="rm", adapter={"task_type": "SEQ_CLS", "modules_to_save": ["score"]})
    write(base / "config.json", {"architectures": ["Qwen3ForSequenceClassification"]})
    (reward / "stage.json").unlink()
    for directory in (reward, base):
        with pytest.raises(ValueError, match="is a reward model: it scores answers") as raised:
            main(parse_args([str(directory)]))
        assert "merge" not in str(raised.value)


def test_directories_that_are_no_models_are_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory; name what a stage wrote"):
        main(parse_args([str(tmp_path / "nothing")]))
    with pytest.raises(ValueError, match="no weights in this directory"):
        main(parse_args([str(tmp_path)]))
    sft = write_adapter(base)
    write(base / "model.safetensors", "other weights")
    with pytest.raises(ValueError, match="fingerprint differs"):
        main(parse_args([str(sft)]))
    shutil.rmtree(base)
    with pytest.raises(FileNotFoundError, match=f"^{sft} was trained on {base}, which is not there$"):
        main(parse_args([str(sft)]))


def test_a_line_break_in_an_argument_is_refused(base):
    with pytest.raises(ValueError, match="line break"):
        main(parse_args([str(write_adapter(base)), "--x", "a\nb"]))


def test_debug_before_the_directory_shows_the_traceback(tmp_path):
    command = [sys.executable, "-m", "tools.vllm_command"]
    for words, shown in ((["nothing"], False), (["--debug", "nothing"], True), (["nothing", "--debug"], False)):
        result = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2 and ("Traceback" in result.stderr) == shown
        assert result.stderr.splitlines()[-1].startswith("vllm_command: error: nothing: no such directory")


# -- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    """Run the script with a shell, from another directory, on a machine without GPU."""
    write_program(tmp_path / "bin/nvidia-smi", "exit 9\n")

    def run(*words, shell="sh", **variables):
        environment = {name: found for name, found in os.environ.items() if name not in (*READ, "VLLM")}
        environment |= {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable}
        command = [shell, SCRIPT, *words]
        return subprocess.run(command, env={**environment, **variables}, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("shell", SHELLS)
def test_a_dry_run_prints_the_command_one_argument_a_line(shell, base, start, capsys):
    sft = write_adapter(base, name="my sft")
    more = ["--port", "8001", "--api-key", '$HOME `x` "y"', "--empty", "", "  blanks  ", "back\\slash\\", "*"]
    result = start(sft, *more, shell=shell, DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["vllm", *arguments(capsys, sft)[0], *more]
    assert "requests call the trained model 'my sft'" in result.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_vllm_gets_these_arguments_unchanged(shell, base, start, tmp_path, capsys):
    sft, seen = write_adapter(base, name="my sft"), tmp_path / "seen"
    vllm = write_program(tmp_path / "env/vllm", f'for word; do printf "%s\\n" "$word"; done >"{seen}"\nexit 7\n')
    result = start(sft, "--note", "two words", shell=shell, VLLM=str(vllm))
    assert result.returncode == 7, result.stderr  # the script becomes vLLM
    assert seen.read_text().splitlines() == [*arguments(capsys, sft)[0], "--note", "two words"]


def test_what_is_missing_is_said_in_a_line_with_exit_code_2(base, start):
    sft = write_adapter(base)
    refused = write_adapter(base, name="dora", adapter={"use_dora": True})
    for words, variables, message in (
        ([], {}, "the first argument is a stage directory"),
        (["--port", "1"], {}, "the first argument is a stage directory"),
        ([refused], {"DRY_RUN": "1"}, "vLLM has no DoRA. Merge it into one model"),
        (["no/such/stage"], {}, "no/such/stage: no such directory"),
        ([sft], {"VLLM": "no-such-vllm"}, "no-such-vllm is not there: pip install 'vllm>="),
    ):
        result = start(*words, **variables)
        assert result.returncode == 2 and result.stdout == ""
        assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
