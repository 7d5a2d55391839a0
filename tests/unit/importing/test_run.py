"""An imported checkpoint is a run like any other, or nothing is written."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dianjing.config.load import load_recipe
from dianjing.config.schema import TrainConfig
from dianjing.errors import CheckpointError, ConfigError, DataError, DianjingError, ModelError
from dianjing.export.export import Options
from dianjing.export.hf import save
from dianjing.formats.pickle import read_checkpoint
from dianjing.formats.xtuner import moments_by_name
from dianjing.importing.run import ImportOptions, import_run
from dianjing.infer.load import load_for_use
from dianjing.infer.segments import reader_of
from dianjing.model.weights import trainable_state
from dianjing.pictures.rule import PictureRule
from dianjing.run.checkpoint import damage, newest, read_state
from dianjing.train.loop import train
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model
from tests.tiny import TinyDataset, write_clip, write_llm
from tests.xtuner import XTUNER
from tests.xtuner_writer import client_state, write_iter

TINY = XTUNER / "tiny"
HERE = ImportOptions(llm=str(TINY / "tiny_internlm2"), vision_tower=str(TINY / "tiny_clip"))
FINETUNE, PRETRAIN = TINY / "finetune_iter_10.pth", TINY / "pretrain_iter_10.pth"


def test_the_run_is_whole_and_says_what_became_of_each_tensor(tmp_path: Path) -> None:
    report = import_run(FINETUNE, tmp_path / "run", HERE)
    assert report[0] == "XTuner checkpoint: 62 tensors"
    assert report[1] == "matched: 50, as 54 of ours (9,712 parameters)"
    assert report[2] == "missing: 0, unexpected: 0"
    assert report[3].startswith("dropped: 12, behind the layer of the tower that the projector reads (")
    assert report[4] == "optimizer: AdamW's state of 54 tensors"
    assert "/data/llava/train/train.json" in report[5]
    recipe, checkpoint = load_recipe(tmp_path / "run" / "recipe.toml"), newest(tmp_path / "run")
    assert not damage(checkpoint)
    assert checkpoint.name == "step-000010"
    assert recipe.stage == "finetune"
    assert (recipe.language_model.lora_rank, recipe.language_model.lora_alpha) == (4, 2)
    assert recipe.language_model.lora_head
    assert recipe.language_model.lora_share_qkv
    assert (recipe.vision_tower.lora_rank, recipe.vision_tower.lora_alpha) == (2, 1)
    assert recipe.output == str(tmp_path / "run")


def test_each_number_of_the_optimizer_stands_beside_its_weight(tmp_path: Path) -> None:
    import_run(FINETUNE, tmp_path / "run", HERE)
    weights, memory = (
        load_file(newest(tmp_path / "run") / f"{name}.safetensors") for name in ("trainable", "optimizer")
    )
    assert {f"{name}/{kind}" for name in weights for kind in ("step", "exp_avg", "exp_avg_sq")} == memory.keys()
    assert all(memory[f"{name}/exp_avg"].shape == weight.shape for name, weight in weights.items())
    content = read_checkpoint(FINETUNE)
    sums = [
        sum(state[kind].double().sum() for state in content["optimizer"]["state"].values()) for kind in ("exp_avg",)
    ]
    ours = sum(value.double().sum() for name, value in memory.items() if name.endswith("exp_avg"))
    assert ours == pytest.approx(sums[0].item(), abs=1e-12)


def test_without_its_data_it_is_not_trained_on(tmp_path: Path, tiny_dataset: TinyDataset) -> None:
    run = tmp_path / "run"
    import_run(PRETRAIN, run, HERE)
    recipe = load_recipe(
        run / "recipe.toml", {"data.path": str(tiny_dataset.path), "data.images": str(tiny_dataset.images)}
    )
    with pytest.raises(CheckpointError, match="imported without its data; import it again with --data FILE"):
        train(recipe, resume=True, quiet=True)


def test_data_that_would_make_another_run_is_refused(tmp_path: Path, tiny_dataset: TinyDataset) -> None:
    options = replace(HERE, data=str(tiny_dataset.path), images=str(tiny_dataset.images))
    with pytest.raises(DataError, match="8 records in batches of 2 make 4 iterations, but the run was to have 80"):
        import_run(PRETRAIN, tmp_path / "run", options)
    with pytest.raises(DataError, match=r"gone\.json"):
        import_run(PRETRAIN, tmp_path / "run", replace(HERE, data="gone.json"))
    assert not (tmp_path / "run").exists()


def test_weights_alone(tmp_path: Path) -> None:
    report = import_run(FINETUNE, tmp_path / "run", replace(HERE, weights_only=True))
    assert "optimizer: none" in report
    assert "it can be asked and exported, not trained on: the optimizer is not in it" in report
    assert read_state(newest(tmp_path / "run")).step == 10


def test_weights_alone_with_data_begin_a_run(tmp_path: Path, tiny_dataset: TinyDataset) -> None:
    """It is the run that begins from the same projector, bit for bit."""
    content = read_checkpoint(PRETRAIN)["state_dict"]
    save_file({name: weight.contiguous() for name, weight in content.items()}, tmp_path / "init.safetensors")
    options = replace(HERE, data=str(tiny_dataset.path), images=str(tiny_dataset.images), template="internlm2_chat")
    report = import_run(tmp_path / "init.safetensors", tmp_path / "imported", options)
    assert "optimizer: none in it; training begins with a new one" in report
    recipe = load_recipe(tmp_path / "imported" / "recipe.toml", {"train.global_batch_size": 4, "train.epochs": 2})
    own = replace(
        recipe,
        output=str(tmp_path / "own"),
        projector=replace(recipe.projector, init_from=str(tmp_path / "init.safetensors")),
    )
    with pytest.raises(CheckpointError, match=r"train\.global_batch_size was 16, is 4"):
        train(recipe, resume=True, quiet=True)
    recipe, own = load_recipe(tmp_path / "imported" / "recipe.toml"), replace(own, train=TrainConfig(precision="fp32"))
    weights = [
        load_file(newest(train(one, resume=resume, quiet=True)) / "trainable.safetensors")
        for one, resume in ((recipe, True), (own, False))
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert any(
        not torch.equal(weight, start) for weight, start in zip(weights[0].values(), content.values(), strict=True)
    )


def changed(path: Path, **changes: Any) -> Path:
    """Write the finetune checkpoint with tensors changed, or taken out (None)."""
    weights = {**read_checkpoint(FINETUNE)["state_dict"], **changes}
    config = read_checkpoint(FINETUNE)["meta"]["cfg"]
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    return write_iter(path, kept, {}, client_state(config, 10, 80))


HEAD = "llm.base_model.model.output.lora_B.default.weight"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({HEAD: None}, r"lm_head\.lora_B\.default\.weight missing"),
        ({"llm.base_model.model.new.lora_B.default.weight": torch.ones(1)}, r"new\.lora_B\.default\.weight unexpected"),
        ({HEAD: torch.ones(699, 4)}, r"lm_head\.lora_B\.default\.weight \(699x4 in the checkpoint, 700x4 here\)"),
        ({"projector.model.4.weight": torch.ones(2, 2)}, "its projector has 3 linear layers; only those of 2"),
        ({HEAD.replace("_B", "_A"): torch.ones(5, 32)}, r"the LoRA of llm has ranks \[4, 5\]"),
        ({HEAD.replace("_B", "_A"): torch.tensor(1.0)}, r"the LoRA of llm has ranks \[0, 4\]"),
    ],
)
def test_nothing_is_half_loaded(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        import_run(changed(tmp_path / "iter_10.pth", **changes), tmp_path / "run", HERE)
    assert not (tmp_path / "run").exists()


BIAS = "projector.model.2.bias"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda weight: weight * float("nan"), "hold values that are not finite.* earlier checkpoint"),
        *(
            (lambda weight, dtype=dtype: weight.to(dtype), rf"\({dtype}\) cannot be read; save it again in fp32")
            for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn)
        ),
    ],
)
def test_what_is_no_finite_number_is_not_taken_over(tmp_path: Path, spoil: Any, complaint: str) -> None:
    content = {name: weight.contiguous() for name, weight in read_checkpoint(PRETRAIN)["state_dict"].items()}
    save_file({**content, BIAS: spoil(content[BIAS])}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=rf"linear_2\.bias {complaint}"):
        import_run(tmp_path / "x.safetensors", tmp_path / "run", replace(HERE, template="internlm2_chat"))
    assert not (tmp_path / "run").exists()


def pretrain_at(path: Path, iteration: int, last: int, **spoiled: Any) -> Path:
    """Write the pretrain checkpoint as of another iteration, with the optimizer's state of BIAS changed."""
    content = read_checkpoint(PRETRAIN)
    moments = dict(moments_by_name(content["optimizer"], content["state_dict"], PRETRAIN))
    moments[BIAS] |= spoiled
    return write_iter(path, content["state_dict"], moments, client_state(content["meta"]["cfg"], iteration, last))


@pytest.mark.parametrize(
    ("kind", "value", "fault"),
    [
        ("exp_avg_sq", torch.zeros(1), "is of size 1, not 32"),
        ("exp_avg_sq", -torch.ones(32), "is below 0"),
        ("exp_avg_sq", torch.ones(32, dtype=torch.int8), r"is of torch\.int8"),
        ("exp_avg", torch.full((32,), float("nan")), "has values that are not finite"),
        ("step", torch.tensor(-3.0), "is below 0"),
        ("step", torch.tensor(float("nan")), "has values that are not finite"),
    ],
)
def test_what_cannot_be_adamws_memory_is_not_taken_over(tmp_path: Path, kind: str, value: Any, fault: str) -> None:
    source = pretrain_at(tmp_path / "iter_10.pth", 10, 80, **{kind: value})
    with pytest.raises(ModelError, match=rf"{BIAS}: {kind} in the optimizer's state {fault}; .*--weights-only"):
        import_run(source, tmp_path / "run", HERE)
    assert not (tmp_path / "run").exists()
    import_run(source, tmp_path / "run", replace(HERE, weights_only=True))


def test_a_checkpoint_behind_the_end_of_its_run_is_not_trained_on(tmp_path: Path, tiny_dataset: TinyDataset) -> None:
    options = replace(HERE, data=str(tiny_dataset.path), images=str(tiny_dataset.images))
    with pytest.raises(DataError, match="its 8 records ends at step 4, but the checkpoint is of step 5; give"):
        import_run(pretrain_at(tmp_path / "iter_5.pth", 5, 4), tmp_path / "run", options)
    report = import_run(pretrain_at(tmp_path / "iter_4.pth", 4, 4), tmp_path / "run", options)
    assert report[-1] == "it can be asked and exported; its training has ended: step 4 of 4"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("file/run", "cannot be written: Not a directory; choose another place"),
        ("n" * 300, "cannot be written: File name too long"),
        ("dangling", "already there"),
        (os.fsdecode(b"\xff"), "its name, .* is not UTF-8; rename it"),
    ],
)
def test_a_place_that_cannot_be_written_is_left_as_it_was(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=complaint):
        import_run(PRETRAIN, tmp_path / name, HERE)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"}


@pytest.mark.parametrize("tower", [5, {"a": 1}])
def test_a_tower_that_is_no_name_is_asked_for(tmp_path: Path, tower: Any) -> None:
    weights = read_checkpoint(PRETRAIN)["state_dict"]
    torch.save(
        {name.replace("projector.model", "mm_projector"): one for name, one in weights.items()}, tmp_path / "x.bin"
    )
    (tmp_path / "config.json").write_text(json.dumps({"mm_vision_tower": tower}), encoding="utf-8")
    with pytest.raises(ConfigError, match="which is not a folder here; give --vision-tower DIR"):
        import_run(tmp_path / "x.bin", tmp_path / "run", replace(HERE, vision_tower=""))


def test_a_checkpoint_of_another_llm_or_tower_is_refused(tmp_path: Path) -> None:
    other_llm, other_tower = write_llm(tmp_path / "llm", hidden_size=16), write_clip(tmp_path / "clip", hidden_size=20)
    with pytest.raises(
        ModelError, match=r"another LLM or vision tower than --llm and --vision-tower name:\n.*32x24 in"
    ):
        import_run(PRETRAIN, tmp_path / "run", replace(HERE, llm=str(other_llm), template="internlm2_chat"))
    with pytest.raises(ModelError, match="32x24 in the checkpoint, 32x20 here"):
        import_run(PRETRAIN, tmp_path / "run", replace(HERE, vision_tower=str(other_tower)))


def test_what_is_not_known_is_asked_for_by_its_flag(tmp_path: Path) -> None:
    weights = dict(read_checkpoint(FINETUNE)["state_dict"])
    bare = tmp_path / "bare.safetensors"
    save_file(weights, bare)

    def refusal(source: Path, **options: Any) -> str:
        with pytest.raises(DianjingError) as caught:
            import_run(source, tmp_path / "run", replace(HERE, **options))
        return str(caught.value)

    assert 'names its LLM as "/data/llava/models/tiny_internlm2", which is not a folder here; give --llm' in refusal(
        FINETUNE, llm=""
    )
    assert "give --vision-tower DIR" in refusal(FINETUNE, vision_tower="")
    assert "does not say what its LLM is; give --llm DIR" in refusal(bare, llm="", llm_alpha=2, tower_alpha=1)
    assert "--llm-alpha NUMBER" in refusal(bare)
    assert "--tower-alpha NUMBER" in refusal(bare, llm_alpha=2)
    assert "--config names XTuner's config" in refusal(bare, config=tmp_path / "gone.py")
    (tmp_path / "run").mkdir()
    assert "already there" in refusal(FINETUNE)
    (tmp_path / "run").rmdir()
    config = tmp_path / "config.py"
    text = read_checkpoint(FINETUNE)["meta"]["cfg"]
    config.write_text(text.replace("r=4", "r=8"), encoding="utf-8")
    assert "has rank 4, but the config says 8" in refusal(bare, config=config)
    config.write_text(text.replace("PROMPT_TEMPLATE.internlm2_chat", "PROMPT_TEMPLATE.mine"), encoding="utf-8")
    assert "give --template NAME" in refusal(bare, config=config)

    import_run(bare, tmp_path / "run", replace(HERE, llm_alpha=2, tower_alpha=1))
    assert load_recipe(tmp_path / "run" / "recipe.toml").language_model.lora_alpha == 2


def test_gradients_of_several_batches_make_one_step_of_ours(tmp_path: Path) -> None:
    content = read_checkpoint(PRETRAIN)
    config = content["meta"]["cfg"].replace("accumulative_counts=1", "accumulative_counts=4")
    source = write_iter(tmp_path / "iter_10.pth", content["state_dict"], {}, client_state(config, 10, 80))
    import_run(source, tmp_path / "run", replace(HERE, gpus=2))
    recipe = load_recipe(tmp_path / "run" / "recipe.toml")
    assert recipe.train.global_batch_size == 2 * 4 * 2
    assert newest(tmp_path / "run").name == "step-000002"


def test_an_error_in_the_config_inside_is_said_with_the_checkpoint(tmp_path: Path) -> None:
    source = write_iter(
        tmp_path / "iter_1.pth", read_checkpoint(PRETRAIN)["state_dict"], {}, client_state("x = y()", 1, 2)
    )
    with pytest.raises(ConfigError, match=r"iter_1\.pth \(its config\): line 1: y\(...\) would have to be run"):
        import_run(source, tmp_path / "run", HERE)


def test_transparent_pictures_are_read_as_xtuner_does_wherever_the_run_goes(tmp_path: Path) -> None:
    import_run(PRETRAIN, tmp_path / "run", HERE)
    recipe = load_recipe(tmp_path / "run" / "recipe.toml")
    rule = PictureRule(transparency="drop", profiles="ignore")
    assert PictureRule.of(recipe.data) == rule
    assert reader_of(recipe)[1].rule == rule
    loaded = load_for_use(str(tmp_path / "run"), "cpu")
    assert loaded.image_processor
    assert loaded.image_processor.rule == rule
    (tmp_path / "export").mkdir()
    save(loaded, tmp_path / "export", Options())
    assert load_for_use(str(tmp_path / "export"), "cpu").image_processor == loaded.image_processor


def test_the_state_says_which_recipe(tmp_path: Path) -> None:
    import_run(PRETRAIN, tmp_path / "run", HERE)
    state = json.loads((newest(tmp_path / "run") / "state.json").read_text(encoding="utf-8"))
    assert state["recipe"]["train.learning_rate"] == 0.002
    assert state["data"] == {"fingerprint": ""}


def test_a_lora_folder_of_llava_is_a_run_with_its_numbers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("finetune", language_model={"tuning": "lora", "lora_alpha": 6.0})
    learned = trainable_state(loaded_model(recipe).model)
    folder = tmp_path / "llava-lora"
    folder.mkdir()
    adapter, rest = {}, {}
    for name, weight in learned.items():
        if ".lora_" in name:
            inside = name.replace("model.language_model.", "model.").replace(".default.", ".")
            adapter[f"base_model.model.{inside}"] = weight
        else:
            inside = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
            inside = inside.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
            rest[f"base_model.model.{inside}"] = weight.half()
    torch.save(adapter, folder / "adapter_model.bin")
    torch.save(rest, folder / "non_lora_trainables.bin")
    lora = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.05, "bias": "none"}
    (folder / "adapter_config.json").write_text(
        json.dumps({**lora, "base_model_name_or_path": recipe.language_model.folder}), encoding="utf-8"
    )
    config = {"mm_vision_tower": recipe.vision_tower.folder, "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    import_run(folder, tmp_path / "run", ImportOptions(template="vicuna"))
    loaded = load_for_use(str(tmp_path / "run"), "cpu")
    assert loaded.encoder.template.name == "vicuna"
    assert loaded.recipe
    assert (loaded.recipe.language_model.lora_alpha, loaded.recipe.language_model.lora_dropout) == (6, 0.05)
    for name, weight in trainable_state(loaded.model).items():
        assert torch.equal(weight, learned[name] if ".lora_" in name else learned[name].half().float())
