"""Every expected string is written by hand from the format's description or comes from a model's own template."""

import ast
import json
import sys
from itertools import pairwise
from pathlib import Path

import jinja2
import pytest
from jinja2.ext import Extension
from transformers.utils.chat_template_utils import render_jinja_template

from template import (
    ALIASES,
    TEMPLATES,
    Template,
    complete,
    get_template,
    is_completed,
    thinking_default,
    with_thinking_default,
)

ROOT = Path(__file__).parent.parent
TOKENS = {"bos_token": "<BOS>", "eos_token": "<EOS>"}
every_template = pytest.mark.parametrize("name", sorted(TEMPLATES))


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def render(template, messages, tokens=TOKENS, **options):
    """Render with transformers' own renderer; returns the text and the texts of its generation spans."""
    template = get_template(template) if isinstance(template, str) else template
    texts, spans = render_jinja_template(
        [messages], chat_template=template.chat_template(), return_assistant_tokens_mask=True, **tokens, **options
    )
    return texts[0], [texts[0][start:end] for start, end in spans[0]]


TWO_ROUNDS = [
    said("system", "S"),
    said("user", "Q1"),
    said("assistant", "A1"),
    said("user", "Q2"),
    said("assistant", "A2"),
]

WRITTEN = {
    "base": "SQ1A1<EOS>Q2A2<EOS>",
    "default": "System: S<EOS>\nHuman: Q1<EOS>\nAssistant:A1<EOS>\nHuman: Q2<EOS>\nAssistant:A2<EOS>\n",
    "vicuna": "<BOS>S USER: Q1 ASSISTANT: A1<EOS>USER: Q2 ASSISTANT: A2<EOS>",
    "alpaca": "<BOS>S\n\n### Instruction:\nQ1\n\n### Response:\nA1<EOS>\n\n"
    "### Instruction:\nQ2\n\n### Response:\nA2<EOS>\n\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
    "qwen3": "<|im_start|>system\nS<|im_end|>\n"
    "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA2<|im_end|>\n",
    "llama2": "<BOS>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 <EOS><BOS>[INST] Q2 [/INST] A2 <EOS>",
    "llama3": "<BOS><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>",
    "llama4": "<BOS><|header_start|>system<|header_end|>\n\nS<|eot|>"
    "<|header_start|>user<|header_end|>\n\nQ1<|eot|><|header_start|>assistant<|header_end|>\n\nA1<|eot|>"
    "<|header_start|>user<|header_end|>\n\nQ2<|eot|><|header_start|>assistant<|header_end|>\n\nA2<|eot|>",
    "mistral": "<BOS>[INST] S\n\nQ1 [/INST]A1<EOS>[INST] Q2 [/INST]A2<EOS>",
    "mistral-v3": "<BOS>[INST] S\n\nQ1[/INST] A1<EOS>[INST] Q2[/INST] A2<EOS>",
    "ministral": "<BOS>[INST]S\n\nQ1[/INST]A1<EOS>[INST]Q2[/INST]A2<EOS>",
    "mistral-small": "<BOS>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Q1[/INST]A1<EOS>[INST]Q2[/INST]A2<EOS>",
    "gemma4": "<BOS><|turn>system\nS<turn|>\n<|turn>user\nQ1<turn|>\n<|turn>model\nA1<turn|>\n"
    "<|turn>user\nQ2<turn|>\n<|turn>model\nA2<turn|>\n",
    "phi4": "<|im_start|>system<|im_sep|>S<|im_end|>"
    "<|im_start|>user<|im_sep|>Q1<|im_end|><|im_start|>assistant<|im_sep|>A1<|im_end|>"
    "<|im_start|>user<|im_sep|>Q2<|im_end|><|im_start|>assistant<|im_sep|>A2<|im_end|>",
    "phi4-mini": "<|system|>S<|end|><|user|>Q1<|end|><|assistant|>A1<|end|><|user|>Q2<|end|><|assistant|>A2<|end|>",
    "gemma": "<BOS><start_of_turn>user\nS\n\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
    "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n",
    "phi": "<|system|>\nS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n"
    "<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n",
    "zephyr": "<|system|>\nS<EOS>\n<|user|>\nQ1<EOS>\n<|assistant|>\nA1<EOS>\n"
    "<|user|>\nQ2<EOS>\n<|assistant|>\nA2<EOS>\n",
    "baichuan": "S<reserved_102>Q1<reserved_103>A1<EOS><reserved_102>Q2<reserved_103>A2<EOS>",
    "baichuan2": "S<reserved_106>Q1<reserved_107>A1<EOS><reserved_106>Q2<reserved_107>A2<EOS>",
    "chatglm": "S\n[Round 0]\n问：Q1\n答：A1<EOS>\n[Round 1]\n问：Q2\n答：A2<EOS>\n",
    "chatglm2": "[gMASK]sopS[Round 1]\n\n问：Q1\n\n答：A1<EOS>\n\n[Round 2]\n\n问：Q2\n\n答：A2<EOS>\n\n",
    "chatglm3": "[gMASK]sop<|system|>\nS<|user|>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2<|user|>",
    "glm4": "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2<|user|>",
    "deepseek": "<BOS>S\n\nUser: Q1\n\nAssistant: A1<EOS>User: Q2\n\nAssistant: A2<EOS>",
    "deepseek3": "<BOS>S<｜User｜>Q1<｜Assistant｜>A1<EOS><｜User｜>Q2<｜Assistant｜>A2<EOS>",
    "deepseekcoder": "<BOS>S\n### Instruction:\nQ1\n### Response:\nA1\n<|EOT|>\n"
    "### Instruction:\nQ2\n### Response:\nA2\n<|EOT|>\n",
    "cohere": "<BOS><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q1<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A1<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q2<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A2<|END_OF_TURN_TOKEN|>",
    "openchat": "<BOS>SGPT4 Correct User: Q1<|end_of_turn|>GPT4 Correct Assistant: A1<|end_of_turn|>"
    "GPT4 Correct User: Q2<|end_of_turn|>GPT4 Correct Assistant: A2<|end_of_turn|>",
    "intern": "<BOS><|System|>:S\n<|User|>:Q1<eoh>\n<|Bot|>:A1<eoa>\n<|User|>:Q2<eoh>\n<|Bot|>:A2<eoa>\n",
    "intern2": "<BOS><|im_start|>system\nS<|im_end|>\n"
    "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
    "orion": "<BOS>SHuman: Q1\n\nAssistant: <EOS>A1<EOS>Human: Q2\n\nAssistant: <EOS>A2<EOS>",
    "phoenix": "S\n\nHuman: <BOS>Q1<EOS>Assistant: <BOS>A1<EOS>Human: <BOS>Q2<EOS>Assistant: <BOS>A2<EOS>",
    "aquila": "S###Human: Q1###Assistant: A1<EOS>Human: Q2###Assistant: A2<EOS>",
    "xverse": "SHuman: Q1\n\nAssistant: A1<EOS>Human: Q2\n\nAssistant: A2<EOS>",
    "ziya": "S<human>:Q1\n<bot>:A1<EOS>\n<human>:Q2\n<bot>:A2<EOS>\n",
    "linly": "SUser: Q1\nBot: A1<EOS>\nUser: Q2\nBot: A2<EOS>\n",
    "belle": "<BOS>SHuman: Q1\n\nBelle: A1<EOS>\n\nHuman: Q2\n\nBelle: A2<EOS>\n\n",
    "solar": "### System:\nS\n\n### User:\nQ1\n\n### Assistant:\nA1<EOS>\n\n"
    "### User:\nQ2\n\n### Assistant:\nA2<EOS>\n\n",
    "falcon": "S\nUser: Q1\n\nAssistant: A1<EOS>\n\nUser: Q2\n\nAssistant: A2<EOS>\n\n",
    "openbuddy": "S\nUser: Q1\nAssistant: A1<EOS>\nUser: Q2\nAssistant: A2<EOS>\n",
}
WRITTEN |= {
    "qwen": WRITTEN["chatml"],
    "yi": WRITTEN["chatml"],
    "starchat": WRITTEN["phi"],
    "llama2-zh": WRITTEN["llama2"],
}

# What a model is trained to say where the answer is "A": most say "A<EOS>".
TRAINED = dict.fromkeys(TEMPLATES, "A<EOS>") | {
    **dict.fromkeys(["chatml", "qwen", "qwen3", "yi", "intern2", "phi4"], "A<|im_end|>"),
    **dict.fromkeys(["vicuna", "deepseek", "falcon", "openbuddy", "aquila", "mistral-v3"], " A<EOS>"),
    **dict.fromkeys(["llama2", "llama2-zh"], " A <EOS>"),
    **dict.fromkeys(["phi", "phi4-mini", "starchat"], "A<|end|>"),
    **dict.fromkeys(["chatglm3", "glm4"], "\nA<|user|>"),
    "llama3": "A<|eot_id|>",
    "llama4": "A<|eot|>",
    "gemma": "A<end_of_turn>",
    "gemma4": "A<turn|>",
    "cohere": "A<|END_OF_TURN_TOKEN|>",
    "openchat": " A<|end_of_turn|>",
    "intern": "A<eoa>",
    "deepseekcoder": "\nA\n<|EOT|>",
}

HOURS = {
    "type": "function",
    "function": {
        "name": "opening_hours",
        "description": '营业时间 of a <pharmacy> & "more"',
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}
BMI = {"type": "function", "function": {"name": "bmi", "description": "", "parameters": {"type": "object"}}}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WITH_TOOLS = [
    said("system", "S"),
    said("user", "Q1"),
    said(
        "assistant", "", tool_calls=[call("opening_hours", {"name": '北门 <b>"药店"</b>'}), call("bmi", {"kg": 70.5})]
    ),
    said("tool", '{"open": "8:00"}'),
    said("tool", "22.9"),
    said("assistant", "A1"),
    said("user", "Q2"),
    said("assistant", "One moment.", tool_calls=[call("bmi", {})]),
    said("tool", ""),
    said("assistant", "A2"),
]


def test_every_template_is_written_out_in_this_file():
    assert set(WRITTEN) == set(TEMPLATES)
    assert all(template.name == name for name, template in TEMPLATES.items())


@every_template
def test_two_rounds_with_a_system_text_read_as_the_format_prescribes(name):
    text, spans = render(name, TWO_ROUNDS)
    assert text == WRITTEN[name]
    assert spans == [TRAINED[name].replace("A", answer, 1) for answer in ("A1", "A2")]


@every_template
def test_a_generation_span_is_the_answer_and_its_end_of_turn(name):
    answer = " \n{{ 三 }} </s> <|im_end|>\n"
    _, spans = render(name, [said("user", "Q"), said("assistant", answer), said("user", "Q"), said("assistant", "")])
    assert spans == [TRAINED[name].replace("A", answer, 1), TRAINED[name].replace("A", "", 1)]


@every_template
@pytest.mark.parametrize("messages", [TWO_ROUNDS, TWO_ROUNDS[1:], WITH_TOOLS, WITH_TOOLS[1:]])
def test_what_is_sent_for_an_answer_is_what_stands_before_the_trained_span(name, messages):
    tools = [HOURS, BMI] if len(messages) > len(TWO_ROUNDS) else None
    whole, spans = render(name, messages, tools=tools)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(spans) == len(answers)
    for index, span in zip(answers, spans, strict=True):
        prompt, earlier = render(name, messages[:index], tools=tools, add_generation_prompt=True)
        until_then, _ = render(name, messages[: index + 1], tools=tools)
        assert until_then.startswith(prompt + span) and whole.startswith(until_then)
        assert earlier == spans[: len(earlier)]


@every_template
def test_tools_calls_and_results_come_back_out_of_the_text(name):
    text, spans = render(name, WITH_TOOLS, tools=[HOURS, BMI])
    listed = text.split("<tools>\n")[1].split("\n</tools>")[0]
    assert [json.loads(line) for line in listed.split("\n")] == [HOURS, BMI]
    assert "北门" in text and "营业时间" in text
    end = TRAINED[name].split("A")[1]
    lead = TRAINED[name].split("A")[0]
    first = (
        '<tool_call>\n{"name": "opening_hours", "arguments": {"name": "北门 <b>\\"药店\\"</b>"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "bmi", "arguments": {"kg": 70.5}}\n</tool_call>'
    )
    second = 'One moment.\n<tool_call>\n{"name": "bmi", "arguments": {}}\n</tool_call>'
    assert spans == [lead + answer + end for answer in (first, "A1", second, "A2")]
    assert text.count("<tool_response>\n{") == 1
    assert '<tool_response>\n{"open": "8:00"}\n</tool_response>\n<tool_response>\n22.9\n</tool_response>' in text
    assert "<tool_response>\n\n</tool_response>" in text


@pytest.mark.parametrize("name", ["chatml", "qwen", "yi"])
def test_tool_results_are_one_user_turn_in_chatml(name):
    text, _ = render(name, WITH_TOOLS, tools=[BMI])
    assert text.startswith("<|im_start|>system\nS\n\n")
    assert (
        "</tool_call><|im_end|>\n<|im_start|>user\n"
        '<tool_response>\n{"open": "8:00"}\n</tool_response>\n<tool_response>\n22.9\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
    ) in text


def test_a_tool_result_is_written_as_the_users_turn_where_a_format_knows_no_tools():
    text, _ = render("llama2", WITH_TOOLS[1:6])
    assert text.endswith(
        ' <EOS><BOS>[INST] <tool_response>\n{"open": "8:00"}\n</tool_response>\n'
        "<tool_response>\n22.9\n</tool_response> [/INST] A1 <EOS>"
    )
    text, _ = render("chatglm3", WITH_TOOLS[1:6])
    assert "</tool_call><|user|>\n<tool_response>" in text and text.count("<|user|>") == 3


def test_tools_without_a_system_text_have_a_system_turn_of_their_own():
    text, _ = render("chatml", TWO_ROUNDS[1:], tools=[BMI])
    turn = text.split("<|im_end|>")[0]
    assert turn.startswith("<|im_start|>system\n") and not turn.startswith("<|im_start|>system\n\n")
    assert json.dumps(BMI) in turn
    assert render("chatml", TWO_ROUNDS, tools=[])[0] == WRITTEN["chatml"]


def test_arguments_that_are_json_already_are_not_encoded_again():
    messages = [said("user", "Q"), said("assistant", None, tool_calls=[call("bmi", '{"kg":70}')])]
    assert render("chatml", messages)[1] == [
        '<tool_call>\n{"name": "bmi", "arguments": {"kg":70}}\n</tool_call><|im_end|>'
    ]


QWEN_START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"


def test_the_default_system_text_is_for_conversations_without_a_system_message():
    assert render("qwen", TWO_ROUNDS[1:])[0].startswith(QWEN_START + "Q1<|im_end|>")
    assert "helpful" not in render("qwen", TWO_ROUNDS)[0]
    assert render("alpaca", TWO_ROUNDS[1:])[0].startswith(
        "<BOS>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nQ1\n\n"
    )
    assert render("vicuna", TWO_ROUNDS[1:])[0].startswith(
        "<BOS>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Q1 ASSISTANT: A1<EOS>"
    )
    assert render("phoenix", TWO_ROUNDS[1:])[0].startswith(
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions.\n\nHuman: <BOS>Q1"
    )
    assert render("llama2-zh", TWO_ROUNDS[1:])[0].startswith(
        "<BOS>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\nQ1 [/INST]"
    )


@every_template
def test_a_default_system_text_stands_where_a_given_one_would(name):
    default = TEMPLATES[name].default_system
    assert render(name, TWO_ROUNDS[1:]) == render(name, [said("system", default), *TWO_ROUNDS[1:]])


@every_template
@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_system_message_asks_for_no_system_turn_at_all(name, empty):
    text, _ = render(name, [said("system", empty), *TWO_ROUNDS[1:]])
    marked, _ = render(name, [said("system", "<MARK>"), *TWO_ROUNDS[1:]])
    system = TEMPLATES[name].system.replace("{system}", "<MARK>").replace("{eos}", "<EOS>")
    assert marked.count(system) == 1 and text == marked.replace(system, "")


S, U, A = said("system", "s"), said("user", "u"), said("assistant", "a")
TOOL, CALL = said("tool", "t"), said("assistant", "", tool_calls=[call("bmi", {})])


@every_template
@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([U, U], "message 2: a user message cannot follow a user message"),
        ([S, U, U, A], "message 3: a user message cannot follow a user message"),
        ([A], "message 1: an assistant message must follow a user or tool message, not nothing"),
        ([S, A], "message 2: an assistant message must follow a user or tool message, not system"),
        ([U, A, A], "message 3: an assistant message must follow a user or tool message, not assistant"),
        ([U, S, A], "message 2: only the first message may be a system message"),
        ([S, S, U], "message 2: only the first message may be a system message"),
        ([U, A, TOOL], "message 3: a tool message must follow an assistant message with tool_calls"),
        ([U, TOOL], "message 2: a tool message must follow"),
        ([TOOL], "message 1: a tool message must follow"),
        ([U, CALL, TOOL, U], "message 4: a user message cannot follow a tool message"),
        ([U, said("gpt", "a")], "message 2: unknown role 'gpt'; known: system, user, assistant, tool"),
        ([said("user", [{"type": "text", "text": "u"}])], "message 1: content must be a string"),
        ([S], "there is no user message"),
        ([], "there is no user message"),
    ],
)
def test_a_conversation_out_of_order_is_refused(name, messages, complaint):
    with pytest.raises(jinja2.TemplateError) as refusal:
        render(name, messages)
    assert complaint in str(refusal.value)


def test_a_generation_prompt_after_an_answer_is_refused():
    with pytest.raises(jinja2.TemplateError, match="the last message is already an answer"):
        render("chatml", TWO_ROUNDS, add_generation_prompt=True)


@pytest.mark.parametrize("messages", [[U, CALL, TOOL, TOOL, A, U, A], [S, U, CALL, TOOL, CALL, TOOL], [U, CALL, U]])
def test_results_follow_their_call_and_lead_to_the_next_answer(messages):
    text, spans = render("chatml", messages)
    assert len(spans) == sum(message["role"] == "assistant" for message in messages)
    roles = [turn.split("\n")[0] for turn in text.split("<|im_start|>")[1:]]
    assert all(one != other for one, other in pairwise(roles))


@every_template
@pytest.mark.parametrize(
    "content",
    [
        "{query} {answer} {system} {eos} {bos} {round} {0} {}",
        "{{ messages }} {% raise %} {# gone? #} {%- endfor -%} {{- bos_token -}}",
        "\"double\" 'single' \\ \\n \\u4e2d $prefix ${name} $$ %s <b>&amp;</b>",
        "\n\n  two spaces, two lines\t\r\n \n",
        "头痛三天，体温 38.5℃ 🤒 é",
    ],
)
def test_contents_are_verbatim(name, content):
    roles = ("system", "user", "assistant", "user", "assistant")
    text, spans = render(name, [said(role, content) for role in roles])
    marked, _ = render(name, [said(role, "\0") for role in roles])
    assert marked.count("\0") == len(roles) and text == marked.replace("\0", content)
    assert spans == [TRAINED[name].replace("A", content, 1)] * 2


@every_template
def test_the_first_stop_string_is_the_end_of_turn_that_is_trained(name):
    stops = get_template(name).stop_strings("<EOS>")
    assert TRAINED[name].endswith(stops[0])
    assert all(stops) and not any("{eos}" in stop for stop in stops)


# Where an answer of each format ends. Formats that name their own token end there, the others with the eos_token.
STOPS = dict.fromkeys(TEMPLATES, ("<EOS>",)) | {
    **dict.fromkeys(["chatml", "qwen", "qwen3", "yi", "intern2", "phi4"], ("<|im_end|>",)),
    **dict.fromkeys(["phi", "phi4-mini", "starchat"], ("<|end|>",)),
    "llama3": ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    "llama4": ("<|eot|>", "<|eom|>"),
    "chatglm3": ("<|user|>", "<|observation|>"),
    "glm4": ("<|user|>", "<|observation|>", "<|endoftext|>"),
    "gemma": ("<end_of_turn>",),
    "gemma4": ("<turn|>",),
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "openchat": ("<|end_of_turn|>",),
    "intern": ("<eoa>",),
    "deepseekcoder": ("<|EOT|>",),
    "falcon": ("<EOS>", "\nUser"),
    "openbuddy": ("<EOS>", "User:"),
    "aquila": ("<EOS>", "[UNK]"),  # without "###", with which Markdown headings begin
}


@every_template
def test_stop_strings_are_those_of_the_format(name):
    assert get_template(name).stop_strings("<EOS>") == STOPS[name]


def test_a_format_with_a_token_of_its_own_needs_no_eos():
    assert get_template("glm4").stop_strings(None) == ("<|user|>", "<|observation|>", "<|endoftext|>")
    assert get_template("vicuna").stop_strings("</s>") == ("</s>",)


# What users and other toolkits call the formats.
OTHER_NAMES = {
    "base": "empty raw",
    "vicuna": "vicuna_v1.1 Vicuna",
    "baichuan": "baichuan-chat",
    "baichuan2": "baichuan2-chat",
    "chatglm3": "ChatGLM3-6B",
    "glm4": "glm-4 GLM4",
    "llama2": "llama-2 Llama2",
    "llama2-zh": "llama2_zh llama-2-zh chinese-alpaca2",
    "llama3": "llama-3 Llama3 llama3.1 llama-3.2 llama3.3",
    "llama4": "llama-4",
    "mistral": "mistral_v0.1 mistral-v0.2",
    "mistral-v3": "mistral_v3 mistral-v0.3",
    "ministral": "mistral-nemo pixtral",
    "mistral-small": "mistral_small",
    "qwen": "Qwen qwen2 qwen2.5 qwen1.5 qwen-7b-chat",
    "qwen3": "Qwen3 qwen3_nothink qwen3_5 qwen3.6 qwen3_5_nothink",
    "yi": "Yi Yi-34b-chat",
    "intern": "internlm-chat internlm",
    "intern2": "internlm2",
    "deepseek": "deepseek-chat deepseek-v2",
    "deepseek3": "deepseek-v3 deepseekr1 deepseek-r1 DeepSeek-V3",
    "deepseekcoder": "deepseek-coder",
    "gemma": "gemma2 gemma3 gemma-2",
    "phi": "phi3 phi-3 phi3.5",
    "phi4": "phi-4",
    "phi4-mini": "phi4_mini",
    "cohere": "command-r",
    "zephyr": "TinyLlama catppt",
    "aquila": "aquila-chat",
    "openchat": "openchat_3.5",
    "falcon": "falcon-instruct",
}


def test_formats_are_found_by_the_names_users_know():
    for name, others in OTHER_NAMES.items():
        assert {get_template(other).name for other in (name, *others.split())} == {name}


def test_no_name_stands_for_two_formats():
    names = [name.lower().replace("_", "-") for names in (TEMPLATES, *ALIASES.values()) for name in names]
    assert len(names) == len(set(names)) and set(ALIASES) <= set(TEMPLATES)


def test_a_stop_string_is_named_once():
    assert Template("x", "{query}", "{answer}<end>", ("<end>", "{eos}")).stop_strings("<end>") == ("<end>",)
    assert Template("x", "{query}", "{answer}<end>", ("<end>", "{eos}")).stop_strings(None) == ("<end>",)


@pytest.mark.parametrize("tokens", [{}, {"bos_token": "<BOS>"}, {"eos_token": None}])
def test_a_format_that_ends_with_the_eos_token_needs_one(tokens):
    with pytest.raises(
        jinja2.TemplateError, match="'vicuna' writes the tokenizer's eos_token, but the tokenizer has none"
    ):
        render("vicuna", TWO_ROUNDS, tokens)
    with pytest.raises(ValueError, match="'vicuna' ends an answer with the tokenizer's eos_token, but it has none"):
        get_template("vicuna").stop_strings(tokens.get("eos_token"))


@pytest.mark.parametrize("tokens", [{"eos_token": "<EOS>"}, {"bos_token": None, "eos_token": "<EOS>"}])
def test_a_tokenizer_without_a_bos_token_gets_none(tokens):
    assert render("llama2", TWO_ROUNDS, tokens)[0] == WRITTEN["llama2"].replace("<BOS>", "")
    assert render("chatml", TWO_ROUNDS, {})[0] == WRITTEN["chatml"]


def test_a_question_is_ready_for_its_answer_with_and_without_a_generation_prompt():
    for asked in (False, True):
        assert render("vicuna", TWO_ROUNDS[:2], add_generation_prompt=asked)[0] == "<BOS>S USER: Q1 ASSISTANT:"


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known_ones():
    with pytest.raises(ValueError) as refusal:
        get_template("Chatm")
    assert str(refusal.value).startswith(
        "--template_name 'Chatm' is not a template; did you mean 'chatml'? known: alpaca,"
    )
    assert all(name in str(refusal.value) for name in TEMPLATES)
    with pytest.raises(ValueError, match="^--template_name 'zzzz' is not a template; known: alpaca, "):
        get_template("zzzz")


def test_strings_of_a_row_may_contain_what_jinja_would_read_as_its_own():
    odd = Template(
        "odd", "{{\"a\\n'{query}$x医🩺%}{#\n", "}}{answer}\\{% endfor %}\n$", ("{% endfor %}",), "{%{system}%}"
    )
    text, spans = render(odd, [S, U, A])
    assert text == "{%s%}{{\"a\\n'u$x医🩺%}{#\n}}a\\{% endfor %}\n$"
    assert spans == ["}}a\\{% endfor %}"]


class Generation(Extension):
    """Let plain jinja2 read the generation tags, without tracking them."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


@every_template
@pytest.mark.parametrize("trim", [False, True])
def test_the_text_does_not_depend_on_how_jinja_treats_blocks(name, trim):
    environment = jinja2.Environment(extensions=[Generation], trim_blocks=trim, lstrip_blocks=trim)
    source = get_template(name).chat_template()
    assert environment.from_string(source).render(messages=TWO_ROUNDS, **TOKENS) == WRITTEN[name]


PLAIN = [
    said("user", "头痛三天。\nWhat now?"),
    said("assistant", "多喝水。"),
    said("user", "Thanks {x}"),
    said("assistant", "See a doctor."),
]
PLAIN_WITH_SYSTEM = [said("system", "You are a doctor."), *PLAIN]


def own_template(file_name):
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / file_name
    if not path.exists():
        pytest.skip(f"this trl has no {file_name}")
    return path.read_text()


@pytest.mark.parametrize(
    "name, file_name, messages",
    [
        ("llama3", "llama3.jinja", PLAIN),
        ("llama3", "llama3.jinja", PLAIN_WITH_SYSTEM),
        ("gemma", "gemma.jinja", PLAIN),
        ("gemma", "gemma3.jinja", PLAIN_WITH_SYSTEM),
        ("phi", "phi3.jinja", PLAIN_WITH_SYSTEM),
        ("phi", "phi3_5.jinja", PLAIN),
        ("qwen", "qwen2_5.jinja", PLAIN_WITH_SYSTEM),
        ("cohere", "cohere.jinja", PLAIN_WITH_SYSTEM),
        ("deepseek3", "deepseekv3.jinja", PLAIN_WITH_SYSTEM),
        ("gemma4", "gemma4.jinja", PLAIN_WITH_SYSTEM),
    ],
)
def test_a_plain_conversation_reads_as_in_the_models_own_template(name, file_name, messages):
    texts, _ = render_jinja_template([messages], chat_template=own_template(file_name), **TOKENS)
    # Phi closes a whole conversation with its eos_token, which is no part of any turn; DeepSeek spells its own out.
    expected = texts[0].removesuffix("<EOS>" if name == "phi" else "").replace("<｜end▁of▁sentence｜>", "<EOS>")
    assert render(name, messages)[0] == expected


@pytest.mark.parametrize(
    "name, file_name", [("llama3", "llama3.jinja"), ("gemma", "gemma.jinja"), ("phi", "phi3.jinja")]
)
def test_a_prompt_reads_as_in_the_models_own_template(name, file_name):
    options = {"add_generation_prompt": True, **TOKENS}
    texts, _ = render_jinja_template([PLAIN[:3]], chat_template=own_template(file_name), **options)
    assert render(name, PLAIN[:3], add_generation_prompt=True)[0] == texts[0]


def test_the_tool_turns_of_qwen_read_as_in_its_own_template():
    texts, _ = render_jinja_template([WITH_TOOLS], tools=[BMI], chat_template=own_template("qwen2_5.jinja"))
    text, _ = render("qwen", WITH_TOOLS, tools=[BMI])
    assert text.partition("<|im_end|>")[2] == texts[0].partition("<|im_end|>")[2]


def test_a_first_question_to_qwen3_reads_as_in_its_own_template_when_it_shall_not_think():
    own = own_template("qwen3.jinja")
    options = {"add_generation_prompt": True, "enable_thinking": False, **TOKENS}
    texts, _ = render_jinja_template([PLAIN_WITH_SYSTEM[:2]], chat_template=own, **options)
    assert render("qwen3", PLAIN_WITH_SYSTEM[:2], add_generation_prompt=True)[0] == texts[0]


# -- thoughts --------------------------------------------------------------------------------------------------------

THOUGHT = "<think>\nhm\n</think>\n\nA1"
EMPTY = "<think>\n\n</think>\n\n"


def test_an_answer_with_thoughts_takes_the_place_of_the_empty_block():
    text, spans = render("qwen3", [U, said("assistant", THOUGHT), U, A, U, said("assistant", THOUGHT)])
    ask = "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"{ask}{THOUGHT}<|im_end|>\n{ask}{EMPTY}a<|im_end|>\n{ask}{THOUGHT}<|im_end|>\n"
    assert spans == [f"{THOUGHT}<|im_end|>", "a<|im_end|>", f"{THOUGHT}<|im_end|>"]


@pytest.mark.parametrize("content", ["a <think>b</think>", "<think>b", "b</think>", EMPTY + "a"])
def test_what_is_no_thought_stands_behind_the_empty_block(content):
    assert f"assistant\n{EMPTY}{content}<|im_end|>" in render("qwen3", [U, said("assistant", content)])[0]


def test_a_prompt_asks_for_thoughts_as_the_caller_or_else_the_template_says():
    asked, source = "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n", get_template("qwen3").chat_template()
    for default in (False, True):
        written = with_thinking_default(source, default)
        assert thinking_default(written) is default and with_thinking_default(written, False) == source
        for says, thinks in (({}, default), ({"enable_thinking": True}, True), ({"enable_thinking": False}, False)):
            texts, _ = render_jinja_template([[U]], chat_template=written, add_generation_prompt=True, **says)
            assert texts == [asked + ("" if thinks else EMPTY)]


def test_formats_without_such_a_block_know_no_choice():
    for name in set(TEMPLATES) - {"qwen3"}:
        source = get_template(name).chat_template()
        assert thinking_default(source) is None and with_thinking_default(source, True) == source


# -- what a tokenizer's own template lacks ---------------------------------------------------------------------------

# Knows roles and contents, and nothing else.
BARE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def written_by(source, messages, **options):
    return render_jinja_template([messages], chat_template=source, **options)[0][0]


def test_a_template_that_lacks_nothing_stays_as_it_is():
    assert complete(BARE, []) == BARE and not is_completed(BARE)
    assert is_completed(complete(BARE, ["system"])) and is_completed(get_template("vicuna").chat_template())


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n  \n", "x\n"])
def test_what_stands_before_a_template_leaves_no_trace(start):
    for source in (start + BARE, start + BARE + "\n"):
        whole = complete(source, ["thinking", "thoughts", "tools", "arguments", "ids", "system"])
        assert written_by(whole, [U, A]) == written_by(source, [U, A])


def test_a_system_text_goes_before_the_first_question():
    assert written_by(complete(BARE, ["system"]), [S, U, A, U]) == "<user>s\n\nu<assistant>a<user>u"
    assert written_by(complete(BARE, ["system"]), [said("system", ""), U]) == "<user>u"
    assert written_by(complete(BARE, ["system"]), [U, A]) == "<user>u<assistant>a"


def test_tools_calls_and_results_become_plain_json():
    text = written_by(complete(BARE, ["tools", "system"]), WITH_TOOLS[:6], tools=[HOURS, BMI])
    head, listed = text.split("<tools>\n", 1)
    assert head.startswith("<user>S\n\nFunctions are at your disposal.")
    listed, rest = listed.split("\n</tools>", 1)
    assert [json.loads(line) for line in listed.split("\n")] == [HOURS, BMI]
    assert rest.endswith(
        "and </tool_response>.\n\nQ1<assistant>"
        '<tool_call>\n{"name": "opening_hours", "arguments": {"name": "北门 <b>\\"药店\\"</b>"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "bmi", "arguments": {"kg": 70.5}}\n</tool_call><user>'
        '<tool_response>\n{"open": "8:00"}\n</tool_response>\n<tool_response>\n22.9\n</tool_response><assistant>A1'
    ), rest
    named, _ = render("gemma", WITH_TOOLS[:2], tools=[HOURS, BMI])
    assert named.split("user\nS")[1].split("Q1")[0] == text.split("<user>S")[1].split("Q1")[0]  # in the same words
    spoken = written_by(complete(BARE, ["tools"]), [U, said("assistant", "One moment.", tool_calls=[call("bmi", {})])])
    assert spoken == ('<user>u<assistant>One moment.\n<tool_call>\n{"name": "bmi", "arguments": {}}\n</tool_call>')


def test_functions_are_listed_where_a_template_writes_only_calls():
    source = complete(BARE.replace("['user'", "['system', 'user'"), ["listing"])
    text = written_by(source, [S, U], tools=[BMI])
    start = (
        "<system>s\n\nFunctions are at your disposal. Each line between <tools> and </tools> is the JSON description "
    )
    assert text == f"{start}of one:\n<tools>\n{json.dumps(BMI)}\n</tools><user>u"


def test_arguments_become_text_and_ids_are_numbered_where_a_template_wants_them():
    source = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments + c.id }}|{% endfor %}"
    source += "{{ m.tool_call_id or '' }}{% endfor %}"
    text = written_by(complete(source, ["arguments", "ids"]), WITH_TOOLS)
    assert text == (
        '{"name": "北门 <b>\\"药店\\"</b>"}call00001|{"kg": 70.5}call00002|call00001call00002{}call00003|call00003'
    )
    given = [U, said("assistant", "", tool_calls=[{**call("bmi", "{}"), "id": "x"}]), {**TOOL, "tool_call_id": "x"}]
    assert written_by(complete(source, ["arguments", "ids"]), given) == "{}x|x"


def test_an_open_thought_is_closed_at_once_where_nobody_asks_for_it():
    source = complete(
        BARE.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}"), ["thinking", "thoughts"]
    )
    ask = {"add_generation_prompt": True}
    assert written_by(source, [U], **ask) == "<user>u<assistant><think>\n\n</think>\n\n"
    assert written_by(source, [U], **ask, enable_thinking=True) == "<user>u<assistant><think>\n"
    assert written_by(source, [U, A]) == "<user>u<assistant>a"
    assert written_by(source.replace("<think>\n{%", "<think>{%"), [U], **ask).endswith("<think>\n\n</think>\n\n")


def test_todays_date_is_a_fixed_day():
    source = (
        "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y-%m-%d\") }}{% if strftime_now is defined %}!{% endif %}"
    )
    assert written_by(complete(source, []), [U]) == "26 Jul 2024 2024-07-26!"


def test_template_imports_only_the_standard_library_and_jinja2():
    tree = ast.parse((ROOT / "template.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names | {"jinja2"}
