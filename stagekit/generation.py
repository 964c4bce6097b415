"""Answers from a trained model: load a checkpoint for generation, answer a batch, stream one answer.

Prompts are rendered by tokenization.encode_prompt, the renderer of training: nothing is asked in another form than was
trained. Used by inference.py and by whatever else asks a model questions.
"""

import contextlib
import inspect
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from stagekit.arguments import ModelArguments
from stagekit.checkpoint import (
    DELIVERED,
    Source,
    base_fingerprint,
    check_base,
    directory_files,
    extended_vocabulary,
    fingerprint,
    resolve,
    stage_fingerprint,
)
from stagekit.commandline import LEAST_TEMPERATURE, is_temperature
from stagekit.modeling import (
    explain_hub_error,
    inference_device,
    is_reward_model,
    load_config,
    load_tokenizer,
    merge_adapter,
    quantization_config,
)
from stagekit.tokenization import Chat, prepare_chat

logger = logging.getLogger(__name__)

# Used where neither a flag nor the checkpoint's generation_config.json says anything.
DEFAULTS = {"max_new_tokens": 512, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.0, "top_k": 0}
LESS_MEMORY = "shorten --max_new_tokens or the prompts, or give --load_in_4bit True"


@dataclass(frozen=True)
class LoadedModel:
    """A model that can answer.

    Attributes:
        model: in eval mode, on its device, its adapter active and not merged (merging rounds in 16 bits).
        chat: tokenizer and template.
        source: where all of it was found.
        context_length: positions of the model in tokens, prompt and answer together; None when it has no limit.
        stop_ids: token ids that end an answer: the template's and those of generation_config.json.
        defaults: the checkpoint's own generation_config.
    """

    model: torch.nn.Module
    chat: Chat
    source: Source
    context_length: int | None
    stop_ids: list[int]
    defaults: GenerationConfig


@dataclass(frozen=True)
class Settings:
    """How to choose tokens; temperature 0 is greedy, top_k 0 is no limit."""

    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    top_k: int


@dataclass(frozen=True)
class Answer:
    """An answer, or while it streams the beginning of one.

    Attributes:
        text: without the stop token and without white space at its ends.
        finish_reason: "stop" (the model ended it), "length" (max_new_tokens did), None (unfinished).
        num_tokens: generated tokens, the stop token included.
    """

    text: str
    finish_reason: str | None
    num_tokens: int


class OutOfMemory(ValueError):
    """No memory is left for an answer; the message says what would do."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that no memory is left; devices have several types of them, not all with a name."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


# -- loading ---------------------------------------------------------------------------------------------------------


def find_source(base_model: str | None, lora_model: str | None) -> Source:
    """Find the base, adapter and tokenizer that --base_model and --lora_model name; either of them is enough.

    Raises:
        ValueError: neither was given, no adapter there, a reward model, or an adapter of another base.
        FileNotFoundError: a directory that does not exist.
    """
    if not (base_model or lora_model):
        raise ValueError(
            "--base_model or --lora_model is missing: name a model, or a directory an earlier stage wrote"
        )
    source = resolve(base_model, lora_model) if base_model else resolve(lora_model)
    if lora_model and not source.adapter:
        raise ValueError(f"--lora_model {lora_model} holds no adapter (adapter_config.json); give it as --base_model")
    check_base(source)
    if source.adapter and is_reward_model(source, None):
        raise ValueError(f"{source.adapter} is a reward model: it scores answers and cannot write any")
    return source


def model_fingerprints(source: Source) -> list[str | None]:
    """Fingerprints of the base and of what was trained on it: a stage, an adapter, or None."""
    if source.stage:
        return [source.stage["base_model"].get("fingerprint"), stage_fingerprint(source.stage)]
    adapter = fingerprint(directory_files(source.adapter, DELIVERED)) if source.adapter else None
    return [base_fingerprint(source.base), adapter]


def load_chat(source: Source, tokenizer_path: str | None = None, template_name: str | None = None) -> Chat:
    """Load the tokenizer with its chat template, or with a named one."""
    args = model_arguments(source, tokenizer_name_or_path=tokenizer_path)
    return prepare_chat(load_tokenizer(source, args), template_name)


def load_for_generation(source: Source, chat: Chat, only_cpu=False, resize_emb=False, **quantization) -> LoadedModel:
    """Load weights and adapter: bf16 on GPUs that have it, else fp16, fp32 on CPU; spread over all visible GPUs.

    Args:
        source, chat: what find_source and load_chat returned.
        only_cpu: use no accelerator even if there is one.
        resize_emb: give the embeddings a row for every token; without it a larger tokenizer is an error.
        **quantization: load_in_4bit or load_in_8bit.

    Raises:
        ValueError: no model there, damaged weights, the tokenizer is larger than the embeddings, the adapter does not
            fit, or memory is too small.
    """
    args = model_arguments(source, **quantization)
    config = load_config(source, args)
    model = _load_base(source, args, config, only_cpu)
    fit_embeddings(model, chat.tokenizer, resize_emb)
    defaults = model.generation_config
    if source.adapter and Path(source.adapter, "generation_config.json").is_file():
        defaults = GenerationConfig.from_pretrained(source.adapter)
    model.generation_config = GenerationConfig()  # generate() fills what a call leaves open from here: nothing
    for directory in source.merged:
        model = merge_adapter(model, directory)
    if source.adapter:
        model = put_adapter(model, source)
    extended = extended_vocabulary(source.base)
    if extended and len(chat.tokenizer) <= extended["tokens_before"]:
        logger.warning(
            "the vocabulary differs: %s has none of the %d tokens by which %s was extended; was the adapter trained "
            "before that?",
            *(source.tokenizer, extended["num_tokens"], source.base),
        )
    eos = defaults.eos_token_id
    stop_ids = chat.stop_ids + (eos if isinstance(eos, list) else [] if eos is None else [eos])
    text = config.get_text_config()
    context_length = getattr(text, "max_position_embeddings", None) or getattr(text, "seq_length", None)
    return LoadedModel(model.eval(), chat, source, context_length, list(dict.fromkeys(stop_ids)), defaults)


def template_name(loaded: LoadedModel) -> str:
    """The template that prompts are written with: the named one, else the one that the stage has recorded."""
    recorded = (loaded.source.stage or {}).get("template") or {}
    return recorded.get("name", "own") if loaded.chat.name == "own" else loaded.chat.name


@contextlib.contextmanager
def _one_line_errors(name):
    """Make ValueErrors of what weights raise while they are loaded."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{name}: damaged weights ({error}); a download that was cut off? Fetch it again") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"{name}: no memory is left to load it; give --load_in_4bit True, or --only_cpu where a GPU is too small"
        ) from error


def _load_base(source, args, config, only_cpu):
    device, dtype = inference_device(only_cpu)
    several = device != "cpu" and torch.accelerator.device_count() > 1
    try:
        with _one_line_errors(source.base):
            return AutoModelForCausalLM.from_pretrained(
                source.base,
                config=config,
                revision=args.model_revision,
                dtype=dtype,
                device_map="auto" if several else {"": device},
                quantization_config=quantization_config(args),
            )
    except (OSError, ImportError) as error:
        if isinstance(error, OSError) and not os.path.isdir(source.base):
            raise explain_hub_error(source.base, error) from error
        raise ValueError(f"{source.base}: {str(error).strip().splitlines()[0]}") from error


def model_arguments(source: Source, **options) -> ModelArguments:
    """ModelArguments for a base, in the revision that what stands on it was trained on."""
    revision = (source.stage or {}).get("base_model", {}).get("revision")
    pinned = None if os.path.isdir(source.base) else revision
    return ModelArguments(model_name_or_path=source.base, model_revision=pinned, **options)


def fit_embeddings(model: torch.nn.Module, tokenizer, resize: bool) -> None:
    """Give the embeddings a row for every token of the tokenizer.

    Raises:
        ValueError: rows are missing, and `resize` does not allow to add them.
    """
    needed = max(tokenizer.get_vocab().values()) + 1
    rows = model.get_input_embeddings().weight.shape[0]
    if needed > rows and not resize:
        raise ValueError(
            f"the tokenizer has {needed} tokens and the model embeddings for {rows}; --resize_emb True adds rows, "
            "untrained unless the adapter brings them, or give the tokenizer that belongs to the model "
            "(--tokenizer_path)"
        )
    if needed > rows:
        model.resize_token_embeddings(needed)


def put_adapter(model: torch.nn.Module, source: Source) -> PeftModel:
    """Put a source's adapter on its base.

    Raises:
        ValueError: it does not fit, is damaged, or memory is too small.
    """
    try:
        with _one_line_errors(source.adapter):
            return PeftModel.from_pretrained(model, source.adapter)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"adapter {source.adapter} does not fit {source.base} (--resize_emb True?): {reason}"
        ) from error


def choose_settings(loaded: LoadedModel, **chosen: float | None) -> Settings:
    """Complete settings: what was chosen, else what the checkpoint's generation_config says, else DEFAULTS.

    Args:
        loaded: what load_for_generation returned.
        **chosen: fields of Settings; None stands for "not chosen".

    Raises:
        ValueError: the chosen max_new_tokens leaves no room for a prompt, or the chosen temperature overflows.
    """
    values = {name: getattr(loaded.defaults, name, None) for name in DEFAULTS}
    values = {name: DEFAULTS[name] if value is None else value for name, value in values.items()}
    if not is_temperature(values["temperature"]):  # some write 1e-6 into their checkpoints and mean greedy
        values["temperature"] = 0.0
    if loaded.context_length:
        values["max_new_tokens"] = min(values["max_new_tokens"], loaded.context_length // 2)
    values.update({name: value for name, value in chosen.items() if value is not None})
    if loaded.context_length and values["max_new_tokens"] >= loaded.context_length:
        raise ValueError(
            f"--max_new_tokens {values['max_new_tokens']} leaves no room for a prompt: the model's context is "
            f"{loaded.context_length} tokens"
        )
    if not is_temperature(values["temperature"]):
        raise ValueError(f"--temperature {values['temperature']:g} must be 0 (greedy) or at least {LEAST_TEMPERATURE}")
    return Settings(**values)


def prompt_limit(loaded: LoadedModel, settings: Settings) -> int | None:
    """Longest prompt in tokens that leaves room for the answer; None without limit."""
    return loaded.context_length - settings.max_new_tokens if loaded.context_length else None


# -- answers ---------------------------------------------------------------------------------------------------------


def generate_batch(loaded: LoadedModel, prompts: list[list[int]], settings: Settings) -> list[Answer]:
    """Answer several prompts at once; greedily, each as it would be alone (in fp32; 16 bits round by batch shape).

    Args:
        loaded: what load_for_generation returned.
        prompts: input_ids of each, of any lengths.
        settings: what choose_settings returned.
    """
    longest = max(map(len, prompts))
    pad = loaded.chat.tokenizer.pad_token_id  # on the left: masked, and left out of positions and repetition penalty
    padded = [[pad] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    output = loaded.model.generate(
        input_ids=torch.tensor(padded, device=loaded.model.device),  # (batch, longest)
        attention_mask=torch.tensor(mask, device=loaded.model.device),
        generation_config=make_generation_config(loaded, settings),
    )
    return [_answer(loaded, ids) for ids in output[:, longest:].tolist()]


def run_in_batches(count: int, batch_size: int, work: Callable[[range], list]) -> Iterator[tuple[range, list]]:
    """Work through `count` items, some at a time; where memory runs out, repeat the batch and go on with half of it.

    Args:
        count: how many items there are; the ones that need most memory should come first.
        batch_size: items at a time.
        work: function of the places of a batch's items.

    Yields:
        (places, what work returned for them), in order; every place once.

    Raises:
        OutOfMemory: not even one item fits.
    """
    first = 0
    while first < count:
        batch = range(first, min(first + batch_size, count))
        try:
            found = work(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise OutOfMemory(f"memory runs out with --batch_size 1; {LESS_MEMORY}") from None
        else:
            yield batch, found
            first = batch.stop
            continue
        batch_size = len(batch) // 2
        clear_device_cache(garbage_collection=True)  # not above: there the error still holds the tensors
        logger.warning("memory ran out with %d at a time; goes on with --batch_size %d", len(batch), batch_size)


def make_generation_config(loaded, settings):
    sampling = {"do_sample": settings.temperature > 0}
    if sampling["do_sample"]:
        sampling.update(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k)
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=loaded.stop_ids,
        pad_token_id=loaded.chat.tokenizer.pad_token_id,
        **sampling,
    )


def _answer(loaded, ids):
    """Cut (new_tokens,) ids at the first stop token; what stands behind it is padding."""
    end = next((index for index, token in enumerate(ids) if token in loaded.stop_ids), None)
    reason, count = ("length", len(ids)) if end is None else ("stop", end + 1)
    return Answer(decode(loaded, ids[:end]).strip(), reason, count)


def decode(loaded, ids):
    return loaded.chat.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class GrowingText:
    """The text of an answer while its tokens come.

    Attributes:
        num_tokens: tokens seen, a stop token included.
        stopped: a stop string has come; the text ends before it.
    """

    def __init__(self, loaded: LoadedModel, stops: list[str] | None = None, marks: list[str] | None = None):
        """Begin with nothing.

        Args:
            stops: strings that end the answer.
            marks: strings of which certain() must not show a beginning.
        """
        self.loaded, self.stops, self.marks = loaded, stops or [], marks or []
        self.ids, self.text, self.num_tokens, self.stopped = [], "", 0, False
        self.prefix = self.read = 0

    def add(self, tokens: list[int]) -> None:
        """Take new tokens; after a stop string they change nothing."""
        for token in tokens:
            if self.stopped:
                return
            self.num_tokens += 1
            if token in self.loaded.stop_ids:
                continue
            self.ids.append(token)
            # From `prefix`, some tokens back: tokenizers drop the blank at the start of a text. Nothing is shown while
            # it ends in half a character.
            before = decode(self.loaded, self.ids[self.prefix : self.read])
            now = decode(self.loaded, self.ids[self.prefix :])
            if len(now) > len(before) and not now.endswith("\ufffd"):
                self._show(self.text + now[len(before) :])
                self.prefix, self.read = self.read, len(self.ids)

    def certain(self) -> str:
        """The text so far without an end that may yet become a stop string or a mark."""
        if self.stopped:
            return self.text
        ends = (
            length
            for string in (*self.stops, *self.marks)
            for length in range(1, len(string))
            if self.text.endswith(string[:length])
        )
        return self.text[: len(self.text) - max(ends, default=0)]

    def finish(self) -> str:
        """The whole text, with what could not be decoded to the end."""
        if not self.stopped:
            self._show(decode(self.loaded, self.ids))
        return self.text

    def _show(self, text):
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        self.stopped = bool(found)
        self.text = text[: min(found)] if found else text


class PrefixCache:
    """Keys and values of the last prompt and its answer: the next turn of a conversation computes what is new in it.

    One serves a model and whoever asks it, one after the other: what a prompt shares with the one before is not
    computed again, whosever it was. Keys and values depend on nothing behind them, so answers are those of a fresh
    run. Layers that forget (sliding windows, recurrent states) cannot be cut back, and start afresh every time.
    """

    def __init__(self):
        self.ids: list[int] = []
        self.states: DynamicCache | None = None

    def take(self, model: torch.nn.Module, input_ids: list[int]) -> DynamicCache | None:
        """Hand out the states of the longest beginning that input_ids share with what is kept; keep() returns them.

        Returns:
            Of at most len(input_ids) - 1 tokens, for the last one must be computed; None: the model takes no such
            states.
        """
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        takes_states = "past_key_values" in inspect.signature(model.forward).parameters
        if not (takes_states and model._supports_default_dynamic_cache()):
            return None
        states, self.states = self.states, None  # not kept while they change: an error must not leave half of it
        pairs = zip(self.ids, input_ids[:-1], strict=False)
        shared = next((place for place, (old, new) in enumerate(pairs) if old != new), None)
        if shared is None:
            shared = min(len(self.ids), len(input_ids) - 1)
        if not shared or states is None or any(states.is_sliding) or not states.is_croppable:
            return DynamicCache(config=model.config)
        states.crop(shared - len(self.ids))
        return states

    def keep(self, states: DynamicCache | None, ids: list[int]) -> None:
        """Keep states that stand for the beginning of ids; of the last token generated there are none."""
        if states is not None:
            length = states.get_seq_length()
            self.states, self.ids = states, ids[:length]
            if length > len(ids):
                self.states.crop(len(ids) - length)


def stream(
    loaded: LoadedModel, input_ids: list[int], settings: Settings, cache: PrefixCache | None = None
) -> Iterator[Answer]:
    """Yield one answer as it grows; the last item is the finished one.

    The text of an item begins with the text of the one before it and never ends in half a character. The model works
    in its own thread, so an interrupt reaches the caller at once; closing the generator stops it within one token.

    Args:
        loaded: what load_for_generation returned.
        input_ids: the prompt.
        settings: what choose_settings returned.
        cache: remembers what was computed for the prompt before; one stream at a time.

    Raises:
        OutOfMemory: it does not fit.
    """
    tokens, stop = queue.SimpleQueue(), threading.Event()

    def work():
        try:
            states = cache.take(loaded.model, input_ids) if cache else None
            output = loaded.model.generate(
                input_ids=torch.tensor([input_ids], device=loaded.model.device),
                attention_mask=torch.ones(1, len(input_ids), dtype=torch.long, device=loaded.model.device),
                generation_config=make_generation_config(loaded, settings),
                **({} if states is None else {"past_key_values": states}),
                streamer=TokenQueue(tokens),
                stopping_criteria=StoppingCriteriaList([StopWhen(stop)]),
            )
            if cache:
                cache.keep(states, output[0].tolist())
            tokens.put(None)
        except Exception as error:
            tokens.put(error)  # raised where the answer is read

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        ids, growing, length = [], GrowingText(loaded), 0
        while (token := tokens.get()) is not None:
            if isinstance(token, Exception):
                raise OutOfMemory(f"memory runs out; {LESS_MEMORY}") if is_out_of_memory(token) else token
            ids.append(token)
            growing.add([token])
            if len(growing.text) > length:
                length = len(growing.text)
                yield Answer(growing.text.strip(), None, len(ids))
        yield _answer(loaded, ids)
    finally:
        stop.set()
        thread.join()


class TokenQueue(BaseStreamer):
    """Put each new token id into a queue; the first call brings the prompt."""

    def __init__(self, tokens):
        self.tokens, self.prompt_seen = tokens, False

    def put(self, value):
        if self.prompt_seen:
            self.tokens.put(value.item())
        self.prompt_seen = True

    def end(self):
        pass


class StopWhen(StoppingCriteria):
    def __init__(self, event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
