"""Engines without HTTP: answers given together against a loop written out, and models that must not be batched."""

import contextlib
import logging
import queue
import shutil
import threading

import pytest
import torch
from conftest import build_model
from test_generation import COLD, TAUGHT, endless, greedy, greedy_by_hand, load, outputs, said  # noqa: F401 (fixtures)

from stagekit import generation, serving
from stagekit.generation import GrowingText, choose_settings
from stagekit.tokenization import encode_prompt

QUESTIONS = ["a", "What is a fever?", "发烧怎么办？要多休息吗？" * 6, "rest", "多喝水"]


@pytest.fixture
def start():
    """serving.start_engine; what was started is stopped, for a batch that is left alone would keep the tests alive."""
    engines = []

    def start_engine(loaded, at_once):
        engines.append(serving.start_engine(loaded, at_once))
        return engines[-1]

    yield start_engine
    for engine in engines:
        engine.stop()


@contextlib.contextmanager
def counted_steps(loaded):
    """A list that grows with every step of the model."""
    steps = []
    handle = loaded.model.register_forward_pre_hook(lambda module, args: steps.append(None))
    yield steps
    handle.remove()


def ask_all(engine, loaded, prompts, *settings):
    """[(text, finish reason, number of tokens)] of requests that are made at once."""
    texts, finishes, ended = [GrowingText(loaded) for _ in prompts], [None] * len(prompts), queue.SimpleQueue()
    for number, ids in enumerate(prompts):

        def deliver(tokens, finish, number=number):
            texts[number].add(tokens)
            if finish is not None:
                finishes[number] = finish
                ended.put(number)

        engine.submit(ids, settings[number % len(settings)], deliver)
    for _ in prompts:
        ended.get(timeout=60)
    return [(text.finish().strip(), finish, text.num_tokens) for text, finish in zip(texts, finishes, strict=True)]


def random_head(loaded):
    """Give a tiny model a random head, for its answers would all be alike."""
    head = loaded.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))
    return loaded


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_answers_given_together_are_those_of_greedy_decoding_written_out(architecture, tmp_path, start):
    loaded = random_head(load(build_model(tmp_path / "model", architecture, chat=False), template_name="vicuna"))
    prompts = [encode_prompt(loaded.chat, [said("user", question)]) for question in QUESTIONS]
    expected = [greedy_by_hand(loaded, ids, 24) for ids in prompts]
    engine = start(loaded, 3)
    assert isinstance(engine, serving.Continuous)
    for _ in range(2):  # the second time beginnings are found in the cache
        answers = ask_all(engine, loaded, prompts, greedy(loaded, max_new_tokens=24))
        assert [(text, number) for text, _, number in answers] == expected
    hot = choose_settings(loaded, temperature=5.0, max_new_tokens=24)
    mixed = ask_all(engine, loaded, prompts, greedy(loaded, max_new_tokens=24), hot)
    assert [(text, number) for text, _, number in mixed][::2] == expected[::2]
    assert mixed[1][0] != expected[1][0] and mixed[3][0] != expected[3][0]


def test_an_adapter_is_active_and_its_answers_stop(outputs, start):  # noqa: F811
    loaded = load(lora_model=outputs / "sft")
    engine = start(loaded, 3)
    assert isinstance(engine, serving.Continuous) and engine.longest == 2048
    answers = ask_all(engine, loaded, [encode_prompt(loaded.chat, turns[:-1]) for turns in TAUGHT], greedy(loaded))
    assert [(text, finish) for text, finish, _ in answers] == [(turns[-1]["content"], "stop") for turns in TAUGHT]


def test_a_model_that_batching_would_answer_wrongly_is_answered_one_by_one_and_the_log_says_why(
    tmp_path, caplog, start
):
    caplog.set_level(logging.INFO, logger="stagekit")
    loaded = random_head(load(build_model(tmp_path / "bloom", "bloom", chat=False), template_name="vicuna"))
    engine = start(loaded, 3)
    assert isinstance(engine, serving.OneByOne)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "stagekit.serving"]
    assert line.startswith("no continuous batching, requests are answered one after the other: with it bloom gives ")
    prompts = [encode_prompt(loaded.chat, [said("user", question)]) for question in QUESTIONS]
    answers = ask_all(engine, loaded, prompts, greedy(loaded, max_new_tokens=12))
    assert [(text, number) for text, _, number in answers] == [greedy_by_hand(loaded, ids, 12) for ids in prompts]


def test_what_a_model_raises_and_what_batching_lacks_are_reasons_too(outputs, tmp_path, caplog, monkeypatch, start):  # noqa: F811
    loaded = load(outputs / "base")

    def refuse(model, *args, **options):
        model.set_attn_implementation("eager")  # as transformers does before it finds out
        raise ValueError("Invalid layer type:\n  linear_attention")

    monkeypatch.setattr(type(loaded.model), "init_continuous_batching", refuse)
    base = shutil.copytree(outputs / "base", tmp_path / "base")
    generation.GenerationConfig(repetition_penalty=1.1).save_pretrained(base)
    for model in (loaded, load(base)):
        assert isinstance(start(model, 4), serving.OneByOne)
    reasons = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert reasons[0] == "ValueError: Invalid layer type: linear_attention"
    assert loaded.model.config._attn_implementation == "sdpa"
    assert reasons[1] == "the checkpoint asks for repetition_penalty 1.1, which continuous batching cannot give"


@pytest.mark.parametrize("fits", [True, False])
def test_a_model_with_eager_attention_alone_is_refused_for_that_reason_and_answers_one_by_one(
    fits,
    tmp_path,
    monkeypatch,
    caplog,
    start,
):
    from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler as Handler

    loaded = random_head(load(build_model(tmp_path / "model", "llama", chat=False), template_name="vicuna"))
    loaded.model.set_attn_implementation("eager")
    if not fits:  # a cache that shrinks is another manager's, which knows nothing of the first attention
        monkeypatch.setattr(Handler, "compute_memory_footprint", lambda self, tokens, n: 0 if n <= 40 else 1 << 60)
    engine = start(loaded, 3)
    assert isinstance(engine, serving.OneByOne)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "stagekit.serving"]
    assert "one after the other: ValueError: its attention is eager alone" in line
    ids = encode_prompt(loaded.chat, [said("user", "rest")])
    answers = ask_all(engine, loaded, [ids], greedy(loaded, max_new_tokens=12))
    assert [(text, number) for text, _, number in answers] == [greedy_by_hand(loaded, ids, 12)]


def test_the_likeliest_token_is_left_alone_also_among_equals():
    from types import SimpleNamespace

    kwargs = [{"greedy": True}, {}, {"greedy": True}]
    requests = [SimpleNamespace(state=SimpleNamespace(logit_processor_kwargs=given)) for given in kwargs]
    scores = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    flags = torch.zeros(8, dtype=torch.int32)  # longer than the batch, as transformers keeps it
    flags[:3] = serving._Greedy().prepare_tensor_args(requests)
    kept = serving._Greedy()(scores, flags).softmax(-1)
    assert kept[0].tolist() == [0, 1, 0] and kept[2].tolist() == [1, 0, 0]
    assert torch.equal(kept[1], scores[1].softmax(-1))


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_cancelled_request_stops_within_a_token_and_the_next_is_answered(at_once, endless, start):  # noqa: F811
    loaded = load(endless)
    engine, began, heard = start(loaded, at_once), queue.SimpleQueue(), []

    def deliver(new, finish):
        heard.append(new)
        began.put(None)

    ids = encode_prompt(loaded.chat, [COLD])
    with counted_steps(loaded) as steps:
        cancels = [engine.submit(ids, greedy(loaded, max_new_tokens=1900), deliver) for _ in range(2)]
        began.get(timeout=60)
        for cancel in (*cancels, *cancels):
            cancel()
        seen, done = len(heard), len(steps)
        assert ask_all(engine, loaded, [ids], greedy(loaded, max_new_tokens=5))[0][1:] == ("length", 5)
        assert len(steps) - done < 5 + 20 and len(heard) - seen <= 2  # the rest of 1900 is never made


def test_ctrl_c_while_the_model_is_tried_leaves_no_thread_behind(endless, monkeypatch):  # noqa: F811
    engines = []

    def interrupted(self):
        engines.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(serving.Continuous, "why_unfit", interrupted)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        serving.start_engine(load(endless), 3)
    left = [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
    engines[0].stop()
    assert not left
