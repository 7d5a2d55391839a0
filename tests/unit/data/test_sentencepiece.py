"""tokenizer.model -> the ids of the tokenizer.json that was made of it elsewhere."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from transformers import PreTrainedTokenizerBase

from dianjing.data.encode import load_tokenizer
from dianjing.data.sentencepiece import BLANK, BPE, CONTROL, USER_DEFINED, read_sentencepiece
from dianjing.data.template import choose_template, text_ids
from dianjing.errors import ModelError
from tests.xtuner import XTUNER

SPM = XTUNER / "tokenizers" / "tiny_llama_spm"
INTERNLM2 = XTUNER / "internlm2_tokenizer"
NORMAL, UNKNOWN, BYTE = 1, 2, 6
CHAT = ("<|im_start|>", "<|im_end|>")


def varint(number: int) -> bytes:
    written = b""
    while number > 0x7F:
        written += bytes([number & 0x7F | 0x80])
        number >>= 7
    return written + bytes([number])


def field(number: int, value: bytes | int | float) -> bytes:
    """Return a protobuf field."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model_bytes(pieces: list[tuple[str, float, int]], *, dummy_prefix: bool, kind: int = BPE) -> bytes:
    """Return a tokenizer.model as sentencepiece writes it."""
    written = b"".join(
        field(1, field(1, piece.encode()) + field(2, score) + field(3, number)) for piece, score, number in pieces
    )
    trainer = field(3, kind) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2)
    normalizer = field(1, b"identity") + field(3, int(dummy_prefix)) + field(4, 0)
    return written + field(2, trainer) + field(3, normalizer)


def pieces_of(tokenizer_json: dict, renamed: dict[int, str]) -> list[tuple[str, float, int]]:
    """Return the pieces of a model whose fast form is given: sentencepiece scores a piece by its number."""
    vocabulary = sorted(tokenizer_json["model"]["vocab"], key=tokenizer_json["model"]["vocab"].__getitem__)
    kinds = [UNKNOWN, CONTROL, CONTROL]
    kinds += [BYTE if piece.startswith("<0x") else NORMAL for piece in vocabulary[3:]]
    for number in renamed:
        kinds[number] = USER_DEFINED
    return [
        (renamed.get(number, piece), 0.0 if kinds[number] != NORMAL else -float(number), kinds[number])
        for number, piece in enumerate(vocabulary)
    ]


def texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield what people write, and mixtures of pieces and of characters."""
    yield from ("", " ", "\n", "  two  blanks ", "\t\tx = 1;\r\n  y", "你好，世界！……——", "😀👩‍👩‍👧 é é", "\x01\x7f")
    yield from ("def f(x):\n    return x**2  # note\n", "▁▁ a ▁", "<s>not</s> text<unk>", f"a{CHAT[0]}b {CHAT[1]}\n c")
    yield " ".join(Path(__file__).read_text(encoding="utf-8").splitlines())
    rng = Random(0)
    pieces = [piece.replace(BLANK, " ") for piece in tokenizer.get_vocab()]
    for _ in range(300):
        yield "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        ranges = ((0x20, 0x7E), (0x4E00, 0x9FFF), (0x2000, 0x2FFF), (0x1F300, 0x1F6FF), (10, 10), (32, 32))
        yield "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 30)))


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InternLM2's tokenizer as its repositories ship it: tokenizer.model, six unused pieces renamed beside it."""
    folder = tmp_path_factory.mktemp("internlm2_model")
    config = json.loads((INTERNLM2 / "tokenizer_config.json").read_text())
    shipped = config | {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(shipped))
    fast = json.loads(gzip.decompress((INTERNLM2 / "tokenizer.json.gz").read_bytes()))
    renamed = {92538 + index: f"[UNUSED_TOKEN_{141 + index}]" for index in range(6)}
    (folder / "tokenizer.model").write_bytes(model_bytes(pieces_of(fast, renamed), dummy_prefix=False))
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('code of a model folder was run')")
    return folder


@pytest.fixture(scope="module")
def internlm2_fast(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("internlm2_fast")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((INTERNLM2 / "tokenizer.json.gz").read_bytes()))
    shutil.copy(INTERNLM2 / "tokenizer_config.json", folder)
    return load_tokenizer(folder)


def test_internlm2_has_the_ids_of_its_fast_tokenizer(internlm2: Path, internlm2_fast: PreTrainedTokenizerBase) -> None:
    tokenizer = load_tokenizer(internlm2)
    assert text_ids(tokenizer, "<|im_start|>user\n") == [92543, 1008, 364]
    assert text_ids(tokenizer, "<|im_end|>\n") == [92542, 364]
    assert len(tokenizer) == len(internlm2_fast) == 92544
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert choose_template(tokenizer) == "internlm2_chat"
    for text in texts(internlm2_fast):
        ids = text_ids(tokenizer, text)
        assert ids == text_ids(internlm2_fast, text), text
        assert tokenizer.decode(ids) == internlm2_fast.decode(ids), text


@pytest.mark.parametrize("legacy", [False, True])
def test_a_llama_has_the_ids_of_its_fast_tokenizer(tmp_path: Path, legacy: bool) -> None:
    fast = load_tokenizer(SPM)
    config = json.loads((SPM / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": legacy}))
    (tmp_path / "tokenizer.model").write_bytes(
        model_bytes(pieces_of(json.loads((SPM / "tokenizer.json").read_text()), {}), dummy_prefix=True)
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("word")["input_ids"][0] == tokenizer.bos_token_id
    for text in texts(fast):
        # The older way also puts a blank before a blank, and after a special token.
        differs = text.startswith((" ", BLANK)) or any(token in text for token in ("<s>", "</s>", "<unk>"))
        if not (legacy and differs):
            assert text_ids(tokenizer, text) == text_ids(fast, text), text
    if legacy:
        blank = text_ids(tokenizer, " ")
        assert len(blank) == 2 * len(text_ids(fast, " "))


def test_tokens_of_its_own_are_matched_first_and_new_ones_get_the_next_ids(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<table>", 0.0, USER_DEFINED)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [(BLANK, -1.0, NORMAL), ("a", -2.0, NORMAL), ("b", -3.0, NORMAL), ("ab", -0.5, NORMAL)]
    (tmp_path / "tokenizer.model").write_bytes(model_bytes(pieces, dummy_prefix=False))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": len(pieces)}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokenize("ab<table>a é<|end|>") == ["ab", "<table>", "a", BLANK, "<0xC3>", "<0xA9>", "<|end|>"]
    assert tokenizer.convert_tokens_to_ids("<|end|>") == len(pieces)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": 10_000}))
    with pytest.raises(ModelError, match=r"'<\|end\|>' has id 10000, but 264 is the next free"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_no_bpe_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    pieces = [("<unk>", 0.0, UNKNOWN), ("a", -1.0, NORMAL)]
    path.write_bytes(model_bytes(pieces, dummy_prefix=True, kind=1))
    with pytest.raises(ModelError, match="only sentencepiece models of the kind BPE"):
        read_sentencepiece(path)
    whole = model_bytes(pieces, dummy_prefix=True)
    for damaged in (b"", b"text", whole[:-3], whole[:7], b"\xff" * 40, b"\x0a\x03\x0a\x01\xff"):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="no sentencepiece model"):
            read_sentencepiece(path)
