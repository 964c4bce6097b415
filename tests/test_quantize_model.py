"""Quantising: reloaded by inference's functions, perplexity by hand, llama.cpp's programs called as they ask."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, build_model, stage_of, write_jsonl
from test_merge_adapter import answers, write_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from stagekit import export
from stagekit.checkpoint import base_fingerprint, resolve, write_stage
from stagekit.commandline import run
from stagekit.seen_prompts import SEEN_PROMPTS
from tools import quantize_model as tool
from tools.quantize_model import find_programs, main, parse_args, read_texts

TEXTS = ["What is a fever? Drink water and rest.", "发烧是体温升高，要多喝水、多休息。"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A merged model as a stage leaves it, and texts."""
    root = tmp_path_factory.mktemp("quantize")
    build_model(root / "merged")
    (root / "merged" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "pad_token_id": 3}))
    np.save(root / "merged" / SEEN_PROMPTS, np.arange(3, dtype=np.uint64))
    base = {"name_or_path": ".", "revision": None, "fingerprint": base_fingerprint(str(root / "merged"))}
    write_stage(root / "merged", {"format": 1, "stage": "merge", "base_model": base, "parent": None, "seed": 1})
    write_jsonl(root / "texts.jsonl", [{"text": text} for text in TEXTS])
    return root


def flags_for(outputs, target, *flags):
    given = [
        "--model",
        outputs / "merged",
        "--output_dir",
        target,
        "--text_file",
        outputs / "texts.jsonl",
        "--only_cpu",
    ]
    return parse_args(list(map(str, [*given, *flags])))


def quantize(outputs, target, *flags):
    main(flags_for(outputs, target, *flags))
    return target


def refusal(outputs, target, *flags):
    """The message with which it ends, when nothing may be left."""
    with pytest.raises((ValueError, OSError)) as error:
        quantize(outputs, target, *flags)
    assert not target.exists() and not target.with_name(target.name + export.UNFINISHED).exists()
    return str(error.value)


def loss_by_hand(model, directory):
    """Summed loss of the texts behind EOS, in float64."""
    tokenizer, total, tokens = AutoTokenizer.from_pretrained(directory), 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[tokenizer.eos_token_id, *ids[:-1]]])).logits[0].double()
        total, tokens = total - logits.log_softmax(-1)[range(len(ids)), ids].sum().item(), tokens + len(ids)
    return total, tokens


# -- bitsandbytes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[4, 8])
def quantised(outputs, request, tmp_path_factory):
    """(bits, directory of the model quantised to them, what was printed)"""
    pytest.importorskip("bitsandbytes")
    import contextlib
    import io

    target, told = outputs / f"int{request.param}", io.StringIO()
    with contextlib.redirect_stdout(told):
        quantize(outputs, target, "--bits", str(request.param))
    return request.param, target, told.getvalue()


def in_memory(outputs, bits):
    """The model as bitsandbytes quantises it while it is loaded."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(load_in_4bit=True, **nf4) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(outputs / "merged", quantization_config=config, device_map={"": "cpu"})


def test_what_is_saved_is_what_bitsandbytes_quantises(outputs, quantised):
    bits, directory, _ = quantised
    ids, wanted = torch.arange(5, 60)[None], in_memory(outputs, bits)
    found = AutoModelForCausalLM.from_pretrained(directory)
    layer = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert type(found.model.layers[1].mlp.up_proj).__name__ == layer
    with torch.no_grad():
        assert torch.equal(found(ids).logits, wanted(ids).logits)


def test_inference_answers_with_it(outputs, quantised):
    _, directory, _ = quantised
    (wanted, plain), (found, loaded) = answers(outputs / "merged"), answers(directory)
    assert loaded.model.is_quantized and not getattr(plain.model, "is_quantized", False)
    assert loaded.stop_ids == plain.stop_ids and loaded.chat.tokenizer.chat_template
    assert all(answer.num_tokens for answer in found) and len(found) == len(wanted)


def test_perplexity_is_measured_before_and_after(outputs, quantised):
    _, directory, told = quantised
    metrics = stage_of(directory)["metrics"]
    for name, place in (("before", outputs / "merged"), ("after", directory)):
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        nll, tokens = loss_by_hand(model, outputs / "merged")
        assert metrics[name]["nll"] == pytest.approx(nll, rel=1e-5 if name == "before" else 1e-3)
        assert metrics[name]["tokens"] == tokens
        assert metrics[name]["perplexity"] == pytest.approx(math.exp(metrics[name]["nll"] / tokens))
        assert metrics[name]["bytes"] == sum(len(text.encode()) for text in TEXTS)
        assert f"{metrics[name]['perplexity']:.3f}" in told
    assert metrics["before"]["nll"] != metrics["after"]["nll"]


def test_sizes_are_those_on_disk(outputs, quantised):
    _, directory, told = quantised
    before, after = ((place / "model.safetensors").stat().st_size for place in (outputs / "merged", directory))
    assert after < 0.6 * before  # the embeddings, half of this model, stay as they are
    row = next(line.split() for line in told.splitlines() if line.startswith("weights on disk"))
    assert row[3:] == [*export.size_text(before).split(), *export.size_text(after).split(), f"{after / before:.0%}"]


def test_the_directory_is_a_stage_with_checksums(outputs, quantised):
    bits, directory, _ = quantised
    stage = stage_of(directory)
    assert stage["stage"] == "quantize" and stage["parent"]["path"] == "../merged"
    assert stage["base_model"]["name_or_path"] == "../merged"
    assert stage["tuning"] == {"method": "bitsandbytes", "type": {4: "4-bit NF4", 8: "8-bit int8"}[bits]}
    assert resolve(str(directory)).stage == stage
    assert np.load(directory / SEEN_PROMPTS).tolist() == [0, 1, 2]
    assert subprocess.run(["sha256sum", "-c", "--quiet", "sha256sums.txt"], cwd=directory).returncode == 0


def test_what_is_quantised_already_is_refused(outputs, quantised, tmp_path):
    arguments = ["--model", str(quantised[1]), "--output_dir", str(tmp_path / "again"), "--only_cpu"]
    with pytest.raises(ValueError, match="is quantised already; name the model it was made from"):
        main(parse_args(arguments))


def test_embeddings_keep_the_type_of_the_original(outputs, tmp_path):
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    model = shutil.copytree(outputs / "merged", tmp_path / "merged")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    (model / "stage.json").unlink()
    quantize(outputs, tmp_path / "int8", "--model", model, "--bits", "8")
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


# -- what is refused -------------------------------------------------------------------------------------------------


def test_an_adapter_is_refused_with_the_command_that_merges_it(outputs, tmp_path):
    adapter = write_adapter(outputs / "merged", tmp_path / "sft")
    message = refusal(outputs, tmp_path / "int4", "--model", adapter)
    assert f"is an adapter; merge it first: python -m tools.merge_adapter --lora_model {adapter} " in message
    assert message.endswith(f"--output_dir {adapter}-merged")


def test_a_reward_model_is_refused(outputs, tmp_path):
    model = shutil.copytree(outputs / "merged", tmp_path / "rm")
    (model / "stage.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForSequenceClassification"]}))
    assert "is a reward model" in refusal(outputs, tmp_path / "int4", "--model", model)


def test_a_failure_leaves_nothing_and_a_full_disk_is_told_before(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "quantize", lambda *args: (_ for _ in ()).throw(ValueError("broken")))
    assert refusal(outputs, tmp_path / "int4") == "broken"
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "are free on that disk" in refusal(outputs, tmp_path / "int4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        quantize(outputs, tmp_path / "full")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "3"], "invalid choice: 3"),
        (["--format", "gguf", "--bits", "4"], "--bits is not for --format gguf"),
        (["--gguf_type", "f16"], "--gguf_type is not for --format bitsandbytes"),
        (["--format", "gguf", "--gguf_type", "q9"], "invalid choice: 'q9'"),
        (["--max_texts", "0"], "--max_texts 0 must be above 0"),
        (["--max_shard_size", "big"], "--max_shard_size 'big' is no size such as 5GB or 500MB"),
        (["--format", "gguf", "--max_shard_size", "1GB"], "--max_shard_size is not for --format gguf"),
        (["--only_cpu", "--gpus", "0"], "--only_cpu and --gpus exclude each other"),
        (["--modell", "x"], "unknown flag --modell; did you mean --model?"),
    ],
)
def test_wrong_flags_are_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        parse_args(["--model", "a", "--output_dir", "b", *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_help_loads_nothing_heavy():
    code = (
        "import sys, tools.quantize_model as tool\n"
        "try: tool.parse_args(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.startswith("usage: python -m tools.quantize_model") and told.endswith("[]\n")


# -- texts -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_record_is_read_as_text(tmp_path):
    rows = [
        {"text": "A document."},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"question": "q2", "answer": "a2"},
        {"prompt": "q3", "chosen": "good", "rejected": "bad"},
    ]
    path = write_jsonl(tmp_path / "texts.jsonl", rows)
    assert read_texts(str(path), 9) == ["A document.", "q\n\na", "q2\n\na2", "q3\n\ngood"]
    assert read_texts(str(path), 2) == ["A document.", "q\n\na"]
    write_jsonl(path, [rows[0], {"nothing": 1}])
    with pytest.raises(ValueError, match=f"^{path}:2: "):
        read_texts(str(path), 9)


def test_the_default_texts_are_there_and_held_out():
    texts = read_texts(parse_args(["--model", "a", "--output_dir", "b"]).text_file, 200)
    assert len(texts) > 100 and all("\n" in text for text in texts)


# -- gguf ------------------------------------------------------------------------------------------------------------


def write_program(path, body):
    """An executable that notes how it was called, and then runs `body`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    note = f"import json, sys\nprint(json.dumps(sys.argv[1:]), file=open({f'{path}.calls'!r}, 'a'))"
    path.write_text(f"#!{sys.executable}\n{note}\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def calls_of(path):
    return [json.loads(line) for line in Path(f"{path}.calls").read_text().splitlines()]


@pytest.fixture
def llama_cpp(tmp_path):
    """A stand-in for llama.cpp, whose programs write files that hold nothing."""
    write_program(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py", "open(sys.argv[3], 'wb').write(b'x' * 500)")
    write_program(
        tmp_path / "llama.cpp" / "build" / "bin" / "llama-quantize", "open(sys.argv[2], 'wb').write(b'y' * 99)"
    )
    return tmp_path / "llama.cpp"


def test_the_converter_is_called_as_it_asks(outputs, llama_cpp, tmp_path, caplog, capsys):
    target = quantize(outputs, tmp_path / "gguf", "--format", "gguf", "--llama_cpp", llama_cpp)
    (call,) = calls_of(llama_cpp / "convert_hf_to_gguf.py")
    written = f"{target}{export.UNFINISHED}/merged-f16.gguf"
    assert call == [str(outputs / "merged"), "--outfile", written, "--outtype", "f16"]
    assert {path.name for path in target.iterdir()} == {
        *("merged-f16.gguf", "stage.json", "sha256sums.txt", SEEN_PROMPTS)
    }
    assert subprocess.run(["sha256sum", "-c", "--quiet", "sha256sums.txt"], cwd=target).returncode == 0
    assert "transformers cannot read this GGUF file back" in caplog.text  # nothing is made up about it
    assert stage_of(target)["metrics"].keys() == {"before"}
    table = capsys.readouterr().out
    assert "500 B" in table and "could not be measured here" in table


def test_types_the_converter_does_not_write_are_made_from_the_exact_file(outputs, llama_cpp, tmp_path):
    flags = ("--format", "gguf", "--gguf_type", "q4_k_m", "--llama_cpp", llama_cpp)
    target = quantize(outputs, tmp_path / "gguf", *flags)
    (first,), (second,) = (
        calls_of(llama_cpp / name) for name in ("convert_hf_to_gguf.py", "build/bin/llama-quantize")
    )
    assert first[-2:] == ["--outtype", "f32"]  # what the model holds
    assert second == [first[2], first[2].replace("f32", "q4_k_m"), "Q4_K_M"]
    assert [path.name for path in target.glob("*.gguf")] == ["merged-q4_k_m.gguf"]


def test_programs_on_path_are_found(llama_cpp, tmp_path, monkeypatch):
    script = llama_cpp / "convert_hf_to_gguf.py"
    monkeypatch.setenv("PATH", f"{llama_cpp}{os.pathsep}{llama_cpp}/build/bin")
    assert find_programs(None, "q6_k") == ([sys.executable, str(script)], f"{llama_cpp}/build/bin/llama-quantize")
    script.rename(llama_cpp / "convert-hf-to-gguf")  # as the package of that name installs it
    assert find_programs(None, "q8_0") == ([f"{llama_cpp}/convert-hf-to-gguf"], None)


def test_what_is_not_installed_is_said_with_what_to_do(outputs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refusal(outputs, tmp_path / "out", "--format", "gguf")
    assert message.startswith(
        "--format gguf needs llama.cpp's convert_hf_to_gguf.py, which is not on PATH: git clone "
    )
    (tmp_path / "llama.cpp").mkdir()
    message = refusal(outputs, tmp_path / "out", "--format", "gguf", "--llama_cpp", tmp_path / "llama.cpp")
    assert f"which is not in {tmp_path}/llama.cpp or on PATH" in message
    write_program(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py", "")
    flags = ("--format", "gguf", "--llama_cpp", tmp_path / "llama.cpp", "--gguf_type", "q5_k_m")
    assert "--gguf_type q5_k_m needs llama.cpp's llama-quantize" in refusal(outputs, tmp_path / "out", *flags)
    assert "no such directory" in refusal(outputs, tmp_path / "out", "--format", "gguf", "--llama_cpp", tmp_path / "x")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "print('reads', file=sys.stderr); raise ValueError('no such architecture')",
            "(1): ValueError: no such architecture",
        ),
        (
            "raise NotImplementedError('BPE pre-tokenizer was not recognized - update get_vocab_base_pre()')",
            "llama.cpp knows the tokenizers of published models only, not one trained here or extended",
        ),
        ("import os; os.kill(os.getpid(), 9)", "convert_hf_to_gguf.py failed (-9): without a word"),
    ],
)
def test_a_converter_that_fails_is_quoted(outputs, llama_cpp, tmp_path, capsys, body, reason):
    write_program(llama_cpp / "convert_hf_to_gguf.py", body)
    args = flags_for(outputs, tmp_path / "out", "--format", "gguf", "--llama_cpp", llama_cpp)
    with pytest.raises(SystemExit) as end:
        run(main, args, tool.PROGRAM, "")
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        end.value.code == 2
        and last.startswith(f"{tool.PROGRAM}: error: convert_hf_to_gguf.py failed")
        and reason in last
    )
    assert not (tmp_path / "out").exists()


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}


def write_gguf(model, path, bits):
    """What the converter writes of a Qwen3 model, as far as transformers reads it, by the gguf package."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    writer = GGUFWriter(path, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    for name, tensor in load_file(model / "model.safetensors").items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        array = tensor.float().numpy()
        kind = GGMLQuantizationType.Q8_0 if bits == 8 and array.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("bits, error", [(32, 1e-5), (8, 0.02)])
def test_the_perplexity_of_a_gguf_file_is_measured_on_the_file(outputs, tmp_path, bits, error):
    pytest.importorskip("gguf")
    write_gguf(outputs / "merged", tmp_path / "right.gguf", bits)
    body = f"import shutil\nshutil.copy({str(tmp_path / 'right.gguf')!r}, sys.argv[3])"
    write_program(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py", body)
    flags = ("--format", "gguf", "--gguf_type", "q8_0", "--llama_cpp", tmp_path / "llama.cpp")
    metrics = stage_of(quantize(outputs, tmp_path / "out", *flags))["metrics"]
    assert metrics["after"]["nll"] == pytest.approx(metrics["before"]["nll"], rel=error)
    assert (metrics["after"]["nll"] == pytest.approx(metrics["before"]["nll"], rel=1e-7)) == (bits == 32)


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="set LLAMA_CPP to a directory of llama.cpp, built")
@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_k_m"])
def test_llama_cpp_itself_converts_the_model(outputs, tmp_path, kind):
    """With llama.cpp's own programs, for a tokenizer that they know (SentencePiece's byte fallback)."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast

    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, "▁", *"abcdefghijklmnopqrstuvwxyz", "th", "▁th", "er"]
    merges = [("t", "h"), ("▁", "th"), ("e", "r")]
    bpe = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = LlamaTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(pieces), max_position_embeddings=256, **shape))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = (
        "--model",
        tmp_path / "model",
        "--format",
        "gguf",
        "--gguf_type",
        kind,
        "--llama_cpp",
        os.environ["LLAMA_CPP"],
    )
    metrics = stage_of(quantize(outputs, tmp_path / "gguf", *flags))["metrics"]
    assert metrics["after"]["nll"] == pytest.approx(metrics["before"]["nll"], rel=1e-6 if kind == "f32" else 0.02)
