"""A server on this machine: its port, its life until Ctrl-C, the command for vLLM's, an example of a request."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dianjing.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

HOST = "127.0.0.1"


def open_port(port: int) -> socket.socket:
    """Return a socket that listens on this machine only; port 0 = any free one.

    Raises:
        ConfigError: the port cannot be had.
    """
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port}: {error}; choose another, or 0 for any free one") from None


def run_server(app: ASGIApp, listening: socket.socket, ending: Callable[[], object] = lambda: None) -> None:
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
