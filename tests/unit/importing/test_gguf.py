"""A GGUF file that is cut, or says of itself what cannot be, gets one sentence and leaves nothing behind."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="needs the extra gguf: pip install 'dianjing[gguf]'")

from dianjing.cli.main import main
from dianjing.errors import ConfigError, ModelError
from dianjing.formats.gguf import read_header
from dianjing.importing.gguf import import_gguf
from dianjing.model.folders import resolve
from tests.gguf_files import write_gguf_llm


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf_llm(tmp_path_factory.mktemp("gguf") / "model.gguf", kind="Q8_0").read_bytes()


def refusal(path: Path) -> str:
    out = path.parent / "out"
    with pytest.raises(ModelError) as caught:
        import_gguf(path, out)
    assert sorted(other.name for other in path.parent.iterdir()) == [path.name]
    assert len(str(caught.value)) < 700
    return str(caught.value)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file(keys: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 0), version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + keys + tensors + b"\0" * 256


LLAMA = text("general.architecture") + struct.pack("<I", 8) + text("llama")
BROKEN = {
    "empty": b"",
    "no GGUF": b"PK\x03\x04" + b"\0" * 99,
    "version": file(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "keys": file(counts=(0, 2**63)),
    "tensors": file(counts=(2**40, 0)),
    "no architecture": file(),
    "architecture": file(text("general.architecture") + struct.pack("<I", 8) + text("../x"), counts=(0, 1)),
    "key twice": file(LLAMA * 2, counts=(0, 2)),
    "long text": file(struct.pack("<Q", 2**62), counts=(0, 1)),
    "text of no UTF-8": file(struct.pack("<Q", 2) + b"\xff\xff", counts=(0, 1)),
    "unknown type": file(text("a") + struct.pack("<I", 99), counts=(0, 1)),
    "long list": file(text("a") + struct.pack("<IIQ", 9, 0, 2**62), counts=(0, 1)),
    "list past the end": file(text("a") + struct.pack("<IIQ", 9, 10, 2**20), counts=(0, 1)),
    "list of lists": file(text("a") + struct.pack("<IIQ", 9, 9, 2), counts=(0, 1)),
    "alignment": file(LLAMA + text("general.alignment") + struct.pack("<II", 4, 0), counts=(0, 2)),
    "dimensions": file(LLAMA, text("a") + struct.pack("<I", 2**31), counts=(1, 1)),
    "no size": file(LLAMA, text("a") + struct.pack("<IQIQ", 1, 0, 0, 0), counts=(1, 1)),
    "tensor type": file(LLAMA, text("a") + struct.pack("<IQIQ", 1, 8, 77, 0), counts=(1, 1)),
    "half a block": file(LLAMA, text("a") + struct.pack("<IQIQ", 1, 33, 8, 0), counts=(1, 1)),
    "huge": file(LLAMA, text("a") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0), counts=(1, 1)),
    "outside": file(LLAMA, text("a") + struct.pack("<IQIQ", 1, 8, 0, 2**62), counts=(1, 1)),
    "one over the other": file(
        LLAMA, b"".join(text(n) + struct.pack("<IQIQ", 1, 48, 0, 0) for n in "ab"), counts=(2, 1)
    ),
    "tensor twice": file(LLAMA, (text("a") + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2, counts=(2, 1)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_header_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(BROKEN[name])
    assert "not a sound GGUF file" in refusal(path)


def test_a_file_that_is_cut_is_refused_wherever_it_ends(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for size in (3, 4, 8, 20, 24, 60, 500, 3000, 5000, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="not a sound GGUF file"):
            read_header(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"llama.block_count": 2**31}, "num_hidden_layers is 2147483648"),
        ({"llama.block_count": 400}, "its keys describe"),
        ({"llama.embedding_length": 2**31 - 256}, "its keys describe"),
        ({"llama.attention.head_count": 0}, "transformers cannot read it: ZeroDivisionError"),
        ({"llama.rope.freq_base": float("nan")}, "rope_theta is nan"),
        ({"llama.block_count": 1}, "its keys describe"),
        ({"general.architecture": "unheard"}, "transformers cannot read it"),
        ({"tokenizer.ggml.model": "unheard"}, "transformers cannot read it"),
    ],
)
def test_keys_that_do_not_fit_the_tensors_are_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    architecture = str(change.pop("general.architecture", "llama"))
    said = refusal(write_gguf_llm(tmp_path / "model.gguf", architecture, **change))  # type: ignore[arg-type]
    assert words in said


def test_a_chat_template_is_not_rendered(tmp_path: Path) -> None:
    evil = (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "ran") + "') }}{% for x in range(10**9) %}"
    )
    path = write_gguf_llm(tmp_path / "model.gguf", **{"tokenizer.chat_template": evil + "{% endfor %}"})
    import_gguf(path, tmp_path / "llm")
    assert not (tmp_path / "ran").exists()


def test_rotary_factors_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    import numpy as np

    path = write_gguf_llm(tmp_path / "model.gguf", factors=np.linspace(1, 3, 32, dtype=np.float32))
    assert "rope_freqs.weight divides the rotary frequencies" in refusal(path)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    path = write_gguf_llm(tmp_path / "model.gguf")
    (norm,) = (t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.1.attn_norm.weight")
    norm.data[0] = np.nan
    norm.data.base.flush()
    assert "model.layers.1.input_layernorm.weight hold values that are not finite" in refusal(path)


def test_the_verb_and_the_way_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf_llm(tmp_path / "small.gguf", kind="Q8_0")
    with pytest.raises(ModelError, match=f"a GGUF file.*dianjing import {path} models/small"):
        resolve(str(path), "language_model")
    assert main(["import", str(path), str(tmp_path / "llm"), "--gpus", "2"]) == 2
    assert "leave out the flags" in capsys.readouterr().err
    assert main(["import", str(path), str(tmp_path / "llm")]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'llm'}\n"
    assert "the weights stay as the file rounded them" in shown.err
    assert resolve(str(tmp_path / "llm"), "language_model").is_dir()
    with pytest.raises(ConfigError, match="already there"):
        import_gguf(path, tmp_path / "llm")
    os.truncate(path, 5000)
    assert main(["import", str(path), str(tmp_path / "other")]) == 2
    assert "Traceback" not in capsys.readouterr().err
