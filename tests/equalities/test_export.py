"""An export answers as its run does, read by others: the same tokens, pixels, logits and greedy answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from dianjing.errors import ExportError
from dianjing.export import hf
from dianjing.export.export import export
from dianjing.export.formats import Options
from dianjing.export.layout import EMBEDDING, HEAD
from dianjing.export.receipt import ANSWER_TOKENS, drawn_cases
from dianjing.infer.generate import Conversation, LoadedModel, generate_ids
from dianjing.infer.load import load_for_use
from tests.conftest import MakeRecipe
from tests.loaded_models import conversations, loaded_model, loaded_text_model, picture
from tests.tiny import write_llm

save = hf.save

LORA = {"language_model": {"tuning": "lora"}, "vision_tower": {"tuning": "lora"}}
RUNS = {
    "pretrain": ("pretrain", {}),
    "lora": ("finetune", LORA),
    "lora on the head": ("finetune", {"language_model": {"tuning": "lora", "lora_head": True}}),
    "full": ("finetune", {"language_model": {"tuning": "full"}, "vision_tower": {"tuning": "full"}}),
    "crop": ("finetune", {**LORA, "data": {"aspect": "crop"}}),
}


@pytest.fixture
def loaded(make_recipe: MakeRecipe) -> LoadedModel:
    return loaded_model(make_recipe("finetune", **LORA))


@pytest.mark.parametrize("run", list(RUNS))
def test_export_equals_run(make_recipe: MakeRecipe, tmp_path: Path, run: str) -> None:
    stage, sections = RUNS[run]
    loaded = loaded_model(make_recipe(stage, **sections))
    alone = [one for one in conversations() if not one.history]
    cases = export(loaded, tmp_path / "out", alone).cases
    assert len(cases) == len(alone) + len(drawn_cases())
    for case in cases:
        assert case.equal
        assert case.pixel_difference == 0
        assert case.logit_difference < 1e-4
    receipt = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert receipt["max_logit_difference"] == max(case.logit_difference for case in cases)
    assert receipt["conversations"] == receipt["equal_answers"] == len(cases)
    assert [60, 20] in [size for case in receipt["cases"] for size in case["image_sizes"]]


def test_turns_that_end_with_eos(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Vicuna's template, for a tokenizer without chat marks: BOS begins each turn."""
    folder = write_llm(tmp_path / "llm")
    for file in folder.glob("*token*.json"):
        file.write_text(file.read_text().replace("|im_start|", "mark-1").replace("|im_end|", "mark-2"))
    language_model = {"folder": str(folder), "template": "vicuna", "tuning": "lora"}
    proof = export(
        loaded_model(make_recipe("finetune", language_model=language_model)), tmp_path / "out", conversations()
    )
    assert all(case.equal for case in proof.cases)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_tied_weights_stay_tied_unless_the_head_learned(
    make_recipe: MakeRecipe, tmp_path: Path, tied: bool, head: bool
) -> None:
    folder = write_llm(tmp_path / "llm", tie_word_embeddings=tied, rope_theta=5e5)
    loaded = loaded_model(
        make_recipe("finetune", language_model={"folder": str(folder), "tuning": "lora", "lora_head": head})
    )
    assert all(case.equal for case in export(loaded, tmp_path / "out").cases)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert (HEAD in weights) == (head or not tied)
    assert weights[EMBEDDING].shape[0] % 64 == 0


def test_a_stranger_reads_it(loaded: LoadedModel, tmp_path: Path) -> None:
    """With nothing of ours but the folder: a wide picture, two pictures, several turns, as a batch."""
    export(loaded, tmp_path / "out")
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path / "out", local_files_only=True)
    wide, tall = picture(60, 20, 1), picture(18, 50, 2)
    image, question = {"type": "image"}, {"type": "text", "text": "What is it?"}
    talks = [
        [{"role": "user", "content": [image, question]}],
        [
            {"role": "user", "content": [image, image, question]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
            {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        ],
    ]
    ours = [
        Conversation((), "<image>\nWhat is it?", [wide]),
        Conversation([("<image>\n<image>\nWhat is it?", "Red.")], "Sure?", [tall, wide]),
    ]
    text = processor.apply_chat_template(talks, add_generation_prompt=True)
    inputs = processor(text=text, images=[wide, tall, wide], padding=True, return_tensors="pt")
    with torch.inference_mode():
        written = model.eval().generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    answers = written[:, inputs["input_ids"].shape[1] :].tolist()
    for answer, ids in zip(answers, generate_ids(loaded, ours, ANSWER_TOKENS), strict=True):
        assert answer[: len(ids)] == ids


def test_an_export_can_be_asked_and_exported_again(loaded: LoadedModel, tmp_path: Path) -> None:
    export(loaded, tmp_path / "out")
    again = load_for_use(str(tmp_path / "out"), "cpu")
    assert again.encoder.template == loaded.encoder.template
    assert again.image_processor == loaded.image_processor
    assert generate_ids(again, conversations(), 12) == generate_ids(loaded, conversations(), 12)
    export(again, tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def break_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["multi_modal_projector.linear_1.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_row(folder: Path) -> None:
    """Of a token that no conversation has."""
    weights = load_file(folder / "model.safetensors")
    weights[EMBEDDING][317, 3] += 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose_prefix(folder: Path) -> None:
    """What transformers 5 itself would write, as 4.x reads it: a tower of random weights."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "encoder.layers.0" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return edit


CORRUPTIONS = {
    "a weight": break_weight,
    "a row nobody reads": break_row,
    "a layer is lost": lose_prefix,
    "pictures are cropped": edit_json("preprocessor_config.json", do_pad=False),
    "another mean": edit_json("preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
    "another layer of the tower": edit_json("config.json", vision_feature_layer=-1),
    "another chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"),
    "it never stops": edit_json("generation_config.json", eos_token_id=[9]),
}


@pytest.mark.parametrize("corruption", list(CORRUPTIONS))
def test_a_corrupted_export_is_not_kept(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corruption: str
) -> None:
    def save_and_corrupt(loaded: LoadedModel, folder: Path, options: Options) -> None:
        save(loaded, folder, options)
        CORRUPTIONS[corruption](folder)

    if corruption == "it never stops":
        stop = generate_ids(loaded, drawn_cases()[:1], 4)[0][2]
        monkeypatch.setattr("dianjing.infer.generate.stop_sequences", lambda loaded: [(stop,)])
        monkeypatch.setattr("dianjing.export.hf.stop_sequences", lambda loaded: [(stop,)])
    monkeypatch.setattr(hf, "save", save_and_corrupt)
    with pytest.raises(ExportError, match=r"not kept"):
        export(loaded, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_export_that_cannot_be_read_is_not_kept(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_and_forget(loaded: LoadedModel, folder: Path, options: Options) -> None:
        save(loaded, folder, options)
        (folder / "config.json").unlink()

    monkeypatch.setattr(hf, "save", save_and_forget)
    with pytest.raises(ExportError, match="cannot be read back"):
        export(loaded, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_overwritten(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="already there"):
        export(loaded, tmp_path / "out")


def test_a_text_model_is_not_exported(tiny_llm: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="text-only"):
        export(loaded_text_model(tiny_llm), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_large_weights_are_sharded(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dianjing.export.files.SHARD_SIZE", "100KB")
    assert all(case.equal for case in export(loaded, tmp_path / "out").cases)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    shutil.rmtree(tmp_path / "out")


def test_the_comparison_sees_a_picture_that_is_not_looked_at(loaded: LoadedModel, tmp_path: Path) -> None:
    hf.save(loaded, tmp_path, Options())
    other = [Conversation((), one.question, [picture(*image.size) for image in one.images]) for one in drawn_cases()]
    before, after = (hf.prove(loaded, tmp_path, cases[:1], Options()).cases for cases in (drawn_cases(), other))
    assert before[0].largest_logit != after[0].largest_logit
