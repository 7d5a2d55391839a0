"""Every form that a checkpoint from elsewhere can have is told from the others, and read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dianjing.errors import ModelError
from dianjing.formats.source import open_foreign
from tests.xtuner import XTUNER
from tests.xtuner_writer import client_state, write_iter, write_zero3, write_zero12

PROJECTOR = {
    f"projector.model.{number}.{kind}": torch.randn(3, 3) if kind == "weight" else torch.randn(3)
    for number in (0, 2)
    for kind in ("weight", "bias")
}
LORA = {
    "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.randn(2, 5),
    "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight": torch.randn(7, 2),
}
TOWER = {
    "visual_encoder.base_model.model.vision_model.encoder.layers.0.mlp.fc1.lora_A.default.weight": torch.randn(2, 5),
    "visual_encoder.base_model.model.vision_model.encoder.layers.0.mlp.fc1.lora_B.default.weight": torch.randn(3, 2),
}
ALL = {**LORA, **TOWER, **PROJECTOR}
MOMENTS = {
    name: {"step": torch.tensor(4.0), "exp_avg": torch.randn_like(weight), "exp_avg_sq": torch.rand_like(weight)}
    for name, weight in ALL.items()
}
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_dropout": 0.1, "bias": "none"}


def equal(ours: Any, theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def write_adapter(folder: Path, weights: dict[str, Tensor], prefix: str, *, pickled: bool, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    named = {name.removeprefix(prefix).replace(".default.", "."): weight for name, weight in weights.items()}
    if pickled:
        torch.save(named, folder / "adapter_model.bin")
    else:
        save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER_CONFIG, **config}), encoding="utf-8")


def test_files_of_weights_alone(tmp_path: Path) -> None:
    save_file(ALL, tmp_path / "x.safetensors")
    torch.save(ALL, tmp_path / "x.pth")
    torch.save({"state_dict": ALL}, tmp_path / "y.pth")
    for name in ("x.safetensors", "x.pth", "y.pth"):
        found = open_foreign(tmp_path / name)
        assert equal(found.weights, ALL)
        assert not found.moments
        assert not found.config


def test_iter_pth_and_its_work_dir(tmp_path: Path) -> None:
    write_iter(tmp_path / "iter_4.pth", ALL, MOMENTS, client_state("x = 1", 4, 80))
    (tmp_path / "last_checkpoint").write_text("/root/work_dirs/run/iter_4.pth", encoding="utf-8")
    for path in (tmp_path / "iter_4.pth", tmp_path):
        found = open_foreign(path)
        assert equal(found.weights, ALL)
        assert all(equal(found.moments[name], MOMENTS[name]) for name in ALL)
        assert (found.iteration, found.last_iteration, found.seed, found.config) == (4, 80, 0, "x = 1")
    assert not open_foreign(tmp_path, optimizer=False).moments


def test_a_file_that_names_the_newest_checkpoint_leads_to_nothing_else(tmp_path: Path) -> None:
    write_iter(tmp_path / "iter_4.pth", ALL, {}, client_state("", 4, 80))
    inside = tmp_path / "inside"
    inside.mkdir()
    for pointer in ("last_checkpoint", "latest"):
        (inside / pointer).write_text(str(tmp_path / "iter_4.pth"), encoding="utf-8")
        with pytest.raises(ModelError, match=r"inside/iter_4\.pth: no such file"):
            open_foreign(inside)
        for nothing in ("\n", ".", "..", "../..", "C:\\x\\.."):
            (inside / pointer).write_text(nothing, encoding="utf-8")
            with pytest.raises(ModelError, match=f"{pointer}: it names no checkpoint"):
                open_foreign(inside)
        (inside / pointer).write_text("x" * 5000, encoding="utf-8")
        with pytest.raises(ModelError, match="cannot be read: File name too long"):
            open_foreign(inside)
        (inside / "again").symlink_to(".")
        (inside / pointer).write_text("again", encoding="utf-8")
        with pytest.raises(ModelError, match="again: no checkpoint of a known form"):
            open_foreign(inside)
        (inside / "again").unlink()
        (inside / pointer).unlink()
    (tmp_path / "latest").write_text("D:\\work\\iter_4.pth", encoding="utf-8")
    assert open_foreign(tmp_path).iteration == 4


def test_a_folder_of_several_checkpoints_says_which_there_are(tmp_path: Path) -> None:
    for number in (4, 8):
        write_iter(tmp_path / f"iter_{number}.pth", ALL, {}, client_state("", number, 80))
    with pytest.raises(ModelError, match=r"give one of those that are there: iter_4\.pth, iter_8\.pth"):
        open_foreign(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"iter": value} for value in (-1, "ten", math.inf, 10**300)),
        *({"seed": value} for value in ("x", math.inf, 2**70)),
        {"cfg": ("x",)},
        [1],
    ],
)
def test_what_no_run_could_have_saved_is_refused(tmp_path: Path, wrong: Any) -> None:
    meta = {"iter": 4, "seed": 0, **wrong} if isinstance(wrong, dict) else wrong
    torch.save({"state_dict": ALL, "meta": meta}, tmp_path / "iter_4.pth")
    with pytest.raises(ModelError, match="not made as XTuner or LLaVA make theirs"):
        open_foreign(tmp_path / "iter_4.pth")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_on_any_number_of_ranks(tmp_path: Path, ranks: int, stage: int) -> None:
    extra, folder = client_state("x = 1", 4, 80), tmp_path / "iter_4.pth"
    if stage == 2:
        write_zero12(folder, ALL, MOMENTS, extra, ranks=ranks, dtype=torch.bfloat16 if ranks % 2 else torch.float16)
    else:
        write_zero3(folder, ALL, MOMENTS, extra, ranks=ranks, subgroups=ranks)
    found = open_foreign(folder)
    assert equal(found.weights, ALL)
    assert all(equal(found.moments[name], MOMENTS[name]) for name in ALL)
    assert (found.ranks, found.iteration, found.config) == (ranks, 4, "x = 1")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_deepspeed_folder_with_a_part_gone_is_refused(tmp_path: Path, stage: int) -> None:
    extra, folder = client_state("", 4, 80), tmp_path / "iter_4.pth"
    if stage == 2:
        write_zero12(folder, ALL, MOMENTS, extra, ranks=3, dtype=torch.bfloat16)
    else:
        write_zero3(folder, ALL, MOMENTS, extra, ranks=3, subgroups=1)
    with pytest.raises(ModelError, match=r"give its folder, .*iter_4\.pth"):
        open_foreign(next(folder.glob("*_model_states.pt")))
    files = sorted(folder.glob("*optim_states.pt"))
    files[1].unlink()
    with pytest.raises(ModelError, match="the files of rank 1 are missing"):
        open_foreign(folder)
    files[2].unlink()
    with pytest.raises(ModelError, match=r"1 ranks' .* are there, but the run had 3; copy the whole folder again"):
        open_foreign(folder)
    files[0].write_bytes(files[0].read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"optim_states\.pt: cut off or damaged; copy it again"):
        open_foreign(folder)
    files[0].unlink()
    with pytest.raises(ModelError, match="which hold the weights in fp32"):
        open_foreign(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_ranks_file_that_is_a_copy_of_anothers_is_refused(tmp_path: Path, stage: int) -> None:
    extra, folder = client_state("", 4, 80), tmp_path / "iter_4.pth"
    if stage == 2:
        write_zero12(folder, ALL, MOMENTS, extra, ranks=3, dtype=torch.bfloat16)
    else:
        write_zero3(folder, ALL, MOMENTS, extra, ranks=3, subgroups=1)
    files = sorted(folder.glob("*optim_states.pt"))
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(ModelError, match=r"rank_1.* it holds the same weights as .*rank_0"):
        open_foreign(folder)


LATER = {name: weight + 0.1 for name, weight in ALL.items()}
LATER_MOMENTS = {name: {**moments, "step": torch.tensor(8.0)} for name, moments in MOMENTS.items()}


def write_zero(folder: Path, stage: int, *, later: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a folder of two ranks, of step 4 or of step 8."""
    weights, moments = (LATER, LATER_MOMENTS) if later else (ALL, MOMENTS)
    if stage == 3:
        return write_zero3(folder, weights, moments, client_state("", 4, 80), ranks=2, subgroups=1)
    return write_zero12(folder, weights, moments, client_state("", 4, 80), ranks=2, dtype=dtype)


@pytest.mark.parametrize(
    ("stage", "moved", "complaint"),
    [
        (2, "*rank_1*optim_states.pt", r"rank_1.* it is of step 8, .*rank_0.* of step 4; copy"),
        (3, "*rank_1*optim_states.pt", r"rank_1.* it is of step 8, .*rank_0.* of step 4; copy"),
        (2, "*model_states.pt", r"weight in \*_model_states\.pt is not what the \*_optim_states\.pt have in fp32"),
    ],
)
def test_a_folder_of_two_checkpoints_is_refused(tmp_path: Path, stage: int, moved: str, complaint: str) -> None:
    folder = write_zero(tmp_path / "iter_4.pth", stage)
    (later,) = write_zero(tmp_path / "iter_8.pth", stage, later=True).glob(moved)
    later.replace(folder / later.name)
    with pytest.raises(ModelError, match=complaint):
        open_foreign(folder)


@pytest.mark.parametrize(
    ("stage", "moved", "complaint"),
    [
        (2, "*optim_states.pt", r"bf16_zero_pp_rank_1_\S+ and zero_pp_rank_1_\S+ are of two runs; move"),
        (3, "*model_states.pt", r"mp_rank_00_\S+ and zero_pp_rank_1_\S+ are of two runs; move"),
    ],
)
def test_a_folder_of_two_runs_is_refused(tmp_path: Path, stage: int, moved: str, complaint: str) -> None:
    folder = write_zero(tmp_path / "iter_4.pth", 2)
    for other in write_zero(tmp_path / "other", stage, later=True, dtype=torch.float16).glob(moved):
        other.replace(folder / other.name)
    with pytest.raises(ModelError, match=complaint):
        open_foreign(folder)


@pytest.mark.parametrize("pickled", [True, False])
def test_what_pth_to_hf_wrote(tmp_path: Path, pickled: bool) -> None:
    write_adapter(tmp_path / "llm_adapter", LORA, "llm.", pickled=pickled, base_model_name_or_path="/x/llm")
    write_adapter(tmp_path / "visual_encoder_adapter", TOWER, "visual_encoder.", pickled=pickled, lora_alpha=1)
    (tmp_path / "projector").mkdir()
    projector = {name.removeprefix("projector."): weight for name, weight in PROJECTOR.items()}
    if pickled:
        torch.save(projector, tmp_path / "projector" / "pytorch_model.bin")
    else:
        save_file(projector, tmp_path / "projector" / "model.safetensors")
    (tmp_path / "xtuner_config.py").write_text("x = 1", encoding="utf-8")
    found = open_foreign(tmp_path)
    assert equal(found.weights, ALL)
    assert {part: adapter.alpha for part, adapter in found.adapters.items()} == {"llm": 6, "visual_encoder": 1}
    assert found.config == "x = 1"
    assert found.settings == {"language_model.folder": "/x/llm"}


def test_what_pth_to_hf_wrote_of_parts_tuned_in_full(tmp_path: Path) -> None:
    llm = {"model.norm.weight": torch.randn(3), "lm_head.weight": torch.randn(4, 3)}
    tower = {"vision_model.post_layernorm.weight": torch.randn(3)}
    for folder in ("projector", "visual_encoder"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    torch.save({"model.norm.weight": llm["model.norm.weight"]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"lm_head.weight": llm["lm_head.weight"]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    save_file(tower, tmp_path / "visual_encoder" / "model.safetensors")
    projector = {name.removeprefix("projector."): weight for name, weight in PROJECTOR.items()}
    save_file(projector, tmp_path / "projector" / "model.safetensors")
    expected = {f"llm.{name}": weight for name, weight in llm.items()}
    expected |= {f"visual_encoder.{name}": weight for name, weight in tower.items()}
    assert equal(open_foreign(tmp_path).weights, {**expected, **PROJECTOR})


def test_llavas_projector_and_its_lora_folder(tmp_path: Path) -> None:
    projector = {name.replace("projector.model", "model.mm_projector"): weight for name, weight in PROJECTOR.items()}
    config = {"mm_vision_tower": "/x/clip", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(projector, tmp_path / "mm_projector.bin")
    for path in (tmp_path / "mm_projector.bin", tmp_path):
        found = open_foreign(path)
        assert equal(found.weights, PROJECTOR)
        assert found.settings["vision_tower.folder"] == "/x/clip"
        assert found.settings["data.aspect"] == "pad"
    torch.save(
        {f"base_model.model.{name}": one for name, one in projector.items()}, tmp_path / "non_lora_trainables.bin"
    )
    write_adapter(tmp_path, LORA, "llm.", pickled=True, base_model_name_or_path="/x/llm")
    found = open_foreign(tmp_path)
    assert equal(found.weights, {**LORA, **PROJECTOR})
    assert found.adapters["llm"].alpha == 6
    assert found.settings["language_model.folder"] == "/x/llm"


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ('{"mm_projector_type": "linear"}', 'mm_projector_type is "linear", only "mlp2x_gelu" can be read'),
        ('{"mm_vision_select_feature": "cls_patch"}', 'mm_vision_select_feature is "cls_patch", only "patch"'),
        ('{"mm_use_im_start_end": true}', "mm_use_im_start_end is true, only false"),
        ('{"image_aspect_ratio": "anyres"}', 'image_aspect_ratio is "anyres", only "pad" and "square"'),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_llava_that_ours_cannot_be_is_refused(tmp_path: Path, config: str, complaint: str) -> None:
    torch.save({"model.mm_projector.0.weight": torch.ones(2, 2)}, tmp_path / "mm_projector.bin")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ModelError, match=rf"config\.json: {complaint}"):
        open_foreign(tmp_path)


def test_a_whole_llava(tmp_path: Path) -> None:
    whole = {
        "model.layers.0.mlp.up_proj.weight": torch.randn(2, 2),
        "lm_head.weight": torch.randn(2, 2),
        "model.mm_projector.0.weight": torch.randn(2, 2),
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias": torch.randn(2),
    }
    save_file(whole, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert list(open_foreign(tmp_path).weights) == [
        "llm.lm_head.weight",
        "llm.model.layers.0.mlp.up_proj.weight",
        "projector.model.0.weight",
        "visual_encoder.vision_model.post_layernorm.bias",
    ]


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"projector.model.0.weight": 3}, tmp_path / "number.pth")
    torch.save({"meta": {"iter": []}, "state_dict": PROJECTOR}, tmp_path / "odd.pth")
    (tmp_path / "x.txt").write_text("x", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{}", encoding="utf-8")
    save_file({"model.norm.weight": torch.ones(1)}, tmp_path / "llm" / "model.safetensors")
    for name, complaint in {
        "gone.pth": "no such file or folder",
        "x" * 300: "cannot be read: File name too long",
        "other.pth": r"no weights of a LLaVA are in it \(it begins with conv.weight\)",
        "list.pth": "no weights are in it, but a list",
        "number.pth": "is a int, not a tensor",
        "odd.pth": "not made as XTuner or LLaVA make theirs",
        "x.txt": r"neither \.safetensors nor \.pth, \.pt, \.bin",
        "empty": "no checkpoint of a known form",
        "llm": "it has no mm_projector",
    }.items():
        with pytest.raises(ModelError, match=complaint):
            open_foreign(tmp_path / name)


def test_adapters_that_are_more_than_lora_are_refused(tmp_path: Path) -> None:
    (tmp_path / "projector").mkdir()
    write_adapter(tmp_path / "llm_adapter", LORA, "llm.", pickled=False, use_dora=True)
    with pytest.raises(Exception, match=r"adapter_config\.json: use_dora is set"):
        open_foreign(tmp_path)


def test_the_real_ones(tmp_path: Path) -> None:
    for stage, tensors in (("pretrain", 4), ("finetune", 62)):
        found = open_foreign(XTUNER / "tiny" / f"{stage}_iter_10.pth")
        assert len(found.weights) == tensors
        assert (found.iteration, found.last_iteration, found.seed) == (10, 80, 0)
