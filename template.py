"""Named prompt templates, for tokenizers that bring none of their own.

A model does not read a list of messages, it reads one text. A template says how the one becomes the other: what stands
around a question, where the answer begins, which string ends it. A model answers well only when it is asked in the
form it was trained on, so the form is chosen once and then travels with the tokenizer:

    tokenizer.chat_template = get_template("vicuna").chat_template()

From there on training, inference, evaluation and serving all render with it, and none of them can drift from the
others. A tokenizer that has a chat template keeps it; a name from here is for one that has none (base models, models
from before chat templates) or for a user who asks for it.

A template is one row of strings in TEMPLATES; one Jinja source below turns every row into a chat template, with these
promises:

- The `{% generation %}` span is the answer and its end-of-turn, no more and no less. What a row's `assistant` writes
  before {answer} (the space of "ASSISTANT: Hello") is in the span, since the model writes it: a prompt that ended in
  that space would be cut into other tokens than the text the model was trained on.
- What was rendered before an answer is a prefix of what is rendered after it. No turn is ever rewritten.
- Where a format has a block for an answer that does not think first (qwen3), the block is part of the prompt, and is
  left out before an answer that brings its own <think>…</think>. Which of the two is asked for when there is no answer
  yet, `enable_thinking` says; its default is a line of the template (see thinking_default).
- Contents are verbatim. What cannot be written (two user messages in a row, a tokenizer without the eos_token that the
  format needs) is an error, never a guess.
- The assistant header is part of the user turn, so a conversation that ends in a question is ready for the answer
  whatever `add_generation_prompt` is; asking for it after an answer is an error.

A template writes the BOS itself: encode its text with `add_special_tokens=False`, as `apply_chat_template` does.

Tools in formats that know none. Functions, their calls and their results are plain JSON in ordinary turns, between
marks that also Hermes and Qwen use, so that common tool parsers (vLLM: `hermes`) read them:

    system turn     what it says, a blank line, "Functions are at your disposal. …", and between <tools> and </tools>
                    the JSON description of each function on a line of its own
    the call        written by the assistant, and learnt: behind whatever it says in words, for each call
                    <tool_call>\n{"name": "bmi", "arguments": {"kg": 70}}\n</tool_call>
    the result      a user turn, never learnt: <tool_response>\n22.9\n</tool_response>, several below one another

Without a system message the list of functions is the system text. stagekit/openai_format.py reads calls back.

A tokenizer's own template that lacks something is completed by complete(): Jinja in front of it brings the messages
into a form that it writes. The result is one template again, so that every engine that renders it does the same.
"""

import difflib
import json
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date

_PLACEHOLDER = re.compile(r"\{(answer|bos|call|eos|query|result|round|system|tools)\}")

_LISTING = (
    "Functions are at your disposal. Each line between <tools> and </tools> is the JSON description of one:\n"
    "<tools>\n{tools}\n</tools>"
)
_TOOLS = _LISTING + (
    "\n\nTo use one, answer with its name and its arguments, in one such block for each call:\n"
    '<tool_call>\n{"name": "<name>", "arguments": {<arguments>}}\n</tool_call>\n'
    "What it returned will be given to you between <tool_response> and </tool_response>."
)
_CALL = "<tool_call>\n{call}\n</tool_call>"
_RESULT = "<tool_response>\n{result}\n</tool_response>"

# The one line of a template that says whether an answer is asked to think first; callers may pass enable_thinking.
_THINKING = "{%- set enable_thinking = enable_thinking | default(false) %}"
_THINKING_LINE = re.compile(r"(\{%- set enable_thinking = enable_thinking \| default\()(true|false)(\) %\})")

# Appends the calls of `message` to said.text, in _SOURCE and in what complete() writes.
_CALLS = """\
{%- for tool_call in message["tool_calls"] %}
    {%- set arguments = tool_call["function"]["arguments"] %}
    {%- set arguments = arguments if arguments is string else arguments | tojson %}
    {%- set call = '{"name": ' ~ tool_call["function"]["name"] | tojson ~ ', "arguments": ' ~ arguments ~ "}" %}
    {%- set said.text = said.text ~ ("\\n" if said.text else "") ~ $tool_call %}
{%- endfor %}"""

# Two loops: the first refuses what has no rendering, the second writes. Every tag strips the whitespace before it, so
# the layout below leaves no trace in the text, with or without Jinja's trim_blocks. Jinja finds message["role"] faster
# than message.role, and this runs for every row of data.
_SOURCE = """\
{#- Prompt template "$name" -#}
$thinking{%- set bos = bos_token | default("", true) %}
{%- set eos = eos_token | default("", true) %}
{%- if $needs_eos and not eos %}
    {{- raise_exception("template '$name' writes the tokenizer's eos_token, but the tokenizer has none") }}
{%- endif %}
{%- for message in messages %}
    {%- set role = message["role"] %}
    {%- set before = "nothing" if loop.first else loop.previtem["role"] %}
    {%- set wrong = "" %}
    {%- if role not in ["system", "user", "assistant", "tool"] %}
        {%- set wrong = "unknown role '" ~ role ~ "'; known: system, user, assistant, tool" %}
    {%- elif (message["content"] or "") is not string %}
        {%- set wrong = "content must be a string" %}
    {%- elif role == "system" and not loop.first %}
        {%- set wrong = "only the first message may be a system message" %}
    {%- elif role == "user" and before not in ["nothing", "system", "assistant"] %}
        {%- set wrong = "a user message cannot follow a " ~ before ~ " message, an answer must" %}
    {%- elif role == "assistant" and before not in ["user", "tool"] %}
        {%- set wrong = "an assistant message must follow a user or tool message, not " ~ before %}
    {%- elif role == "tool" and not (before == "tool" or (loop.previtem | default({}))["tool_calls"]) %}
        {%- set wrong = "a tool message must follow an assistant message with tool_calls" %}
    {%- endif %}
    {%- if wrong %}
        {{- raise_exception("message " ~ loop.index ~ ": " ~ wrong) }}
    {%- endif %}
{%- endfor %}
{%- set turns = messages %}
{%- set system = $default_system %}
{%- if messages and messages[0]["role"] == "system" %}
    {%- set turns = messages[1:] %}
    {%- set system = messages[0]["content"] or "" %}
{%- endif %}
{%- if not turns %}
    {{- raise_exception("there is no user message") }}
{%- elif add_generation_prompt and turns[-1]["role"] == "assistant" %}
    {{- raise_exception("add_generation_prompt: the last message is already an answer") }}
{%- endif %}
{%- if tools %}
    {%- set tools = tools | map("tojson") | join("\\n") %}
    {%- set system = system ~ ("\\n\\n" if system else "") ~ $tools %}
{%- endif %}
{%- set system = $system if system else "" %}
{{- $prefix ~ ("" if $system_in_user else system) }}
{%- set count = namespace(round=$first_round) %}
{%- for message in turns %}
    {%- set before = "" if loop.first else loop.previtem["role"] %}
    {%- set after = "" if loop.last else loop.nextitem["role"] %}
    {%- set round = count.round %}
    {%- if message["role"] == "assistant" %}
        {%- set answer = message["content"] or "" %}
        {%- if message["tool_calls"] %}
            {%- set said = namespace(text=answer) %}
            $calls
            {%- set answer = said.text %}
        {%- endif %}
        {%- generation %}
        {{- $answer }}
        {%- endgeneration %}
        {{- $after_answer }}
        {%- set count.round = count.round + 1 %}
    {%- else %}
        {%- set query = message["content"] or "" %}
        {%- if message["role"] == "tool" %}
            {%- set result = query %}
            {%- set query = $tool_result %}
        {%- elif loop.first and $system_in_user %}
            {%- set query = system ~ query %}
        {%- endif %}
        {{- "\\n" if before == "tool" else $next_query if before == "assistant" else $first_query }}
        {{- query }}
        {{- "" if after == "tool" else $after_query }}$without_thoughts
    {%- endif %}
{%- endfor %}"""

# Behind a question, where the format has a block for answers that do not think first.
_WITHOUT_THOUGHTS = """
        {%- if after != "tool" %}
            {%- set said = ((loop.nextitem | default({}))["content"] or "").split("</think>") %}
            {%- set thought = said[0].strip() %}
            {%- set thinks = said | length > 1 and thought.startswith("<think>") and thought != "<think>" %}
            {{- "" if (thinks if after == "assistant" else enable_thinking) else $block }}
        {%- endif %}"""


def _to_jinja(text: str) -> str:
    """Write a row's string as a Jinja expression: 'USER: {query}' becomes '("USER: " ~ query ~ "")'."""
    pieces = _PLACEHOLDER.split(text)  # literals at even places, placeholders at odd ones
    pieces[::2] = [json.dumps(literal, ensure_ascii=False) for literal in pieces[::2]]
    return f"({' ~ '.join(pieces)})"


@dataclass(frozen=True)
class Template:
    """One chat format, as strings in which {bos} and {eos} stand for the tokenizer's own tokens.

    Attributes:
        name: What --template_name calls it.
        user: A user turn up to where the answer begins, the assistant header included. Contains {query}; {round} is
            the number of the round. If it begins with `stop[0]`, that string is written once between two turns: it
            ends the one and opens the other (chatglm3).
        assistant: The answer's turn. Contains {answer}, then `stop[0]`; what follows is not part of the answer.
        stop: Strings that end an answer. The first is the end-of-turn that is written and trained, the others are
            what the original models may also say.
        system: The system turn around {system}; written only if there is a system text.
        prefix: Written once at the very start.
        default_system: The system text of a conversation without a system message. An empty system message is a
            choice: no system text at all.
        system_in_user: Whether the system turn stands inside the first user turn, before the query.
        first_round: What {round} counts from.
        tools: What is appended to the system text when functions are offered: {tools} is one line of JSON for each.
        tool_call: How a call stands in the answer; {call} is JSON.
        tool_result: How a result stands in the user turn that brings it.
        without_thoughts: What closes the prompt of an answer that does not think first.
    """

    name: str
    user: str
    assistant: str
    stop: tuple[str, ...] = ("{eos}",)
    system: str = "{system}"
    prefix: str = ""
    default_system: str = ""
    system_in_user: bool = False
    first_round: int = 1
    tools: str = _TOOLS
    tool_call: str = _CALL
    tool_result: str = _RESULT
    without_thoughts: str = ""

    def chat_template(self) -> str:
        """Write the Jinja source that `apply_chat_template` renders."""
        before_query, after_query = self.user.split("{query}")
        before_stop, _, after_stop = self.assistant.partition(self.stop[0])
        strings = {
            "default_system": self.default_system,
            "system": self.system,
            "prefix": self.prefix,
            "tools": self.tools,
            "tool_result": self.tool_result,
            "first_query": before_query,
            "next_query": before_query.removeprefix(self.stop[0]),
            "after_query": after_query,
            "answer": before_stop + self.stop[0],
            "after_answer": after_stop,
        }
        return string.Template(_SOURCE).substitute(
            {key: _to_jinja(text) for key, text in strings.items()},
            name=self.name,
            first_round=self.first_round,
            system_in_user=str(self.system_in_user).lower(),
            needs_eos=str("{eos}" in self.prefix + self.system + self.user + self.assistant).lower(),
            calls=string.Template(_CALLS).substitute(tool_call=_to_jinja(self.tool_call)),
            thinking=_THINKING + "\n" if self.without_thoughts else "",
            without_thoughts=string.Template(_WITHOUT_THOUGHTS).substitute(block=_to_jinja(self.without_thoughts))
            if self.without_thoughts
            else "",
        )

    def stop_strings(self, eos_token: str | None) -> tuple[str, ...]:
        """Name the strings at which generation ends, the trained end-of-turn first.

        Args:
            eos_token: The tokenizer's, or None if it has none.

        Raises:
            ValueError: The end-of-turn is the eos_token and there is none.
        """
        if not eos_token and self.stop[0] == "{eos}":
            raise ValueError(f"template {self.name!r} ends an answer with the tokenizer's eos_token, but it has none")
        stops = (stop.replace("{eos}", eos_token or "") for stop in self.stop)
        return tuple(dict.fromkeys(stop for stop in stops if stop))


_CHATML = {
    "user": "<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n",
    "assistant": "{answer}<|im_end|>\n",
    "stop": ("<|im_end|>",),
    "system": "<|im_start|>system\n{system}<|im_end|>\n",
}
_PHI = {
    "user": "<|user|>\n{query}<|end|>\n<|assistant|>\n",
    "assistant": "{answer}<|end|>\n",
    "stop": ("<|end|>",),
    "system": "<|system|>\n{system}<|end|>\n",
}
_LLAMA2 = {
    # Every turn opens with a BOS of its own, and both the question and the answer stand between spaces.
    "user": "{bos}[INST] {query} [/INST]",
    "assistant": " {answer} {eos}",
    "system": "<<SYS>>\n{system}\n<</SYS>>\n\n",
    "system_in_user": True,
}
_MISTRAL = {"system": "{system}\n\n", "prefix": "{bos}", "system_in_user": True}
# An answer of ChatGLM3 has no end of its own: it ends where the next turn's header begins.
_GLM = {"user": "<|user|>\n{query}<|assistant|>", "assistant": "\n{answer}<|user|>", "system": "<|system|>\n{system}"}

_INTERNLM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
    "English and 中文."
)
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
_HUMAN = _VICUNA.replace("user", "human")

# Where a format writes the model's own BOS or EOS, a row says {bos} or {eos}, so that it also serves a tokenizer that
# spells them otherwise. Some older formats (baichuan, chatglm, ziya, linly, openbuddy, solar, falcon) close only the
# last answer with it; here every answer is closed, or only one turn of a conversation would teach the model to stop.
# fmt: off
_ROWS = (
    Template("base", "{query}", "{answer}{eos}"),
    Template("default", "Human: {query}{eos}\nAssistant:", "{answer}{eos}\n", system="System: {system}{eos}\n"),
    # The ChatML family. The eos_token of the base models is <|endoftext|>, not the <|im_end|> that ends a turn.
    Template("chatml", **_CHATML),
    Template("yi", **_CHATML),
    Template("qwen", **_CHATML, default_system="You are a helpful assistant."),
    # Every answer, in history as in training, stands behind an empty think block, which belongs to the prompt, or
    # brings its own thoughts. The model's own template takes both out of history, and with them the stable prefix.
    Template("qwen3", **_CHATML, without_thoughts="<think>\n\n</think>\n\n"),
    Template("intern2", **_CHATML, prefix="{bos}", default_system=_INTERNLM),
    # Roles in words. Stanford's alpaca prompt ended at the colon; the newline after it is what others trained since.
    Template("vicuna", "USER: {query} ASSISTANT:", " {answer}{eos}", ("{eos}",), "{system} ", "{bos}", _VICUNA),
    Template("alpaca", "### Instruction:\n{query}\n\n### Response:\n", "{answer}{eos}\n\n",
             system="{system}\n\n", prefix="{bos}", default_system=_ALPACA),
    # Its own default system text has the model refuse all that is not programming; it is left out.
    Template("deepseekcoder", "### Instruction:\n{query}\n### Response:", "\n{answer}\n<|EOT|>\n",
             stop=("<|EOT|>",), system="{system}\n", prefix="{bos}"),
    Template("solar", "### User:\n{query}\n\n### Assistant:\n", "{answer}{eos}\n\n",
             system="### System:\n{system}\n\n"),
    Template("deepseek", "User: {query}\n\nAssistant:", " {answer}{eos}", system="{system}\n\n", prefix="{bos}"),
    Template("falcon", "User: {query}\n\nAssistant:", " {answer}{eos}\n\n", ("{eos}", "\nUser"), "{system}\n"),
    Template("openbuddy", "User: {query}\nAssistant:", " {answer}{eos}\n", ("{eos}", "User:"), "{system}\n"),
    Template("linly", "User: {query}\nBot: ", "{answer}{eos}\n"),
    Template("belle", "Human: {query}\n\nBelle: ", "{answer}{eos}\n\n", prefix="{bos}"),
    Template("xverse", "Human: {query}\n\nAssistant: ", "{answer}{eos}"),
    # The eos before the answer is no slip: the model was trained to answer after it.
    Template("orion", "Human: {query}\n\nAssistant: {eos}", "{answer}{eos}", prefix="{bos}"),
    Template("ziya", "<human>:{query}\n<bot>:", "{answer}{eos}\n"),
    Template("phoenix", "Human: {bos}{query}{eos}Assistant: {bos}", "{answer}{eos}",
             system="{system}\n\n", default_system=_HUMAN),
    # Other toolkits also stop at "###", which would cut an answer at its first Markdown heading.
    Template("aquila", "Human: {query}###Assistant:", " {answer}{eos}", ("{eos}", "[UNK]"),
             system="{system}###", default_system=_HUMAN),
    Template("openchat", "GPT4 Correct User: {query}<|end_of_turn|>GPT4 Correct Assistant:",
             " {answer}<|end_of_turn|>", ("<|end_of_turn|>",), prefix="{bos}"),
    # Llama and Mistral. Up to v0.2 Mistral's space stands before [/INST], since the v3 tokenizer before the answer.
    Template("llama2", **_LLAMA2),
    Template("llama2-zh", **_LLAMA2, default_system="You are a helpful assistant. 你是一个乐于助人的助手。"),
    Template("mistral", "[INST] {query} [/INST]", "{answer}{eos}", **_MISTRAL),
    Template("mistral-v3", "[INST] {query}[/INST]", " {answer}{eos}", **_MISTRAL),
    # The tekken tokenizers put no blanks around anything; from Small 2501 on the system text has tokens of its own.
    Template("ministral", "[INST]{query}[/INST]", "{answer}{eos}", **_MISTRAL),
    Template("mistral-small", "[INST]{query}[/INST]", "{answer}{eos}",
             system="[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT]", prefix="{bos}"),
    Template("llama3", "<|start_header_id|>user<|end_header_id|>\n\n{query}<|eot_id|>"
             "<|start_header_id|>assistant<|end_header_id|>\n\n", "{answer}<|eot_id|>",
             stop=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"), prefix="{bos}",
             system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"),
    Template("llama4", "<|header_start|>user<|header_end|>\n\n{query}<|eot|>"
             "<|header_start|>assistant<|header_end|>\n\n", "{answer}<|eot|>",
             stop=("<|eot|>", "<|eom|>"), prefix="{bos}",
             system="<|header_start|>system<|header_end|>\n\n{system}<|eot|>"),
    # Turns between tokens of their own
    Template("phi", **_PHI),
    Template("phi4", "<|im_start|>user<|im_sep|>{query}<|im_end|><|im_start|>assistant<|im_sep|>",
             "{answer}<|im_end|>", ("<|im_end|>",), "<|im_start|>system<|im_sep|>{system}<|im_end|>"),
    Template("phi4-mini", "<|user|>{query}<|end|><|assistant|>", "{answer}<|end|>", ("<|end|>",),
             "<|system|>{system}<|end|>"),
    Template("starchat", **_PHI),
    Template("zephyr", "<|user|>\n{query}{eos}\n<|assistant|>\n", "{answer}{eos}\n",
             system="<|system|>\n{system}{eos}\n"),
    Template("gemma", "<start_of_turn>user\n{query}<end_of_turn>\n<start_of_turn>model\n", "{answer}<end_of_turn>\n",
             stop=("<end_of_turn>",), system="{system}\n\n", prefix="{bos}", system_in_user=True),
    Template("gemma4", "<|turn>user\n{query}<turn|>\n<|turn>model\n", "{answer}<turn|>\n", ("<turn|>",),
             "<|turn>system\n{system}<turn|>\n", "{bos}"),
    Template("cohere", "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{query}<|END_OF_TURN_TOKEN|>"
             "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "{answer}<|END_OF_TURN_TOKEN|>",
             stop=("<|END_OF_TURN_TOKEN|>",), prefix="{bos}",
             system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{system}<|END_OF_TURN_TOKEN|>"),
    Template("deepseek3", "<｜User｜>{query}<｜Assistant｜>", "{answer}{eos}", prefix="{bos}"),
    Template("intern", "<|User|>:{query}<eoh>\n<|Bot|>:", "{answer}<eoa>\n",
             stop=("<eoa>",), system="<|System|>:{system}\n", prefix="{bos}", default_system=_INTERNLM),
    Template("baichuan", "<reserved_102>{query}<reserved_103>", "{answer}{eos}"),
    Template("baichuan2", "<reserved_106>{query}<reserved_107>", "{answer}{eos}"),
    # chatglm has no place for a system text (here: a line before the first round), and its own code sends a single
    # question without the header. The header is written always, or a second turn would rewrite the first.
    Template("chatglm", "[Round {round}]\n问：{query}\n答：", "{answer}{eos}\n", system="{system}\n", first_round=0),
    Template("chatglm2", "[Round {round}]\n\n问：{query}\n\n答：", "{answer}{eos}\n\n", prefix="[gMASK]sop"),
    Template("chatglm3", **_GLM, stop=("<|user|>", "<|observation|>"), prefix="[gMASK]sop"),
    Template("glm4", **_GLM, stop=("<|user|>", "<|observation|>", "<|endoftext|>"), prefix="[gMASK]<sop>"),
)
# fmt: on
TEMPLATES: dict[str, Template] = {row.name: row for row in _ROWS}
# Other names of the same formats, as models and toolkits call them; case, "_" and "-" make no difference.
ALIASES: dict[str, tuple[str, ...]] = {
    "base": ("empty", "raw"),
    "vicuna": ("vicuna-v1.1", "vicuna-v1.5"),
    "baichuan": ("baichuan-chat",),
    "baichuan2": ("baichuan2-chat",),
    "chatglm": ("chatglm-6b",),
    "chatglm2": ("chatglm2-6b",),
    "chatglm3": ("chatglm3-6b",),
    "glm4": ("glm-4", "chatglm4"),
    "llama2": ("llama-2",),
    "llama2-zh": ("llama-2-zh", "chinese-alpaca2", "chinese-alpaca-2"),
    "llama3": ("llama-3", "llama3.1", "llama-3.1", "llama3.2", "llama-3.2", "llama3.3", "llama-3.3"),
    "llama4": ("llama-4",),
    "mistral": ("mistral-v0.1", "mistral-v0.2"),
    "mistral-v3": ("mistral-v0.3",),
    "ministral": ("mistral-tekken", "mistral-nemo", "pixtral"),
    "qwen": ("qwen1.5", "qwen2", "qwen2.5", "qwen-7b-chat"),
    "qwen3": tuple(f"qwen3{version}{mode}" for version in ("", ".5", "-5", ".6", "-6") for mode in ("", "-nothink"))[
        1:
    ],
    "yi": ("yi-34b-chat", "yi-chat"),
    "intern": ("internlm", "internlm-chat"),
    "intern2": ("internlm2", "internlm2-chat"),
    "deepseek": ("deepseek-chat", "deepseek-llm", "deepseek-v2", "deepseek2"),
    "deepseek3": ("deepseek-v3", "deepseekr1", "deepseek-r1"),
    "deepseekcoder": ("deepseek-coder",),
    "gemma": ("gemma2", "gemma-2", "gemma3", "gemma-3"),
    "phi": ("phi3", "phi-3", "phi3.5", "phi-3.5"),
    "gemma4": ("gemma-4",),
    "phi4": ("phi-4",),
    "cohere": ("command-r", "aya"),
    "zephyr": ("tinyllama", "catppt"),
    "aquila": ("aquila-chat", "aquilachat", "aquilachat2"),
    "starchat": ("starchat-beta",),
    "openchat": ("openchat-3.5",),
    "solar": ("solar-instruct",),
    "falcon": ("falcon-chat", "falcon-instruct"),
}


def _plain_name(name):
    return name.lower().replace("_", "-")


_NAMES = {_plain_name(alias): name for name in TEMPLATES for alias in (name, *ALIASES.get(name, ()))}


def get_template(name: str) -> Template:
    """Look up a template by name or alias.

    Raises:
        ValueError: There is none of this name; the message has the nearest and all the known ones.
    """
    if _plain_name(name) in _NAMES:
        return TEMPLATES[_NAMES[_plain_name(name)]]
    nearest = difflib.get_close_matches(_plain_name(name), _NAMES, n=1)
    hint = f" did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"--template_name {name!r} is not a template;{hint} known: {', '.join(sorted(TEMPLATES))}")


# -- what a tokenizer's own template lacks ---------------------------------------------------------------------------

# A template that writes the day it is rendered asks tomorrow for something else than was trained today. This is the
# day that Llama 3.1's own template names when it is told none.
_DAY = date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

_WITH_TOOLS = """\
{%- if messages | selectattr("tool_calls") | first is defined
    or messages | selectattr("role", "equalto", "tool") | first is defined %}
"""
_SYSTEM_MESSAGE = """\
{%- if tools %}
    {%- set tools = tools | map("tojson") | join("\\n") %}
    {%- set tools = $tools %}
    {%- if messages[0]["role"] == "system" %}
        {%- set system = messages[0]["content"] ~ "\\n\\n" ~ tools %}
        {%- set messages = [{"role": "system", "content": system}] + messages[1:] %}
    {%- else %}
        {%- set messages = [{"role": "system", "content": tools}] + messages %}
    {%- endif %}
    {%- set tools = none %}
{%- endif %}
"""
# Each brings `messages` into a form that the template behind it writes, in this order; see complete().
_ADDITIONS = {
    "thinking": _THINKING + "\n",
    "listing": string.Template(_SYSTEM_MESSAGE).substitute(tools=_to_jinja(_LISTING)),
    "tools": string.Template(_SYSTEM_MESSAGE).substitute(tools=_to_jinja(_TOOLS))
    + _WITH_TOOLS
    + string.Template("""\
{%- set made = namespace(messages=[], results=[]) %}
{%- for message in messages %}
    {%- if message["role"] == "tool" %}
        {%- set result = message["content"] %}
        {%- set made.results = made.results + [$tool_result] %}
        {%- if loop.last or loop.nextitem["role"] != "tool" %}
            {%- set made.messages = made.messages + [{"role": "user", "content": made.results | join("\\n")}] %}
            {%- set made.results = [] %}
        {%- endif %}
    {%- elif message["tool_calls"] %}
        {%- set said = namespace(text=message["content"] or "") %}
        $calls
        {%- set made.messages = made.messages + [{"role": "assistant", "content": said.text}] %}
    {%- else %}
        {%- set made.messages = made.messages + [message] %}
    {%- endif %}
{%- endfor %}
{%- set messages = made.messages %}
{%- endif %}
""").substitute(tool_result=_to_jinja(_RESULT), calls=string.Template(_CALLS).substitute(tool_call=_to_jinja(_CALL))),
    "arguments": _WITH_TOOLS
    + """\
{%- set made = namespace(messages=[]) %}
{%- for message in messages %}
    {%- if message["tool_calls"] %}
        {%- set calls = namespace(made=[]) %}
        {%- for tool_call in message["tool_calls"] %}
            {%- set function = tool_call["function"] %}
            {%- set arguments = function["arguments"] %}
            {%- set arguments = arguments if arguments is string else arguments | tojson %}
            {%- set calls.made = calls.made + [dict(tool_call, function=dict(function, arguments=arguments))] %}
        {%- endfor %}
        {%- set made.messages = made.messages + [dict(message, tool_calls=calls.made)] %}
    {%- else %}
        {%- set made.messages = made.messages + [message] %}
    {%- endif %}
{%- endfor %}
{%- set messages = made.messages %}
{%- endif %}
""",
    "ids": _WITH_TOOLS
    + """\
{%- set made = namespace(messages=[], calls=0, results=0) %}
{%- for message in messages %}
    {%- if message["tool_calls"] %}
        {%- set calls = namespace(made=[]) %}
        {%- for tool_call in message["tool_calls"] %}
            {%- set made.calls = made.calls + 1 %}
            {%- set id = tool_call["id"] or "call%05d" | format(made.calls) %}
            {%- set calls.made = calls.made + [dict(tool_call, id=id)] %}
        {%- endfor %}
        {%- set made.messages = made.messages + [dict(message, tool_calls=calls.made)] %}
    {%- elif message["role"] == "tool" %}
        {%- set made.results = made.results + 1 %}
        {%- set id = message["tool_call_id"] or "call%05d" | format(made.results) %}
        {%- set made.messages = made.messages + [dict(message, tool_call_id=id)] %}
    {%- else %}
        {%- set made.messages = made.messages + [message] %}
    {%- endif %}
{%- endfor %}
{%- set messages = made.messages %}
{%- endif %}
""",
    "system": """\
{%- if messages and messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] ~ ("\\n\\n" if messages[0]["content"] else "") %}
    {%- set messages = [{"role": "user", "content": system ~ messages[1]["content"]}] + messages[2:] %}
{%- endif %}
""",
}
_COMPLETED = "{#- Completed: "


def is_completed(source: str) -> bool:
    """Whether complete() has seen this template before, or it is one of this module's own."""
    return source.startswith((_COMPLETED, '{#- Prompt template "'))


def complete(source: str, additions: Iterable[str]) -> str:
    """Write before a tokenizer's own template what it lacks; what it writes itself stays as it is.

    A date that it takes from the clock is fixed in any case.

    Args:
        source: the tokenizer's chat template.
        additions: any of
            "thinking": it can ask for an answer without thoughts (enable_thinking): give that a default;
            "thoughts": its prompts open a thought: close it at once where enable_thinking is false;
            "listing": it writes calls and results, but not the functions: list them in the system text;
            "tools": it knows no tools: write all three as plain JSON (the docstring of this module shows how);
            "arguments": it takes the arguments of calls as text only;
            "ids": it wants an id of nine characters with each call and result;
            "system": it takes no system message: put the text before the first question, with a blank line between.
    """
    chosen = set(additions)
    assert chosen <= {*_ADDITIONS, "thoughts"}, chosen
    source = _TODAY.sub(lambda found: json.dumps(_DAY.strftime(found.group(2))), source)
    if not chosen:
        return source
    if "thoughts" in chosen:
        # The text is caught to see how it ends. Jinja takes one newline from a template's end, but not from a block's.
        source = (
            "{%- set text %}\n"
            + source.removesuffix("\n")
            + (
                "{% endset %}{{- text }}"
                '{%- if add_generation_prompt and not enable_thinking and text.rstrip().endswith("<think>") %}'
                '{{- "\\n</think>\\n\\n" if text.endswith("\\n") else "\\n\\n</think>\\n\\n" }}{%- endif %}'
            )
        )
    before = "".join(text for name, text in _ADDITIONS.items() if name in chosen)
    # One newline: transformers' Jinja (trim_blocks) takes it away, and the template begins where it always began.
    return f"{_COMPLETED}{', '.join(sorted(chosen))} -#}}\n{before.rstrip()}\n{source}"


def thinking_default(source: str) -> bool | None:
    """Whether a template asks for thoughts where nobody says so; None if it knows no such choice."""
    found = _THINKING_LINE.search(source)
    return found.group(2) == "true" if found else None


def with_thinking_default(source: str, thinking: bool) -> str:
    """The template with another thinking_default; unchanged where it knows no such choice."""
    return _THINKING_LINE.sub(rf"\g<1>{str(thinking).lower()}\3", source)
