"""An exported folder -> a server on this machine: transformers' own behind our guard, or vLLM's."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dianjing.errors import ConfigError, ModelError
from dianjing.model.vision import num_image_tokens

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from dianjing.serve.chat_request import ContextWindow

HOST = "127.0.0.1"


def transformers_app(folder: Path) -> tuple[ASGIApp, ContextWindow]:
    """Return transformers' server of one folder, the model loaded under the folder's name, with its context window.

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

    from dianjing.serve.chat_request import ContextWindow

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
    return app, ContextWindow(
        positions=model.config.get_text_config().max_position_embeddings,
        picture=num_image_tokens(model.config.vision_config, model.config.vision_feature_select_strategy),
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
