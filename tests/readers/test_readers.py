"""Other versions of transformers read an export as the run answers.

They live in environments of their own, whose interpreters DIANJING_READER_PYTHON names (several as in PATH):

    python3 -m venv reader && reader/bin/pip install torch==2.13.0 transformers==4.57.6 pillow
    DIANJING_READER_PYTHON=reader/bin/python python -m pytest tests/readers
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from dianjing.export.export import export
from dianjing.export.receipt import drawn_cases
from dianjing.infer.answering import answering
from dianjing.infer.generate import Conversation, LoadedModel, generate_ids, pack, prepare
from dianjing.model.forward import language_parts
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model
from tests.readers.read_export import ANSWER_TOKENS
from tests.recipe_models import write_family, write_siglip
from tests.tiny import write_llm

READERS = [python for python in os.environ.get("DIANJING_READER_PYTHON", "").split(os.pathsep) if python]
RUNS: dict[str, Callable[[Path], Path]] = {
    "lora": write_llm,
    "tied": partial(write_llm, tie_word_embeddings=True),
    "rope": partial(write_llm, rope_theta=1e6, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "crop": write_llm,
    "siglip": write_llm,
    "siglip crop": write_llm,
    **{kind: partial(write_family, kind=kind) for kind in ("internlm2", "qwen2", "qwen3", "mistral", "phi3")},
    "gemma3_text": partial(write_family, kind="gemma3_text", sliding_window=512),
}
"""Name -> what writes the LLM; not Gemma 1, before which transformers 4.57 scales picture features (`hf.SCALED`)."""

pytestmark = pytest.mark.skipif(
    not READERS, reason="DIANJING_READER_PYTHON is not set: NOT checked that transformers 4.57 reads an export"
)


@pytest.fixture(params=list(RUNS))
def loaded(request: pytest.FixtureRequest, make_recipe: MakeRecipe, tmp_path: Path) -> LoadedModel:
    tower = {"folder": str(write_siglip(tmp_path / "tower"))} if "siglip" in request.param else {}
    sections = {
        "language_model": {"folder": str(RUNS[request.param](tmp_path / "llm")), "tuning": "lora"},
        "vision_tower": {"tuning": "lora"} | tower,
        "data": {"aspect": "crop" if "crop" in request.param else "pad"},
    }
    return loaded_model(make_recipe("finetune", **sections))


def last_logits(loaded: LoadedModel, conversation: Conversation) -> torch.Tensor:
    """Return the run's logits where the answer begins."""
    decoder, head = language_parts(loaded.model)
    with answering(loaded.model):
        embeddings = pack(loaded, [prepare(loaded, conversation)]).embeddings[None]
        return head(decoder(inputs_embeds=embeddings).last_hidden_state[0, -1])


@pytest.mark.parametrize("python", READERS)
def test_another_version_reads_the_export(loaded: LoadedModel, tmp_path: Path, python: str) -> None:
    export(loaded, tmp_path / "out")
    cases = []
    for number, conversation in enumerate(drawn_cases()):
        paths = [tmp_path / f"{number}-{i}.png" for i in range(len(conversation.images))]
        for path, image in zip(paths, conversation.images, strict=True):
            image.save(path)
        text = {"type": "text", "text": conversation.question.replace("<image>\n", "")}
        message = {"role": "user", "content": [*[{"type": "image"}] * len(paths), text]}
        cases.append({"messages": [message], "images": [str(path) for path in paths]})
    (tmp_path / "cases.json").write_text(json.dumps(cases))

    script = Path(__file__).with_name("read_export.py")
    command = [python, str(script), str(tmp_path / "out"), str(tmp_path / "cases.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    version, *read = map(json.loads, done.stdout.splitlines())
    assert "newly initialized" not in done.stderr

    assert loaded.image_processor is not None
    answers = generate_ids(loaded, drawn_cases(), ANSWER_TOKENS)
    for conversation, answer, theirs in zip(drawn_cases(), answers, read, strict=True):
        pixels = [loaded.image_processor(image).flatten() for image in conversation.images]
        assert theirs["input_ids"] == prepare(loaded, conversation).input_ids, version
        assert torch.equal(torch.tensor(theirs["pixel_values"]), torch.cat(pixels) if pixels else torch.empty(0))
        logits = torch.tensor(theirs["logits"])
        assert int(logits.argmax()) == answer[0]
        assert theirs["answer"] == answer, version
        gap = (last_logits(loaded, conversation) - logits[: loaded.model.config.text_config.vocab_size]).abs().max()
        assert gap < 1e-4
