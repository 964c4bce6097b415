"""OpenAI's API over HTTP: who is let in, how much is taken on, and what happens when a client leaves.

Nothing that is asked or answered is logged. Used by openai_api.py.
"""

import argparse
import asyncio
import contextlib
import hmac
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from stagekit import openai_format
from stagekit.commandline import is_loopback, names_loopback
from stagekit.generation import GrowingText, LoadedModel, Settings, choose_settings
from stagekit.openai_format import ApiError, Chat, Completion
from stagekit.records import RowError
from stagekit.serving import WorkerStopped
from stagekit.tokenization import encode_document, encode_prompt

logger = logging.getLogger(__name__)

BODY_SECONDS = 30  # a client that sends its request more slowly is let go
SEND_SECONDS = 5  # for the end of a stream whose time is over


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    """Settings of the HTTP server; it logs nothing by itself, for errors are logged here, in a line each."""
    return uvicorn.Config(
        app,
        log_config=None,
        log_level=logging.CRITICAL,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=5,
    )


class Server:
    """The model, its engine, and how much they may be asked.

    Attributes:
        name: what requests call the model.
        active: requests that are worked on or wait.
    """

    def __init__(self, loaded: LoadedModel, engine, args: argparse.Namespace, key: str | None = None):
        self.loaded, self.engine, self.args, self.key = loaded, engine, args, key
        given = args.lora_model or args.base_model
        self.name = args.served_model_name or (Path(given).resolve().name if os.path.isdir(given) else given)
        self.active, self.started = 0, int(time.time())
        self.encoder = ThreadPoolExecutor(1)  # one prompt at a time: tokenizers are no friends of threads

    def app(self) -> FastAPI:
        """The application with its paths; errors of every kind have OpenAI's form."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        protected = [Depends(self.admit)]
        app.get("/health")(self.health)
        app.get("/v1/models", dependencies=protected)(self.models)
        app.get("/v1/models/{name:path}", dependencies=protected)(self.model)
        app.post("/v1/chat/completions", dependencies=protected)(self.chat)
        app.post("/v1/completions", dependencies=protected)(self.completion)
        for kind in (ApiError, HTTPException, Exception):
            app.add_exception_handler(kind, self.refuse)
        if self.args.allowed_origins:
            origins = [origin.strip() for origin in self.args.allowed_origins.split(",")]
            app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        return app

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Tell a client what went wrong, and no more than concerns it."""
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, str(error.detail))
        elif not isinstance(error, ApiError):
            self.log_error(error)
            error = ApiError(500, "internal error")
        return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 429 else None)

    def log_error(self, error: Exception) -> None:
        """Log where an error came from that nobody foresaw; its own words may quote what was asked."""
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        where = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace else ""
        debug = self.args.debug or os.environ.get("STAGEKIT_DEBUG")
        logger.error("a request failed: %s%s", type(error).__name__, where, exc_info=error if debug else None)

    async def admit(self, request: Request) -> None:
        """Let a request in that has the key; where there is none, one that calls this machine by its own name."""
        if self.key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
                message = "the API key is missing or wrong (Authorization: Bearer KEY)"
                raise ApiError(401, message, code="invalid_api_key")
        elif is_loopback(self.args.host) and not names_loopback(request.headers.get("host", "")):
            raise ApiError(403, "without a key this server answers only to the names 127.0.0.1 and localhost")

    # -- paths --

    async def health(self) -> Response:
        """Say whether requests are answered, and how many are at work."""
        working = min(self.active, self.engine.at_once)
        state = {"status": self.engine.failure or "ok", "running": working, "waiting": self.active - working}
        return JSONResponse(state, 503 if self.engine.failure else 200)

    async def models(self) -> dict:
        """List the one model."""
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, name: str) -> dict:
        """Describe the model."""
        self.check_name(name)
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "local"}

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        payload = await self.read_payload(request, openai_format.OF_CHAT)
        messages, chat = openai_format.read_messages(payload), self.loaded.chat
        tools = openai_format.read_tools(payload, chat.tokenizer.chat_template)
        limit = openai_format.read_limit(payload, self.args.max_new_tokens)
        form = Chat(self.name, tools)
        self.check_least(len(messages), json.dumps([messages, tools], ensure_ascii=False))
        return await self.answer(request, payload, lambda: encode_prompt(chat, messages, tools), limit, form)

    async def completion(self, request: Request) -> Response:
        """Go on with a text, read as in pretraining: control strings stay plain text. Token ids are taken as given."""
        payload = await self.read_payload(request, openai_format.OF_COMPLETION)
        prompt = openai_format.read_prompt(payload, self.loaded.model.config.get_text_config().vocab_size)
        limit = openai_format.read_limit(payload, self.args.max_new_tokens)
        self.check_least(0, prompt if isinstance(prompt, str) else "")

        def encode():
            if isinstance(prompt, list):
                return prompt
            chat = self.loaded.chat
            (piece,) = encode_document(chat.control, chat.tokenizer, prompt, 1 << 40)
            return piece.input_ids[:-1]  # without the EOS that ends a document

        return await self.answer(request, payload, encode, limit, Completion(self.name))

    # -- steps --

    def check_name(self, name: object) -> None:
        if name != self.name:
            raise ApiError(404, f"there is no such model here, only {self.name!r}", "model", "model_not_found")

    def check_least(self, num_messages: int, text: str) -> None:
        """Refuse what cannot fit before time is spent on it: messages and control strings are tokens at least."""
        least = num_messages + sum(1 for _ in self.loaded.chat.control.finditer(text))
        if self.engine.longest and least > self.engine.longest:
            raise self.too_long(f"at least {least}")

    def too_long(self, num_tokens: int | str, asked: str = "") -> ApiError:
        message = f"the prompt has {num_tokens} tokens{asked}; the model takes {self.engine.longest} altogether"
        return ApiError(400, message, "messages", "context_length_exceeded")

    async def read_payload(self, request: Request, known: set[str]) -> dict:
        """Read the JSON body within its limits; check the model's name and that all parameters are known."""
        # Web pages of other origins may send any other type without asking the browser's preflight.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the request must be JSON (Content-Type: application/json)")
        limit, body = self.args.max_body_bytes, bytearray()
        too_long = ApiError(413, f"the request is longer than {limit} bytes")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_long

        async def read():
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > limit:
                    raise too_long

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except (asyncio.TimeoutError, ClientDisconnect):
            raise ApiError(408, f"the request did not arrive within {BODY_SECONDS} seconds") from None
        try:
            payload = json.loads(body)
            json.dumps(payload, ensure_ascii=False).encode()  # half a character (\ud83d) is what no tokenizer takes
        except (ValueError, RecursionError):
            raise ApiError(400, "the request is not valid JSON in UTF-8") from None
        if not isinstance(payload, dict):
            raise ApiError(400, "the request must be a JSON object")
        if not isinstance(payload.get("model"), str):
            raise ApiError(400, "model is missing", "model")
        self.check_name(payload["model"])
        openai_format.check_parameters(payload, known)
        return payload

    async def answer(
        self,
        request: Request,
        payload: dict,
        encode: Callable[[], list[int]],
        limit: int | None,
        form: Chat | Completion,
    ) -> Response:
        """Check what is asked for, take it on, and answer in one piece or as a stream.

        Args:
            encode: makes the prompt's token ids; called beside the event loop.
            limit: tokens that the answer may have, None where nothing was said.
        """
        stream, include_usage = openai_format.read_stream(payload)
        sampling, stops = openai_format.read_sampling(payload), openai_format.read_stops(payload)
        text = GrowingText(self.loaded, stops, marks=[openai_format.CALL_MARK] if form.tools else None)
        most = self.engine.at_once + self.args.max_queue
        if self.active >= most:
            raise ApiError(429, f"{most} requests are at work or waiting; try again", code="rate_limit_exceeded")
        self.active, began = self.active + 1, time.monotonic()  # until the request is closed
        try:
            encoding = asyncio.get_running_loop().run_in_executor(self.encoder, encode)
            input_ids = await asyncio.wait_for(encoding, self.args.timeout_seconds)
            running = self.begin(input_ids, limit, sampling, text, form, began)
        except asyncio.TimeoutError:
            self.active -= 1
            raise self.timed_out() from None
        except RowError as error:
            self.active -= 1
            raise ApiError(400, str(error), "messages") from None
        except BaseException:
            self.active -= 1
            raise
        return EventStream(running, include_usage) if stream else await whole_response(running, request)

    def timed_out(self) -> ApiError:
        return ApiError(504, f"the answer took longer than {self.args.timeout_seconds:g} seconds", code="timeout")

    def begin(
        self,
        input_ids: list[int],
        limit: int | None,
        sampling: dict,
        text: GrowingText,
        form: Chat | Completion,
        began: float,
    ) -> "Running":
        """Hand a request to the engine; `began` is when it came, by time.monotonic()."""
        if not input_ids:
            raise ApiError(400, "prompt is empty", "prompt")
        seed = sampling.pop("seed")
        settings = choose_settings(self.loaded, max_new_tokens=self.fit(input_ids, limit, form.usual), **sampling)
        if settings.temperature == 0:
            seed = None  # the same answer every time
        if seed is not None and not self.engine.takes_seeds:
            message = (
                "seed: answers are sampled together here, and none can have its own; temperature 0 needs none, and a "
                "server with --max_concurrent_requests 1 takes it"
            )
            raise ApiError(400, message, "seed")
        try:
            return Running(self, input_ids, settings, seed, text, form, began)
        except WorkerStopped:
            raise ApiError(503, "the model's worker has stopped; the server must be started again") from None

    def fit(self, input_ids: list[int], limit: int | None, usual: int | None) -> int:
        """How many tokens the answer may have: as asked, or the usual number as far as there is room."""
        usual = usual or choose_settings(self.loaded).max_new_tokens
        room = self.engine.longest - len(input_ids) if self.engine.longest else max(limit or 0, usual)
        if room < (limit or 1):
            raise self.too_long(len(input_ids), f" and max_tokens asks for {limit}" if limit else "")
        return limit or min(usual, room, self.args.max_new_tokens or room)


class Running:
    """A request at work: the engine's thread hands over tokens, and the event loop makes text of them.

    Attributes:
        finish_reason: "stop", "length" or "tool_calls"; None while it is unfinished.
        calls: the calls the answer makes, or None.
    """

    def __init__(
        self,
        server: Server,
        input_ids: list[int],
        settings: Settings,
        seed: int | None,
        text: GrowingText,
        form: Chat | Completion,
        began: float,
    ):
        self.server, self.text, self.form, self.num_prompt = server, text, form, len(input_ids)
        self.finish_reason = self.calls = None
        self.closed, self.began, loop = False, began, asyncio.get_running_loop()
        self.events: asyncio.Queue = asyncio.Queue()

        def deliver(tokens, finish):
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for it
                loop.call_soon_threadsafe(self.events.put_nowait, (tokens, finish))

        self.cancel = server.engine.submit(input_ids, settings, deliver, seed)

    async def parts(self):
        """Yield the text piece by piece, as far as it is certain.

        Raises:
            ApiError: the time is over, or the engine failed.
        """
        sent = 0
        while self.finish_reason is None:
            try:
                tokens, finish = await asyncio.wait_for(self.events.get(), self.seconds_left())
            except asyncio.TimeoutError:
                raise self.server.timed_out() from None
            if isinstance(finish, Exception):
                self.server.log_error(finish)
                raise ApiError(500, "the model could not answer this request")
            self.text.add(tokens)
            whole = self.text.certain() if finish is None else self.text.finish()
            finish = "stop" if self.text.stopped else finish
            shown, self.calls = self.form.show(whole, finish)
            self.finish_reason = "tool_calls" if self.calls else finish
            if len(shown) > sent:
                yield shown[sent:]
                sent = len(shown)

    def seconds_left(self) -> float:
        """How long the request may still take."""
        return self.began + self.server.args.timeout_seconds - time.monotonic()

    def usage(self) -> dict:
        """Tokens read and made; the stop token counts, and so does what a stop string cut off."""
        made = self.text.num_tokens
        return {"prompt_tokens": self.num_prompt, "completion_tokens": made, "total_tokens": self.num_prompt + made}

    def close(self) -> None:
        """Stop the model if it still works on this, and make room for another request."""
        if not self.closed:
            self.closed = True
            self.cancel()
            self.server.active -= 1
            how, seconds = self.finish_reason or "not finished", time.monotonic() - self.began
            logger.info("%d + %d tokens, %s, %.1f s", self.num_prompt, self.text.num_tokens, how, seconds)


async def whole_response(running: Running, request: Request) -> Response:
    """Answer in one piece; the model stops if the client leaves meanwhile."""

    async def work():
        text = "".join([part async for part in running.parts()])
        answer = running.form.whole(text, running.calls, running.finish_reason)
        return JSONResponse({**answer, "usage": running.usage()})

    async def leave():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work()), asyncio.create_task(leave())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else Response(status_code=499)
    finally:
        for task in tasks:
            task.cancel()
        running.close()


class EventStream(StreamingResponse):
    """An answer as server-sent events; however it ends, the request is closed."""

    def __init__(self, running: Running, include_usage: bool):
        self.running = running
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self.events(include_usage), media_type="text/event-stream", headers=headers)

    async def events(self, include_usage: bool):
        """The events as text."""
        form, usage = self.running.form, {"usage": None} if include_usage else {}
        try:
            for chunk in form.first():
                yield event({**chunk, **usage})
            async for text in self.running.parts():
                yield event({**form.part(text), **usage})
            for chunk in form.last(self.running.calls, self.running.finish_reason):
                yield event({**chunk, **usage})
            if include_usage:
                yield event({**form.chunk(None), "usage": self.running.usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield event(error.body)

    async def __call__(self, scope, receive, send):
        try:
            seconds = self.running.seconds_left() + SEND_SECONDS  # a client that does not read would stay for good
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(super().__call__(scope, receive, send), seconds)
        finally:
            self.running.close()


def event(data: dict) -> str:
    """A server-sent event; in ASCII, for some clients take every line separator of Unicode for the end of a line."""
    return f"data: {json.dumps(data)}\n\n"
