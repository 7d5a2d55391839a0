"""Prompts and pictures -> logits of llama.cpp itself, through llama-cpp-python, in a process of its own.

llama.cpp ends the process it runs in where it finds a fault, hence the other process. Run as a program, this file
is that process: `python -m dianjing.export.gguf.llama answer FOLDER WORK` or `... quantize FROM TO TYPE`.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dianjing.errors import ExportError

THREADS = max(1, (os.cpu_count() or 1) // 2)
IMAGE = -1
"""Stands in the prompt's ids for one feature of a picture."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt with a MEDIA marker for each picture, and the answer that is put to the model token by token."""

    prompt: str
    pictures: Sequence[np.ndarray]
    """Each (height, width, 3), 0 to 255."""
    answer: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Result of a request."""

    prompt_ids: list[int]
    logits: np.ndarray
    """(answer, vocab): before each token of the answer."""
    features: np.ndarray
    """(features, hidden) of all pictures."""


def require_llama() -> None:
    """Refuse to go on without llama-cpp-python.

    Raises:
        ExportError: says how to install it.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ExportError(
            "this needs llama.cpp; install it (it is compiled, which takes minutes): pip install llama-cpp-python"
        )


def ask_llama(text_file: Path, vision_file: Path, requests: Sequence[Request]) -> list[Reply]:
    """Return what llama.cpp makes of each request.

    Raises:
        ExportError: llama-cpp-python is missing, or llama.cpp cannot run the files.
    """
    require_llama()
    with tempfile.TemporaryDirectory() as work:
        for number, request in enumerate(requests):
            arrays: dict[str, Any] = {f"picture{i}": picture for i, picture in enumerate(request.pictures)}
            np.savez(Path(work, f"request{number}.npz"), answer=np.array(request.answer, np.int32), **arrays)
        Path(work, "prompts.json").write_text(json.dumps([request.prompt for request in requests]), encoding="utf-8")
        _run("answer", str(text_file), str(vision_file), work)
        replies = []
        for number in range(len(requests)):
            with np.load(Path(work, f"reply{number}.npz")) as file:
                ids = file["prompt_ids"].tolist()
                replies.append(Reply(prompt_ids=ids, logits=file["logits"], features=file["features"]))
        return replies


def quantize_llama(source: Path, target: Path, kind: str) -> None:
    """Write a text file in one of llama.cpp's own mixtures of types.

    Raises:
        ExportError: llama-cpp-python is missing, or llama.cpp cannot do it.
    """
    require_llama()
    _run("quantize", str(source), str(target), kind)


def _run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dianjing.export.gguf.llama", *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode:
        raise ExportError(f"llama.cpp cannot use the files (exit code {done.returncode}):\n{done.stderr[-2000:]}")


class _Llama:
    """The two files, loaded, with a key-value cache and all arithmetic in fp32 as far as llama.cpp has it."""

    def __init__(self, text_file: str, vision_file: str) -> None:
        self.llama: Any = importlib.import_module("llama_cpp")
        self.mtmd: Any = importlib.import_module("llama_cpp.mtmd_cpp")
        llama_cpp, mtmd_cpp = self.llama, self.mtmd
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = False  # repacked Q8_0 crashes on some processors
        self.model = _loaded(llama_cpp.llama_model_load_from_file(text_file.encode(), settings), text_file)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = min(llama_cpp.llama_model_n_ctx_train(self.model), 8192)
        context.n_batch = context.n_ubatch = min(context.n_ctx, 2048)
        context.n_threads = context.n_threads_batch = THREADS
        context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32
        self.n_batch = context.n_batch
        self.context = _loaded(llama_cpp.llama_init_from_model(self.model, context), text_file)
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu, vision.warmup, vision.n_threads = False, False, THREADS
        vision.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.eyes = _loaded(mtmd_cpp.mtmd_init_from_file(vision_file.encode(), self.model, vision), vision_file)

    def answer(self, prompt: str, pictures: Sequence[np.ndarray], answer: Sequence[int]) -> dict[str, Any]:
        """Return prompt ids, logits before each token of the answer, and the features of the pictures."""
        chunks = self._chunks(prompt, pictures)
        ids, features = self._read(chunks)
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        past = self.llama.llama_pos(0)
        done = self.mtmd.mtmd_helper_eval_chunks(
            self.eyes, self.context, chunks, 0, 0, self.n_batch, True, ctypes.byref(past)
        )
        if done:
            raise RuntimeError(f"llama.cpp could not evaluate a prompt (code {done})")
        logits = [self._logits()]
        for token in answer[:-1]:
            one = (self.llama.llama_token * 1)(token)
            if self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(one, 1)):
                raise RuntimeError("llama.cpp could not evaluate a token")
            logits.append(self._logits())
        self.mtmd.mtmd_input_chunks_free(chunks)
        return {"prompt_ids": np.array(ids), "logits": np.stack(logits), "features": features}

    def _chunks(self, prompt: str, pictures: Sequence[np.ndarray]) -> Any:
        bitmaps = []
        for picture in pictures:
            pixels = np.ascontiguousarray(picture)
            data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            bitmaps.append(self.mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], data))
        text = self.mtmd.mtmd_input_text()
        encoded = prompt.encode()
        text.text, text.text_len, text.add_special, text.parse_special = encoded, len(encoded), True, True
        chunks = self.mtmd.mtmd_input_chunks_init()
        array = (self.mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        failed = self.mtmd.mtmd_tokenize(self.eyes, chunks, ctypes.byref(text), array, len(bitmaps))
        for bitmap in bitmaps:
            self.mtmd.mtmd_bitmap_free(bitmap)
        if failed:
            raise RuntimeError(f"llama.cpp could not read a prompt (code {failed})")
        return chunks

    def _read(self, chunks: Any) -> tuple[list[int], np.ndarray]:
        """Return the ids of all chunks, IMAGE for each feature, and the features."""
        ids: list[int] = []
        width = self.llama.llama_model_n_embd_inp(self.model)
        features = [np.zeros((0, width), np.float32)]
        for number in range(self.mtmd.mtmd_input_chunks_size(chunks)):
            chunk = self.mtmd.mtmd_input_chunks_get(chunks, number)
            count = self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            if self.mtmd.mtmd_input_chunk_get_type(chunk) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                size = ctypes.c_size_t(0)
                ids += self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(size))[: size.value]
            else:
                ids += [IMAGE] * count
                if self.mtmd.mtmd_encode_chunk(self.eyes, chunk):
                    raise RuntimeError("llama.cpp could not encode a picture")
                rows = self.mtmd.mtmd_get_output_embd(self.eyes)
                features.append(np.ctypeslib.as_array(rows, (count, width)).copy())
        return ids, np.concatenate(features)

    def _logits(self) -> np.ndarray:
        rows = self.llama.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(rows, (self.llama.llama_vocab_n_tokens(self.vocabulary),)).copy()


def _loaded(pointer: Any, file: str) -> Any:
    if not pointer:
        raise RuntimeError(f"llama.cpp cannot load {file}")
    return pointer


def _answer(text_file: str, vision_file: str, work: str) -> None:
    llama = _Llama(text_file, vision_file)
    prompts = json.loads(Path(work, "prompts.json").read_text(encoding="utf-8"))
    for number, prompt in enumerate(prompts):
        with np.load(Path(work, f"request{number}.npz")) as file:
            pictures = [file[f"picture{i}"] for i in range(len(file.files) - 1)]
            reply = llama.answer(prompt, pictures, file["answer"].tolist())
        np.savez(Path(work, f"reply{number}.npz"), **reply)


def _quantize(source: str, target: str, kind: str) -> None:
    llama_cpp: Any = importlib.import_module("llama_cpp")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    settings.nthread = THREADS
    if failed := llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantise {source} (code {failed})")


if __name__ == "__main__":
    {"answer": _answer, "quantize": _quantize}[sys.argv[1]](*sys.argv[2:])
    # Freeing what llama.cpp holds takes time and has crashed; all is written.
    sys.stdout.flush()
    os._exit(0)
