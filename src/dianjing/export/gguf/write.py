"""Run -> the two files for llama.cpp and Ollama's Modelfile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dianjing.errors import ExportError
from dianjing.export.formats import Options
from dianjing.export.gguf.chat import gguf_chat_template, modelfile
from dianjing.export.gguf.file import BLOCK_TYPES, K_TYPES, TYPES, Type, gguf, stored_type, write_gguf
from dianjing.export.gguf.llama import quantize_llama, require_llama
from dianjing.export.gguf.text import EMBEDDING, TEXT_FILE, text_keys, text_tensors
from dianjing.export.gguf.tokenizer import tokenizer_keys
from dianjing.export.gguf.vision import VISION_FILE, check_vision, vision_keys, vision_tensors
from dianjing.export.merge import merged_state
from dianjing.infer.generate import LoadedModel, stop_sequences


def write_pair(loaded: LoadedModel, folder: Path, options: Options) -> None:
    """Write both files and the Modelfile.

    Raises:
        ExportError: llama.cpp has no place for a part of the model, or would compute it otherwise.
    """
    config: Any = loaded.model.config
    if options.quantize not in (*TYPES, *K_TYPES):
        raise ExportError(f'GGUF: no type "{options.quantize}"; there are {", ".join((*TYPES, *K_TYPES))}')
    if options.verify or options.quantize in K_TYPES:
        require_llama()
    check_vision(config, loaded.processor)
    name = {"general.name": Path(loaded.name).name}
    state = merged_state(loaded.model)
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
        {**vision_keys(config, loaded.processor), **name, "general.file_type": _file_type(kind)},
        vision_tensors(state, config),
        lambda name, tensor: Type.F32 if "position_embd" in name else stored_type(tensor, TYPES[kind]),
    )
    stops = sorted({*template.stop_words, *filter(None, [template.suffix, eos])})
    if text := modelfile(template, bos, eos, [TEXT_FILE, VISION_FILE], stops):
        (folder / "Modelfile").write_text(text, encoding="utf-8")


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
