"""The tokenizers' own templates of known model families: what is learnt under them, and what is asked.

The originals are those TRL ships; Mistral's and GLM-4's are written here from their formats. Every expected text is
written by hand.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import trl
from conftest import write_jsonl
from test_tokenization import BMI, NO_MARKS, calls, chat_of, learnt, said, talk, text_of
from transformers.utils.chat_template_utils import render_jinja_template

from stagekit.chat_templates import has_thoughts
from stagekit.checks import loss_mask, no_forged_turns, template_parity
from stagekit.encoding import Probe, encode_samples
from stagekit.likelihood import candidate_ids
from stagekit.pairs import encode_answers
from stagekit.records import Conversation, RowError
from stagekit.tokenization import encode_conversation, encode_prompt, prepare_chat, settle_thinking

# Up to v0.2: no system role, no tools, roles must alternate.
MISTRAL_V2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# v0.3: a system text stands before the last question, and nowhere once it is answered; the tools stand there, too;
# calls have ids of nine characters.
MISTRAL_V3 = """\
{%- set turns = messages %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- set asked = turns | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m["role"] == "user" %}
        {%- if tools and m == asked[-1] %}
            {{- "[AVAILABLE_TOOLS] " ~ (tools | tojson) ~ "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\\n\\n" + m["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + m["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif m["tool_calls"] is defined %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in m["tool_calls"] %}
            {%- if call["id"] is not defined or call["id"] | length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- (call["function"] | tojson)[:-1] + ', "id": "' + call["id"] + '"}' + ("]" if loop.last else ", ") }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m["role"] == "assistant" %}
        {{- " " + m["content"] + eos_token }}
    {%- elif m["role"] == "tool" %}
        {%- if m["tool_call_id"] is not defined or m["tool_call_id"] | length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + m["content"] + ', "call_id": "' + m["tool_call_id"] + '"}' }}
        {{- "[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("only user, assistant and tool") }}
    {%- endif %}
{%- endfor %}"""
# glm-4-9b-chat: an answer has no end of its own. Its tools stand inside of messages, where nobody else puts them.
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{% if m['content'] %}<|{{ m['role'] }}|>{{ m['metadata'] }}\n"
    "{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def shipped(name):
    """A template that TRL ships."""
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this trl has no {path.name}")
    return path.read_text(encoding="utf-8")


THINK, TOOL_WORDS = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
DEEPSEEK = {
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "tokens": tuple(
        f"<｜{word}｜>"
        for word in (
            *(
                "User",
                "Assistant",
                "tool▁sep",
                "tool▁calls▁begin",
                "tool▁calls▁end",
                "tool▁call▁begin",
                "tool▁call▁end",
            ),
            *("tool▁outputs▁begin", "tool▁outputs▁end", "tool▁output▁begin", "tool▁output▁end"),
        )
    ),
}
MISTRAL = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]")
BOS = {"bos_token": "<s>", "eos_token": "</s>"}
BEGIN = {"bos_token": "<|begin_of_text|>"}


def original(name):
    """The template of a family as its models ship it."""
    if name == "deepseekv3 without thoughts":  # as V3 was released: its prompts open no thought
        source = shipped("deepseekv3").replace("<think>\\n", "")
        assert "<think>" not in source
        return source
    written = {"mistral v0.2": MISTRAL_V2, "mistral v0.3": MISTRAL_V3, "glm4": GLM4}
    return written[name] if name in written else shipped(name)


TOKENS = {
    "qwen": {"words": (*THINK, *TOOL_WORDS)},
    "llama": {"tokens": HEADERS, **BEGIN},
    "gemma": {"tokens": ("<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>"), "bos_token": "<bos>"},
    "phi": {"tokens": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")},
    "mistral": {"tokens": MISTRAL, **BOS},
    "glm": {"tokens": GLM, "words": (*THINK, *TOOL_WORDS)},
    "deepseek": {"words": THINK, **DEEPSEEK},
}


def family(name):
    """A chat with a family's own template on a tiny tokenizer that has the family's tokens."""
    return chat_of(source=original(name), **next(TOKENS[kind] for kind in TOKENS if name.startswith(kind)))


def check(chat, conversation, samples):
    """Whatever the template: what is asked is what was learnt, and the run's own checks hold."""
    messages, tools = conversation.messages, conversation.tools
    for sample in samples:
        for turn, (start, _) in sample.turns.items():
            thinking = chat.thinking_of(messages[turn])
            assert encode_prompt(chat, messages[:turn], tools, thinking) == sample.input_ids[:start]
            sent = chat.tokenizer.apply_chat_template(
                messages[:turn],
                tools=tools,
                add_generation_prompt=True,
                return_dict=False,
                **({} if thinking is None else {"enable_thinking": thinking}),
            )
            assert sent == sample.input_ids[:start]
        bos = chat.tokenizer.bos_token_id
        assert bos is None or sample.input_ids[0] == bos and sample.input_ids.count(bos) == 1
        assert sample.input_ids[max(end for _, end in sample.turns.values()) - 1] in chat.stop_ids
    probes = [Probe(conversation, sample, "data.jsonl:1") for sample in samples]
    loss_mask(chat, probes, False)
    template_parity(chat, probes)
    no_forged_turns(chat)


def trained(chat, messages, tools=None):
    """(text of each sample, what is learnt in it), after the checks that hold for all."""
    conversation = Conversation(messages, tools)
    samples, lost = encode_conversation(chat, conversation, 4000)
    assert lost == 0
    check(chat, conversation, samples)
    return [text_of(chat, sample.input_ids) for sample in samples], [learnt(chat, sample) for sample in samples]


# -- dialogues -------------------------------------------------------------------------------------------------------

QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
DATED = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n"
)
ROLE = {role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("system", "user", "assistant", "ipython")}
LLAMA = f"{ROLE['user']}Q1<|eot_id|>{ROLE['assistant']}A1<|eot_id|>"
LLAMA += f"{ROLE['user']}Q2<|eot_id|>{ROLE['assistant']}A2<|eot_id|>"
GEMMA = (
    "Q1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n<start_of_turn>user\nQ2<end_of_turn>\n"
    "<start_of_turn>model\nA2<end_of_turn>\n"
)
PHI = "<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n<|endoftext|>"
CHATML = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
NO_THOUGHTS = "<think>\n\n</think>\n\n"
V3 = "<｜User｜>Q1<｜Assistant｜>A1<｜end▁of▁sentence｜><｜User｜>Q2<｜Assistant｜>A2<｜end▁of▁sentence｜>"

# Two rounds, without and with the system text S: (texts of the samples, what is learnt in each).
ROUNDS = {
    "qwen2_5": (
        [f"{QWEN}{CHATML}<|im_start|>assistant\nA2<|im_end|>\n"],
        [f"<|im_start|>system\nS<|im_end|>\n{CHATML}<|im_start|>assistant\nA2<|im_end|>\n"],
        [["A1<|im_end|>", "A2<|im_end|>"]],
    ),
    "qwen3": (  # the block that says "no thoughts" stands before the last answer only: a sample an answer
        [
            f"<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n{NO_THOUGHTS}A1<|im_end|>",
            f"{CHATML}<|im_start|>assistant\n{NO_THOUGHTS}A2<|im_end|>",
        ],
        [
            "<|im_start|>system\nS<|im_end|>\n"
            f"<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n{NO_THOUGHTS}A1<|im_end|>",
            f"<|im_start|>system\nS<|im_end|>\n{CHATML}<|im_start|>assistant\n{NO_THOUGHTS}A2<|im_end|>",
        ],
        [["A1<|im_end|>"], ["A2<|im_end|>"]],
    ),
    "llama3": (
        [f"<|begin_of_text|>{LLAMA}"],
        [f"<|begin_of_text|>{ROLE['system']}S<|eot_id|>{LLAMA}"],
        [["A1<|eot_id|>", "A2<|eot_id|>"]],
    ),
    "llama3_1": ([f"{DATED}<|eot_id|>{LLAMA}"], [f"{DATED}S<|eot_id|>{LLAMA}"], [["A1<|eot_id|>", "A2<|eot_id|>"]]),
    "llama3_2": ([f"{DATED}<|eot_id|>{LLAMA}"], [f"{DATED}S<|eot_id|>{LLAMA}"], [["A1<|eot_id|>", "A2<|eot_id|>"]]),
    "gemma": (
        [f"<bos><start_of_turn>user\n{GEMMA}"],
        [f"<bos><start_of_turn>user\nS\n\n{GEMMA}"],
        [["A1<end_of_turn>", "A2<end_of_turn>"]],
    ),
    "gemma3": (
        [f"<bos><start_of_turn>user\n{GEMMA}"],
        [f"<bos><start_of_turn>user\nS\n\n{GEMMA}"],
        [["A1<end_of_turn>", "A2<end_of_turn>"]],
    ),
    "phi3": ([PHI], [f"<|system|>\nS<|end|>\n{PHI}"], [["A1<|end|>", "A2<|end|>"]]),
    "phi3_5": ([PHI], [f"<|system|>\nS<|end|>\n{PHI}"], [["A1<|end|>", "A2<|end|>"]]),
    "mistral v0.2": (
        ["<s>[INST] Q1 [/INST]A1</s>[INST] Q2 [/INST]A2</s>"],
        ["<s>[INST] S\n\nQ1 [/INST]A1</s>[INST] Q2 [/INST]A2</s>"],
        [["A1</s>", "A2</s>"]],
    ),
    "mistral v0.3": (
        ["<s>[INST] Q1[/INST] A1</s>[INST] Q2[/INST] A2</s>"],
        ["<s>[INST] S\n\nQ1[/INST] A1</s>", "<s>[INST] Q1[/INST] A1</s>[INST] S\n\nQ2[/INST] A2</s>"],
        [[" A1</s>", " A2</s>"]],
        [[" A1</s>"], [" A2</s>"]],
    ),
    "glm4": (
        ["[gMASK]<sop><|user|>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2<|user|>"],
        ["[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2<|user|>"],
        [["\nA1<|user|>", "\nA2<|user|>"]],
    ),
    "glm4moe": (
        [
            "[gMASK]<sop><|user|>\nQ1/nothink<|assistant|>\n<think></think>\nA1"
            "<|user|>\nQ2/nothink<|assistant|>\n<think></think>\nA2<|user|>"
        ],
        [
            "[gMASK]<sop><|system|>\nS<|user|>\nQ1/nothink<|assistant|>\n<think></think>\nA1"
            "<|user|>\nQ2/nothink<|assistant|>\n<think></think>\nA2<|user|>"
        ],
        [["\nA1<|user|>", "\nA2<|user|>"]],
    ),
    "deepseekv3 without thoughts": (
        [f"<｜begin▁of▁sentence｜>{V3}"],
        [f"<｜begin▁of▁sentence｜>S{V3}"],
        [["A1<｜end▁of▁sentence｜>", "A2<｜end▁of▁sentence｜>"]],
    ),
    **{
        name: (  # every prompt opens a thought; without one it is closed at once, and history shows none of it
            [
                f"<｜begin▁of▁sentence｜><｜User｜>Q1<｜Assistant｜>{NO_THOUGHTS}A1<｜end▁of▁sentence｜>",
                "<｜begin▁of▁sentence｜><｜User｜>Q1<｜Assistant｜>A1<｜end▁of▁sentence｜>"
                f"<｜User｜>Q2<｜Assistant｜>{NO_THOUGHTS}A2<｜end▁of▁sentence｜>",
            ],
            [
                f"<｜begin▁of▁sentence｜>S<｜User｜>Q1<｜Assistant｜>{NO_THOUGHTS}A1<｜end▁of▁sentence｜>",
                "<｜begin▁of▁sentence｜>S<｜User｜>Q1<｜Assistant｜>A1<｜end▁of▁sentence｜>"
                f"<｜User｜>Q2<｜Assistant｜>{NO_THOUGHTS}A2<｜end▁of▁sentence｜>",
            ],
            [["A1<｜end▁of▁sentence｜>"], ["A2<｜end▁of▁sentence｜>"]],
        )
        for name in ("deepseekv3", "deepseek_r1_distill")
    },
}


@pytest.mark.parametrize("name", ROUNDS)
def test_exactly_the_answers_and_their_stop_are_learnt(name):
    chat = family(name)
    plain, with_system, answers, *more = ROUNDS[name]
    assert trained(chat, talk("Q1", "A1", "Q2", "A2")) == (plain, answers)
    assert trained(chat, talk("Q1", "A1", "Q2", "A2", system="S")) == (with_system, *(more or [answers]))
    text, first = trained(chat, talk("Q1", "A1"))
    assert first == [answers[0][:1]] and (len(answers) == 1 or text == plain[:1])


@pytest.mark.parametrize("name", ROUNDS)
def test_a_prompt_is_letter_by_letter_what_the_original_writes(name):
    chat, source = family(name), original(name)
    thinks = {"qwen3": (False, True), "glm4moe": (False, True), "deepseekv3": (True,), "deepseek_r1_distill": (True,)}
    for messages in (talk("Q1"), talk("头痛", " A1\n", "Q2"), talk("Q1", "A1", "Q2", "A2", "Q3", system="S")):
        for thinking in thinks.get(name, (None,)):
            options = {"enable_thinking": thinking, "date_string": "26 Jul 2024", "add_generation_prompt": True}
            if messages[0]["role"] == "system" and name in ("gemma", "mistral v0.2"):
                with pytest.raises(jinja2.TemplateError):
                    chat.tokenizer.apply_chat_template(messages, chat_template=source, **options)
                continue
            if name == "llama3_2":  # it asks the clock, whatever date it is told
                source = source.replace('strftime_now("%d %b %Y")', "date_string")
            sent = chat.tokenizer.apply_chat_template(messages, chat_template=source, return_dict=False, **options)
            assert encode_prompt(chat, messages, None, thinking) == sent


@pytest.mark.parametrize("name", ROUNDS)
def test_a_checkpoints_template_is_left_as_it_was_found(name, tmp_path):
    from transformers import AutoTokenizer

    chat = family(name)
    chat.tokenizer.save_pretrained(tmp_path)
    again = prepare_chat(AutoTokenizer.from_pretrained(tmp_path), None)
    assert again.tokenizer.chat_template == chat.tokenizer.chat_template
    assert (again.ends, again.stop_ids, again.stable, again.thinks) == (
        chat.ends,
        chat.stop_ids,
        chat.stable,
        chat.thinks,
    )
    assert trained(again, talk("Q1", "A1", "Q2", "A2", system="S"))[1] == (ROUNDS[name][3:] or ROUNDS[name][2:])[0]


STOPS = {"qwen": ["<|im_end|>"], "llama": ["<|eot_id|>"], "gemma": ["<end_of_turn>"], "phi": ["<|end|>"]}
STOPS |= {"mistral": [], "deepseek": [], "glm4": ["<|user|>"], "glm4moe": ["<|user|>", "<|observation|>"]}


@pytest.mark.parametrize("name", ROUNDS)
def test_generation_stops_where_answers_end(name):
    chat, stops = family(name), [stops for kind, stops in STOPS.items() if name.startswith(kind)][-1]
    assert chat.tokenizer.convert_ids_to_tokens(chat.stop_ids) == [*stops, chat.tokenizer.eos_token]


def test_white_space_that_a_template_strips_is_not_learnt():
    for name, end in (("llama3_1", "<|eot_id|>"), ("gemma", "<end_of_turn>")):
        chat = family(name)
        _, answers = trained(chat, talk("\nQ1 ", " A1\n\n", "Q2", "\tA2 ", system=" S\n"))
        assert answers == [[f"A1{end}", f"A2{end}"]]
    _, answers = trained(family("phi3"), talk("Q1", " A1\n"))
    assert answers == [[" A1\n<|end|>"]]


# -- tools -----------------------------------------------------------------------------------------------------------

DIALOGUE = [
    said("user", "BMI?"),
    said("assistant", "", tool_calls=calls("bmi", kg=70)),
    said("tool", "22.9"),
    said("assistant", "It is 22.9."),
    said("user", "Thanks."),
    said("assistant", "Bye."),
]
PLAIN_CALL = '<tool_call>\n{"name": "bmi", "arguments": {"kg": 70}}\n</tool_call>'
RESULT = "<tool_response>\n22.9\n</tool_response>"
# What is learnt of the dialogue, and how the result stands in front of what is said of it.
TOOLS = {
    "qwen2_5": (
        [[f"{PLAIN_CALL}<|im_end|>", "It is 22.9.<|im_end|>", "Bye.<|im_end|>"]],
        f"user\n{RESULT}<|im_end|>\n",
    ),
    "qwen3": (
        [[f"{PLAIN_CALL}<|im_end|>"], ["It is 22.9.<|im_end|>"], ["Bye.<|im_end|>"]],
        f"user\n{RESULT}<|im_end|>\n",
    ),
    "llama3_1": (
        [['{"name": "bmi", "parameters": {"kg": 70}}<|eot_id|>', "It is 22.9.<|eot_id|>", "Bye.<|eot_id|>"]],
        f'{ROLE["ipython"]}"22.9"<|eot_id|>',
    ),
    "llama3_2": (
        [['{"name": "bmi", "parameters": {"kg": 70}}<|eot_id|>', "It is 22.9.<|eot_id|>", "Bye.<|eot_id|>"]],
        f'{ROLE["ipython"]}"22.9"<|eot_id|>',
    ),
    "mistral v0.3": (  # the functions move to the last question: a sample an answer
        [
            ['[TOOL_CALLS] [{"name": "bmi", "arguments": {"kg": 70}, "id": "call00001"}]</s>'],
            [" It is 22.9.</s>"],
            [" Bye.</s>"],
        ],
        '[TOOL_RESULTS] {"content": 22.9, "call_id": "call00001"}[/TOOL_RESULTS]',
    ),
    "glm4moe": (
        [
            [
                "\n<tool_call>bmi\n<arg_key>kg</arg_key>\n<arg_value>70</arg_value>\n</tool_call><|observation|>",
                "\nIt is 22.9.<|user|>",
                "\nBye.<|user|>",
            ]
        ],
        f"<|observation|>\n{RESULT}<|assistant|>",
    ),
    "deepseekv3": (
        [
            [
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>bmi\n```json\n"
                '{"kg": 70}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
            ],
            ["It is 22.9.<｜end▁of▁sentence｜>"],
            ["Bye.<｜end▁of▁sentence｜>"],
        ],
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>22.9<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
    ),
    # These know no tools: plain JSON.
    "llama3": (
        [[f"{PLAIN_CALL}<|eot_id|>", "It is 22.9.<|eot_id|>", "Bye.<|eot_id|>"]],
        f"{ROLE['user']}{RESULT}<|eot_id|>",
    ),
    "gemma": (
        [[f"{PLAIN_CALL}<end_of_turn>", "It is 22.9.<end_of_turn>", "Bye.<end_of_turn>"]],
        f"<start_of_turn>user\n{RESULT}<end_of_turn>\n",
    ),
    "phi3": ([[f"{PLAIN_CALL}<|end|>", "It is 22.9.<|end|>", "Bye.<|end|>"]], f"<|user|>\n{RESULT}<|end|>\n"),
    "mistral v0.2": ([[f"{PLAIN_CALL}</s>", "It is 22.9.</s>", "Bye.</s>"]], f"[INST] {RESULT} [/INST]"),
    "glm4": (
        [[f"\n{PLAIN_CALL}<|user|>", "\nIt is 22.9.<|user|>", "\nBye.<|user|>"]],
        f"<|user|>\n{RESULT}<|assistant|>",
    ),
    "deepseek_r1_distill": (
        [[f"{PLAIN_CALL}<｜end▁of▁sentence｜>"], ["It is 22.9.<｜end▁of▁sentence｜>"], ["Bye.<｜end▁of▁sentence｜>"]],
        f"<｜User｜>{RESULT}<｜Assistant｜>",
    ),
}


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("system", [[], [said("system", "Be brief.")]], ids=["", "system"])
def test_calls_are_learnt_and_results_are_not(name, system):
    texts, answers = trained(family(name), [*system, *DIALOGUE], [BMI])
    expected, result = TOOLS[name]
    if name == "glm4moe" or len(expected) == 1 and name != "mistral v0.3":
        assert len(texts) == 1
    assert answers == expected
    for text in texts:
        assert '"Body mass index"' in text and (not system or "Be brief." in text or name == "mistral v0.3")
    assert result in texts[-1] and not any("22.9\n" in part or '22.9"' in part for parts in answers for part in parts)


def test_a_conversation_that_ends_with_a_call_learns_to_stop_there():
    for name, end in (("glm4moe", "<|observation|>"), ("glm4", "<|user|>"), ("qwen2_5", "<|im_end|>")):
        _, ((call,),) = trained(family(name), DIALOGUE[:2], [BMI])
        assert call.endswith(end)


def test_two_calls_where_a_template_takes_one_are_refused_with_its_reason():
    both = [DIALOGUE[0], said("assistant", "", tool_calls=calls("bmi", kg=70) + calls("bmi", kg=80))]
    with pytest.raises(RowError, match="refuses this conversation: This model only supports single tool-calls"):
        encode_conversation(family("llama3_1"), Conversation(both, [BMI]), 2000)
    assert len(trained(family("llama3"), both, [BMI])[1][0]) == 1


def test_words_beside_a_call_that_a_template_drops_are_refused():
    spoken = [DIALOGUE[0], said("assistant", "One moment.", tool_calls=calls("bmi", kg=70))]
    with pytest.raises(RowError, match="leaves out a part of this answer; use --template_name"):
        encode_conversation(family("llama3_1"), Conversation(spoken, [BMI]), 2000)
    ((answer,),) = trained(family("llama3"), spoken, [BMI])[1]
    assert answer == f"One moment.\n{PLAIN_CALL}<|eot_id|>"


def test_a_second_call_that_deepseek_writes_without_its_header_is_refused():
    again = [*DIALOGUE[:5], said("assistant", "", tool_calls=calls("bmi", kg=80)), *DIALOGUE[2:4]]
    with pytest.raises(RowError, match="does not let this answer follow its prompt; use --template_name"):
        encode_conversation(family("deepseekv3"), Conversation(again, [BMI]), 2000)


def test_a_result_inside_of_an_answers_own_turn_is_not_learnt():
    chat = family("gemma4_v5")
    assert trained(chat, talk("Q1", "A1", system="S"))[1] == [["A1<turn|>"]]
    with pytest.raises(RowError, match="does not close this answer, and nothing would learn to"):
        encode_conversation(chat, Conversation(DIALOGUE, [BMI]), 2000)


# -- thoughts --------------------------------------------------------------------------------------------------------

FIRST, SECOND = "<think>\nhm\n</think>\n\nA1", "<think>\nso\n</think>\n\nA2"
ASK = "<|im_start|>user\nQ{0}<|im_end|>\n<|im_start|>assistant\n"
Q1, Q2 = ASK.format(1), ASK.format(2)
R1, EOS = "<｜begin▁of▁sentence｜><｜User｜>Q1<｜Assistant｜>", "<｜end▁of▁sentence｜>"


def test_qwen3_learns_thoughts_behind_the_prompt_that_asks_for_them():
    texts, answers = trained(family("qwen3"), talk("Q1", FIRST, "Q2", SECOND))
    assert texts == [f"{Q1}{FIRST}<|im_end|>", f"{Q1}A1<|im_end|>\n{Q2}{SECOND}<|im_end|>"]
    assert answers == [[f"{FIRST}<|im_end|>"], [f"{SECOND}<|im_end|>"]]


def test_answers_with_and_without_thoughts_are_each_learnt_behind_their_own_prompt():
    texts, answers = trained(family("qwen3"), talk("Q1", FIRST, "Q2", "A2"))
    assert texts == [f"{Q1}{FIRST}<|im_end|>", f"{Q1}A1<|im_end|>\n{Q2}{NO_THOUGHTS}A2<|im_end|>"]
    assert answers == [[f"{FIRST}<|im_end|>"], ["A2<|im_end|>"]]
    texts, answers = trained(family("qwen3"), talk("Q1", "A1", "Q2", SECOND))
    assert texts == [f"{Q1}{NO_THOUGHTS}A1<|im_end|>", f"{Q1}A1<|im_end|>\n{Q2}{SECOND}<|im_end|>"]


@pytest.mark.parametrize("content", ["<think>hm</think>A1", "\n<think>\n\nhm\n\n</think>A1", FIRST])
def test_the_template_settles_the_white_space_of_a_thought(content):
    assert trained(family("qwen3"), talk("Q1", content)) == ([f"{Q1}{FIRST}<|im_end|>"], [[f"{FIRST}<|im_end|>"]])


@pytest.mark.parametrize("content", [f"{NO_THOUGHTS}A1", "<think></think>\nA1", "<think> </think>A1"])
def test_an_empty_thought_is_none(content):
    assert trained(family("qwen3"), talk("Q1", content)) == ([f"{Q1}{NO_THOUGHTS}A1<|im_end|>"], [["A1<|im_end|>"]])
    named = chat_of("qwen3", words=THINK)
    text = f"{Q1}{NO_THOUGHTS}A1<|im_end|>\n"
    assert trained(named, talk("Q1", content)) == ([text], [["A1<|im_end|>"]])


def test_a_thought_that_the_template_would_take_from_the_middle_of_an_answer_is_refused():
    with pytest.raises(RowError, match="does not let this answer follow its prompt"):
        encode_conversation(family("qwen3"), Conversation(talk("Q1", "It says </think> there.")), 2000)


def test_qwen3_by_name_keeps_thoughts_in_history_and_learns_all_in_one_sample():
    chat = chat_of("qwen3", words=THINK)
    texts, answers = trained(chat, talk("Q1", FIRST, "Q2", "A2", "Q3", SECOND))
    q3 = ASK.format(3)
    assert texts == [f"{Q1}{FIRST}<|im_end|>\n{Q2}{NO_THOUGHTS}A2<|im_end|>\n{q3}{SECOND}<|im_end|>\n"]
    assert answers == [[f"{FIRST}<|im_end|>", "A2<|im_end|>", f"{SECOND}<|im_end|>"]]


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
def test_deepseeks_prompt_opens_the_thought_that_the_answer_goes_on_with(name):
    texts, answers = trained(family(name), talk("Q1", FIRST, "Q2", SECOND))
    # History shows what is behind </think>, blank lines included: so the template writes it.
    assert texts == [f"{R1}{FIRST}{EOS}", f"{R1}\n\nA1{EOS}<｜User｜>Q2<｜Assistant｜>{SECOND}{EOS}"]
    assert answers == [[f"hm\n</think>\n\nA1{EOS}"], [f"so\n</think>\n\nA2{EOS}"]]


def test_thoughts_that_a_template_drops_from_every_answer_are_learnt_all_the_same():
    texts, answers = trained(family("deepseekv3 without thoughts"), talk("Q1", FIRST, "Q2", SECOND))
    assert texts == [f"{R1}{FIRST}{EOS}", f"{R1}\n\nA1{EOS}<｜User｜>Q2<｜Assistant｜>{SECOND}{EOS}"]
    assert answers == [[f"{FIRST}{EOS}"], [f"{SECOND}{EOS}"]]


def test_qwen3_5_and_glm_think_in_their_own_form():
    texts, answers = trained(family("qwen3_5_think"), talk("Q1", FIRST, "Q2", SECOND))
    assert texts == [f"{Q1}{FIRST}<|im_end|>", f"{Q1}A1<|im_end|>\n{Q2}{SECOND}<|im_end|>"]
    assert answers == [["hm\n</think>\n\nA1<|im_end|>"], ["so\n</think>\n\nA2<|im_end|>"]]
    texts, answers = trained(family("glm4moe"), talk("Q1", FIRST, "Q2", "A2"))
    assert texts == [
        "[gMASK]<sop><|user|>\nQ1<|assistant|>\n<think>hm</think>\nA1<|user|>",
        "[gMASK]<sop><|user|>\nQ1/nothink<|assistant|>\n<think></think>\nA1"
        "<|user|>\nQ2/nothink<|assistant|>\n<think></think>\nA2<|user|>",
    ]
    assert answers == [["\n<think>hm</think>\nA1<|user|>"], ["\nA2<|user|>"]]


@pytest.mark.parametrize("name", ["phi3", "mistral v0.3", "qwen2_5", "gemma3"])
def test_where_a_template_knows_no_thoughts_they_are_text(name):
    (answers,) = trained(family(name), talk("Q1", FIRST, "Q2", SECOND))[1]
    assert [FIRST in answers[0], SECOND in answers[1]] == [True, True]


@pytest.mark.parametrize("name", ["qwen3", "deepseekv3"])
def test_what_most_answers_did_is_what_inference_asks_for(name):
    chat = family(name)
    asked = {
        thinking: chat.tokenizer.apply_chat_template(
            talk("Q1"), add_generation_prompt=True, return_dict=False, enable_thinking=thinking
        )
        for thinking in (False, True)
    }
    assert asked[False] != asked[True]
    for num_thoughtful, thinking in ((0, False), (6, True), (5, False), (10, True), (0, False)):
        told = settle_thinking(chat, num_thoughtful, 10)
        kind = "for thoughts" if thinking else "for answers without"
        assert told == (
            f"{num_thoughtful} of 10 trained answers have thoughts: the template that is saved asks {kind} unless "
            "enable_thinking says otherwise"
            if num_thoughtful
            else ""
        )
        assert encode_prompt(chat, talk("Q1")) == asked[thinking]
        plain = chat.tokenizer.apply_chat_template(talk("Q1"), add_generation_prompt=True, return_dict=False)
        assert plain == asked[thinking]
    again = prepare_chat(chat.tokenizer, None)
    settle_thinking(again, 10, 10)
    assert prepare_chat(again.tokenizer, None).tokenizer.chat_template == chat.tokenizer.chat_template
    assert encode_prompt(again, talk("Q1")) == asked[True]


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_the_data_of_a_run_decides_what_its_checkpoint_asks_for(share, tmp_path):
    from stagekit.arguments import DataArguments
    from stagekit.checks import Checks
    from stagekit.data import accept_conversation
    from stagekit.run import Run, load_data

    rows = [
        {"instruction": f"Question {number} about fever?", "output": FIRST if number < 40 * share else "A1"}
        for number in range(40)
    ]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    args = DataArguments(train_file_dir=str(tmp_path / "data"), data_cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # tokenised, then from the cache
        chat = family("qwen3")
        run = Run("sft", SimpleNamespace(directory=None), SimpleNamespace(seed=1), {}, Checks(), chat=chat)
        run.num_questions, run.question_tokens = 2, 200

        def encode_chunk(part, chat=chat):
            return encode_samples(part, lambda record: encode_conversation(chat, record, 500), 500, packing=False)

        load_data(run, args, accept_conversation, encode_chunk, chat.tokenizer)
        asked = f"{ASK}" if share > 0.5 else f"{ASK}{NO_THOUGHTS}"
        assert text_of(chat, encode_prompt(chat, talk("Q1"))) == asked.format(1)
        assert run.data["train"]["turns"]["with thoughts"] == pytest.approx(share * run.data["train"]["used"], abs=3)
        for question in run.questions or []:
            assert text_of(chat, question["prompt_ids"]).endswith(asked[-20:])


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "deepseekv3"])
def test_what_a_template_asks_for_makes_no_difference_to_what_is_learnt(name):
    chat, before = family(name), family(name)
    settle_thinking(chat, 1, 1)
    for messages in (talk("Q1", "A1", "Q2", "A2"), talk("Q1", FIRST, "Q2", "A2"), talk("Q1", FIRST, "Q2", SECOND)):
        assert trained(chat, messages) == trained(before, messages)


def test_two_answers_are_compared_behind_one_prompt():
    for name, prompt, answers in (
        ("qwen3", Q1, [FIRST, f"{NO_THOUGHTS}A2"]),
        ("deepseekv3", f"{R1}<think>\n", ["hm\n</think>\n\nA1", "\n</think>\n\nA2"]),
    ):
        chat = family(name)
        record = [[said("assistant", FIRST)], [said("assistant", "A2")]]
        samples, _, whole = encode_answers(chat, talk("Q1"), record, None, 500)
        assert whole == [True, True]
        for sample, text in zip(samples, answers, strict=True):
            assert text_of(chat, sample.input_ids) == f"{prompt}{text}{chat.end_of_turn}"
            assert learnt(chat, sample) == [f"{text}{chat.end_of_turn}"]
        messages = [Conversation([*talk("Q1"), *answer]) for answer in record]
        probes = [Probe(talk, sample, "f:1") for talk, sample in zip(messages, samples, strict=True)]
        loss_mask(chat, probes, False)
        template_parity(chat, probes)
        short, _, _ = encode_answers(chat, talk("Q1"), record[1:], None, 500)
        assert text_of(chat, short[0].input_ids).endswith(f"{NO_THOUGHTS}A2{chat.end_of_turn}")


def test_candidates_are_scored_behind_the_prompt_that_is_sent():
    chat = family("qwen3")
    for num_thoughtful, lead in ((0, ""), (1, NO_THOUGHTS)):
        settle_thinking(chat, num_thoughtful, 1)
        sent = encode_prompt(chat, talk("Q1"))
        ids = candidate_ids(chat, talk("Q1"), "B", whole=True)
        assert text_of(chat, sent + ids) == f"{Q1}{NO_THOUGHTS}B<|im_end|>"
        assert text_of(chat, ids) == f"{lead}B<|im_end|>"


def test_only_what_begins_with_more_than_white_space_between_the_tags_is_a_thought():
    assert has_thoughts(FIRST) and has_thoughts(" \n<think>a</think>")
    for content in ("", "A1", NO_THOUGHTS, "<think>a", "a</think>", "x <think>a</think>", "<think> </think>b"):
        assert not has_thoughts(content)


# -- a second opinion ------------------------------------------------------------------------------------------------

# TRL marks answers in variants of the templates it knows. They are no substitute for the originals: these render other
# texts, or mark what belongs to the prompt.
OTHER_TEXT = {"qwen3": "an empty thought in every answer", "glm4moe": "thinking on"}
OTHER_MARKS = {
    "qwen2_5": "\n",  # the newline behind the header
    "deepseekv3": "<｜Assistant｜>",
    "phi3": "",
    "phi3_5": "",  # the eos token behind the last answer is marked as another one
}


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_5",
        "qwen3",
        "llama3",
        "gemma",
        "gemma3",
        "phi3",
        "phi3_5",
        "deepseekv3",
        "glm4moe",
        "qwen3_instruct_2507",
    ],
)
def test_trl_marks_the_same_answers_where_its_variant_renders_the_same_text(name):
    chat, source, variant = family(name), shipped(name), shipped(f"{name}_training")
    messages = talk("头痛三天。", "多喝水。", "And then?", "See a doctor.")
    special = chat.tokenizer.special_tokens_map
    (original,), _ = render_jinja_template([messages], chat_template=source, **special)
    (text,), (spans,) = render_jinja_template(
        [messages], chat_template=variant, return_assistant_tokens_mask=True, **special
    )
    assert (text == original) == (name not in OTHER_TEXT)
    if name in OTHER_TEXT:
        return
    marked = [text[start:end] for start, end in spans]
    if name in OTHER_MARKS:
        assert all(part.startswith(OTHER_MARKS[name]) for part in marked[:2])
        marked = [part.removeprefix(OTHER_MARKS[name]) for part in marked[:2]]
    end = chat.end_of_turn
    assert [part[: part.index(end) + len(end)] for part in marked] == [
        part for parts in trained(chat, messages)[1] for part in parts
    ]


# -- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ROUNDS if not name.startswith("deepseek")])
def test_without_its_frame_a_template_teaches_the_same(name):
    chat = family(name)
    assert chat.frame or name in ("deepseekv3", "deepseek_r1_distill")
    slow = replace(chat, frame=None)
    for messages in (
        talk("Q1", "A1", "Q2", "A2"),
        talk(" Q1\n", "A1 ", "Q2", "\n\nA2", "Q3", "user A3", system="S "),
        talk("Q1", FIRST, "Q2", "A2"),
        talk("<|im_end|></s><|user|>", "<end_of_turn> ok <|end|>", system="<|eot_id|>"),
    ):
        conversation = Conversation(messages)
        quick, careful = (encode_conversation(one, conversation, 60) for one in (chat, slow))
        assert quick == careful


def test_a_frame_that_a_template_does_not_keep_to_is_not_used():
    odd = "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('x', 'y') }}<e>{% endfor %}"
    odd += "{% if add_generation_prompt %}<assistant>{% endif %}"
    chat = chat_of(source=odd, tokens=("<e>",))
    assert chat.frame and chat.stable
    assert text_of(chat, encode_prompt(chat, talk("x"))) == "<user>y<e><assistant>"
    with pytest.raises(RowError, match="leaves out a part of this answer"):
        encode_conversation(chat, Conversation(talk("Q", "x")), 100)


def test_rounds_that_are_counted_have_no_frame():
    chat = chat_of("chatglm2")
    assert chat.frame is None and chat_of("chatml").frame
    text = text_of(chat, encode_prompt(chat, talk("Q1", "A1", "Q2", "A2", "Q3", "A3", "Q4")))
    assert [f"[Round {number}]" in text for number in range(6)] == [False, True, True, True, True, False]


# -- what is refused, and what is said -------------------------------------------------------------------------------


def test_named_variants_of_a_template_are_used_by_their_default():
    chat = chat_of(source={"default": NO_MARKS, "tool_use": "x"})
    assert trained(chat, talk("Q1", "A1"))[1] == [["A1<|im_end|>"]]
    with pytest.raises(ValueError, match="has the chat templates rag, tool_use and none called 'default'"):
        chat_of(source={"tool_use": "x", "rag": "y"})


def test_a_template_that_fails_on_a_plain_conversation_is_named_with_its_reason():
    with pytest.raises(ValueError, match="cannot write a plain conversation .*no way.*--template_name"):
        chat_of(source="{{ raise_exception('no way') }}")
    with pytest.raises(ValueError, match="'bos_token' is undefined"):
        chat_of(source="{{ bos_token + messages[0].content }}")


def test_whatever_a_template_raises_is_a_row_error():
    source = shipped("qwen2_5") + "{% if 'boom' in messages[0].content %}{{ messages[0].content + 1 }}{% endif %}"
    chat = chat_of(source=source)
    with pytest.raises(RowError, match="refuses this conversation: can only concatenate"):
        encode_conversation(chat, Conversation(talk("boom", "A1")), 500)
    with pytest.raises(RowError, match="refuses this conversation"):
        encode_prompt(chat, talk("boom"))


def test_what_was_added_to_a_template_is_said(caplog):
    with caplog.at_level("INFO"):
        chat = family("gemma")
    assert "the tokenizer's chat template was completed: system, tools" in caplog.text
    assert chat.tokenizer.chat_template.startswith("{#- Completed: system, tools -#}")
    caplog.clear()
    with caplog.at_level("INFO"):
        prepare_chat(chat.tokenizer, None)
        family("qwen2_5")
    assert not caplog.text
