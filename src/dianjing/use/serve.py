"""An exported folder -> transformers' own OpenAI-compatible server on this machine, with a guard in front.

`transformers serve` reads any local path that stands where a picture's address should, follows HTTP redirects, and
loads whatever model a request names. The guard lets through only chat requests for the one model, with the pictures
inside the request; each picture is decoded and written anew, prepared as in training.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import json
import os
import re
import socket
import tempfile
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dianjing.constants import IMAGE_MARKER
from dianjing.data.picture import load_image
from dianjing.errors import ConfigError, DataError, ModelError

HOST = "127.0.0.1"
MAX_REQUEST_BYTES = 32 * 1024 * 1024
MAX_PICTURES = 16
FIELDS = (
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    *("seed", "stop", "frequency_penalty", "user"),
)
"""What a request may hold; transformers ignores the others, or lets them replace the prompt."""
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
class Guard:
    """Stands before an application and lets only safe requests for one model through."""

    app: App
    model: str
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
                body = safe_request(await _read(headers, receive), self.model)
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


def safe_request(body: bytes, model: str) -> bytes:
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
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of messages")
    pictures = [0]
    safe = [_safe_message(number, message, pictures) for number, message in enumerate(messages)]
    if safe[-1]["role"] != "user":
        raise Refusal(400, "the last message must be the user's")
    # Without a temperature the answer is the likeliest one, as in `dianjing chat`.
    return json.dumps({"temperature": 0, **request, "model": model, "messages": safe}).encode()


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
    if IMAGE_MARKER in text:
        raise Refusal(400, f"{where}: {IMAGE_MARKER} in a text; send the picture as a part of type image_url")
    return text


def _written_anew(where: str, encoded: str) -> str:
    """Return a picture as a data URI of a plain RGB PNG, read with the same care as a training picture."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            Path(folder, "picture").write_bytes(base64.b64decode(encoded, validate=True))
            image = load_image(folder, "picture")
        except (binascii.Error, DataError) as error:
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


def transformers_app(folder: Path) -> App:
    """Return transformers' server of one folder, the model loaded; its name there is the folder's.

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
    models = ModelManager(force_model=folder.name)
    model, _ = models.load_model_and_processor(models.process_model_name(folder.name))
    model.generation_config.do_sample = True  # a request's temperature counts; 0, the guard's default, is greedy
    state = GenerationState()
    return build_server(
        models,
        ChatCompletionHandler(models, state),
        completion_handler=CompletionHandler(models, state),
        response_handler=ResponseHandler(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
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
