"""A run that starts from a model that sees begins with exactly what that model had learned."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dianjing.cli.main import main
from dianjing.config.load import load_recipe, save_recipe
from dianjing.config.schema import Recipe
from dianjing.data.dataset import open_dataset
from dianjing.errors import ConfigError, ModelError
from dianjing.export import hf
from dianjing.export.export import export
from dianjing.export.formats import DEFAULTS
from dianjing.export.merge import merged_state
from dianjing.importing.run import ImportOptions, import_run
from dianjing.infer.load import load_for_use
from dianjing.model.build import build
from dianjing.model.folders import base_folders
from dianjing.model.stage import apply_stage
from dianjing.model.weights import load_start, trainable_state
from dianjing.run.checkpoint import newest, save
from dianjing.run.fingerprints import fingerprints
from dianjing.run.layout import OPTIMIZER, RECIPE, START, TRAINABLE
from dianjing.run.state import state_at
from dianjing.start import settle
from dianjing.train.loop import train
from tests.xtuner import XTUNER

LORA = {"language_model": {"tuning": "lora"}, "vision_tower": {"tuning": "lora"}}
FULL = {"language_model": {"tuning": "full"}, "vision_tower": {"tuning": "full"}}
FEW = {"max_steps": 3, "learning_rate": 1e-2}


@pytest.fixture
def first(make_recipe: Any, tmp_path: Path) -> Path:
    """Return a finetune run with adapters on LLM and tower."""
    return train(replace(make_recipe("finetune", train=FEW, **LORA), output=str(tmp_path / "first")), quiet=True)


def from_it(make_recipe: Any, source: Path, output: Path, stage: str = "finetune", **sections: Any) -> Recipe:
    """Return the recipe of a run that starts from `source`, with other data than the first one."""
    short = {"max_steps": 2, "learning_rate": 1e-4}
    recipe = make_recipe(stage, train=short, data={"order": "sequential"}, **sections)
    return replace(
        recipe,
        start_from=str(source),
        seed=5,
        output=str(output),
        language_model=replace(recipe.language_model, folder="", template=""),
        vision_tower=replace(recipe.vision_tower, folder=""),
    )


def at_start(recipe: Recipe) -> dict[str, Tensor]:
    """Return the whole model before its first step, adapters merged."""
    model = build(recipe).model
    apply_stage(model, recipe)
    load_start(model, recipe)
    return merged_state(model)


def write_export(run: Path, folder: Path) -> Path:
    """Write the hf export of a run without its receipt, which has tests of its own."""
    folder.mkdir()
    hf.save(load_for_use(str(run), "cpu"), folder, DEFAULTS)
    return folder


def learned(run: Path) -> dict[str, bytes]:
    return {name: (newest(run) / name).read_bytes() for name in (TRAINABLE, OPTIMIZER)}


@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_a_then_b_is_the_second_run_resumed_at_step_0_with_a_new_optimizer(
    make_recipe: Any, tmp_path: Path, tuning: dict[str, Any]
) -> None:
    first = train(replace(make_recipe("finetune", train=FEW, **tuning), output=str(tmp_path / "a")), quiet=True)
    recipe = settle(from_it(make_recipe, first, tmp_path / "b", **tuning), write=True)
    assert not (tmp_path / "b" / START).exists(), "the same tuning: nothing is merged"
    straight = train(recipe, quiet=True)

    # The same by hand: a checkpoint at step 0 with the weights of the first run and AdamW's state before any step.
    begun = replace(recipe, output=str(tmp_path / "by-hand"))
    built = build(begun, fresh_projector=True)
    apply_stage(built.model, begun)
    weights = load_file(newest(first) / TRAINABLE)
    assert weights.keys() == trainable_state(built.model).keys()
    zeros = {f"{name}/{kind}": torch.zeros_like(w) for name, w in weights.items() for kind in ("exp_avg", "exp_avg_sq")}
    dataset = open_dataset(begun.data, built.encoder, built.image_processor)
    state = state_at(0, begun, dataset, fingerprints(*base_folders(begun), dataset))
    steps = {f"{name}/step": torch.tensor(0.0) for name in weights}
    save(Path(begun.output), weights, zeros | steps, state, keep=1)
    by_hand = train(begun, resume=True, quiet=True)
    assert learned(straight) == learned(by_hand)
    assert load_file(newest(straight) / TRAINABLE).keys() == weights.keys()


def test_an_export_started_from_and_exported_again_is_the_same(make_recipe: Any, first: Path, tmp_path: Path) -> None:
    loaded = load_for_use(str(first), "cpu")
    write_export(first, tmp_path / "export")
    for stage, tuning in (("pretrain", {}), ("finetune", LORA), ("finetune", FULL)):
        recipe = settle(from_it(make_recipe, tmp_path / "export", tmp_path / "b", stage, **tuning))
        built = build(recipe)
        apply_stage(built.model, recipe)
        load_start(built.model, recipe)
        again = replace(
            loaded,
            model=built.model.eval(),
            tokenizer=built.tokenizer,
            encoder=built.encoder,
            image_processor=built.image_processor,
        )
        out = tmp_path / f"again-{stage}-{recipe.language_model.tuning}"
        out.mkdir()
        hf.save(again, out, DEFAULTS)
        written, read = (load_file(folder / "model.safetensors") for folder in (tmp_path / "export", out))
        assert written.keys() == read.keys()
        assert all(torch.equal(written[name], read[name]) for name in written)


def test_other_tuning_merges_what_was_learned(make_recipe: Any, first: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for number, (stage, tuning) in enumerate(
        (
            ("pretrain", {}),
            ("finetune", FULL),
            ("finetune", {"language_model": {"tuning": "lora", "lora_rank": 2}}),
        )
    ):
        out = tmp_path / f"b{number}"
        recipe = settle(from_it(make_recipe, first, out, stage, **tuning), said.append, write=True)
        assert recipe.language_model.folder == recipe.projector.init_from == str(out / START)
        expected, found = merged_state(load_for_use(str(first), "cpu").model), at_start(recipe)
        for name, weight in expected.items():
            assert torch.equal(found[name][: len(weight)], weight), name
    assert "is merged into" in said[-1]


def test_three_stages_in_a_row_by_the_command_line(make_recipe: Any, tmp_path: Path, capsys: Any) -> None:
    run = train(replace(make_recipe(train=FEW), output=str(tmp_path / "0")), quiet=True)
    for number, tuning in enumerate((LORA, FULL, {}), 1):
        stage = "finetune" if tuning else "pretrain"
        save_recipe(from_it(make_recipe, run, tmp_path / str(number), stage, **tuning), tmp_path / "recipe.toml")
        before = merged_state(load_for_use(str(run), "cpu").model)
        assert number != 2 or main(["plan", str(tmp_path / "recipe.toml"), "--gpu", "h200"]) == 0
        assert main(["train", str(tmp_path / "recipe.toml")]) == 0
        run = tmp_path / str(number)
        after = merged_state(load_for_use(str(run), "cpu").model)
        moved = max(float((after[name][: len(w)] - w).abs().max()) for name, w in before.items())
        assert 0 < moved < 0.02, "it went on from there"
        assert load_recipe(run / RECIPE).start_from == str(tmp_path / str(number - 1))
    # A stopped run goes on with the parts that it began with, whatever has become of the first run since.
    shutil.rmtree(tmp_path / "2")
    assert main(["train", str(tmp_path / "recipe.toml"), "--resume"]) == 0
    assert "resumed from" in capsys.readouterr().err


def test_llavas_start_under_the_names_of_either_generation(make_recipe: Any, first: Path, tmp_path: Path) -> None:
    """A folder as transformers 4.57 writes it, and the same saved by transformers 5, whose names are others."""
    old = tmp_path / "old"
    write_export(first, old)
    new = tmp_path / "new"
    shutil.copytree(old, new)
    (new / "model.safetensors").unlink()
    weights = load_file(old / "model.safetensors")
    renamed = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    save_file({fresh(name, renamed): weight for name, weight in weights.items()}, new / "model.safetensors")
    older, newer = (at_start(settle(from_it(make_recipe, folder, tmp_path / "b"))) for folder in (old, new))
    assert older.keys() == newer.keys()
    assert all(torch.equal(older[name], newer[name]) for name in older)


def fresh(name: str, renamed: dict[str, str]) -> str:
    start = next(start for start in renamed if name.startswith(start))
    return renamed[start] + name.removeprefix(start)


def test_a_llava_that_transformers_made_and_saved_itself(
    make_recipe: Any, tiny_llm: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    llm, clip = LlamaConfig.from_pretrained(tiny_llm), CLIPVisionConfig.from_pretrained(tiny_clip)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=llm, vision_config=clip, image_token_id=0))
    model.save_pretrained(tmp_path / "llava")
    for folder, files in ((tiny_llm, "tokenizer*"), (tiny_clip, "preprocessor*")):
        for file in folder.glob(files):
            shutil.copy(file, tmp_path / "llava")
    recipe = from_it(make_recipe, tmp_path / "llava", tmp_path / "b")
    recipe = replace(recipe, language_model=replace(recipe.language_model, template="internlm2_chat"))
    found = at_start(settle(recipe))
    expected = {name.replace(".vision_model.", "."): weight for name, weight in model.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_llava_next_starts_without_its_tiles(make_recipe: Any, first: Path, tmp_path: Path) -> None:
    folder = tmp_path / "next"
    write_export(first, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "image_newline": torch.zeros(32)}, folder / "model.safetensors")
    change(folder, model_type="llava_next")
    said: list[str] = []
    found = at_start(settle(from_it(make_recipe, folder, tmp_path / "b"), said.append))
    assert torch.equal(found["lm_head.weight"], weights["language_model.lm_head.weight"])
    assert "without tiles" in said[-1]


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_what_cannot_be_started_from_is_said(make_recipe: Any, first: Path, tiny_llm: Path, tmp_path: Path) -> None:
    recipe = from_it(make_recipe, tiny_llm, tmp_path / "b")
    with pytest.raises(ModelError, match="start_from names a model that sees"):
        settle(recipe)
    named = replace(recipe, language_model=replace(recipe.language_model, folder="elsewhere"), start_from=str(first))
    with pytest.raises(ConfigError, match=r'language_model\.folder is "elsewhere", but start_from brings'):
        settle(named)
    shuffled = replace(recipe, start_from=str(first), projector=replace(recipe.projector, kind="pixel_shuffle"))
    with pytest.raises(ConfigError, match='that of start_from is "mlp"'):
        settle(shuffled)
    with pytest.raises(ModelError, match="no such"):
        settle(replace(recipe, start_from=str(tmp_path / "nothing")))

    folder = tmp_path / "export"
    write_export(first, folder)
    recipe = replace(recipe, start_from=str(folder))
    for values, message in (
        ({"vision_feature_layer": [-2, -3]}, "features of several layers"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is relu"),
        ({"vision_feature_select_strategy": "full"}, 'select_strategy is "full", but only "default"'),
    ):
        change(folder, **values)
        with pytest.raises(ModelError, match=message):
            settle(recipe)
        change(folder, vision_feature_layer=-2, projector_hidden_act="gelu", vision_feature_select_strategy="default")
    weights = load_file(folder / "model.safetensors")
    wrong = {**weights, "language_model.lm_head.weight": torch.zeros(7, 32)}
    save_file(wrong, folder / "model.safetensors")
    with pytest.raises(ModelError, match="of other sizes"):
        build(settle(recipe))
    save_file({**weights, "audio_tower.weight": torch.zeros(7)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"audio_tower\.weight left over"):
        build(settle(recipe))


def test_an_adapter_export_and_a_projector_of_our_own_are_merged_too(make_recipe: Any, tmp_path: Path) -> None:
    """A stock LLaVA has no place for pixel_shuffle; what is merged here is only read by us."""
    shuffle = {"projector": {"kind": "pixel_shuffle"}}
    recipe = make_recipe("finetune", train=FEW, **LORA, **shuffle)
    run = train(replace(recipe, output=str(tmp_path / "first")), quiet=True)
    export(load_for_use(str(run), "cpu"), tmp_path / "adapter", format="adapter")
    expected = merged_state(load_for_use(str(run), "cpu").model)
    begun = settle(from_it(make_recipe, tmp_path / "adapter", tmp_path / "b", **LORA, **shuffle), write=True)
    found = at_start(begun)
    assert all(torch.equal(found[name][: len(weight)], weight) for name, weight in expected.items())
    # A run whose bases are a LLaVA's parts is exported as an adapter on them.
    second = train(begun, quiet=True)
    export(load_for_use(str(second), "cpu"), tmp_path / "second", format="adapter")


def test_a_run_imported_from_xtuner_goes_on_too(make_recipe: Any, tmp_path: Path) -> None:
    llm, tower = XTUNER / "tiny" / "tiny_internlm2", XTUNER / "tiny" / "tiny_clip"
    options = ImportOptions(llm=str(llm), vision_tower=str(tower), weights_only=True)
    import_run(XTUNER / "tiny" / "finetune_iter_10.pth", tmp_path / "imported", options)
    before = load_recipe(tmp_path / "imported" / RECIPE)
    recipe = from_it(make_recipe, tmp_path / "imported", tmp_path / "b")
    recipe = replace(
        recipe,
        language_model=replace(before.language_model, folder="", quantization=""),
        vision_tower=replace(before.vision_tower, folder=""),
    )
    begun = settle(recipe, write=True)
    expected, found = merged_state(load_for_use(str(tmp_path / "imported"), "cpu").model), at_start(begun)
    assert all(torch.equal(found[name][: len(weight)], weight) for name, weight in expected.items())
    train(begun, quiet=True)
