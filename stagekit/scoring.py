"""Scores from a trained reward model: load it, score answers. The tokens are those of training, the position too."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from peft import PeftModel

from stagekit.arguments import ModelArguments
from stagekit.checkpoint import Source, resolve
from stagekit.modeling import (
    inference_device,
    is_reward_model,
    load_config,
    load_model,
    load_tokenizer,
    prepare_to_score,
)
from stagekit.pairs import encode_answers, padding_id
from stagekit.tokenization import Chat, prepare_chat


@dataclass(frozen=True)
class RewardModel:
    """A reward model ready to score: in eval mode, on its device, its adapter active and not merged."""

    model: torch.nn.Module
    chat: Chat
    source: Source
    pad_token_id: int

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer it can read."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**20


def find_reward_model(path: str, verify: bool = True, flag: str = "--reward_model_path") -> Source:
    """Find what --reward_model_path names, before anything is loaded.

    Args:
        path: the directory.
        verify: recompute its fingerprints (reads every file once).
        flag: that named it, for the message.

    Raises:
        ValueError: it is not there, or writes answers.
    """
    if not os.path.isdir(path):
        raise ValueError(f"{flag} {path}: no such directory; sh scripts/run_rm.sh trains a reward model")
    source = resolve(path, verify=verify)
    if not is_reward_model(source, load_config(source, ModelArguments(model_name_or_path=path), scores=True)):
        raise ValueError(f"{flag} {path} is no reward model (it writes answers)")
    return source


def load_reward_model(directory: str | Source, only_cpu: bool = False) -> RewardModel:
    """Load what reward_modeling.py wrote: base, adapter with its score head, tokenizer and template.

    Args:
        directory: the directory, or what find_reward_model found there.
        only_cpu: use no accelerator even if there is one.

    Raises:
        ValueError: not a reward model, or its files were changed.
        FileNotFoundError: no such directory.
    """
    source = directory if isinstance(directory, Source) else resolve(directory)
    device, dtype = inference_device(only_cpu)
    model_args = ModelArguments(model_name_or_path=source.adapter or source.base, dtype=dtype)
    config = load_config(source, model_args, scores=True)
    if not is_reward_model(source, config):
        raise ValueError(
            f"{source.adapter or source.base} is no reward model (it writes answers); reward_modeling.py trains one"
        )
    tokenizer = load_tokenizer(source, model_args)
    chat = prepare_chat(tokenizer, None)
    pad_token_id = padding_id(tokenizer, chat.stop_ids)
    prepare_to_score(config, pad_token_id)
    settings = SimpleNamespace(bf16=False, fp16=False, use_cpu=device == "cpu", deepspeed=None)
    model = load_model(source, model_args, settings, config, scores=True)
    if source.adapter:
        model = PeftModel.from_pretrained(model, source.adapter)
    return RewardModel(model.to(device).eval(), chat, source, pad_token_id)


@torch.no_grad()
def score_answers(
    reward: RewardModel,
    items: list[tuple[list[dict], list[list[dict]], list[dict] | None]],
    max_length: int,
    batch_size: int,
) -> Iterator[tuple[tuple[int, int], float | None]]:
    """Score answers, the longest ones first, as they get ready; those to one prompt see the same part of it.

    Args:
        reward: what load_reward_model returned.
        items: (prompt, answers, tools): messages, a list of messages for each answer, tools or None.
        max_length: limit in tokens; a prompt gives way first.
        batch_size: answers in a forward pass.

    Yields:
        ((index into items, index into its answers), score); None for an answer that does not fit, which has no end to
        be scored at.
    """
    samples = []
    for index, (prompt, answers, tools) in enumerate(items):
        encoded, _, whole = encode_answers(reward.chat, prompt, answers, tools, max_length)
        for number, (sample, fits) in enumerate(zip(encoded, whole, strict=True)):
            if fits:
                samples.append(((index, number), sample.input_ids))
            else:
                yield (index, number), None
    samples.sort(key=lambda item: -len(item[1]))
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        width = len(batch[0][1])
        ids = [ids + [reward.pad_token_id] * (width - len(ids)) for _, ids in batch]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for _, ids in batch]
        tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        tensors = {name: tensor.to(reward.model.device) for name, tensor in tensors.items()}
        scores = reward.model(**tensors, use_cache=False).logits.squeeze(-1).float().tolist()
        yield from zip((index for index, _ in batch), scores, strict=True)
