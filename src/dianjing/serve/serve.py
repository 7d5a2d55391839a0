"""An exported folder -> transformers' own OpenAI-compatible server on this machine, with a guard in front.

`transformers serve` reads any local path that stands where a picture's address should, follows HTTP redirects, and
loads whatever model a request names. The guard lets through only chat requests for the one model, with the pictures
inside the request; each picture is decoded and written anew, prepared as in training.
"""

from __future__ import annotations

import base64
import hmac
import io
import json
import os
import re
import socket
import tempfile
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from dianjing.constants import IMAGE_MARKER
from dianjing.errors import ConfigError, DataError, ModelError
from dianjing.model.projector import kind_of, picture_tokens
from dianjing.pictures.image import ImageProcessor
from dianjing.pictures.picture import load_image

HOST = "127.0.0.1"
MAX_REQUEST_BYTES = 32 * 1024 * 1024
MAX_PICTURES = 16
ANSWER_TOKENS = 1024
"""Longest answer to a request that names no limit, as far as the model's positions reach."""
SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half a character, which JSON can write and no tokenizer can read."""
DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
"""ASGI, the interface between a Python web server and its application."""


class Refusal(Exception):
    """A request that is not let through, with its HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Room:
    """The positions of a model, which prompt and answer share."""

    positions: int
    picture: int
    """Positions of one picture."""
    processor: Any
    """Its chat template and its tokenizer, as transformers has them."""

    def taken(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """Return how many positions a prompt takes, its pictures included.

        Raises:
            Refusal: it takes more than there are, or the model's chat template refuses it.
        """
        said = [{"role": one["role"], "content": _template_parts(one["content"])} for one in messages]
        parts = [part for one in said for part in one["content"]]
        characters = sum(len(part.get("text", "")) for part in parts)
        tokenizer = self.processor.tokenizer
        longest = max(map(len, tokenizer.get_vocab()))
        if max(len(said), len(parts), characters / longest) > self.positions:
            raise Refusal(400, f"the messages are longer than the {self.positions} positions of the model; send less")
        try:
            text = self.processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise Refusal(400, f"messages: the model's chat template refuses them: {error}") from None
        pictures = sum(part["type"] == "image" for part in parts)
        return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) + pictures * (self.picture - 1)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Stands before an application and lets only safe requests for one model through."""

    app: App
    model: str
    room: Room
    key: str = ""
    """Bearer token that every request must bring; "" = none."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            check_sender(headers, self.key)
            if (scope["method"], scope["path"]) == ("GET", "/v1/models"):
                await _reply(send, 200, {"object": "list", "data": [{"id": self.model, "object": "model"}]})
            elif (scope["method"], scope["path"]) == ("GET", "/health"):
                await self.app(scope, receive, send)
            elif (scope["method"], scope["path"]) == ("POST", "/v1/chat/completions"):
                body = safe_request(await _read(headers, receive), self.model, self.room)
                await self._pass_on(scope, body, receive, send)
            else:
                raise Refusal(404, "only POST /v1/chat/completions, GET /v1/models and GET /health are served")
        except Refusal as refusal:
            kind = "invalid_request_error"
            await _reply(send, refusal.status, {"error": {"message": str(refusal), "type": kind}})

    async def _pass_on(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        given = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        headers = [*given, (b"content-length", str(len(body)).encode())]
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return parts.pop() if parts else await receive()

        await self.app({**scope, "headers": headers}, replay, send)


def check_sender(headers: Mapping[str, str], key: str) -> None:
    """Refuse a request that another web page makes, or that lacks the key.

    Raises:
        Refusal: says why.
    """
    host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
    if host not in (HOST, "localhost"):
        raise Refusal(403, f"this server answers only to {HOST} and localhost, not to the name {host!r}")
    if key and not hmac.compare_digest(headers.get("authorization", "").encode(), f"Bearer {key}".encode()):
        raise Refusal(401, "the key is missing or wrong; send it as Authorization: Bearer KEY")


def _is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most  # NaN is neither


def _is_temperature(value: Any) -> bool:
    return _is_number(value, 0, 0) or _is_number(value, 1e-4, 2)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not SURROGATE.search(value)


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return 1 <= len(texts) <= 4 and all(_is_text(text) and 1 <= len(text) <= 100 for text in texts)


VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "stream_options": (lambda value: isinstance(value, dict), "an object"),
    "max_tokens": (lambda value: type(value) is int and value > 0, "a whole number of at least 1"),
    "max_completion_tokens": (lambda value: type(value) is int and value > 0, "a whole number of at least 1"),
    "temperature": (_is_temperature, "0, or a number from 0.0001 to 2,"),
    "top_p": (lambda value: _is_number(value, 1e-9, 1), "a number above 0, at most 1,"),
    "seed": (lambda value: type(value) is int and -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    "stop": (_is_stop, "a text, or up to four, each of 1 to 100 characters,"),
    "frequency_penalty": (lambda value: _is_number(value, -0.99, 2), "a number from -0.99 to 2"),
    "user": (_is_text, "text"),
}
"""Field -> whether it may have a value, and the values it may have, in words; null is as if it were not there."""
FIELDS = ("model", "messages", *VALUES)
"""What a request may hold; transformers ignores the others, or lets them replace the prompt."""


def safe_request(body: bytes, model: str, room: Room) -> bytes:
    """Return a chat request as it may be passed on, its pictures decoded and written anew.

    Raises:
        Refusal: it asks for something else, or is broken.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the request is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise Refusal(400, "the request must be a JSON object")
    if unknown := sorted(set(request) - set(FIELDS)):
        raise Refusal(400, f"not supported: {', '.join(unknown)}; a request may hold {', '.join(FIELDS)}")
    if request.get("model", model) != model:
        raise Refusal(404, f"this server has only the model {model!r}")
    request = {name: value for name, value in request.items() if value is not None}
    for name, (allowed, wanted) in VALUES.items():
        if name in request and not allowed(request[name]):
            raise Refusal(400, f"{name}: {wanted} is needed, not {json.dumps(request[name])[:60]}")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of messages")
    pictures = [0]
    safe = [_safe_message(number, message, pictures) for number, message in enumerate(messages)]
    if safe[-1]["role"] != "user":
        raise Refusal(400, "the last message must be the user's")
    asked = request.pop("max_completion_tokens", request.get("max_tokens"))
    limits = {"max_tokens": _answer_tokens(asked, room.taken(safe), room.positions)}
    # Without a temperature the answer is the likeliest one, as in `dianjing chat`.
    return json.dumps({"temperature": 0, **request, **limits, "model": model, "messages": safe}).encode()


def _answer_tokens(asked: int | None, taken: int, positions: int) -> int:
    """Return how long the answer may become."""
    left = positions - taken
    told = f"the messages take {taken} of the model's {positions} positions, pictures included"
    if left < 1:
        raise Refusal(400, f"{told}; send less, or start a new conversation")
    if asked and asked > left:
        raise Refusal(400, f"max_tokens is {str(asked)[:30]}, but {told}; ask for at most {left}")
    return asked or min(ANSWER_TOKENS, left)


def _template_parts(content: str | Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return a message's content as chat templates read it."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{"type": "text", "text": part["text"]} if "text" in part else {"type": "image"} for part in parts]


def _safe_message(number: int, message: Any, pictures: list[int]) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or set(message) - {"role", "content"}:
        raise Refusal(400, f"{where}: a message holds role and content, nothing else")
    if message.get("role") not in ("user", "assistant"):
        raise Refusal(400, f"{where}: the role must be user or assistant; the model was trained with no other")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": _safe_text(where, content)}
    if not isinstance(content, list) or not content:
        raise Refusal(400, f"{where}: content must be text or a list of parts")
    parts = [_safe_part(f"{where}.content[{i}]", part, pictures) for i, part in enumerate(content)]
    return {"role": message["role"], "content": parts}


def _safe_part(where: str, part: Any, pictures: list[int]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": _safe_text(where, part["text"])}
    if kind != "image_url":
        raise Refusal(400, f"{where}: a part is of type text or image_url")
    address = part.get("image_url")
    url = address.get("url") if isinstance(address, dict) else address
    if not isinstance(url, str) or not (found := DATA_URI.match(url)):
        raise Refusal(
            400,
            f"{where}: a picture must be sent inside the request, as data:image/png;base64,...; "
            "files and addresses are not opened",
        )
    pictures[0] += 1
    if pictures[0] > MAX_PICTURES:
        raise Refusal(400, f"{where}: more than {MAX_PICTURES} pictures in one request")
    return {"type": "image_url", "image_url": {"url": _written_anew(where, url[found.end() :])}}


def _safe_text(where: str, text: str) -> str:
    if SURROGATE.search(text):
        raise Refusal(400, f"{where}: half a character (a lone surrogate) is in the text; send it as valid Unicode")
    if IMAGE_MARKER in text:
        raise Refusal(400, f"{where}: {IMAGE_MARKER} in a text; send the picture as a part of type image_url")
    return text


def _written_anew(where: str, encoded: str) -> str:
    """Return a picture as a data URI of a plain RGB PNG, read with the same care as a training picture."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            Path(folder, "picture").write_bytes(base64.b64decode(encoded, validate=True))
            image = load_image(folder, "picture")
        except (ValueError, DataError) as error:  # what is not ASCII is no base64 either
            raise Refusal(400, f"{where}: {error}") from None
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


async def _read(headers: Mapping[str, str], receive: Receive) -> bytes:
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "send the request as application/json")
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the connection was closed")
        body += message.get("body", b"")
        if len(body) > MAX_REQUEST_BYTES:
            raise Refusal(413, f"a request may have at most {MAX_REQUEST_BYTES // 2**20} MiB")
        if not message.get("more_body"):
            return body


async def _reply(send: Send, status: int, content: Mapping[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def transformers_app(folder: Path) -> tuple[App, Room]:
    """Return transformers' server of one folder, the model loaded, and its room; its name there is the folder's.

    Raises:
        ConfigError: a package that serving needs is missing.
        ModelError: the folder's name would be read as something else.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ConfigError("serving needs more packages; install them: pip install 'dianjing[serve]'")
    if set(folder.name) & set("@:"):
        raise ModelError(f"{folder}: @ and : have a meaning in a served model's name; rename the folder")
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    # Answers name the model as it was loaded: by the folder's name, not by a path of this machine.
    os.chdir(folder.parent)
    models: Any = ModelManager(force_model=folder.name)
    model, processor = models.load_model_and_processor(models.process_model_name(folder.name))
    generate = model.generate  # transformers gives it the processor, which cannot find the texts that stop an answer
    model.generate = lambda **given: generate(**given | {"tokenizer": processor.tokenizer})
    model.generation_config.do_sample = True  # a request's temperature counts; 0, the guard's default, is greedy
    state = GenerationState()
    app = build_server(
        models,
        ChatCompletionHandler(models, state),
        completion_handler=CompletionHandler(models, state),
        response_handler=ResponseHandler(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
    )
    side = ImageProcessor.from_folder(folder).size
    return app, Room(
        positions=model.config.get_text_config().max_position_embeddings,
        picture=picture_tokens(model.config, (side, side), kind_of(model.model.multi_modal_projector))(),
        processor=processor,
    )


def open_port(port: int) -> socket.socket:
    """Return a socket that listens on this machine only; port 0 = any free one.

    Raises:
        ConfigError: the port cannot be had.
    """
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port}: {error}; choose another, or 0 for any free one") from None


def run_server(app: App, listening: socket.socket, ending: Callable[[], object] = lambda: None) -> None:
    """Serve until Ctrl-C; `ending` is called when it comes, before the answers under way are waited for."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            ending()
            super().handle_exit(sig, frame)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    with suppress(KeyboardInterrupt):  # the server ends in peace first, then raises it again
        server.run(sockets=[listening])


def vllm_command(folder: Path, port: int) -> list[str]:
    """Return the command that serves a folder with vLLM: on this machine only, pictures only inside requests.

    vLLM takes the key from the environment (VLLM_API_KEY).
    """
    return [
        *("vllm", "serve", str(folder), "--host", HOST, "--port", str(port)),
        *("--served-model-name", folder.name, "--allowed-media-domains", "none.invalid"),
    ]


def example(port: int, model: str, key: bool) -> str:
    """Return a command that shows photo.jpg to the server."""
    question = '{"type": "text", "text": "What is in the picture?"}'
    picture = '{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,%s"}}'
    content = f"[{picture}, {question}]"
    body = f'{{"model": {json.dumps(model)}, "messages": [{{"role": "user", "content": {content}}}]}}'
    body = body.replace("%", "%%").replace("%%s", "%s")
    token = ' -H "Authorization: Bearer $DIANJING_SERVE_KEY"' if key else ""
    return (
        f"printf '{body}' \"$(base64 < photo.jpg | tr -d '\\n')\" |\n"
        f"  curl -s http://{HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json'{token} -d @-"
    )
