"""Answers to many requests at once: by transformers' continuous batching where it proves right, else one by one.

An engine works in threads of its own and hands every token to whoever asked. Used by openai_api.py.
"""

import contextlib
import logging
import math
import queue
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from peft import PeftModel
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import GenerationOutput

from stagekit.generation import LoadedModel, Settings, StopWhen, TokenQueue, choose_settings, make_generation_config
from stagekit.tokenization import encode_prompt

logger = logging.getLogger(__name__)

# Called in an engine's thread: (new token ids, why the answer ended: "stop", "length", an error, or None so far).
Deliver = Callable[[list[int], str | Exception | None], None]

PAGE = 32  # tokens in a piece of the cache
MAX_BATCH_TOKENS = 512  # prompt tokens computed in one step; a longer prompt is spread over steps, and others go on
DEFAULT_CONTEXT = 4096  # for models whose configuration names no limit
PROBES = ("What is a fever?", "发烧是体温升高，要多喝水、多休息，持续高热要及时就医。" * 4)
NUM_PROBE_TOKENS = 12


class WorkerStopped(RuntimeError):
    """The engine answers nothing any more; its process must be started again."""


@dataclass
class _Request:
    input_ids: list[int]
    settings: Settings
    seed: int | None
    deliver: Deliver
    cancelled: threading.Event = field(default_factory=threading.Event)
    num_delivered: int = 0
    answer: GenerationOutput | None = None


def start_engine(loaded: LoadedModel, at_once: int):
    """Start the engine that suits the model, and say which.

    Continuous batching is tried on probe prompts first: it runs on some models without an error and answers wrongly
    (Bloom, whose attention never sees the paged cache).

    Args:
        loaded: what load_for_generation returned.
        at_once: answers to work on at the same time; 1 needs no batching.
    """
    penalty = choose_settings(loaded).repetition_penalty
    if at_once > 1 and penalty != 1:
        reason = f"the checkpoint asks for repetition_penalty {penalty:g}, which continuous batching cannot give"
    elif at_once > 1:
        engine, reason = _try_continuous(loaded, at_once)
        if engine is not None:
            logger.info("continuous batching: up to %d requests at once, %d tokens each", at_once, engine.longest)
            return engine
    if at_once > 1:
        logger.warning("no continuous batching, requests are answered one after the other: %s", reason)
    return OneByOne(loaded)


def _try_continuous(loaded, at_once):
    """Return (engine, None), or (None, why not); then the model is as it was."""
    model, engine = _without_adapter(loaded.model), None
    attention = model.config._attn_implementation
    try:
        engine = Continuous(loaded, at_once)
        reason = engine.why_unfit()
    except Exception as error:  # whatever a model that is not made for it may raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    except BaseException:  # Ctrl-C: the manager's thread would keep the process alive
        if engine is not None:
            engine.stop()
        raise
    if reason is None:
        return engine, None
    if engine is not None:
        engine.stop()
    if model.config._attn_implementation != attention:  # a manager puts back what it found, once it was started
        model.set_attn_implementation(attention)
    return None, reason


def _without_adapter(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


# -- one by one ------------------------------------------------------------------------------------------------------


class OneByOne:
    """Answers requests in the order they came, each as inference.py would.

    Attributes:
        at_once: answers that are worked on at the same time.
        longest: prompt and answer together, in tokens; None without limit.
        takes_seeds: whether the same seed gives the same answer.
        failure: what ended the engine, or None.
    """

    at_once, takes_seeds, failure = 1, True, None

    def __init__(self, loaded: LoadedModel):
        self.loaded, self.longest = loaded, loaded.context_length
        self.waiting: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(
        self, input_ids: list[int], settings: Settings, deliver: Deliver, seed: int | None = None
    ) -> Callable[[], None]:
        """Ask for an answer.

        Returns:
            Function that cancels it: the model stops within a token, and at most that one is still delivered.
        """
        request = _Request(input_ids, settings, seed, deliver)
        self.waiting.put(request)
        return request.cancelled.set

    def stop(self) -> None:
        """End after the answer that is worked on."""
        self.waiting.put(None)

    def _work(self):
        while (request := self.waiting.get()) is not None:
            if not request.cancelled.is_set():
                try:
                    finish = self._answer(request)
                except Exception as error:
                    finish = error
                if not request.cancelled.is_set():
                    request.deliver([], finish)

    def _answer(self, request):
        def put(token):
            if not request.cancelled.is_set():
                request.deliver([token], None)

        device = self.loaded.model.device
        with torch.random.fork_rng() if request.seed is not None else contextlib.nullcontext():
            if request.seed is not None:
                torch.manual_seed(request.seed)
            output = self.loaded.model.generate(
                input_ids=torch.tensor([request.input_ids], device=device),
                attention_mask=torch.ones(1, len(request.input_ids), dtype=torch.long, device=device),
                generation_config=make_generation_config(self.loaded, request.settings),
                streamer=TokenQueue(types.SimpleNamespace(put=put)),
                stopping_criteria=StoppingCriteriaList([StopWhen(request.cancelled)]),
            )
        return "stop" if output[0, -1].item() in self.loaded.stop_ids else "length"


# -- continuous batching ---------------------------------------------------------------------------------------------


class Continuous:
    """Answers requests together: each joins the running batch at the next token and leaves it when it is finished.

    Nothing else may use the model meanwhile: transformers 5.23 writes is_causal=False into the model's configuration
    while a batch runs (utils/generic.py, merge_with_config_defaults). Whoever else is at work then sees the future, or
    restores the value too late and leaves it so for good. Attributes are those of OneByOne.
    """

    takes_seeds = False  # all answers of a batch draw from one random generator

    def __init__(self, loaded: LoadedModel, at_once: int):
        """Reserve the cache and start working.

        Raises:
            ValueError, RuntimeError, …: transformers has no continuous batching for this model.
            MemoryError: not even a short answer fits.
        """
        # Its own log would show a traceback for every error; errors reach whoever asked instead.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        self.loaded, self.at_once, self.failure = loaded, at_once, None
        self.model = _without_adapter(loaded.model)
        self.requests: dict[str, _Request] = {}
        self.lock, self.number = threading.Lock(), 0
        self.manager, self.longest = self._reserve(loaded.context_length or DEFAULT_CONTEXT)
        self.manager.start()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def submit(
        self, input_ids: list[int], settings: Settings, deliver: Deliver, seed: int | None = None
    ) -> Callable[[], None]:
        """Ask for an answer.

        Returns:
            Function that cancels it: the model stops within a token, and at most that one is still delivered.

        Raises:
            WorkerStopped: the engine has failed.
        """
        assert seed is None
        return self._submit(_Request(input_ids, settings, seed, deliver))

    def stop(self) -> None:
        """End at once; what is unfinished is told so."""
        self.manager.stop(block=True, hard_stop=True)
        self.reader.join()

    def why_unfit(self) -> str | None:
        """Compare log-probabilities of answers to probes, sampled together, with a plain forward pass.

        Returns:
            None where they agree, to the limits of checks.sampler_is_policy.
        """
        prompts = [encode_prompt(self.loaded.chat, [{"role": "user", "content": probe}]) for probe in PROBES]
        settings = Settings(NUM_PROBE_TOKENS, temperature=1.0, top_p=1.0, repetition_penalty=1.0, top_k=0)
        requests, ended = [], queue.SimpleQueue()

        def deliver(tokens, finish):
            if finish is not None:
                ended.put(finish)

        for ids in prompts:
            requests.append(_Request(ids[-self.longest + NUM_PROBE_TOKENS :], settings, None, deliver))
            self._submit(requests[-1], stop_ids=[])
        for _ in requests:
            finish = ended.get()
            if isinstance(finish, Exception):
                return str(finish)
        differences = []
        for request in requests:
            prompt, answer = request.input_ids, request.answer.generated_tokens
            whole = torch.tensor([prompt + answer], device=self.model.device)
            with self.manager.pause(), torch.no_grad():
                logits = self.model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logps = logits.float().cpu().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            differences.append((logps - torch.tensor(request.answer.logprobs)).abs())
        mean = torch.cat(differences).mean().item()
        if not mean <= (1e-4 if self.model.dtype == torch.float32 else 5e-2):
            kind = self.model.config.model_type
            return f"with it {kind} gives tokens other log-probabilities, by {mean:.2g} nats on average"
        return None

    def _reserve(self, context_length):
        """Return (manager with its cache, tokens that prompt and answer may have); the cache shrinks until it fits."""
        blocks_each = math.ceil(context_length / PAGE)
        num_blocks = self.at_once * blocks_each
        while True:
            manager = self.model.init_continuous_batching(
                # Each request has values of its own; where these meant "off", transformers would leave a step out.
                GenerationConfig(
                    do_sample=True,
                    temperature=0.7,
                    top_k=50,
                    top_p=0.9,
                    eos_token_id=self.loaded.stop_ids,
                    pad_token_id=self.loaded.chat.tokenizer.pad_token_id,
                ),
                ContinuousBatchingConfig(
                    page_size=PAGE,
                    num_blocks=num_blocks,
                    max_batch_tokens=MAX_BATCH_TOKENS,
                    max_requests_per_batch=self.at_once,
                    per_request_processors=True,
                    return_logprobs=True,
                    auto_switch_to_flash=find_spec("flash_attn") is not None,  # else it asks the hub for a kernel
                ),
            )
            if self.model.config._attn_implementation == "paged|eager":
                raise ValueError("its attention is eager alone: paged, no plain forward pass compares with it")
            greedy = _Greedy()
            manager.logit_processor.logits_processor.insert(0, greedy)
            manager.logit_processor.supported_keys.update(greedy.supported_kwargs)
            manager.logit_processor.tensors_required += 1
            try:
                manager.warmup()  # makes the cache here, where an error reaches the caller
                return manager, min(context_length, num_blocks * PAGE)
            except (MemoryError, torch.OutOfMemoryError):
                if num_blocks * PAGE <= MAX_BATCH_TOKENS:
                    raise
                num_blocks //= 2

    def _submit(self, request, stop_ids=None):
        settings = request.settings
        vocabulary = self.model.config.get_text_config().vocab_size
        chosen = {"greedy": True}
        if settings.temperature > 0:
            top_k = min(settings.top_k or vocabulary, vocabulary)
            chosen = {"temperature": float(settings.temperature), "top_k": top_k, "top_p": float(settings.top_p)}
        with self.lock:
            if self.failure:
                raise WorkerStopped(self.failure)
            self.number += 1
            name = str(self.number)
            self.requests[name] = request
        self.manager.add_request(
            request.input_ids,
            request_id=name,
            max_new_tokens=settings.max_new_tokens,
            streaming=True,
            eos_token_id=self.loaded.stop_ids if stop_ids is None else stop_ids,
            **chosen,
        )

        def cancel():
            request.cancelled.set()
            with self.lock:
                unfinished = self.requests.pop(name, None)
            if unfinished:
                self.manager.cancel_request(name)

        return cancel

    def _read(self):
        """Hand out what the manager's thread makes, until that thread ends."""
        while True:
            output = self.manager.get_result(timeout=0.5)
            if output is not None:
                self._hand_out(output)
            elif not self.manager.is_running():
                break
        error = self.manager.background_thread_status.fatal_error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}" if error else "the server is stopping"
        with self.lock:
            self.failure = reason
            left, self.requests = list(self.requests.values()), {}
        if error:
            logger.error("continuous batching ended: %s", reason)
        for request in left:
            request.deliver([], WorkerStopped(reason))

    def _hand_out(self, output):
        with self.lock:
            finished = output.is_finished()
            request = (self.requests.pop if finished else self.requests.get)(output.request_id, None)
        if request is None or request.cancelled.is_set():
            return
        request.answer = output
        tokens = output.generated_tokens[request.num_delivered :]
        request.num_delivered = len(output.generated_tokens)
        finish = None
        if output.error is not None:
            finish = RuntimeError(output.error)
        elif finished:
            finish = "stop" if output.generated_tokens[-1] in self.loaded.stop_ids else "length"
        request.deliver(tokens, finish)


class _Greedy(ContinuousBatchingLogitsProcessor):
    """Leave a greedy request its likeliest token alone.

    All requests are sampled together, and top_k=1 would draw among equals, which 16 bits have often.
    """

    supported_kwargs = {"greedy": bool}
    ignored_kwargs = ()

    def fill_defaults(self, int32_tensor):
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token):
        flags = [request.state.logit_processor_kwargs.get("greedy", False) for request in requests_with_new_token]
        return torch.tensor(flags, dtype=torch.int32)

    def __call__(self, scores, tensor_arg):
        others = torch.ones_like(scores, dtype=torch.bool).scatter(-1, scores.argmax(-1, keepdim=True), False)
        greedy = tensor_arg[: scores.size(0)].bool().unsqueeze(-1)  # (requests, 1)
        return scores.masked_fill(others & greedy, -torch.inf)
