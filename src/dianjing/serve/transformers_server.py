"""An exported folder -> transformers' own OpenAI-compatible server, which is only safe behind a guard (api.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dianjing.errors import ConfigError, ModelError
from dianjing.extras import install
from dianjing.model.projector import kind_of, picture_tokens
from dianjing.pictures.image import ImageProcessor

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from dianjing.serve.chat_request import ContextWindow


def transformers_app(folder: Path) -> tuple[ASGIApp, ContextWindow]:
    """Return transformers' server of one folder, the model loaded under the folder's name, with its context window.

    Raises:
        ConfigError: a package that serving needs is missing.
        ModelError: the folder's name would be read as something else.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ConfigError(f"serving needs more packages: {install('serve')}")
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
    preparing, kind = ImageProcessor.from_folder(folder), kind_of(model.model.multi_modal_projector)
    return app, ContextWindow(
        positions=model.config.get_text_config().max_position_embeddings,
        picture=picture_tokens(model.config, (preparing.size, preparing.size), kind)(),
        processor=processor,
        rule=preparing.rule,
    )
