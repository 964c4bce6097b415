"""Ask a model all that benchmarks need to know: answers, log-likelihoods, scores. Each is in the journal at once.

What a journal holds is not asked again. Prompts are worked on longest first, so that what does not fit the memory
fails at the beginning; where it runs out, a batch is halved.
"""

import math
from collections.abc import Callable

from tqdm import tqdm

from stagekit.benchmarks import Benchmark
from stagekit.choices import candidates, choose_shots, question_text
from stagekit.generation import LoadedModel, Settings, generate_batch, prompt_limit, run_in_batches
from stagekit.journal import Journal
from stagekit.likelihood import candidate_ids, score_candidates, text_windows
from stagekit.prompts import fit_history
from stagekit.records import Choice, Preference, RowError
from stagekit.scoring import RewardModel, score_answers

MAX_SCORED = 4096  # tokens of text at once: with a vocabulary of 150,000 their logits take 2.5 GB in fp32
TOO_LONG = {"text": "", "finish_reason": "prompt_too_long", "num_tokens": 0}  # in the place of an answer
Asked = tuple[list[dict], list[int]]  # messages as shown, with shots and without what did not fit, and their input_ids


def encode_items(
    loaded: LoadedModel, settings: Settings, benchmark: Benchmark, shots: list[Choice], num_shots: int
) -> list[Asked | None]:
    """Make the prompts of a benchmark; None for those that do not fit the context beside an answer.

    Shots are earlier exchanges; the oldest ones give way where the context is full, as in any conversation.

    Raises:
        ValueError: the template refuses one; it is named by file and line.
    """
    limit = prompt_limit(loaded, settings)
    found = []
    for item in benchmark.items:
        messages = item.messages
        if benchmark.task == "choice" and num_shots:
            shown = [
                {"role": role, "content": text}
                for shot in choose_shots(item.record, shots, num_shots)
                for role, text in (("user", question_text(shot)), ("assistant", shot.answer))
            ]
            messages = [*messages[:-1], *shown, messages[-1]]
        try:
            found.append(fit_history(loaded.chat, messages, limit, item.tools))
        except RowError as error:
            raise ValueError(f"{item.origin}: {error}") from None
    return found


def generate_answers(
    loaded: LoadedModel,
    settings: Settings,
    benchmark: Benchmark,
    prompts: list[Asked | None],
    journal: Journal,
    batch_size: int,
) -> None:
    """Answer every prompt: {"text", "finish_reason", "num_tokens"} under key("answer", item)."""
    waiting = {}
    for number, prompt in enumerate(prompts):
        key = benchmark.key("answer", number)
        if prompt is None and key not in journal.rows:
            journal.add({"index": key, **TOO_LONG})
        elif key not in journal.rows:
            waiting[key] = prompt[1]

    def work(inputs):
        return [vars(answer) for answer in generate_batch(loaded, inputs, settings)]

    _run(waiting, len, work, journal, batch_size, f"{benchmark.name}: answers")


def candidates_of(chat, item, prompt: Asked) -> list[list[int]]:
    """Token ids of all the answers to a multiple-choice question, in the order of choices.candidates."""
    return [candidate_ids(chat, prompt[0], text, item.record.several) for text in candidates(item.record)]


def score_choices(
    loaded: LoadedModel, benchmark: Benchmark, prompts: list[Asked | None], journal: Journal, batch_size: int
) -> None:
    """Score all answers to every question that fits: {"logps": in the order of choices.candidates} under key("logps").

    Raises:
        ValueError: the model gives no numbers.
    """
    waiting = {
        benchmark.key("logps", number): (item, prompt)
        for number, (item, prompt) in enumerate(zip(benchmark.items, prompts, strict=True))
        if prompt is not None and benchmark.key("logps", number) not in journal.rows
    }

    def work(inputs):
        items = [(prompt[1], candidates_of(loaded.chat, item, prompt)) for item, prompt in inputs]
        return [{"logps": _numbers(logps)} for logps in score_candidates(loaded.model, items)]

    _run(waiting, lambda asked: len(asked[1][1]), work, journal, batch_size, f"{benchmark.name}: log-likelihoods")


def score_text(
    loaded: LoadedModel, benchmark: Benchmark, journal: Journal, batch_size: int, max_length: int, stride: int
) -> None:
    """Score every token of running text: {"nll": in nats, "tokens"} under key("nll", item, window)."""
    waiting = {}
    for number, item in enumerate(benchmark.items):
        for window, found in enumerate(text_windows(loaded.chat.tokenizer, item.record.text, max_length, stride)):
            if benchmark.key("nll", number, window) not in journal.rows:
                waiting[benchmark.key("nll", number, window)] = found

    def work(inputs):
        found = score_candidates(loaded.model, [(context, [scored]) for context, scored in inputs])
        return [
            {"nll": -_numbers(logps)[0], "tokens": len(scored)}
            for logps, (_, scored) in zip(found, inputs, strict=True)
        ]

    longest = max((sum(map(len, item)) for item in waiting.values()), default=1)
    fitting = max(1, min(batch_size, MAX_SCORED // longest))
    _run(waiting, lambda item: sum(map(len, item)), work, journal, fitting, f"{benchmark.name}: windows of text")


def score_pairs(reward: RewardModel, benchmark: Benchmark, journal: Journal, batch_size: int) -> None:
    """Score all answers of preferences and rankings; see _score."""
    waiting = {}
    for number, item in enumerate(benchmark.items):
        record = item.record
        answers = [record.chosen, record.rejected] if isinstance(record, Preference) else record.answers
        waiting[benchmark.key("scores", number)] = (record.prompt, answers, record.tools)
    _score(reward, waiting, journal, batch_size, benchmark.name)


def score_generated(reward: RewardModel, benchmark: Benchmark, journal: Journal, batch_size: int) -> None:
    """Score what generate_answers found; see _score."""
    waiting = {}
    for number, item in enumerate(benchmark.items):
        answer = journal.rows[benchmark.key("answer", number)]
        if answer["finish_reason"] != TOO_LONG["finish_reason"]:
            said = [{"role": "assistant", "content": answer["text"]}]
            waiting[benchmark.key("scores", number)] = (item.messages, [said], item.tools)
    _score(reward, waiting, journal, batch_size, benchmark.name)


def _score(reward, items, journal, batch_size, name):
    """{"scores": one for each answer, None where it does not fit the reward model} under the items' keys."""
    waiting = {key: item for key, item in items.items() if key not in journal.rows}

    def work(inputs):
        found = [[None] * len(answers) for _, answers, _ in inputs]
        for (place, number), score in score_answers(reward, inputs, reward.max_length, len(inputs)):
            found[place][number] = None if score is None else _numbers([score])[0]
        return [{"scores": scores} for scores in found]

    def size(item):
        prompt, answers, _ = item
        return _num_chars(prompt) + max(map(_num_chars, answers))

    _run(waiting, size, work, journal, batch_size, f"{name}: scores")


def _num_chars(messages):
    return sum(len(message["content"]) for message in messages)


def _run(
    waiting: dict[str, object],
    size: Callable,
    work: Callable[[list], list[dict]],
    journal: Journal,
    batch_size: int,
    description: str,
) -> None:
    """Work through {key: input}, largest first, and add what is found to the journal under the same keys."""
    if not waiting:
        return
    keys = sorted(waiting, key=lambda key: -size(waiting[key]))
    with tqdm(total=len(keys), desc=description, unit="item", mininterval=0.5) as progress:
        batches = run_in_batches(len(keys), batch_size, lambda batch: work([waiting[keys[place]] for place in batch]))
        for batch, found in batches:
            for place, row in zip(batch, found, strict=True):
                journal.add({"index": keys[place], **row})
            progress.update(len(batch))


def _numbers(values):
    if any(map(math.isnan, values)):
        raise ValueError(
            "the model's output is not a number (NaN): its weights are damaged, or overflow in 16 bits (--only_cpu "
            "computes in 32)"
        )
    return values
