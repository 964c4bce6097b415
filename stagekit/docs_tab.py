"""The documents tab of the browser demo: answers from the passages of a folder's documents, shown below each answer.

Asks what chatpdf.py asks. The folder belongs to whoever started the program: nothing can be uploaded.
"""

import html
import logging
import threading
from collections.abc import Iterator

import gradio as gr

from stagekit import generation
from stagekit.chat_tab import ChatTab, Job, Prompt, describe, reply
from stagekit.grounding import cite, cited_numbers, ground
from stagekit.page import show_messages
from stagekit.retrieval import BrokenIndex, Index, Passage
from stagekit.tokenization import encode_prompt

logger = logging.getLogger(__name__)

CITED = "被引用 cited"
UNSEARCHABLE = "the index of the documents cannot be searched"


def answer(
    loaded: generation.LoadedModel,
    index: Index,
    messages: list[dict],
    settings: generation.Settings,
    stop: threading.Event,
    cache: generation.PrefixCache | None = None,
) -> Iterator[tuple[list[dict], str]]:
    """Answer a conversation's last question from the documents; whatever goes wrong becomes a notice.

    Args:
        loaded: what load_for_generation returned.
        index: of the documents.
        messages: the whole conversation, ending with the question. Answers hold the passages they were given as
            "passages": a list, or None where nothing was found and no model was asked.
        settings: of the answer.
        stop: set to end the answer; what was said stays.
        cache: of this model; one answer at a time uses it.

    Yields:
        (messages with the answer as far as it is, HTML of a notice or "").
    """

    def prepare():
        *before, question = messages

        def count_tokens(written):
            return len(encode_prompt(loaded.chat, written))

        def limit():
            return generation.prompt_limit(loaded, settings)

        try:
            found = ground(index, question["content"], _told(before), count_tokens, limit)
        except BrokenIndex as error:  # it names the file, which is not for whoever asks
            logger.exception("a question was not searched")
            raise ValueError(UNSEARCHABLE) from error
        if isinstance(found, str):
            return [*messages, {"role": "assistant", "content": found, "passages": None}], ""
        written, passages = found
        return Prompt(encode_prompt(loaded.chat, written), settings, about={"passages": passages})

    return reply(loaded, messages, prepare, stop, cache)


def _told(messages):
    """What a model is told of earlier exchanges: those that one has answered, without their passages."""
    told = []
    for question, answered in zip(messages[::2], messages[1::2], strict=True):
        if answered["passages"] is not None:
            told += [{"role": each["role"], "content": each["content"]} for each in (question, answered)]
    return told


def show_passages(passages: list[Passage], text: str) -> str:
    """HTML that lists passages, each to be opened, and marks those that a text cites; what they hold stays text."""
    cited, lines = cited_numbers(text, len(passages)), []
    for number, passage in enumerate(passages, 1):
        kind, mark = (' class="cited"', f" · {CITED}") if number in cited else ("", "")
        where = html.escape(f"[{number}] {cite(passage)}{mark}")
        lines.append(f"<details{kind}><summary>{where}</summary><p>{html.escape(passage.text)}</p></details>")
    return "".join(lines)


class DocsTab(ChatTab):
    """Components and handlers; made inside a gr.Tab.

    Args:
        loaded: the model that answers.
        name: of the folder, as it is shown.
        index: of its documents.
        settings: of the answers.
    """

    hint, welcome, examples = (
        "就文档提问 · Ask about the documents",
        "**文档里说了什么？ What do the documents say?**",
        (),
    )
    prefix = "docs_"

    def __init__(self, loaded: generation.LoadedModel, name: str, index: Index, settings: generation.Settings):
        self.models, self.caches = [loaded], [generation.PrefixCache()]
        self.index, self.settings = index, settings
        self.talks, self.job = gr.State([[]]), gr.State(None)
        chatbot, notice = self._add_window({"documents": name, "model": describe(loaded)["model"]})
        self.chatbots, self.notices = [chatbot], [notice]
        self._add_composer()
        self._wire()

    def _inputs(self):
        return []

    def _answers(self, talks, job: Job):
        (loaded,), (talk,), (cache,) = self.models, talks, self.caches
        return [answer(loaded, self.index, talk, self.settings, job.stop, cache)]

    def _present(self, talk):
        shown = show_messages(talk)
        for message, value in zip(talk, shown, strict=True):
            if message.get("passages"):
                found = show_passages(message["passages"], message["content"])
                value["content"].append(gr.HTML(found, elem_classes="passages", render=False))
        return shown
