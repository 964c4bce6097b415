"""Answers against a greedy loop written out, a trained model's own training answers, and loading by every road."""

import math
import os
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model, build_tokenizer

from stagekit import generation
from stagekit.checkpoint import base_fingerprint, relative, write_stage
from stagekit.generation import GrowingText, PrefixCache, generate_batch, stream
from stagekit.modeling import generation_settings
from stagekit.prompts import fit_history
from stagekit.records import Conversation
from stagekit.tokenization import encode_conversation, encode_prompt

torch.set_num_threads(1)


def said(role, content):
    return {"role": role, "content": content}


COLD = said("user", "感冒了怎么办？")
FEVER = said("user", "What is a fever?")
TAUGHT = [
    [COLD, said("assistant", "多休息，多喝温水。")],
    [said("system", "Be brief."), FEVER, said("assistant", "A raised body temperature.")],
    [COLD, said("assistant", "多休息，多喝温水。"), FEVER, said("assistant", "Ask a doctor! 看医生。")],
]


def write_sft_stage(base, directory, steps=300):
    """Teach a LoRA adapter the conversations of TAUGHT by heart and save it as a stage does."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    chat = generation.load_chat(generation.find_source(str(base), None))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    model = get_peft_model(model, lora)
    samples = [encode_conversation(chat, Conversation(messages), 1000)[0][0] for messages in TAUGHT]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        losses = [model(input_ids=torch.tensor([s.input_ids]), labels=torch.tensor([s.labels])).loss for s in samples]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        if max(losses) < 0.01:
            break
    model.save_pretrained(directory)
    chat.tokenizer.save_pretrained(directory)
    generation_settings(chat.stop_ids, chat.tokenizer).save_pretrained(directory)
    base_model = {
        "name_or_path": relative(str(base), directory),
        "revision": None,
        "fingerprint": base_fingerprint(str(base)),
    }
    record = {"format": 1, "stage": "sft", "base_model": base_model, "parent": None, "template": {"name": "chatml"}}
    write_stage(directory, record)
    return directory


@pytest.fixture(scope="session")
def outputs(tmp_path_factory):
    """A directory with `base`, a random model, and `sft`, an adapter on it that knows TAUGHT by heart."""
    root = tmp_path_factory.mktemp("outputs")
    write_sft_stage(build_model(root / "base"), root / "sft")
    return root


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """A model that greedily never chooses a stop token."""
    from transformers import AutoModelForCausalLM

    directory = build_model(tmp_path_factory.mktemp("endless") / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.get_input_embeddings().weight[:4] = 0  # the special tokens; the head shares the matrix
    model.save_pretrained(directory)
    return directory


def load(base_model=None, lora_model=None, template_name=None, tokenizer_path=None, **options):
    source = generation.find_source(base_model and str(base_model), lora_model and str(lora_model))
    chat = generation.load_chat(source, tokenizer_path, template_name)
    return generation.load_for_generation(source, chat, **options)


@pytest.fixture(scope="module")
def sft(outputs):
    return load(lora_model=outputs / "sft")


def greedy(loaded, **more):
    return generation.choose_settings(loaded, temperature=0.0, **more)


def greedy_by_hand(loaded, input_ids, steps, penalty=1.0):
    """Greedy decoding without cache, padding or transformers' generate(); the penalty is CTRL's (arXiv:1909.05858)."""
    ids = list(input_ids)
    for _ in range(steps):
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1]
        used = sorted(set(ids))
        logits[used] = torch.where(logits[used] > 0, logits[used] / penalty, logits[used] * penalty)
        ids.append(int(logits.argmax()))
        if ids[-1] in loaded.stop_ids:
            break
    new = ids[len(input_ids) :]
    text = [token for token in new if token not in loaded.stop_ids]
    return loaded.chat.tokenizer.decode(text, skip_special_tokens=True).strip(), len(new)


# -- answers ---------------------------------------------------------------------------------------------------------


def test_a_trained_stage_gives_its_training_answers_and_stops(sft):
    for messages in TAUGHT:
        (answer,) = generate_batch(sft, [encode_prompt(sft.chat, messages[:-1])], greedy(sft))
        assert (answer.text, answer.finish_reason) == (messages[-1]["content"], "stop")


def test_a_batch_of_different_lengths_gives_the_answers_of_each_alone(sft):
    prompts = [encode_prompt(sft.chat, messages[:-1]) for messages in TAUGHT]
    assert len({len(ids) for ids in prompts}) == 3
    texts = [answer.text for answer in generate_batch(sft, prompts, greedy(sft))]
    assert texts == [messages[-1]["content"] for messages in TAUGHT]


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "bloom"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_of_a_batch_are_those_of_a_loop_written_out(architecture, penalty, tmp_path):
    loaded = load(build_model(tmp_path / "model", architecture, chat=False), template_name="vicuna")
    head = loaded.model.get_output_embeddings()  # random, so that the answers differ
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))
    questions = ["a", "What is a fever?", "发烧怎么办？要多休息吗？" * 6]
    prompts = [encode_prompt(loaded.chat, [said("user", text)]) for text in questions]
    answers = generate_batch(loaded, prompts, greedy(loaded, max_new_tokens=24, repetition_penalty=penalty))
    expected = [greedy_by_hand(loaded, ids, 24, penalty) for ids in prompts]
    assert [(answer.text, answer.num_tokens) for answer in answers] == expected
    assert len({answer.text for answer in answers}) > 1


def test_padding_is_not_seen_by_the_repetition_penalty(outputs):
    loaded = load(lora_model=outputs / "sft")
    prompts = [encode_prompt(loaded.chat, messages[:-1]) for messages in TAUGHT]
    settings = greedy(loaded, max_new_tokens=4, repetition_penalty=50.0)
    alone = [generate_batch(loaded, [ids], settings)[0] for ids in prompts]
    rest = loaded.chat.tokenizer(TAUGHT[0][-1]["content"])["input_ids"][0]
    assert alone[0].text.startswith(loaded.chat.tokenizer.decode([rest]))
    loaded.chat.tokenizer.pad_token_id = rest  # as if the padding token were one that belongs into the answer
    (first, *_) = generate_batch(loaded, prompts, settings)
    assert first.num_tokens == alone[0].num_tokens
    assert first == generate_batch(loaded, prompts[:1], settings)[0]


def test_the_length_limit_is_reported_and_kept(sft):
    (answer,) = generate_batch(sft, [encode_prompt(sft.chat, [COLD])], greedy(sft, max_new_tokens=2))
    assert (answer.text, answer.finish_reason, answer.num_tokens) == ("多休息，", "length", 2)


def test_every_stop_token_of_the_generation_config_ends_an_answer(outputs, tmp_path):
    base, sft = outputs / "base", shutil.copytree(outputs / "sft", tmp_path / "sft")
    (sft / "stage.json").unlink()
    chat = generation.load_chat(generation.find_source(str(base), str(sft)))
    comma = encode_prompt(chat, [said("user", "休息，多")])
    comma = next(token for token in comma if chat.tokenizer.decode([token]) == "，")
    generation.GenerationConfig(eos_token_id=[comma]).save_pretrained(sft)
    loaded = load(base, sft)
    (answer,) = generate_batch(loaded, [encode_prompt(chat, [COLD])], greedy(loaded))
    assert (answer.text, answer.finish_reason) == ("多休息", "stop")
    assert [step.text for step in stream(loaded, encode_prompt(chat, [COLD]), greedy(loaded))] == ["多休息"] * 2


def test_sampling_follows_the_temperature(outputs):
    loaded = load(outputs / "base")
    prompt = [encode_prompt(loaded.chat, [COLD])] * 4
    hot = generate_batch(loaded, prompt, generation.choose_settings(loaded, temperature=5.0, max_new_tokens=16))
    cold = generate_batch(loaded, prompt, generation.choose_settings(loaded, temperature=1e-4, max_new_tokens=16))
    assert len({answer.text for answer in hot}) == 4
    assert {answer.text for answer in cold} == {greedy_by_hand(loaded, prompt[0], 16)[0]}


# -- streaming -------------------------------------------------------------------------------------------------------


def test_a_stream_grows_to_the_answer_of_the_batch(sft):
    for messages in TAUGHT:
        prompt = encode_prompt(sft.chat, messages[:-1])
        steps = list(stream(sft, prompt, greedy(sft)))
        assert steps[-1] == generate_batch(sft, [prompt], greedy(sft))[0]
        for before, after in zip(steps, steps[1:], strict=False):
            assert after.text.startswith(before.text)


def test_a_stream_never_shows_half_a_character(sft):
    prompt = encode_prompt(sft.chat, TAUGHT[2][:-1])
    steps = list(stream(sft, prompt, greedy(sft)))
    tokens = sft.chat.tokenizer(TAUGHT[2][-1]["content"], add_special_tokens=False)["input_ids"]
    assert len(tokens) > len(steps), "the answer must have characters of several tokens for this test to say anything"
    assert not any("\ufffd" in step.text for step in steps)


def test_a_stream_of_broken_bytes_ends_like_the_batch(outputs):
    loaded = load(outputs / "base")
    broken = 0
    for question in ("感冒了怎么办？", "What is a fever?", "多喝水", "rest"):
        prompt = encode_prompt(loaded.chat, [said("user", question)])
        settings = greedy(loaded, max_new_tokens=200)
        steps = list(stream(loaded, prompt, settings))
        assert steps[-1] == generate_batch(loaded, [prompt], settings)[0]
        assert all(steps[-1].text.startswith(step.text) for step in steps)
        broken += "\ufffd" in steps[-1].text
    assert broken


def test_closing_a_stream_stops_the_model(endless):
    loaded = load(endless)
    others = set(threading.enumerate())
    answers = stream(loaded, encode_prompt(loaded.chat, [COLD]), greedy(loaded, max_new_tokens=1900))
    assert next(answers).finish_reason is None
    (worker,) = set(threading.enumerate()) - others
    answers.close()
    assert not worker.is_alive()


@pytest.fixture
def computed(monkeypatch):
    """How many tokens each forward pass of a model of the Qwen3 family computed."""
    from transformers import Qwen3Model

    lengths, forward = [], Qwen3Model.forward

    def counted(self, input_ids=None, **others):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **others)

    monkeypatch.setattr(Qwen3Model, "forward", counted)
    return lengths


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "bloom", "mistral", "mamba"])
def test_a_conversation_with_kept_states_has_the_answers_of_fresh_runs(architecture, tmp_path):
    loaded = load(build_model(tmp_path / "model", architecture, chat=False), template_name="vicuna")
    head = loaded.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)))
    settings, cache, messages, texts = greedy(loaded, max_new_tokens=12, repetition_penalty=1.2), PrefixCache(), [], []
    for question in ("发烧怎么办？", "What is a fever?", "a", "感冒了要多休息吗？"):
        messages.append(said("user", question))
        prompt = encode_prompt(loaded.chat, messages)
        (*_, answer) = stream(loaded, prompt, settings, cache)
        assert (answer.text, answer.num_tokens) == greedy_by_hand(loaded, prompt, 12, 1.2)
        messages.append(said("assistant", answer.text))
        texts.append(answer.text)
    assert len(set(texts)) > 1


def test_a_turn_computes_only_what_is_new_in_its_prompt(sft, computed):
    cache = PrefixCache()
    first, second = (encode_prompt(sft.chat, TAUGHT[2][:turn]) for turn in (1, 3))
    (*_, answer) = stream(sft, first, greedy(sft), cache)
    assert computed == [len(first)] + [1] * (answer.num_tokens - 1)
    assert answer.text == TAUGHT[2][1]["content"]
    told = encode_prompt(sft.chat, TAUGHT[2][:1]) + sft.chat.tokenizer.encode(answer.text, add_special_tokens=False)
    assert second[: len(told)] == told  # the stop token was generated, and nothing was computed behind it
    computed.clear()
    (*_, answer) = stream(sft, second, greedy(sft), cache)
    assert computed[0] == len(second) - len(told)
    assert answer.text == TAUGHT[2][3]["content"]


def test_the_same_prompt_again_computes_its_last_token(sft, computed):
    cache, prompt = PrefixCache(), encode_prompt(sft.chat, [COLD])
    answers = [list(stream(sft, prompt, greedy(sft), cache))[-1] for _ in range(2)]
    assert answers[0] == answers[1]
    assert computed[answers[0].num_tokens] == 1


def test_an_unrelated_conversation_in_between_changes_nothing(sft):
    cache = PrefixCache()
    for messages in (TAUGHT[2][:1], TAUGHT[1][:2], TAUGHT[2][:3], TAUGHT[0][:1]):
        prompt = encode_prompt(sft.chat, messages)
        assert list(stream(sft, prompt, greedy(sft), cache))[-1] == list(stream(sft, prompt, greedy(sft)))[-1]


def test_what_a_stopped_answer_left_can_be_gone_on_from(sft, computed):
    cache, prompt = PrefixCache(), encode_prompt(sft.chat, [COLD])
    answers = stream(sft, prompt, greedy(sft), cache)
    begun = next(answers).text
    answers.close()
    computed.clear()
    messages = [COLD, said("assistant", begun), FEVER]
    after = encode_prompt(sft.chat, messages)
    found = list(stream(sft, after, greedy(sft), cache))[-1]
    assert computed[0] < len(after) - len(prompt) + 1
    assert found == list(stream(sft, after, greedy(sft)))[-1]


def test_states_of_an_answer_that_failed_are_not_used_again(outputs):
    loaded, cache = load(outputs / "base"), PrefixCache()
    prompt = encode_prompt(loaded.chat, [COLD])
    list(stream(loaded, prompt, greedy(loaded, max_new_tokens=4), cache))
    with pytest.raises(IndexError):
        list(stream(loaded, [*prompt, 10**6], greedy(loaded, max_new_tokens=4), cache))
    settings = greedy(loaded, max_new_tokens=4)
    assert list(stream(loaded, prompt, settings, cache))[-1] == list(stream(loaded, prompt, settings))[-1]


def test_blanks_between_words_survive_a_tokenizer_that_drops_the_first():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["▁Drink", "▁warm", "▁water", "<0xE6>", "<0xB0>", "<0xB4>", ".", "</s>"]  # as in Llama 2
    bpe = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")

    class Model:
        device = "cpu"

        def generate(self, input_ids, streamer, **options):
            streamer.put(input_ids)
            for token in range(8):
                streamer.put(torch.tensor([token]))

    chat = SimpleNamespace(tokenizer=tokenizer)
    loaded = generation.LoadedModel(Model(), chat, None, None, [7], generation.GenerationConfig())
    texts = [answer.text for answer in stream(loaded, [0], greedy(loaded))]
    assert texts == ["Drink", "Drink warm", "Drink warm water", "Drink warm water水"] + ["Drink warm water水."] * 2


def test_what_goes_wrong_while_streaming_is_raised_to_the_reader(outputs):
    loaded = load(outputs / "base")
    with pytest.raises(IndexError):
        list(stream(loaded, [10**6], greedy(loaded)))


NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=["GPU", "CPU"])
def test_memory_that_runs_out_is_one_line_that_says_what_would_do(outputs, monkeypatch, error):
    def fail(*args, **options):
        raise error

    loaded = load(outputs / "base")
    monkeypatch.setattr(loaded.model, "generate", fail)
    with pytest.raises(generation.OutOfMemory, match="^memory runs out; shorten --max_new_tokens or the prompts, or"):
        list(stream(loaded, [1], greedy(loaded)))
    with pytest.raises(generation.OutOfMemory, match="^memory runs out with --batch_size 1; shorten "):
        list(generation.run_in_batches(1, 1, fail))
    monkeypatch.setattr(generation.PeftModel, "from_pretrained", fail)
    with pytest.raises(ValueError, match=f"^{outputs}/sft: no memory is left to load it; give --load_in_4bit True"):
        load(lora_model=outputs / "sft")
    monkeypatch.setattr(generation.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ValueError, match=f"^{outputs}/base: no memory is left to load it"):
        load(outputs / "base")


# -- growing texts ---------------------------------------------------------------------------------------------------


def grow(loaded, text, **strings):
    """(certain texts after every token, the whole text) of a text given token by token."""
    growing, seen = GrowingText(loaded, **strings), []
    for token in loaded.chat.tokenizer(text, add_special_tokens=False)["input_ids"]:
        growing.add([token])
        seen.append(growing.certain())
    return seen, growing.finish(), growing


@pytest.fixture(scope="module")
def base(outputs):
    return load(outputs / "base")


def test_a_text_grows_without_half_characters_and_keeps_its_blanks(base):
    seen, whole, _ = grow(base, "  Drink 龘水 ")
    assert whole == "  Drink 龘水 " and not any("\ufffd" in text for text in seen)
    assert all(later.startswith(text) for text, later in zip(seen, seen[1:], strict=False)) and "  Drink " in seen


def test_bytes_that_are_no_character_stay_at_the_end(base):
    ids = base.chat.tokenizer("水龘", add_special_tokens=False)["input_ids"]
    growing = GrowingText(base)
    growing.add(ids[:-1])
    assert growing.certain() == "水" and growing.finish().startswith("水\ufffd")


@pytest.mark.parametrize(
    ("text", "stops", "left", "stopped"),
    [
        ("rest and water", ["and"], "rest ", True),
        ("rest and water", ["water", "t a"], "res", True),
        ("rest and water", ["anda"], "rest and water", False),
        ("rest and", ["and water"], "rest and", False),
        ("多喝水休息", ["水休"], "多喝", True),
    ],
)
def test_no_part_of_a_stop_string_is_ever_shown(base, text, stops, left, stopped):
    seen, whole, growing = grow(base, text, stops=stops)
    assert (whole, growing.stopped) == (left, stopped)
    assert all(left.startswith(shown) for shown in seen)
    growing.add([5])
    assert growing.finish() == left or not stopped


def test_a_mark_is_held_back_until_it_is_another_word(base):
    seen, whole, _ = grow(base, "a <tool bar", marks=["<tool_call>"])
    assert whole == "a <tool bar" and "a " in seen and "a <" not in seen and "a <tool" not in seen


# -- history and settings --------------------------------------------------------------------------------------------


def test_history_is_cut_at_exchanges_oldest_first_and_the_system_message_stays(sft):
    system, old, new = said("system", "Be brief."), [COLD, said("assistant", "多休息。")], [FEVER]
    whole = encode_prompt(sft.chat, [system, *old, *new])
    assert fit_history(sft.chat, [system, *old, *new], len(whole)) == ([system, *old, *new], whole)
    short = encode_prompt(sft.chat, [system, *new])
    assert fit_history(sft.chat, [system, *old, *new], len(whole) - 1) == ([system, *new], short)
    assert fit_history(sft.chat, [system, *old, *new], len(short)) == ([system, *new], short)
    assert fit_history(sft.chat, [system, *old, *new], len(short) - 1) is None
    assert fit_history(sft.chat, [system, *old, *new], None) == ([system, *old, *new], whole)


def test_a_tool_result_is_never_cut_off_from_its_question(sft):
    call = {"type": "function", "function": {"name": "dose", "arguments": {"kg": 20}}}
    asked = [FEVER, {**said("assistant", ""), "tool_calls": [call]}, said("tool", "300 mg")]
    last = encode_prompt(sft.chat, asked)
    assert fit_history(sft.chat, [COLD, said("assistant", "多休息。"), *asked], len(last)) == (asked, last)
    assert fit_history(sft.chat, asked, len(last) - 1) is None


def test_settings_come_from_the_flags_then_the_checkpoint_then_the_defaults(outputs, tmp_path):
    base = shutil.copytree(outputs / "base", tmp_path / "base")
    generation.GenerationConfig(do_sample=True, temperature=0.6, top_k=20, eos_token_id=[2, 0]).save_pretrained(base)
    loaded = load(base)
    assert generation.choose_settings(loaded, top_p=0.5, temperature=None) == generation.Settings(
        512, 0.6, 0.5, 1.0, 20
    )
    assert generation.choose_settings(load(outputs / "base")) == generation.Settings(512, 0.7, 0.9, 1.0, 0)


@pytest.mark.parametrize("temperature", [1e-40, 9e-5, -1.0, math.nan])
def test_a_temperature_at_which_logits_overflow_is_refused(sft, temperature):
    with pytest.raises(ValueError, match=r"^--temperature \S+ must be 0 \(greedy\) or at least 0.0001$"):
        generation.choose_settings(sft, temperature=temperature)
    assert generation.choose_settings(sft, temperature=1e-4).temperature == 1e-4


def test_a_tiny_temperature_of_a_checkpoint_means_the_likeliest_token(outputs, tmp_path):
    base = shutil.copytree(outputs / "base", tmp_path / "base")
    generation.GenerationConfig(do_sample=True, temperature=1e-6).save_pretrained(base)
    assert generation.choose_settings(load(base)).temperature == 0


def test_an_answer_that_would_fill_the_whole_context_is_refused(sft):
    assert generation.prompt_limit(sft, greedy(sft, max_new_tokens=2000)) == 48
    with pytest.raises(ValueError, match="2048"):
        greedy(sft, max_new_tokens=2048)


# -- loading ---------------------------------------------------------------------------------------------------------


def first_answer(loaded):
    return generate_batch(loaded, [encode_prompt(loaded.chat, [COLD])], greedy(loaded))[0].text


def test_outputs_that_were_moved_are_found_from_another_directory(outputs, tmp_path, monkeypatch):
    moved = shutil.copytree(outputs, tmp_path / "elsewhere" / "outputs")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    loaded = load(lora_model=moved / "sft")
    assert loaded.source.base == str(moved / "base")
    assert first_answer(loaded) == "多休息，多喝温水。"
    assert first_answer(load(base_model="../elsewhere/outputs/sft")) == "多休息，多喝温水。"


def test_an_adapter_without_stage_json_finds_its_base_from_another_directory(outputs, tmp_path, monkeypatch):
    import json

    moved = shutil.copytree(outputs, tmp_path / "outputs")
    (moved / "sft" / "stage.json").unlink()
    config = json.loads((moved / "sft" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "outputs/base"  # as peft writes it for a run started beside outputs/
    (moved / "sft" / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(moved)
    assert first_answer(load(lora_model=moved / "sft")) == "多休息，多喝温水。"


def test_a_base_that_is_gone_is_named_with_the_way_out(outputs, tmp_path):
    import json

    alone = shutil.copytree(outputs / "sft", tmp_path / "sft")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/base.*--base_model"):
        load(lora_model=alone)
    (alone / "stage.json").unlink()
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(FileNotFoundError, match="/nowhere/base.*--base_model"):
        load(lora_model=alone)
    assert first_answer(load(outputs / "base", alone)) == "多休息，多喝温水。"


def test_weights_of_a_download_that_was_cut_off_are_named(outputs, tmp_path):
    for name, weights in (("base", "model.safetensors"), ("sft", "adapter_model.safetensors")):
        copy = shutil.copytree(outputs / name, tmp_path / name)
        (copy / "stage.json").unlink(missing_ok=True)
        whole = (copy / weights).read_bytes()
        (copy / weights).write_bytes(whole[: len(whole) // 2])
    for damaged, given in ((tmp_path / "base", [tmp_path / "base"]), (tmp_path / "sft", [None, tmp_path / "sft"])):
        with pytest.raises(ValueError, match=f"^{damaged}: damaged weights .*cut off") as raised:
            load(*given)
        assert "\n" not in str(raised.value)


def test_an_adapter_on_another_base_is_refused(outputs, tmp_path):
    other = build_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="was trained on"):
        load(other, outputs / "sft")


def test_a_full_model_given_as_adapter_is_refused_with_the_right_flag(outputs):
    with pytest.raises(ValueError, match="--base_model"):
        load(lora_model=outputs / "base")


def test_a_reward_model_is_refused(outputs, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    scorer = AutoModelForSequenceClassification.from_pretrained(outputs / "base", num_labels=1)
    scorer.save_pretrained(tmp_path / "full")
    shutil.copy(outputs / "base" / "tokenizer.json", tmp_path / "full")
    shutil.copy(outputs / "base" / "tokenizer_config.json", tmp_path / "full")
    shutil.copy(outputs / "base" / "chat_template.jinja", tmp_path / "full")
    with pytest.raises(ValueError, match="reward model"):
        load(base_model=tmp_path / "full")
    get_peft_model(scorer, LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear")).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(ValueError, match="reward model"):
        load(outputs / "base", tmp_path / "adapter")


def test_a_tokenizer_larger_than_the_embeddings_needs_resize_emb(outputs, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<drug{number}>" for number in range(60)])
    assert len(tokenizer) > 448
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--resize_emb True"):
        load(outputs / "base", tokenizer_path=str(tmp_path))
    loaded = load(outputs / "base", tokenizer_path=str(tmp_path), resize_emb=True)
    assert loaded.model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert generate_batch(
        loaded, [encode_prompt(loaded.chat, [said("user", "<drug59>")])], greedy(loaded, max_new_tokens=3)
    )


def test_a_smaller_tokenizer_never_shrinks_the_embeddings(outputs):
    loaded = load(outputs / "base", resize_emb=True)
    assert len(loaded.chat.tokenizer) < loaded.model.get_input_embeddings().weight.shape[0] == 448


def test_weights_are_fp32_on_cpu(outputs):
    if torch.accelerator.is_available():
        pytest.skip("the rule of this test is about machines without accelerator")
    assert load(outputs / "base").model.dtype == torch.float32
    assert load(outputs / "base", only_cpu=True).model.device.type == "cpu"


def test_a_model_without_chat_template_asks_for_a_template_name(tmp_path):
    bare = build_model(tmp_path / "bare", chat=False)
    with pytest.raises(ValueError, match="--template_name"):
        load(bare)
    assert load(bare, template_name="chatml").chat.name == "chatml"


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="'nobody/no-such-model' is not a directory here"):
        load("nobody/no-such-model")
