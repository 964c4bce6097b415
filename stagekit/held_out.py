"""Held-out questions a model answers whenever it is measured: BLEU, ROUGE-L, accuracy, and whether answers end."""

import logging
import random
from collections.abc import Sequence

from accelerate.utils import gather_object
from transformers import GenerationConfig

from eval_metrics import score_pairs
from stagekit.generation import LoadedModel, Settings, generate_batch
from stagekit.prompts import Prompt, accept_prompt, fit_prompt, last_question
from stagekit.rewards import is_checkable, judge_accuracy
from stagekit.tokenization import Chat

logger = logging.getLogger(__name__)

MAX_QUESTIONS = 500
METRICS = ("bleu4", "rouge_l", "answer_accuracy", "stop_rate", "answer_tokens")
NUM_SHOWN = 3


def choose_questions(rows: Sequence, chat: Chat, max_prompt_length: int, seed: int) -> list[dict]:
    """Choose rows that can be asked and have an answer to compare with, in an order the seed decides.

    Args:
        rows: a sequence of rows.Row of conversations, preferences, questions or prompts.
        chat: tokenizer and template.
        max_prompt_length: in tokens; the oldest exchanges give way.
        seed: of the order.

    Returns:
        At most MAX_QUESTIONS of {"prompt_ids", "question" (the last user's words), "reference"}.
    """
    found = []
    for place in random.Random(seed).sample(range(len(rows)), len(rows)):
        row = rows[place]
        record = row.record if isinstance(row.record, Prompt) else accept_prompt(row.record)
        fitted = fit_prompt(chat, record, max_prompt_length) if record.reference.strip() else None
        if fitted:
            ids, shown = fitted
            found.append({"prompt_ids": ids, "question": last_question(shown), "reference": record.reference})
        if len(found) == MAX_QUESTIONS:
            break
    return found


def measure_answers(trainer, questions: list[dict], max_new_tokens: int) -> dict[str, float]:
    """Let the model that is trained answer greedily, and compare.

    Every process answers a share. Nothing random is drawn, so a run goes on as it would have without being asked.

    Args:
        trainer: a StageMixin.
        questions: of choose_questions.
        max_new_tokens: longest answer.

    Returns:
        The METRICS: corpus BLEU-4 (method3) and mean ROUGE-L (F1) over Chinese characters and other words, 0 to 100;
        accuracy of the answers whose reference is letters, yes or no, or a number, if there are such; the share that
        end by themselves; their mean length.
    """
    args, chat = trainer.args, trainer.run.chat
    share = list(range(args.process_index, len(questions), args.world_size))
    share.sort(key=lambda index: -len(questions[index]["prompt_ids"]))
    settings, answers = Settings(max_new_tokens, 0.0, 1.0, 1.0, 0), []
    with trainer.policy_to_sample() as model, trainer.accelerator.autocast():
        loaded = LoadedModel(model, chat, trainer.run.source, None, chat.stop_ids, GenerationConfig())
        for start in range(0, len(share), args.per_device_eval_batch_size):
            batch = share[start : start + args.per_device_eval_batch_size]
            given = generate_batch(loaded, [questions[index]["prompt_ids"] for index in batch], settings)
            answers += zip(batch, given, strict=True)
    answers = [answer for _, answer in sorted(gather_object(answers), key=lambda item: item[0])]
    texts, references = [answer.text for answer in answers], [question["reference"] for question in questions]
    scores = score_pairs(texts, references, num_resamples=0)
    found = {"bleu4": scores["corpus"]["bleu4"]["score"], "rouge_l": scores["mean"]["rougeL"]["score"]}
    checkable = [place for place, item in enumerate(questions) if is_checkable(item["reference"], item["question"])]
    if checkable:
        judged = (judge_accuracy(texts[at], references[at], questions[at]["question"]).score for at in checkable)
        found["answer_accuracy"] = sum(score == 1 for score in judged) / len(checkable)  # a number needs its unit
    found["stop_rate"] = sum(answer.finish_reason == "stop" for answer in answers) / len(answers)
    found["answer_tokens"] = sum(answer.num_tokens for answer in answers) / len(answers)
    if trainer.is_world_process_zero():
        for question, text in list(zip(questions, texts, strict=True))[:NUM_SHOWN]:
            logger.info("  %s → %s", _shortened(question["question"], 60), _shortened(text, 110))
    return found


def describe_answers(metrics: dict[str, float]) -> str:
    """The METRICS among a run's, in a line."""
    accuracy = f", accuracy {metrics['answer_accuracy']:.3f}" if "answer_accuracy" in metrics else ""
    return (
        f"answers: BLEU-4 {metrics['bleu4']:.2f}, ROUGE-L {metrics['rouge_l']:.2f}{accuracy}, "
        f"{metrics['stop_rate']:.0%} end by themselves, {metrics['answer_tokens']:.0f} tokens"
    )


def _shortened(text, limit):
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
