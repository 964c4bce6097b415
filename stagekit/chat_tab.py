"""The chat tab of the browser demo: what it answers, its components, and what each of its buttons does."""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
from accelerate.utils.memory import clear_device_cache

from stagekit import generation
from stagekit.page import MODEL_QUEUE, show_caption, show_messages, show_notice
from stagekit.prompts import fit_history

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_UPDATES = 0.05  # an update of the page costs more than a token of a small model
EXAMPLES = (
    "感冒第三天还在发烧，什么情况下要去医院？",
    "高血压患者平时饮食要注意什么？",
    "What are the warning signs of a stroke?",
    "How can I tell a cold from the flu?",
)
STOPPED = "已停止 · Stopped"
CUT_OFF = "回答达到长度上限，被截断 · Cut off by max_new_tokens"
FORGOTTEN = "上下文已满，模型看不到最早的 {0} 轮对话 · The context is full: the oldest {0} exchanges are forgotten"
TOO_LONG = "问题太长，除回答外只剩 {0} 个 token · Too long: beside max_new_tokens there is room for {0} tokens"
OUT_OF_MEMORY = (
    "内存或显存不足，请缩短问题或调小 max_new_tokens · Out of memory: shorten the question or lower max_new_tokens"
)
REFUSED = "无法提问 · Cannot be asked: {0}"
FAILED = "模型出错，没有答完，可以重试 · The model failed ({0}); the question can be retried"
NOT_ASKED = "没有提交：排队的人太多，或设置超出范围 · Not asked: too many are waiting, or a setting is out of range"
LEFT = "已取消排队，问题没有提交 · Left the queue; the question was not asked"


@dataclass(eq=False)  # told apart by identity
class Job:
    """One question on its way through the queue."""

    stop: threading.Event = field(default_factory=threading.Event)
    started: bool = False
    ended: bool = False
    left: bool = False


def describe(loaded: generation.LoadedModel) -> dict[str, str]:
    """Say which model, stage, base and template this is; of directories only the last two names."""

    def short(name):
        return "/".join(Path(name).parts[-2:]) if os.path.isdir(name) else name

    source, stage = loaded.source, loaded.source.stage or {}
    return {
        "model": short(source.adapter or source.directory or source.base),
        "stage": stage.get("stage", "none"),
        "base": short(source.base),
        "template": generation.template_name(loaded),
    }


# -- answers ---------------------------------------------------------------------------------------------------------


def answer(
    loaded: generation.LoadedModel,
    messages: list[dict],
    system_prompt: str,
    chosen: dict,
    stop: threading.Event,
    cache: generation.PrefixCache | None = None,
) -> Iterator[tuple[list[dict], str]]:
    """Answer a conversation's last question as inference.py would; whatever goes wrong becomes a notice.

    Args:
        loaded: what load_for_generation returned.
        messages: the whole conversation without a system message, ending with the question.
        system_prompt: empty for none.
        chosen: fields of Settings.
        stop: set to end the answer; what was said stays.
        cache: of this model; one answer at a time uses it.

    Yields:
        (messages with the answer as far as it is, HTML of a notice or "").
    """

    def prepare():
        settings = generation.choose_settings(loaded, **chosen)
        limit = generation.prompt_limit(loaded, settings)
        system = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
        fitted = fit_history(loaded.chat, [*system, *messages], limit)
        if fitted is None:
            return messages, show_notice(TOO_LONG.format(limit), "error")
        num_forgotten = len(system) + len(messages) - len(fitted[0])
        notices = [FORGOTTEN.format(num_forgotten // 2)] if num_forgotten else []
        return Prompt(fitted[1], settings, notices)

    return reply(loaded, messages, prepare, stop, cache)


@dataclass
class Prompt:
    """What a model is asked.

    Attributes:
        input_ids: the prompt.
        settings: of its answer.
        notices: what has to be said beside the answer.
        about: what the answer's message holds beside its text.
    """

    input_ids: list[int]
    settings: generation.Settings
    notices: list[str] = field(default_factory=list)
    about: dict = field(default_factory=dict)


def reply(
    loaded: generation.LoadedModel,
    messages: list[dict],
    prepare: Callable[[], Prompt | tuple[list[dict], str]],
    stop: threading.Event,
    cache: generation.PrefixCache | None = None,
) -> Iterator[tuple[list[dict], str]]:
    """Answer a conversation's last question; whatever goes wrong becomes a notice.

    Args:
        loaded, messages, stop, cache: as for answer().
        prepare: makes the prompt; or, where the model is not to be asked, the one item to yield.

    Yields:
        (messages with the answer as far as it is, HTML of a notice or "").
    """
    answered, prompt = messages, None
    try:
        prompt = prepare()
        if not isinstance(prompt, Prompt):
            yield prompt
            return
        notices = list(prompt.notices)
        with contextlib.closing(generation.stream(loaded, prompt.input_ids, prompt.settings, cache)) as pieces:
            for piece in pieces:
                if piece.text:
                    answered = [*messages, {"role": "assistant", "content": piece.text, **prompt.about}]
                if piece.finish_reason is None and stop.is_set():
                    notices.append(STOPPED)
                    break
                if piece.finish_reason == "length":
                    notices.append(CUT_OFF)
                yield answered, show_notice(" · ".join(notices))
        yield answered, show_notice(" · ".join(notices))
    except Exception as error:  # of any kind: the page stays usable, and the log of whoever runs it has the traceback
        if prompt is None and isinstance(error, ValueError):
            notice = REFUSED.format(error)
        else:
            logger.exception("a question was not answered")
            notice = FAILED.format(type(error).__name__)
        if isinstance(error, generation.OutOfMemory):
            clear_device_cache(garbage_collection=True)
            notice = OUT_OF_MEMORY
        yield answered, show_notice(notice, "error")


def together(iterators: list[Iterator]) -> Iterator[tuple[int, object]]:
    """Run iterators at the same time, each in its own thread; yield (its number, its item) as items come."""
    items = queue.SimpleQueue()

    def read(number, iterator):
        try:
            for item in iterator:
                items.put((number, item))
        finally:
            items.put((number, None))

    threads = [threading.Thread(target=read, args=each, daemon=True) for each in enumerate(iterators)]
    for thread in threads:
        thread.start()
    left = len(threads)
    while left:
        number, item = items.get()
        if item is None:
            left -= 1
        else:
            yield number, item


# -- the tab ---------------------------------------------------------------------------------------------------------


class ChatTab:
    """Components and handlers; made inside a gr.Tab.

    A session keeps one conversation for every model, each ending with the last question and its answer if it got one,
    and the job of that question. The buttons are in one of three phases: idle, waiting (in the queue), answering.
    Handlers return {component: new value}; what they leave out stays. Another tab that asks a model is a subclass with
    its own _answers, _present and _inputs, and a layout that ends with _wire().
    """

    hint, welcome, examples = "输入问题 · Ask a question", "**想问什么？ What would you like to know?**", EXAMPLES
    prefix = ""  # of the names that events have in the API

    def __init__(self, models: list, settings: generation.Settings, system_prompt: str):
        self.models, self.caches = models, [generation.PrefixCache() for _ in models]
        self.talks, self.job = gr.State([[] for _ in models]), gr.State(None)
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                with gr.Row(elem_classes="compared" if len(models) > 1 else None):
                    windows = [self._add_window(describe(loaded)) for loaded in models]
                self.chatbots, self.notices = map(list, zip(*windows, strict=True))
                self._add_composer()
            with gr.Column(scale=1, min_width=300):
                self._add_settings(settings, system_prompt)
        self._wire()

    # -- components --

    def _add_window(self, facts):
        with gr.Column(min_width=280):
            show_caption(facts)
            chatbot = gr.Chatbot(
                label=facts["model"],
                show_label=False,
                elem_classes="window",
                buttons=["copy"],
                placeholder=self.welcome,
                examples=[{"text": text} for text in self.examples],
                reasoning_tags=[("<think>", "</think>")],
            )
            return chatbot, gr.HTML("", elem_classes="notices")

    def _add_composer(self):
        hidden = {"variant": "stop", "scale": 0, "min_width": 110, "visible": False}
        with gr.Row(elem_classes="composer"):
            self.box = gr.Textbox(
                placeholder=self.hint,
                label="问题 Question",
                show_label=False,
                container=False,
                max_lines=8,
                scale=1,
                min_width=180,
            )
            self.send = gr.Button("发送 Send", variant="primary", scale=0, min_width=110)
            self.leave = gr.Button("停止 Stop", elem_id=f"{self.prefix}leave", **hidden)
            self.stop = gr.Button("停止 Stop", elem_id=f"{self.prefix}stop", **hidden)
        with gr.Row(elem_classes="tools"):
            self.retry = gr.Button("重试 Retry", size="sm", scale=0, min_width=110)
            self.clear = gr.Button("新对话 New conversation", size="sm", scale=0, min_width=190)

    def _add_settings(self, settings, system_prompt):
        context_length = self.models[0].context_length or 8192
        penalty = settings.repetition_penalty
        ranges = {  # name: (lowest, highest, step, label)
            "max_new_tokens": (1, max(settings.max_new_tokens, min(4096, context_length // 2)), 1, "最长回答"),
            "temperature": (0, max(2, settings.temperature), 0.01, "温度"),
            "top_p": (0.01, 1, 0.01, "核采样"),
            "repetition_penalty": (min(1, penalty), max(2, penalty), 0.01, "重复惩罚"),
        }
        self.sliders = {}
        with gr.Accordion("设置 Settings", elem_classes="settings"):
            self.system_prompt = gr.Textbox(system_prompt, label="系统提示 System prompt", lines=2, max_lines=8)
            for name, (lowest, highest, step, label) in ranges.items():
                value = getattr(settings, name)
                self.sliders[name] = gr.Slider(lowest, highest, value, step=step, label=f"{label} {name}", buttons=[])

    def _wire(self):
        def ask_example(chosen: gr.SelectData, talks, job):
            return self.on_ask(chosen.value["text"], talks, job)

        def name(event):
            return self.prefix + event

        state = [self.talks, self.job]
        changed = [*state, *self.chatbots, *self.notices, self.box, *self._buttons("idle")]
        # Questions pass the queue, though they never wait there: gradio tells of a changed state in no other way.
        asking = {"outputs": changed, "concurrency_limit": None, "show_progress": "hidden"}
        at_once = {"outputs": changed, "queue": False, "show_progress": "hidden"}
        asked = [
            gr.on([self.box.submit, self.send.click], self.on_ask, [self.box, *state], api_name=name("ask"), **asking),
            self.retry.click(self.on_retry, state, api_name=name("retry"), **asking),
            *(each.example_select(ask_example, state, api_visibility="private", **asking) for each in self.chatbots),
        ]
        answering = self.job.change(
            self.on_job,
            [*state, *self._inputs()],
            changed,
            concurrency_id=MODEL_QUEUE,
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=self.chatbots,
            api_name=name("answer"),
        )
        for event in asked:
            event.failure(self.on_full, [], api_visibility="private", **at_once)
        answering.failure(self.on_failure, self.job, api_visibility="private", **at_once)
        self.stop.click(self.on_stop, self.job, api_name=name("stop"), **at_once)
        self.leave.click(self.on_leave, self.job, api_visibility="private", **at_once)
        self.leave.click(None, cancels=[answering])
        self.clear.click(self.on_clear, self.job, api_name=name("clear"), **at_once)

    def _buttons(self, phase):
        idle = phase == "idle"
        return {
            self.send: gr.update(visible=idle),
            self.leave: gr.update(visible=phase == "waiting"),
            self.stop: gr.update(visible=phase == "answering"),
            self.retry: gr.update(interactive=idle),
            self.clear: gr.update(interactive=idle),
        }

    def _show(self, talks, notices):
        windows = zip(self.chatbots, map(self._present, talks), strict=True)
        return {self.talks: talks, **dict(windows), **dict(zip(self.notices, notices, strict=True))}

    # -- what another tab does in its own way --

    def _present(self, talk: list[dict]) -> list[dict]:
        """A conversation as the value of its gr.Chatbot."""
        return show_messages(talk)

    def _inputs(self) -> list:
        """Components whose values _answers gets."""
        return [self.system_prompt, *self.sliders.values()]

    def _answers(self, talks: list, job: Job, system_prompt: str, *chosen: float) -> list[Iterator]:
        """For each conversation an iterator such as answer() returns."""
        chosen = {name: float(value) for name, value in zip(self.sliders, chosen, strict=True)}  # a slider may say int
        chosen["max_new_tokens"] = int(chosen["max_new_tokens"])
        return [
            answer(loaded, talk, system_prompt, chosen, job.stop, cache)
            for loaded, talk, cache in zip(self.models, talks, self.caches, strict=True)
        ]

    # -- what happens --

    def on_ask(self, question: str, talks: list, job: Job | None):
        """Put a question into every conversation; one that was never answered gives way to it."""
        question = question.strip()
        if not question or (job and not job.ended):
            return gr.skip()
        kept = [talk[:-1] if talk and talk[-1]["role"] == "user" else talk for talk in talks]
        return {self.box: "", **self._enqueue([[*talk, {"role": "user", "content": question}] for talk in kept])}

    def on_retry(self, talks: list, job: Job | None):
        """Ask the last question again, without the answers it got."""
        if not talks[0] or (job and not job.ended):
            return gr.skip()
        return self._enqueue([talk[:-1] if talk[-1]["role"] == "assistant" else talk for talk in talks])

    def _enqueue(self, talks):
        return {self.job: Job(), **self._show(talks, [""] * len(talks)), **self._buttons("waiting")}

    def on_job(self, talks: list, job: Job | None, *values):
        """Let the models answer, and show it as it comes."""
        if job is None or job.started:
            return
        job.started = True
        answers = self._answers(talks, job, *values)
        talks, notices, shown_at = list(talks), [""] * len(talks), 0.0
        try:
            yield self._buttons("answering")
            for number, shown in together(answers):
                talks[number], notices[number] = shown
                if time.monotonic() - shown_at >= SECONDS_BETWEEN_UPDATES:
                    yield self._show(list(talks), list(notices))
                    shown_at = time.monotonic()
        finally:  # also when the page is closed meanwhile
            job.stop.set()
            job.ended = True
        yield {**self._show(talks, notices), **self._buttons("idle")}

    def on_stop(self, job: Job | None):
        """End the answer; on_job then shows what there is of it."""
        if job is None or job.ended:  # the connection was lost meanwhile
            return self._buttons("idle")
        job.stop.set()
        return gr.skip()

    def on_leave(self, job: Job | None):
        """Leave the queue; the event itself is cancelled beside this."""
        if job:
            job.left = True
        return self._withdraw(job, show_notice(LEFT))

    def on_failure(self, job: Job | None):
        """Say that gradio did not let the job begin; to it, leaving the queue is a failure as well."""
        if job and job.left:
            return gr.skip()
        return self._withdraw(job, show_notice(NOT_ASKED, "error"))

    def on_full(self):
        """Say that not even the question was taken."""
        return dict.fromkeys(self.notices, show_notice(NOT_ASKED, "error"))

    def _withdraw(self, job, notice):
        if job:
            job.stop.set()
            job.started = job.ended = True
        return {**dict.fromkeys(self.notices, notice), **self._buttons("idle")}

    def on_clear(self, job: Job | None):
        """Begin a new conversation."""
        if job and not job.ended:
            return gr.skip()
        return self._show([[] for _ in self.models], [""] * len(self.models))
