"""How well a model predicts running text: the negative log-likelihood of every token, summed.

Divided by the tokens and exponentiated it is the perplexity, which only models of one tokenizer share; divided by the
bytes it compares any two models. The course is that of lm-evaluation-harness (loglikelihood_rolling): a text begins
behind the BOS token, or EOS where there is none, so that its first token counts too; a text longer than the context is
read in windows that each predict tokens which no other does, so the first tokens of a window see little before them.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from stagekit.likelihood import score_candidates, text_windows


class TextLoss(NamedTuple):
    """What a model needed for texts.

    Attributes:
        nll: summed negative log-likelihood of all tokens, in nats.
        tokens: how many those were.
        bytes: of the texts in UTF-8.
    """

    nll: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean over tokens; infinite where that is past what a float holds."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The same in bits and over bytes, comparable between tokenizers."""
        return self.nll / math.log(2) / self.bytes


def text_nll(
    model,
    tokenizer,
    texts: Iterable[str],
    context_length: int,
    batch_tokens: int = 2048,
    progress: Callable[[int], object] | None = None,
) -> TextLoss:
    """Sum the negative log-likelihood of texts under a causal model, in eval mode, token by token.

    Args:
        model: causal model on its device.
        tokenizer: its tokenizer; control strings inside a text count as plain text, as in training.
        texts: empty ones count nothing.
        context_length: longest window in tokens.
        batch_tokens: tokens of a forward pass, padding included; one window is always possible.
        progress: called with the number of tokens done since the last call.

    Raises:
        ValueError: there is no token to predict, or the sum is not a number.
    """
    parts, num_bytes = [], 0
    for text in filter(None, texts):
        num_bytes += len(text.encode("utf-8"))
        parts += text_windows(tokenizer, text, context_length, context_length)
    if not parts:
        raise ValueError("no text to predict: every one is empty")
    parts.sort(key=lambda part: -len(part[0]) - len(part[1]))  # what does not fit the memory fails at once
    model.eval()
    total, tokens = 0.0, 0
    while parts:
        rows = max(1, batch_tokens // sum(map(len, parts[0])))
        batch, parts = parts[:rows], parts[rows:]
        total -= sum(logp for (logp,) in score_candidates(model, [(before, [scored]) for before, scored in batch]))
        done = sum(len(scored) for _, scored in batch)
        tokens += done
        if progress:
            progress(done)
    if not math.isfinite(total):
        raise ValueError(f"the loss of these texts is {total}: the model computes numbers that are none")
    return TextLoss(total, tokens, num_bytes)
