"""LoadedModel -> text.gguf and mmproj.gguf for llama.cpp, with a Modelfile for Ollama."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import LlavaForConditionalGeneration

from dianjing.errors import ExportError
from dianjing.export.export import Options
from dianjing.export.gguf_chat import gguf_chat_template, modelfile
from dianjing.export.gguf_file import BLOCK_TYPES, K_TYPES, TYPES, Type, gguf, stored_type, write_gguf
from dianjing.export.gguf_llama import quantize_llama, require_llama
from dianjing.export.gguf_proof import prove_pair
from dianjing.export.gguf_read import TEXT_FILE, VISION_FILE
from dianjing.export.gguf_text import EMBEDDING, text_keys, text_tensors
from dianjing.export.gguf_tokenizer import tokenizer_keys
from dianjing.export.gguf_vision import check_vision, vision_keys, vision_tensors
from dianjing.export.merge import merged_state
from dianjing.export.receipt import Proof
from dianjing.infer.generate import Conversation, LoadedModel, stop_sequences

LOADING = f"""\
llama.cpp: `llama-server -m {TEXT_FILE} --mmproj {VISION_FILE} --jinja --no-cache-prompt`

Ollama: `ollama create my-llava -f Modelfile`, then `ollama run my-llava`
"""


def save(loaded: LoadedModel, folder: Path, options: Options) -> None:
    """Write both files and the Modelfile.

    Raises:
        ExportError: llama.cpp has no place for a part of the model, or would compute it otherwise.
    """
    model, config = loaded.model, cast(Any, loaded.model.config)
    if not isinstance(model, LlavaForConditionalGeneration) or loaded.image_processor is None:
        raise ExportError(f"{loaded.name} is a text-only model; train it first, then export the run")
    if options.dtype != "fp32":
        raise ExportError("GGUF: the type of the weights is chosen with --quantize, not with --dtype")
    if options.quantize not in (*TYPES, *K_TYPES):
        raise ExportError(f'GGUF: no type "{options.quantize}"; there are {", ".join((*TYPES, *K_TYPES))}')
    if options.verify or options.quantize in K_TYPES:
        require_llama()
    check_vision(config, loaded.image_processor)
    name = {"general.name": Path(loaded.name).name}
    state = merged_state(model)
    template, bos, eos, ends = _chat(loaded)
    keys = {
        **text_keys(config.text_config),
        **name,
        **tokenizer_keys(loaded.tokenizer, state[EMBEDDING].shape[0], ends),
        "tokenizer.chat_template": gguf_chat_template(template, bos, eos),
    }
    _write_text(folder / TEXT_FILE, keys, text_tensors(state, config.text_config), options.quantize)
    kind = "f32" if options.quantize == "f32" else "f16"
    write_gguf(
        folder / VISION_FILE,
        {**vision_keys(config, loaded.image_processor), **name, "general.file_type": _file_type(kind)},
        vision_tensors(state, config),
        lambda name, tensor: Type.F32 if "position_embd" in name else stored_type(tensor, TYPES[kind]),
    )
    stops = sorted({*template.stop_words, *filter(None, [template.suffix, eos])})
    if text := modelfile(template, bos, eos, [TEXT_FILE, VISION_FILE], stops):
        (folder / "Modelfile").write_text(text, encoding="utf-8")


def prove(loaded: LoadedModel, folder: Path, conversations: Sequence[Conversation], options: Options) -> Proof:
    """Return how the files, read back by transformers and with `verify` by llama.cpp, answer beside the run.

    Raises:
        ExportError: a tensor is not the run's, or llama.cpp computes other features than the tower.
    """
    return prove_pair(loaded, folder, conversations, options.quantize, options.verify)


def _chat(loaded: LoadedModel) -> tuple[Any, str, str, list[int]]:
    """Return the template, the texts of BOS and EOS, and the tokens that end a turn."""
    tokenizer = loaded.tokenizer
    ends = [stop[0] for stop in stop_sequences(loaded) if len(stop) == 1]
    return loaded.encoder.template, str(tokenizer.bos_token or ""), str(tokenizer.eos_token or ""), ends


def _write_text(path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: str) -> None:
    """Write the LLM; one of llama.cpp's mixtures is made by it from the file in F16."""
    if kind in K_TYPES:
        whole = path.with_suffix(".f16")
        _write_text(whole, keys, tensors, "f16")
        quantize_llama(whole, path, kind)
        whole.unlink()
        return
    matrices = TYPES[kind]
    # Fewer than eight bits are too few for the tables that every token goes through.
    tables: dict[str, Type] = {
        name: Type.Q8_0 for name in ("token_embd.weight", "output.weight") if kind in BLOCK_TYPES
    }
    write_gguf(
        path,
        {**keys, "general.file_type": _file_type(kind)},
        tensors,
        lambda name, tensor: stored_type(tensor, tables.get(name, matrices)),
    )


def _file_type(kind: str) -> int:
    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return int(gguf.LlamaFileType[name])
