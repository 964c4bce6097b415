"""Each check passes where all is well, and stops the run when its fault is planted."""

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from safetensors.torch import load_file, save_file

from stagekit.checks import (
    NAMES,
    CheckError,
    Checks,
    finite,
    gradients_flow,
    leakage,
    loss_mask,
    no_forged_turns,
    packing_is_exact,
    processes_share_gradients,
    saved_is_loaded,
    template_parity,
)
from stagekit.encoding import Probe
from stagekit.records import Conversation
from stagekit.tokenization import IGNORE_INDEX, Collator, encode_conversation, prepare_chat

# -- running, skipping -----------------------------------------------------------------------------------------------


def fails():
    raise CheckError("seven is not eight")


def test_a_check_that_holds_is_logged_and_recorded(caplog):
    checks = Checks.from_flag(None)
    with caplog.at_level(logging.INFO):
        checks.run("finite", lambda a, b: (f"{a}{b}", "limit"), 1, 2)
    assert checks.outcomes == {"finite": {"passed": True, "value": "12", "limit": "limit"}}
    assert "check finite: passed (12; limit: limit)" in caplog.text


def test_a_check_that_does_not_hold_stops_the_run_and_names_itself():
    checks = Checks.from_flag(None)
    with pytest.raises(CheckError, match="^check memory failed: seven is not eight$"):
        checks.run("memory", fails)
    assert checks.outcomes == {}


def test_a_skipped_check_does_not_run_and_is_recorded(caplog):
    checks = Checks.from_flag(" memory, leakage ")
    checks.run("memory", fails)
    assert checks.outcomes == {"memory": {"passed": None, "value": "skipped by --skip_checks", "limit": ""}}
    assert "check memory: skipped by --skip_checks" in caplog.text
    with pytest.raises(CheckError):
        checks.run("finite", fails)


def test_an_unknown_check_is_refused_with_the_known_ones():
    with pytest.raises(ValueError) as refusal:
        Checks.from_flag("memory,los_mask")
    assert "--skip_checks 'los_mask' is not a check" in str(refusal.value)
    assert all(name in str(refusal.value) for name in NAMES)


# -- masks -----------------------------------------------------------------------------------------------------------


def talk(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


CALL = [{"type": "function", "function": {"name": "bmi", "arguments": {"kg": 70}}}]
WITH_TOOL = [
    *talk("BMI at 70 kg?"),
    {"role": "assistant", "content": "", "tool_calls": CALL},
    {"role": "tool", "content": "22.9"},
    {"role": "assistant", "content": "It is 22.9."},
]


@pytest.fixture
def chat():
    return prepare_chat(build_tokenizer(), "chatml")


def probes_of(chat, messages, max_length=1000, **options):
    """Healthy probes, as tokenisation makes them; their lists may be broken by the test."""
    samples, _ = encode_conversation(chat, Conversation(messages), max_length, **options)
    return [Probe(Conversation(messages), sample, "data.jsonl:3") for sample in samples]


def test_healthy_masks_pass(chat):
    probes = [
        *probes_of(chat, talk("What is a fever?", "A raised temperature.", "And then?", " Rest. \n")),
        *probes_of(chat, WITH_TOOL),
        *probes_of(chat, talk("What?", "发烧要多喝水。" * 30), max_length=30),  # cut, maybe inside a character
    ]
    assert [probe.sample.truncated for probe in probes] == [False, False, True]
    assert loss_mask(chat, probes, False) == ("3 samples", "exact")
    for limit in range(16, 30):  # wherever the cut falls
        loss_mask(chat, probes_of(chat, talk("What?", "发烧要多喝水。" * 30), max_length=limit), False)


def test_healthy_masks_of_whole_samples_pass(chat):
    assert loss_mask(chat, probes_of(chat, talk("Q", "A"), train_on_inputs=True), True)


def shift_labels(sample):
    sample.labels[:] = [IGNORE_INDEX, *sample.labels[:-1]]


def shift_labels_and_spans(sample):
    shift_labels(sample)
    sample.turns = {turn: (start + 1, end + 1) for turn, (start, end) in sample.turns.items()}


def shift_span(sample):
    """One token of the prompt more and the end-of-turn less, with labels that agree."""
    sample.turns = {turn: (start - 1, end - 1) for turn, (start, end) in sample.turns.items()}
    learn_spans(sample)


def learn_spans(sample):
    sample.labels[:] = [IGNORE_INDEX] * len(sample.labels)
    for start, end in sample.turns.values():
        sample.labels[start:end] = sample.input_ids[start:end]


def learn_a_question(sample):
    sample.labels[3] = sample.input_ids[3]


def learn_a_question_as_part_of_the_answer(sample):
    (turn, (start, end)) = next(iter(sample.turns.items()))
    sample.turns[turn] = (start - 4, end)
    learn_spans(sample)


def forget_an_answer(sample):
    sample.labels[:] = [IGNORE_INDEX] * len(sample.labels)


def forget_the_end_of_turn(sample):
    sample.turns = {turn: (start, end - 1) for turn, (start, end) in sample.turns.items()}
    learn_spans(sample)


def change_a_label(sample):
    start, _ = next(iter(sample.turns.values()))
    sample.labels[start] += 1


def change_a_token(sample):
    start, _ = next(iter(sample.turns.values()))
    sample.input_ids[start] += 1
    sample.labels[start] += 1


def pretend_a_cut(sample):
    sample.truncated = True


FAULTS = [
    (shift_labels, "outside of the answers are learnt"),
    (shift_labels_and_spans, "labels differ from the tokens"),
    (shift_span, "lacks its end-of-turn"),
    (learn_a_question, "outside of the answers are learnt"),
    (learn_a_question_as_part_of_the_answer, "but the answer is 'A raised temperature.'"),
    (forget_an_answer, "or answers are not"),
    (forget_the_end_of_turn, "lacks its end-of-turn"),
    (change_a_label, "labels differ from the tokens"),
    (change_a_token, "but the answer is 'A raised temperature.'"),
    (pretend_a_cut, "was cut but has an end-of-turn"),
]


@pytest.mark.parametrize("plant, message", FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_a_broken_mask_is_caught(chat, plant, message):
    probes = probes_of(chat, talk("What is a fever?", "A raised temperature."))
    loss_mask(chat, probes, False)
    plant(probes[0].sample)
    with pytest.raises(CheckError, match="data.jsonl:3: ") as stop:
        loss_mask(chat, probes, False)
    assert message in str(stop.value)


def test_an_end_of_turn_behind_a_cut_answer_is_caught(chat):
    (probe,) = probes_of(chat, talk("What?", "Rest and drink water. " * 20), max_length=30)
    assert probe.sample.truncated
    loss_mask(chat, [probe], False)
    probe.sample.input_ids[-1] = probe.sample.labels[-1] = chat.stop_ids[0]
    with pytest.raises(CheckError, match="was cut but has an end-of-turn"):
        loss_mask(chat, [probe], False)


def test_a_cut_that_is_not_the_start_of_the_answer_is_caught(chat):
    (probe,) = probes_of(chat, talk("What?", "Rest and drink water. " * 20), max_length=30)
    swapped = replace(probe, conversation=Conversation(talk("What?", "Drink and rest. " * 20)))
    with pytest.raises(CheckError, match="does not begin the answer"):
        loss_mask(chat, [swapped], False)


def test_a_tool_call_that_is_not_learnt_is_caught(chat):
    (probe,) = probes_of(chat, WITH_TOOL)
    other = [{**WITH_TOOL[1], "tool_calls": [{"type": "function", "function": {"name": "pulse", "arguments": {}}}]}]
    swapped = replace(probe, conversation=Conversation([WITH_TOOL[0], *other, *WITH_TOOL[2:]]))
    with pytest.raises(CheckError, match="the tool call 'pulse' is not in what is learnt"):
        loss_mask(chat, [swapped], False)


def test_prompts_that_should_be_learnt_and_are_not_are_caught(chat):
    with pytest.raises(CheckError, match="--train_on_inputs True, but not every token is learnt"):
        loss_mask(chat, probes_of(chat, talk("Q", "A")), True)


def excluding(messages, turn):
    return [{**message, "train": False} if number == turn else message for number, message in enumerate(messages)]


def test_masks_without_an_excluded_answer_pass(chat):
    messages = excluding(talk("Q1", "A1", "Q2", "A2", "Q3", "A3"), 3)
    loss_mask(chat, probes_of(chat, messages), False)
    loss_mask(chat, probes_of(chat, messages, train_on_inputs=True), True)
    loss_mask(chat, probes_of(chat, excluding(WITH_TOOL, 1), train_on_inputs=True), True)


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_an_excluded_answer_that_is_learnt_is_caught(chat, train_on_inputs):
    messages = talk("Q1", "A1", "Q2", "A2")
    (probe,) = probes_of(chat, messages, train_on_inputs=train_on_inputs)
    probe = replace(probe, conversation=Conversation(excluding(messages, 1)))
    with pytest.raises(CheckError, match="data.jsonl:3: an answer is learnt that the data excludes"):
        loss_mask(chat, [probe], train_on_inputs)


def test_a_question_left_out_beside_an_excluded_answer_is_caught(chat):
    (probe,) = probes_of(chat, excluding(talk("Q1", "A1", "Q2", "A2"), 1), train_on_inputs=True)
    probe.sample.labels[2] = IGNORE_INDEX
    with pytest.raises(CheckError, match="--train_on_inputs True, but not every token is learnt"):
        loss_mask(chat, [probe], True)


THOUGHTFUL = talk("Q", "<think>\nhm\n</think>\n\nyes")


@pytest.mark.parametrize("content", ["<think>hm</think>yes", "<think>\n\nhm\n</think>\n yes "])
def test_the_white_space_of_thoughts_is_the_templates(content):
    chat = prepare_chat(build_tokenizer(), "qwen3")
    (probe,) = probes_of(chat, THOUGHTFUL)
    loss_mask(chat, [replace(probe, conversation=Conversation(talk("Q", content)))], False)


@pytest.mark.parametrize("content", ["<think>hmm</think>yes", "yes", "hm", "<think>hm</think>no", "hm yes"])
def test_other_thoughts_than_the_datas_are_caught(content):
    chat = prepare_chat(build_tokenizer(), "qwen3")
    (probe,) = probes_of(chat, THOUGHTFUL)
    with pytest.raises(CheckError, match="learnt .*, but the answer is"):
        loss_mask(chat, [replace(probe, conversation=Conversation(talk("Q", content)))], False)


# -- templates -------------------------------------------------------------------------------------------------------

CHATML_IN_OTHER_WORDS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)


def test_prompts_equal_to_what_inference_sends_pass(chat):
    messages = [{"role": "system", "content": "S"}, *talk(*(f"{n} rest and drink water" for n in range(8)))]
    probes = [
        *probes_of(chat, talk("Q1", "A1", "Q2", "A2")),
        *probes_of(chat, messages, 50),
        *probes_of(chat, WITH_TOOL),
    ]
    assert len(probes) > 4  # some begin in the middle of their conversation
    value, limit = template_parity(chat, probes)
    assert value == f"{len(probes)} prompts, {len(probes)} equal to transformers' own, stop token '<|im_end|>'"


def test_a_template_changed_after_tokenisation_is_caught(chat):
    probes = probes_of(chat, talk("Q1", "A1"))
    chat.tokenizer.chat_template = CHATML_IN_OTHER_WORDS
    with pytest.raises(CheckError) as stop:
        template_parity(chat, probes)
    assert "data.jsonl:3: inference sends '<|im_start|>user: Q1" in str(stop.value)
    assert "training saw '<|im_start|>user\\nQ1" in str(stop.value)


def test_another_tokenizer_than_the_datas_is_caught(chat):
    probes = probes_of(chat, talk("What is a fever?", "A raised temperature."))
    with pytest.raises(CheckError, match="or the tokenizer is not the one the data was prepared with"):
        template_parity(prepare_chat(build_tokenizer(vocab_size=300), "chatml"), probes)


def test_two_bos_tokens_are_caught():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    source = tokenizer.chat_template
    tokenizer.chat_template = "{{ bos_token }}" + source
    once = prepare_chat(tokenizer, None)
    template_parity(once, probes_of(once, talk("Q", "A")))
    tokenizer.chat_template = "{{ bos_token + bos_token }}" + source
    twice = prepare_chat(tokenizer, None)
    with pytest.raises(CheckError, match="begins with two BOS tokens"):
        template_parity(twice, probes_of(twice, talk("Q", "A")))


def test_parity_without_a_prompt_is_no_proof(chat):
    with pytest.raises(CheckError, match="no prompt could be compared"):
        template_parity(chat, [])


def test_control_strings_of_a_user_pass_as_plain_text(chat):
    value, limit = no_forged_turns(chat)
    assert value == "4 control strings in a user's text" and limit == "0 control tokens"


def test_control_strings_that_become_control_tokens_are_caught(chat):
    with pytest.raises(CheckError, match="5 control tokens came out of a user's text"):  # each of 4, and one more
        no_forged_turns(replace(chat, control=re.compile(r"(?!)")))


def test_a_text_that_does_not_survive_is_caught():
    from tokenizers import normalizers

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("|", "/")
    with pytest.raises(CheckError, match="did not survive tokenisation unchanged"):
        no_forged_turns(prepare_chat(tokenizer, "chatml"))


# -- leakage ---------------------------------------------------------------------------------------------------------

HELD_OUT = [(number, f"valid.jsonl:{number}") for number in range(1, 101)]


def hashes(*values):
    return np.array(values, dtype=np.uint64)


def test_held_out_prompts_that_nobody_trained_on_pass(tmp_path):
    assert leakage(hashes(1000, 2000), HELD_OUT, None, 0.0) == ("0 of 100 held-out prompts seen in training", "0 %")
    np.save(tmp_path / "seen_prompts.npy", hashes(3000))
    assert leakage(hashes(1000), HELD_OUT, str(tmp_path), 0.0)[0].startswith("0 of 100")


def test_a_held_out_prompt_in_the_training_data_is_caught_and_named():
    with pytest.raises(CheckError) as stop:
        leakage(hashes(7, 1000, 9), HELD_OUT, None, 1.0)
    assert "2 of 100 held-out prompts seen in training (2.0 %, limit 1 %)" in str(stop.value)
    assert "valid.jsonl:7, valid.jsonl:9" in str(stop.value) and "--max_leaked_percentage" in str(stop.value)
    assert leakage(hashes(7, 1000, 9), HELD_OUT, None, 2.0)[0].startswith("2 of 100")


def test_a_held_out_prompt_that_an_ancestor_trained_on_is_caught(tmp_path):
    np.save(tmp_path / "seen_prompts.npy", hashes(5, 7))
    with pytest.raises(CheckError) as stop:
        leakage(hashes(7, 1000), HELD_OUT, str(tmp_path), 1.0)
    assert "2 of 100 held-out prompts seen in training, 1 of them by an earlier stage" in str(stop.value)
    assert "valid.jsonl:7, valid.jsonl:5" in str(stop.value)


def test_hashes_of_64_bits_are_compared_exactly(tmp_path):
    large = 2**64 - 1
    np.save(tmp_path / "seen_prompts.npy", hashes(large - 1))
    assert leakage(hashes(large - 2), [(large, "v:1")], str(tmp_path), 0.0)[0].startswith("0 of 1")
    with pytest.raises(CheckError):
        leakage(hashes(large), [(large, "v:1")], None, 0.0)


# -- packing ---------------------------------------------------------------------------------------------------------

SAMPLES = [[10 + 7 * k % 290 for k in range(9)], [20 + 11 * k % 280 for k in range(14)], [33, 44, 55]]


@pytest.fixture(scope="module")
def model(tiny_qwen3):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_qwen3)


class Deaf(torch.nn.Module):
    """A model that does not listen to some of its inputs."""

    def __init__(self, model, *ignored):
        super().__init__()
        self.model, self.ignored = model, ignored

    def forward(self, **inputs):
        return self.model(**{key: value for key, value in inputs.items() if key not in self.ignored})


@pytest.mark.parametrize("flatten", [False, True])
def test_samples_that_are_kept_apart_pass(model, flatten):
    model.train()
    value, limit = packing_is_exact(model, Collator(3, flatten=flatten), SAMPLES)
    assert value.startswith("3 samples in a row") and limit == "0.0001"
    assert model.training  # as it was found
    packing_is_exact(Deaf(model), Collator(3), SAMPLES)


def test_a_model_that_ignores_positions_is_caught(model):
    with pytest.raises(CheckError, match="packed samples see each other: .*--packing False"):
        packing_is_exact(Deaf(model, "position_ids"), Collator(3), SAMPLES)


def test_a_collator_that_does_not_restart_positions_is_caught(model):
    def collator(rows):
        return Collator(3)([{**row, "lengths": [sum(row["lengths"])]} for row in rows])

    with pytest.raises(CheckError, match="packed samples see each other"):
        packing_is_exact(model, collator, SAMPLES)


def test_a_collator_that_puts_a_mask_over_the_positions_is_caught(model):
    def collator(rows):
        batch = Collator(3)(rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    with pytest.raises(CheckError, match="packed samples see each other"):
        packing_is_exact(model, collator, SAMPLES)


def test_logits_that_are_no_numbers_are_caught(model):
    class Broken(Deaf):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits[:] = float("nan")
            return output

    with pytest.raises(CheckError):
        packing_is_exact(Broken(model), Collator(3), SAMPLES)


# -- processes and gradients -----------------------------------------------------------------------------------------


def trainer_of(processes=1, kind="NO", norms=None, deepspeed=None):
    """What the checks look at in a trainer; norms are those of the other processes."""
    return SimpleNamespace(
        is_deepspeed_enabled=False,
        accelerator=SimpleNamespace(
            num_processes=processes,
            distributed_type=SimpleNamespace(name=kind),
            gather=lambda own: torch.cat([own, torch.tensor(norms or [])]),
        ),
        args=SimpleNamespace(device="cpu", deepspeed=deepspeed),
    )


@pytest.mark.parametrize(
    "started, believed, kind, holds",
    [
        ("1", 1, "NO", True),
        ("2", 2, "MULTI_CPU", True),
        ("2", 1, "NO", False),
        ("2", 2, "NO", False),
        ("2", 4, "MULTI_CPU", False),
    ],
)
def test_processes_that_know_nothing_of_each_other_are_caught(monkeypatch, started, believed, kind, holds):
    monkeypatch.setenv("WORLD_SIZE", started)
    if holds:
        assert processes_share_gradients(trainer_of(believed, kind))[1] == started
    else:
        with pytest.raises(CheckError, match="2 processes were started, but the trainer sees"):
            processes_share_gradients(trainer_of(believed, kind))


def linear(gradient):
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = None if gradient is None else torch.tensor([gradient])
    return layer


def test_a_gradient_passes():
    value, limit = gradients_flow(trainer_of(), linear([3.0, 4.0]))
    assert value == "norm 5 on 1 process(es)"
    gradients_flow(trainer_of(norms=[5.0]), linear([3.0, 4.0]))


@pytest.mark.parametrize("gradient", [None, [0.0, 0.0]])
def test_a_gradient_of_zero_is_caught(gradient):
    with pytest.raises(CheckError, match="the gradient of the first step is zero, so nothing is trained"):
        gradients_flow(trainer_of(), linear(gradient))


def test_the_gradient_of_a_frozen_layer_does_not_count():
    layer = linear([3.0, 4.0])
    layer.weight.requires_grad_(False)
    with pytest.raises(CheckError, match="zero"):
        gradients_flow(trainer_of(), layer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_caught(value):
    with pytest.raises(CheckError, match=f"the gradient norm of the first step is {value}"):
        gradients_flow(trainer_of(), linear([1.0, value]))


def test_processes_with_different_gradients_are_caught():
    with pytest.raises(CheckError, match="the processes hold different gradients"):
        gradients_flow(trainer_of(norms=[5.1]), linear([3.0, 4.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_is_caught(value):
    assert finite(2.5, 10) == ("every logged loss up to step 10", "finite")
    with pytest.raises(CheckError, match=f"the loss is {value} at step 3; lower --learning_rate"):
        finite(value, 3)


def test_every_logged_loss_is_looked_at():
    from stagekit.trainers import FirstStep

    checks, state = Checks(), SimpleNamespace(global_step=4)
    watch = FirstStep(SimpleNamespace(run=SimpleNamespace(checks=checks)))
    watch.on_log(None, state, None, logs={"loss": 1.0})
    watch.on_log(None, state, None, logs={"train_runtime": float("nan")})
    assert checks.outcomes["finite"]["passed"]
    for name in ("loss", "eval_loss"):
        with pytest.raises(CheckError, match="check finite failed: the loss is nan at step 4"):
            watch.on_log(None, state, None, logs={name: float("nan")})


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_qwen3):
    """A LoRA model whose B matrices are not zero, and its trained tensors."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_qwen3)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model, get_peft_model_state_dict(model)


@pytest.fixture
def saved(adapter, tmp_path):
    """The directory of the saved adapter and a function that changes its tensors."""
    adapter[0].save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"

    def change(function):
        tensors = load_file(path)
        function(tensors, sorted(tensors)[3])
        save_file(tensors, path)

    return str(tmp_path), change


def test_an_adapter_that_was_saved_whole_passes(adapter, saved):
    directory, _ = saved
    value, limit = saved_is_loaded(directory, adapter[1])
    assert value == f"{len(adapter[1])} tensors read back, equal" and limit == "exact"
    value, _ = saved_is_loaded(directory, adapter[1], lambda: 1e-7)
    assert value.endswith("logits differ by 1e-07")


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda tensors, name: tensors.update({name: torch.empty(0)}), "was saved empty"),
        (lambda tensors, name: tensors.pop(name), "was trained but not saved"),
        (lambda tensors, name: tensors[name].view(-1)[0].add_(0.01), "differs from what was trained"),
        (lambda tensors, name: tensors[name].view(-1)[0].fill_(float("nan")), "differs from what was trained"),
        (lambda tensors, name: tensors.update({name: tensors[name][:2].clone()}), "was saved with shape"),
        (lambda tensors, name: tensors.clear(), "holds no weights"),
    ],
)
def test_an_adapter_that_was_not_saved_as_it_was_trained_is_caught(adapter, saved, fault, message):
    directory, change = saved
    change(fault)
    with pytest.raises(CheckError, match=message):
        saved_is_loaded(directory, adapter[1])


def test_a_directory_without_weights_is_caught(adapter, tmp_path):
    with pytest.raises(CheckError, match="holds no weights"):
        saved_is_loaded(str(tmp_path), adapter[1])


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_a_reloaded_adapter_with_other_logits_is_caught(adapter, saved, difference):
    with pytest.raises(CheckError, match="the reloaded adapter gives other logits"):
        saved_is_loaded(saved[0], adapter[1], lambda: difference)


def test_weights_in_several_files_are_read_together(adapter, tmp_path):
    names = sorted(adapter[1])
    for part, chosen in enumerate((names[:5], names[5:])):
        tensors = {name: adapter[1][name].detach().clone() for name in chosen}
        save_file(tensors, tmp_path / f"model-{part}.safetensors")
    assert saved_is_loaded(str(tmp_path), adapter[1])
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckError, match="was trained but not saved"):
        saved_is_loaded(str(tmp_path), adapter[1])
