"""openai_api.py asked by the real openai client: answers, limits, errors, and clients that leave."""

import contextlib
import json
import logging
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
import uvicorn
from conftest import ROOT
from test_generation import COLD, FEVER, TAUGHT, endless, greedy_by_hand, load, outputs, said  # noqa: F401 (fixtures)
from test_serving import counted_steps

import openai_api
from stagekit import openai_format, openai_server, serving
from stagekit.commandline import is_loopback
from stagekit.tokenization import encode_prompt

ANSWER = TAUGHT[0][-1]["content"]  # 多休息，多喝温水。
PATIENCE_SECONDS = 60


@contextlib.contextmanager
def serve(loaded, engine, *flags, key=None, name="sft"):
    """A server on a free port; the place of requests, a client, and what is inside."""
    args = openai_api.parse_args(["--base_model", "b", "--served_model_name", name, *map(str, flags)])
    server = openai_server.Server(loaded, engine, args, key)
    listener = openai_api.bind("127.0.0.1", 0)
    http = uvicorn.Server(openai_server.uvicorn_config(server.app()))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: http.started)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=PATIENCE_SECONDS)
    try:
        yield SimpleNamespace(url=url, client=client, server=server, engine=engine, loaded=loaded)
    finally:
        client.close()
        http.should_exit = True
        thread.join(PATIENCE_SECONDS)


def wait_for(condition):
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def sft(outputs):  # noqa: F811
    """For engines that are no engines."""
    return load(lora_model=outputs / "sft")


@pytest.fixture(scope="module", params=[8, 1], ids=["continuous", "one_by_one"])
def asked(request, outputs):  # noqa: F811
    """The taught stage behind each engine."""
    loaded = load(lora_model=outputs / "sft")  # each engine has a model of its own, which nothing else may use
    engine = serving.start_engine(loaded, request.param)
    assert isinstance(engine, serving.Continuous if request.param == 8 else serving.OneByOne)
    with serve(loaded, engine) as place:
        yield place
    engine.stop()


@pytest.fixture(scope="module")
def batched(outputs):  # noqa: F811
    """The taught stage behind continuous batching."""
    loaded = load(lora_model=outputs / "sft")
    engine = serving.start_engine(loaded, 8)
    with serve(loaded, engine) as place:
        yield place
    engine.stop()


@pytest.fixture(scope="module", params=[4, 1], ids=["continuous", "one_by_one"])
def talkative(request, endless):  # noqa: F811
    """A model that never stops by itself, behind each engine; two requests may wait."""
    loaded = load(endless)
    engine = serving.start_engine(loaded, request.param)
    with serve(loaded, engine, "--max_queue", 2, name="endless") as place:
        yield place
    engine.stop()


def ask(place, messages, **options):
    """A chat answer."""
    options = {"model": place.server.name, "temperature": 0, **options}
    return place.client.chat.completions.create(messages=messages, **options)


def streamed(place, messages, **options):
    """(pieces of text, finish reason, all chunks) of a streamed chat answer."""
    chunks = list(ask(place, messages, stream=True, **options))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    pieces = [choice.delta.content for choice in choices if choice.delta.content]
    return pieces, [choice.finish_reason for choice in choices if choice.finish_reason], chunks


def state(place):
    return httpx.get(f"{place.url}/health").json()


# -- chat ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
def test_a_chat_gets_the_answer_that_was_trained(asked, number):
    messages = TAUGHT[number]
    answer = ask(asked, messages[:-1])
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        messages[-1]["content"],
        "stop",
    )
    tokenizer = asked.loaded.chat.tokenizer
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    made = len(tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]) + 1  # and the stop token
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), made)
    assert answer.usage.total_tokens == len(prompt) + made
    assert answer.object == "chat.completion" and answer.model == "sft" and abs(answer.created - time.time()) < 60


@pytest.mark.parametrize("number", range(3))
def test_a_stream_says_the_same_piece_by_piece(asked, number):
    messages = TAUGHT[number]
    pieces, finish, chunks = streamed(asked, messages[:-1])
    assert "".join(pieces) == messages[-1]["content"] and len(pieces) > 1 and finish == ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant" and not any("\ufffd" in piece for piece in pieces)
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_its_usage_where_that_is_wanted(asked):
    _, _, chunks = streamed(asked, [COLD], stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and chunks[-1].usage == ask(asked, [COLD]).usage


def test_events_are_lines_of_data_in_ascii_that_end_with_done(asked):
    body = {"model": "sft", "messages": [COLD], "temperature": 0, "stream": True}
    response = httpx.post(f"{asked.url}/v1/chat/completions", json=body, timeout=PATIENCE_SECONDS)
    assert response.headers["content-type"].startswith("text/event-stream") and response.content.isascii()
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: {") for event in events[:-2])


def test_contents_in_parts_and_roles_of_today_are_understood(asked):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " a fever?"}]
    messages = [said("developer", "Be brief."), {"role": "user", "content": parts}]
    assert ask(asked, messages).choices[0].message.content == "A raised body temperature."
    first = ask(asked, [COLD]).choices[0].message
    history = [COLD, first.model_dump(), FEVER]  # with all its empty fields
    assert ask(asked, history).choices[0].message.content == TAUGHT[2][-1]["content"]


def test_max_tokens_cuts_the_answer_and_says_so(asked):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(asked, [COLD], **{name: 2})
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("多休息，", "length")
        assert answer.usage.completion_tokens == 2
    assert streamed(asked, [COLD], max_tokens=2)[:2] == (["多休息", "，"], ["length"])


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        ("，", "多休息"),
        (["never", "喝温"], "多休息，多"),
        ("多休息", ""),
        ("水。再", ANSWER),
        (["。", "温"], "多休息，多喝"),
    ],
)
def test_a_stop_string_ends_the_answer_before_it(asked, stop, left):
    answer = ask(asked, [COLD], stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (left, "stop")
    pieces, finish, _ = streamed(asked, [COLD], stop=stop)
    assert "".join(pieces) == left and finish == ["stop"]
    wait_for(lambda: state(asked)["running"] == 0)


def test_neutral_values_of_what_cannot_be_done_are_no_error(asked):
    neutral = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "user": "somebody"}
    more = {
        "response_format": {"type": "text"},
        "logprobs": False,
        "seed": 7,
        "top_p": 0.5,
        "parallel_tool_calls": True,
    }
    assert ask(asked, [COLD], **neutral, **more).choices[0].message.content == ANSWER


# -- completions -----------------------------------------------------------------------------------------------------


def test_a_completion_goes_on_with_a_text_blanks_and_all(talkative):
    loaded = talkative.loaded
    text = "What is a fever? A fever is"
    ids = loaded.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    made = []
    for _ in range(16):  # greedy decoding written out
        with torch.no_grad():
            made.append(int(loaded.model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
    expected = loaded.chat.tokenizer.decode(made)
    for prompt in (text, ids, [text], [ids]):
        answer = talkative.client.completions.create(model="endless", prompt=prompt, temperature=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "length")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 16)
    stream = talkative.client.completions.create(model="endless", prompt=text, temperature=0, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == expected and chunks[-1].finish_reason == "length"


def test_control_strings_in_a_text_stay_text_and_token_ids_are_taken_as_they_are(batched):
    prompt = encode_prompt(batched.loaded.chat, [COLD])
    answer = batched.client.completions.create(model="sft", prompt=prompt, temperature=0, max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (ANSWER, "stop")
    text = batched.loaded.chat.tokenizer.decode(prompt)
    answer = batched.client.completions.create(model="sft", prompt=text, temperature=0, max_tokens=1)
    assert answer.usage.prompt_tokens > len(prompt) + 10  # <|im_start|> is many tokens, not one


# -- refusals --------------------------------------------------------------------------------------------------------


def refusal(place, path="chat/completions", **body):
    """(status, error) of a request; with defaults for what is not given."""
    body = {"model": place.server.name, "messages": [COLD], **body}
    response = httpx.post(f"{place.url}/v1/{path}", json=body, timeout=PATIENCE_SECONDS)
    return response.status_code, response.json()["error"]


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"temperature": -1}, "temperature must be a number from 0 to 2", "temperature"),
        ({"temperature": "hot"}, "temperature must be a number", "temperature"),
        ({"temperature": True}, "temperature must be a number", "temperature"),
        ({"temperature": 1e-40}, "temperature must be 0 (greedy) or from 0.0001 to 2", "temperature"),
        ({"top_p": 0}, "top_p must be above 0", "top_p"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1", "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number", "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ", "max_tokens"),
        ({"n": 2}, "n is not supported: leave it out, or give 1", "n"),
        ({"logprobs": True}, "logprobs is not supported", "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported", "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported", "response_format"),
        ({"best_off": 3}, "'best_off' is not a parameter", "best_off"),
        ({"repetition_penalty": 1.1}, "'repetition_penalty' is not a parameter", "repetition_penalty"),
        ({"stop": ""}, "stop must be a string", "stop"),
        ({"stop": [1]}, "stop must be a string", "stop"),
        ({"stop": ["a"] * 17}, "stop may hold 16", "stop"),
        ({"stream": "yes"}, "stream must be true or false", "stream"),
        ({"stream_options": {"include_usage": True}}, "where stream is true", "stream_options"),
        ({"messages": []}, "not empty", "messages"),
        ({"messages": ["hello"]}, "message 1 must be an object", "messages"),
        ({"messages": [said("doctor", "a")]}, "role must be one of", "messages"),
        ({"messages": [{"role": "user"}]}, "message 1: content must be a string", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only parts of type text", "messages"),
        ({"messages": [COLD, said("assistant", "a")]}, "the last message must be the user's", "messages"),
        ({"messages": [COLD, COLD]}, "a user message cannot follow a user message", "messages"),
        ({"messages": [{**COLD, "audio": "x"}]}, "'audio' is not supported", "messages"),
        ({"messages": [{**COLD, "name": "Ann"}]}, "message 1: name is not supported in user messages", "messages"),
        ({"messages": [COLD] * 2049}, "messages may hold 2048 messages, and these are 2049", "messages"),
        ({"tool_choice": "required"}, "a call cannot be forced", "tool_choice"),
        ({"tools": ["x"]}, "list of objects", "tools"),
        ({"max_tokens": 2040}, "max_tokens asks for 2040; the model takes 2048", "messages"),
        ({"messages": [said("user", "fever " * 3000)]}, "the model takes 2048 altogether", "messages"),
        ({"seed": 1, "temperature": 1}, "answers are sampled together", "seed"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_form(batched, body, message, param):
    status, error = refusal(batched, **body)
    assert status == 400 and message in error["message"] and "\n" not in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert state(batched) == {"status": "ok", "running": 0, "waiting": 0}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({}, "prompt must be one text"),
        ({"prompt": ["a", "b"]}, "prompt must be one text"),
        ({"prompt": [1, 448]}, "prompt must be one text, or one list of token ids"),
        ({"prompt": [-1]}, "token ids"),
        ({"prompt": [True]}, "token ids"),
        ({"prompt": "a", "logprobs": 0}, "logprobs is not supported"),
        ({"prompt": "a", "echo": True}, "echo is not supported: leave it out, or give false"),
        ({"prompt": "fever " * 3000}, "the model takes 2048"),
    ],
)
def test_a_completion_that_cannot_be_is_refused(batched, body, message):
    response = httpx.post(f"{batched.url}/v1/completions", json={"model": "sft", **body})
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_what_cannot_fit_is_refused_before_it_is_tokenised(batched, monkeypatch):
    monkeypatch.setattr(openai_server, "encode_prompt", None)
    monkeypatch.setattr(openai_server, "encode_document", None)
    forged = "<|im_end|>" * 2048
    for path, body, least in (
        ("chat/completions", {"messages": [said("user", forged)]}, 2049),
        ("chat/completions", {"messages": [*[COLD, said("assistant", forged[:20])] * 600, COLD]}, 1201 + 600 * 2),
        ("completions", {"prompt": f"{forged}<|im_end|>", "messages": None}, 2049),
    ):
        status, error = refusal(batched, path, **body)
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert error["message"] == f"the prompt has at least {least} tokens; the model takes 2048 altogether"


def test_the_clients_own_exceptions_tell_what_went_wrong(batched):
    with pytest.raises(openai.NotFoundError) as raised:
        ask(batched, [COLD], model="gpt-4")
    assert raised.value.code == "model_not_found" and "'sft'" in raised.value.message
    with pytest.raises(openai.BadRequestError) as raised:
        ask(batched, [said("user", "fever " * 3000)], stream=True)
    assert raised.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"\xff", {}, 400),
        (b"[]", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"model": "sft", "messages": [{"role": "user", "content": "\\ud83d"}]}', {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b"x" * ((1 << 20) + 1), {}, 413),
    ],
)
def test_bodies_that_are_no_requests_are_refused(batched, content, headers, status):
    headers = {"content-type": "application/json", **headers}
    response = httpx.post(f"{batched.url}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status and set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_long_body_without_a_length_is_cut_off(batched):
    def chunks():
        for _ in range(3000):
            yield b"x" * 1000

    headers = {"content-type": "application/json"}
    with contextlib.suppress(httpx.WriteError):  # the server may close before all is sent
        response = httpx.post(f"{batched.url}/v1/chat/completions", content=chunks(), headers=headers)
        assert response.status_code == 413


def test_a_body_that_dawdles_is_let_go(batched, monkeypatch):
    monkeypatch.setattr(openai_server, "BODY_SECONDS", 0.05)
    address = ("127.0.0.1", int(batched.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=PATIENCE_SECONDS) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 408")


def test_unknown_paths_and_methods_are_errors_of_the_same_form(batched):
    assert httpx.get(f"{batched.url}/v1/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{batched.url}/v1/completions").status_code == 405
    for path in ("docs", "openapi.json"):
        assert httpx.get(f"{batched.url}/{path}").status_code == 404


def test_the_model_is_listed(batched):
    assert [model.id for model in batched.client.models.list()] == ["sft"]
    assert batched.client.models.retrieve("sft").id == "sft"
    with pytest.raises(openai.NotFoundError):
        batched.client.models.retrieve("other/model")


# -- who may ask -----------------------------------------------------------------------------------------------------


def test_without_the_key_nobody_asks(batched):
    with serve(batched.loaded, batched.engine, "--host", "0.0.0.0", key="s3cret-key") as place:
        assert ask(place, [COLD]).choices[0].message.content == ANSWER
        for wrong in ("s3cret-kex", "s3cret-key2", "none"):
            with pytest.raises(openai.AuthenticationError) as raised:
                ask(SimpleNamespace(**{**vars(place), "client": place.client.with_options(api_key=wrong)}), [COLD])
            assert raised.value.code == "invalid_api_key"
        body = {"model": "sft", "messages": [COLD]}
        for headers in ({}, {"Authorization": "s3cret-key"}, {"Authorization": "Basic s3cret-key"}):
            assert httpx.post(f"{place.url}/v1/chat/completions", json=body, headers=headers).status_code == 401
        assert httpx.get(f"{place.url}/v1/models").status_code == 401
        assert httpx.get(f"{place.url}/health").status_code == 200


def test_a_page_that_only_pretends_to_be_local_is_refused_where_there_is_no_key(batched):
    for host, status in (("evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("localhost:8000", 200)):
        assert httpx.get(f"{batched.url}/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *((name, True) for name in ("127.0.0.1", "127.0.0.2", "::1", "localhost")),
        *((name, False) for name in ("0.0.0.0", "::", "192.0.2.1", "localhost.evil.example", "")),
    ],
)
def test_what_only_this_machine_reaches_is_told_by_the_address(host, local):
    assert is_loopback(host) == local


def test_other_origins_are_let_in_only_by_name(batched):
    ours, theirs = {"Origin": "https://clinic.example"}, {"Origin": "https://evil.example"}
    assert "access-control-allow-origin" not in httpx.get(f"{batched.url}/v1/models", headers=ours).headers
    with serve(
        batched.loaded, batched.engine, "--allowed_origins", "https://clinic.example,https://b.example"
    ) as place:
        allowed = [httpx.get(f"{place.url}/v1/models", headers=headers).headers for headers in (ours, theirs)]
    assert [headers.get("access-control-allow-origin") for headers in allowed] == ["https://clinic.example", None]


@pytest.mark.parametrize(
    ("flags", "variable", "key"),
    [
        ([], None, None),
        ([], "from-environment", "from-environment"),
        (["--api_key", "from-flag"], "from-environment", "from-flag"),
        (["--api_key_file", "{file}"], "from-environment", "from-file"),
    ],
)
def test_the_key_comes_from_a_flag_a_file_or_the_environment(flags, variable, key, tmp_path, monkeypatch):
    (tmp_path / "key").write_text("from-file\n")
    monkeypatch.delenv("API_KEY", raising=False)
    if variable:
        monkeypatch.setenv("API_KEY", variable)
    flags = [flag.format(file=tmp_path / "key") for flag in flags]
    assert openai_api.read_key(openai_api.parse_args(["--base_model", "b", *flags])) == key


def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(monkeypatch):
    for bad in ("", "two words", "ключ"):
        monkeypatch.setenv("API_KEY", bad)
        with pytest.raises(ValueError, match="the key of API_KEY must be") as raised:
            openai_api.read_key(openai_api.parse_args(["--base_model", "b"]))
        assert not bad or bad not in str(raised.value)


# -- many at once ----------------------------------------------------------------------------------------------------


def test_concurrent_answers_are_those_of_greedy_decoding_written_out(talkative):
    questions = [[said("user", "fever " * length + "发烧")] for length in range(1, 9)]
    expected = [greedy_by_hand(talkative.loaded, encode_prompt(talkative.loaded.chat, q), 20)[0] for q in questions]
    assert len(set(expected)) > 1
    with serve(talkative.loaded, talkative.engine, name="endless") as place, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda question: ask(place, question, max_tokens=20), questions))
        assert state(place) == {"status": "ok", "running": 0, "waiting": 0}
    assert [answer.choices[0].message.content for answer in answers] == expected


def test_answers_grow_side_by_side(talkative):
    streams = [ask(talkative, [said("user", word)], stream=True, max_tokens=1900) for word in ("a", "b", "c")]
    if talkative.engine.at_once == 1:
        next(streams[0]), next(streams[0])
        assert state(talkative) == {"status": "ok", "running": 1, "waiting": 2}
    else:
        for _ in range(5):
            assert all(next(stream).choices[0].finish_reason is None for stream in streams)
        assert state(talkative) == {"status": "ok", "running": 3, "waiting": 0}
    for stream in streams:
        stream.close()
    wait_for(lambda: state(talkative)["running"] == 0)


def test_greedy_and_sampled_requests_share_a_batch(batched):
    def one(number):
        temperature = 0 if number % 2 else 2
        return ask(batched, [COLD], temperature=temperature, max_tokens=30).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(16)))
    assert answers[1::2] == [ANSWER] * 8
    assert len(set(answers[::2])) > 1


def test_sampling_follows_each_requests_own_parameters(talkative):
    question = [said("user", "fever")]
    likeliest = ask(talkative, question, max_tokens=12).choices[0].message.content
    for narrow in ({"temperature": 1e-4}, {"temperature": 2, "top_p": 1e-6}):
        assert ask(talkative, question, max_tokens=12, **narrow).choices[0].message.content == likeliest
    wide = {ask(talkative, question, max_tokens=12, temperature=2, top_p=1).choices[0].message.content for _ in "1234"}
    assert len(wide) == 4


def test_the_same_seed_gives_the_same_answer_where_requests_are_answered_one_by_one(talkative):
    if not talkative.engine.takes_seeds:
        pytest.skip("answers that are sampled together have no seed of their own: refused, see above")

    def sample(**seed):
        return ask(talkative, [FEVER], temperature=2, max_tokens=12, **seed).choices[0].message.content

    seeded = [(sample(seed=1), sample()) for _ in range(2)]
    assert seeded[0][0] == seeded[1][0] != sample(seed=2)
    assert seeded[0][1] != seeded[1][1]  # a seed is for one request: the next one draws afresh


def test_more_requests_than_may_wait_get_429_and_the_others_their_answer(talkative):
    most = talkative.engine.at_once + 2
    streams = [ask(talkative, [COLD], stream=True, max_tokens=1500) for _ in range(most)]
    wait_for(lambda: state(talkative)["running"] + state(talkative)["waiting"] == most)
    with pytest.raises(openai.RateLimitError) as raised:
        ask(talkative, [COLD], max_tokens=1)
    assert raised.value.response.headers["retry-after"] == "1" and f"{most} requests" in raised.value.message
    for stream in streams:
        stream.close()
    wait_for(lambda: state(talkative)["running"] + state(talkative)["waiting"] == 0)
    assert ask(talkative, [COLD], max_tokens=1).usage.completion_tokens == 1


# -- clients that leave ----------------------------------------------------------------------------------------------


def is_idle(engine):
    """Whether no answer is left in the batch, wanted or not."""
    return isinstance(engine, serving.OneByOne) or not engine.manager.batch_processor.scheduler.active_requests


def test_a_client_that_leaves_in_mid_stream_frees_its_place_and_the_model(talkative, caplog):
    caplog.set_level(logging.INFO, logger="stagekit.openai_server")
    with counted_steps(talkative.loaded) as steps:
        stream = ask(talkative, [COLD], stream=True, max_tokens=1900)
        for _, _ in zip(range(4), stream, strict=False):
            pass
        assert state(talkative)["running"] == 1
        stream.close()
        wait_for(lambda: state(talkative)["running"] == 0)
        done = len(steps)
        assert ask(talkative, [COLD], max_tokens=3).usage.completion_tokens == 3
        wait_for(lambda: is_idle(talkative.engine))
        assert len(steps) - done < 3 + 20 and done < 1900  # the model did not go on for nobody
    assert re.search(r"\d+ \+ \d+ tokens, not finished", caplog.text)


def test_a_client_that_leaves_while_it_waits_for_the_whole_answer_frees_its_place(talkative):
    body = {"model": "endless", "messages": [COLD], "max_tokens": 1900, "temperature": 0}
    with counted_steps(talkative.loaded) as steps:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{talkative.url}/v1/chat/completions", json=body, timeout=0.3)
        wait_for(lambda: state(talkative)["running"] == 0)
        assert ask(talkative, [COLD], max_tokens=3).usage.completion_tokens == 3
        wait_for(lambda: is_idle(talkative.engine))
        assert len(steps) < 1900


def test_a_request_that_takes_too_long_is_ended(talkative):
    with serve(talkative.loaded, talkative.engine, "--timeout_seconds", 0.2, name="endless") as place:
        with pytest.raises(openai.InternalServerError) as raised:
            ask(place, [COLD], max_tokens=1900)
        assert raised.value.status_code == 504 and "longer than 0.2 seconds" in raised.value.message
        with pytest.raises(openai.APIError, match="longer than 0.2 seconds"):
            list(ask(place, [COLD], max_tokens=1900, stream=True))
        assert state(place)["running"] == 0


def test_time_runs_while_a_prompt_is_tokenised_and_while_it_waits_for_that(sft, monkeypatch):
    began, hold, real = threading.Event(), threading.Event(), openai_server.encode_prompt

    def encode(chat, messages, tools):
        if messages[0]["content"] == "slow":
            began.set()
            assert hold.wait(PATIENCE_SECONDS)
        return real(chat, messages, tools)

    monkeypatch.setattr(openai_server, "encode_prompt", encode)
    engine = Scripted(sft, "yes")
    with serve(sft, engine, "--timeout_seconds", 1) as place, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(refusal, place, messages=[said("user", "slow")])
        assert began.wait(PATIENCE_SECONDS)
        behind = pool.submit(refusal, place)
        try:
            for status, error in (slow.result(), behind.result()):
                assert (status, error["message"]) == (504, "the answer took longer than 1 seconds")
            assert state(place) == {"status": "ok", "running": 0, "waiting": 0}
        finally:
            hold.set()
        assert ask(place, [COLD]).choices[0].message.content == "yes" and len(engine.prompts) == 1


def test_a_client_that_does_not_read_loses_its_place(sft, monkeypatch):
    def bind(host, port):
        listener = real(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    real = openai_api.bind
    monkeypatch.setattr(openai_api, "bind", bind)
    monkeypatch.setattr(openai_server, "SEND_SECONDS", 0.1)
    body = json.dumps({"model": "sft", "messages": [COLD], "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serve(sft, Scripted(sft, "rest " * 4000), "--timeout_seconds", 1) as place, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(place.url.rpartition(":")[2])))
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: place.server.active == 1)
        wait_for(lambda: place.server.active == 0)


# -- limits ----------------------------------------------------------------------------------------------------------


def test_the_ceiling_holds_for_what_is_asked_and_for_what_is_not(talkative):
    with serve(talkative.loaded, talkative.engine, "--max_new_tokens", 5, name="endless") as place:
        assert ask(place, [COLD]).usage.completion_tokens == 5
        assert refusal(place, max_tokens=6)[1]["message"] == "max_tokens 6 is above this server's limit of 5"


def test_a_completion_without_a_limit_stays_below_the_ceiling_and_within_the_room(talkative):
    prompt = [7] * 2045
    with serve(talkative.loaded, talkative.engine, "--max_new_tokens", 8, name="endless") as place:
        for ids, made in ((prompt[:9], 8), (prompt, 3)):
            answer = place.client.completions.create(model="endless", prompt=ids, temperature=0)
            assert answer.usage.completion_tokens == made


def test_without_a_limit_the_answer_fills_what_the_prompt_leaves(talkative):
    longer = [said("user", "fever " * 2000)]
    room = 2048 - len(encode_prompt(talkative.loaded.chat, longer))
    assert 0 < room < 512  # less than what the checkpoint would give
    assert ask(talkative, longer).usage.completion_tokens == room
    ids = encode_prompt(talkative.loaded.chat, longer) + [7] * (room - 3)
    answer = talkative.client.completions.create(model="endless", prompt=ids, temperature=0, max_tokens=3)
    assert answer.usage.total_tokens == 2048


def test_the_cache_shrinks_until_it_fits_and_with_it_the_longest_request(outputs, monkeypatch):  # noqa: F811
    from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler as Handler

    real = Handler.compute_memory_footprint
    enough = {}

    def footprint(self, max_batch_tokens, num_sectors):
        enough["sectors"] = num_sectors
        return real(self, max_batch_tokens, num_sectors) if num_sectors <= 40 else 1 << 60

    monkeypatch.setattr(Handler, "compute_memory_footprint", footprint)
    loaded = load(lora_model=outputs / "sft")
    engine = serving.start_engine(loaded, 4)  # wants 4 x 64 blocks, and 32 are the first half of a half that fits
    try:
        assert (engine.longest, enough["sectors"]) == (1024, 32)
        with serve(loaded, engine) as place:
            assert ask(place, [COLD]).choices[0].message.content == ANSWER
            assert "the model takes 1024" in refusal(place, max_tokens=1024)[1]["message"]
    finally:
        engine.stop()


# -- tools -----------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "dose", "description": "d", "parameters": {"type": "object"}}}


class Scripted:
    """An engine that says what it is told to, a token at a time, and notes what it was asked."""

    at_once, longest, takes_seeds, failure = 1, 2048, True, None

    def __init__(self, loaded, text, finish="stop"):
        self.loaded, self.text, self.finish, self.prompts = loaded, text, finish, []

    def submit(self, input_ids, settings, deliver, seed=None):
        self.prompts.append(self.loaded.chat.tokenizer.decode(input_ids))
        for token in self.loaded.chat.tokenizer(self.text, add_special_tokens=False)["input_ids"]:
            deliver([token], None)
        deliver([], self.finish)
        return lambda: None


CALLS = '<tool_call>\n{"name": "dose", "arguments": {"kg": 20}}\n</tool_call>'


def test_tools_reach_the_template_and_calls_come_back_as_calls(sft):
    engine = Scripted(sft, f"I look it up.\n{CALLS}\n{CALLS}")
    with serve(sft, engine) as place:
        answer = ask(place, [COLD], tools=[TOOL], tool_choice="auto").choices[0]
        assert '"name": "dose"' in engine.prompts[0] and "<tools>" in engine.prompts[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", "I look it up.")
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in answer.message.tool_calls]
        assert calls == [("dose", {"kg": 20})] * 2 and len({call.id for call in answer.message.tool_calls}) == 2
        # what the client sends back is understood, and stands in the prompt as it was said
        result = {"role": "tool", "tool_call_id": answer.message.tool_calls[0].id, "content": "300 mg"}
        ask(place, [COLD, answer.message.model_dump(), result], tools=[TOOL])
        assert engine.prompts[1].count('{"name": "dose", "arguments": {"kg": 20}}') == 2
        assert "<tool_response>\n300 mg\n</tool_response>" in engine.prompts[1]


def test_a_streamed_call_comes_whole_and_never_as_text(sft):
    with serve(sft, Scripted(sft, f"I look it up.\n{CALLS}")) as place:
        pieces, finish, chunks = streamed(place, [COLD], tools=[TOOL])
    assert "".join(pieces) == "I look it up." and finish == ["tool_calls"]
    (delta,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert (delta.index, delta.function.name, delta.function.arguments) == (0, "dose", '{"kg": 20}')


def test_what_stands_around_complete_calls_is_content(sft):
    begun = '<tool_call>\n{"name"'
    with serve(sft, Scripted(sft, f"Before.\n{CALLS}\nBetween.\n{CALLS} Behind. {begun}")) as place:
        answer = ask(place, [COLD], tools=[TOOL]).choices[0]
        assert answer.message.content == f"Before.\n\nBetween.\n Behind. {begun}"
        assert (answer.finish_reason, len(answer.message.tool_calls)) == ("tool_calls", 2)
        pieces, finish, _ = streamed(place, [COLD], tools=[TOOL])
        assert "".join(pieces) == answer.message.content and finish == ["tool_calls"]


def call(name, identity):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": "{}"}}


ASKED = [COLD, {"role": "assistant", "content": None, "tool_calls": [call("dose", "a"), call("weight", "b")]}]


def result(identity, content, **more):
    return {"role": "tool", "tool_call_id": identity, "content": content, **more}


@pytest.mark.parametrize(
    "results",
    [
        [result("a", "300 mg"), result("b", "20 kg")],
        [result("b", "20 kg", name="weight"), result("a", "300 mg", name="dose")],
        [result(None, "300 mg"), result("", "20 kg")],
    ],
)
def test_results_reach_the_model_in_the_order_of_their_calls(sft, results):
    engine = Scripted(sft, "yes")
    with serve(sft, engine) as place:
        ask(place, [*ASKED, *results, said("assistant", "Fine."), *ASKED[:1], *ASKED[1:], *results], tools=[TOOL])
    (prompt,) = engine.prompts
    assert re.findall("300 mg|20 kg|Fine", prompt) == ["300 mg", "20 kg", "Fine", "300 mg", "20 kg"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([*ASKED, result("c", "x")], "message 3: the assistant message before it makes no such call"),
        ([*ASKED, result("a", "x"), result("a", "y")], "message 3: its call has another result"),
        ([*ASKED, result("b", "x")], "message 3: the call before the one that it answers has no result"),
        ([*ASKED, result("a", "x", name="weight")], "message 3: name is not that of the function that was called"),
        ([*ASKED, *map(result, [None] * 3, "xyz")], "message 5: the assistant message before it makes no such call"),
        ([COLD, said("assistant", "Fine."), result("a", "x")], "message 3: the assistant message before it makes no"),
        ([result("a", "x")], "message 1: the assistant message before it makes no such call"),
        ([{**COLD, "tool_call_id": "a"}], "message 1: tool_call_id is not supported in user messages"),
        ([COLD, {**ASKED[1], "tool_calls": "[]"}, COLD], "message 2: tool_calls must be a list"),
    ],
)
def test_a_result_that_belongs_to_no_call_is_refused(messages, message):
    with pytest.raises(openai_format.ApiError, match=message):
        openai_format.read_messages({"messages": messages})


@pytest.mark.parametrize(
    ("text", "finish", "tools"),
    [
        (CALLS, "stop", None),
        ("<tool_call>\nnot JSON\n</tool_call>", "stop", [TOOL]),
        ('<tool_call>\n{"arguments": {}}\n</tool_call>', "stop", [TOOL]),
        ("<tool_call>\n[1]\n</tool_call>", "stop", [TOOL]),
        (CALLS[:-5], "length", [TOOL]),
        ("less < than <tool", "stop", [TOOL]),
    ],
)
def test_what_is_no_call_is_text(sft, text, finish, tools):
    options = {"tools": tools} if tools else {}
    with serve(sft, Scripted(sft, text, finish)) as place:
        answer = ask(place, [COLD], **options).choices[0]
        assert (answer.message.content, answer.finish_reason, answer.message.tool_calls) == (text, finish, None)
        pieces, finishes, _ = streamed(place, [COLD], **options)
        assert "".join(pieces) == text and finishes == [finish]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "dose", "parameters": {"kg": 20}}',  # Llama 3.1
        ' [{"name": "dose", "arguments": {"kg": 20}, "id": "call00001"}]',  # Mistral
        '<tool_call>\n{"name": "dose", "arguments": {"kg": 20}}\n</tool_call>',
    ],
)
def test_calls_are_read_in_the_forms_templates_write_them(text):
    form = openai_format.Chat("m", [TOOL])
    assert form.show(text[:30], None)[0] == ""  # nothing of it is sent before it is whole
    shown, calls = form.show(text, "stop")
    assert shown == "" and [call["function"] for call in calls] == [{"name": "dose", "arguments": '{"kg": 20}'}]


@pytest.mark.parametrize(
    "text", ['{"name": "other", "parameters": {}}', '{"dose": 1}', "[1, 2]", "[]", '"x"', "{", "7"]
)
def test_json_that_calls_nothing_is_text(text):
    assert openai_format.Chat("m", [TOOL]).show(text, "stop") == (text, None)
    assert openai_format.Chat("m", None).show('{"name": "dose", "parameters": {}}', "stop")[1] is None


def test_tools_are_hidden_where_none_may_be_called_and_refused_where_the_template_has_no_place(sft):
    engine = Scripted(sft, "yes")
    with serve(sft, engine) as place:
        ask(place, [COLD], tools=[TOOL], tool_choice="none")
        assert "dose" not in engine.prompts[0]
    with pytest.raises(openai_format.ApiError, match="takes no tools"):
        openai_format.read_tools({"tools": [TOOL]}, "{{ messages }}")


# -- logs and failures -----------------------------------------------------------------------------------------------


def test_nothing_that_is_asked_or_answered_is_logged(batched, caplog):
    caplog.set_level(logging.DEBUG)
    with serve(batched.loaded, batched.engine, key="s3cret-key") as place:
        ask(place, [COLD])
        streamed(place, [COLD])
        refusal(place)
        place.client.with_options(api_key="wr0ng-key")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("stagekit", "uvicorn"))]
    assert sum("tokens, stop" in line for line in ours) == 2
    for secret in (COLD["content"], ANSWER, "s3cret", "wr0ng"):
        assert not any(secret in line for line in ours)


def test_an_error_inside_tells_the_client_nothing_and_the_log_one_line(sft, caplog):
    class Broken(Scripted):
        def submit(self, input_ids, settings, deliver, seed=None):
            deliver([], ValueError("the prompt was: my secret illness"))
            return lambda: None

    with serve(sft, Broken(sft, "")) as place:
        for _ in range(2):
            status, error = refusal(place)
            assert (status, error["message"]) == (500, "the model could not answer this request")
        with pytest.raises(openai.APIError, match="could not answer"):
            list(ask(place, [COLD], stream=True))
        place.server.fit = None  # a bug
        assert refusal(place) == (
            500,
            {"message": "internal error", "type": "server_error", "param": None, "code": None},
        )
        assert state(place)["running"] == 0
    lines = [record.getMessage() for record in caplog.records if record.name == "stagekit.openai_server"]
    lines = [line for line in lines if "failed" in line]
    assert lines[:3] == ["a request failed: ValueError"] * 3
    assert re.fullmatch(r"a request failed: TypeError \(openai_server\.py:\d+\)", lines[3])
    assert "secret" not in caplog.text and "Traceback" not in caplog.text


def test_a_dead_engine_is_503_for_all_and_for_health(outputs, caplog):  # noqa: F811
    loaded = load(lora_model=outputs / "sft")
    engine = serving.start_engine(loaded, 4)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.stop)
        place = stack.enter_context(serve(loaded, engine))
        engine.manager.batch_processor._generation_step = None  # the next step fails
        status, error = refusal(place)
        assert (status, error["message"]) == (500, "the model could not answer this request")
        wait_for(lambda: engine.failure)
        status, error = refusal(place)
        assert status == 503 and "must be started again" in error["message"]
        response = httpx.get(f"{place.url}/health")
        assert response.status_code == 503 and "TypeError" in response.json()["status"]
    assert sum("continuous batching ended: TypeError" in record.getMessage() for record in caplog.records) == 1


# -- the program -----------------------------------------------------------------------------------------------------


def test_the_program_serves_a_stage_directory_and_ends_at_ctrl_c(outputs, tmp_path):  # noqa: F811
    command = [sys.executable, ROOT / "openai_api.py", "--lora_model", outputs / "sft", "--port", "0", "--only_cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "API_KEY": "s3cret-key"}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    lines: queue.SimpleQueue = queue.SimpleQueue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stderr], daemon=True)
    reader.start()
    seen = []
    try:
        while not (found := re.search(r"model sft: (http://127\.0\.0\.1:\d+)/v1 \(key required\)", "".join(seen))):
            seen.append(lines.get(timeout=180))
        assert "continuous batching: up to 8 requests at once, 2048 tokens each\n" in seen
        with openai.OpenAI(base_url=f"{found.group(1)}/v1", api_key="s3cret-key", max_retries=5) as client:
            answer = client.chat.completions.create(model="sft", messages=[COLD], temperature=0)
        assert answer.choices[0].message.content == ANSWER
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    reader.join(10)
    while not lines.empty():
        seen.append(lines.get())
    text = "".join(seen)
    assert text.endswith("interrupted; the server has stopped\n")
    assert "s3cret" not in text and "Traceback" not in text and ANSWER not in text


def test_an_address_that_is_taken_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--host 127.0.0.1 --port {port}: Address already in use"):
            openai_api.main(openai_api.parse_args(["--base_model", "/no/model", "--port", str(port)]))
    with pytest.raises(ValueError, match="--host 203.0.113.1 --port 0: "):
        openai_api.bind("203.0.113.1", 0)


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", str(ROOT / "openai_api.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "API_KEY is safer" in " ".join(result.stdout.split())
    assert not imported & {"torch", "transformers", "numpy", "fastapi", "uvicorn"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "--base_model or --lora_model is missing"),
        (["--base_model", "b", "--port", "70000"], "--port 70000 must be between 0 and 65535"),
        (["--base_model", "b", "--max_queue", "-1"], "--max_queue -1 must be 0 or more"),
        (["--base_model", "b", "--max_concurrent_requests", "0"], "--max_concurrent_requests 0 must be above 0"),
        (["--base_model", "b", "--api_key", "k", "--api_key_file", "f"], "exclude each other"),
        (["--base_model", "b", "--only_cpu", "--gpus", "0"], "--only_cpu and --gpus exclude"),
    ],
)
def test_flags_that_cannot_work_are_refused_in_one_line(flags, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        openai_api.parse_args(flags)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and expected in message and message.count("\n") == 1


def test_the_model_is_called_as_its_directory_or_its_name_on_the_hub(outputs):  # noqa: F811
    for flags, name in (
        (["--lora_model", f"{outputs}/sft/"], "sft"),
        (["--base_model", "Qwen/Qwen3-0.6B"], "Qwen/Qwen3-0.6B"),
        (["--base_model", f"{outputs}/base", "--lora_model", f"{outputs}/sft"], "sft"),
        (["--lora_model", f"{outputs}/sft", "--served_model_name", "doctor"], "doctor"),
    ):
        assert openai_server.Server(None, None, openai_api.parse_args(flags)).name == name
