"""XTuner's configs -> fields of a recipe."""

from __future__ import annotations

from typing import Any

import pytest

from dianjing.data.template import TEMPLATES
from dianjing.errors import ConfigError
from dianjing.formats.pickle import read_checkpoint
from dianjing.formats.xtuner_config import read_xtuner_config, template_name
from tests.xtuner import XTUNER

SMALL = """
max_length = int(2048 - (336 / 14)**2)
model = dict(
    llm=dict(pretrained_model_name_or_path='llm', quantization_config=dict(load_in_4bit=True)),
    llm_lora=dict(r=512, lora_alpha=256, lora_dropout=0.05, bias='none'),
    visual_encoder=dict(pretrained_model_name_or_path='clip'),
    visual_select_layer=-3)
one = dict(data_path='a.json', image_folder='images', max_length=max_length, pad_image_to_square=True,
    template_map_fn=dict(template='xtuner.utils.PROMPT_TEMPLATE.vicuna'))
train_dataloader = dict(batch_size=16, num_workers=4, dataset=one,
    sampler=dict(type='xtuner.dataset.samplers.LengthGroupedSampler'))
optim_wrapper = dict(optimizer=dict(type='torch.optim.AdamW', lr=2e-4, betas=(0.9, 0.99), weight_decay=0.1),
    clip_grad=dict(max_norm=1), accumulative_counts=4)
param_scheduler = [dict(type='x.LinearLR', begin=0, end=0.06), dict(type='x.CosineAnnealingLR', begin=0.06, end=2)]
train_cfg = dict(max_epochs=2)
default_hooks = dict(checkpoint=dict(interval=500, max_keep_ckpts=2), logger=dict(interval=10))
"""


def test_a_config_of_a_real_run() -> None:
    text = read_checkpoint(XTUNER / "tiny" / "finetune_iter_10.pth")["meta"]["cfg"]
    config = read_xtuner_config(text, "x")
    assert config.fields["data.max_tokens"] == 240
    assert config.fields["data.order"] == "length_grouped"
    assert config.fields["train.learning_rate"] == 0.002
    assert (config.batch_size, config.accumulation, config.template) == (2, 1, "internlm2_chat")
    assert {part: adapter.alpha for part, adapter in config.adapters.items()} == {"llm": 2, "visual_encoder": 1}
    assert not config.notes


def test_each_field_goes_where_it_belongs() -> None:
    config = read_xtuner_config(SMALL, "x")
    assert config.fields == {
        "language_model.folder": "llm",
        "language_model.quantization": "nf4",
        "vision_tower.folder": "clip",
        "vision_tower.feature_layer": -3,
        "data.path": "a.json",
        "data.images": "images",
        "data.aspect": "pad",
        "data.max_tokens": 1472,
        "data.pack_tokens": 4096,
        "data.on_long_record": "truncate",
        "data.order": "length_grouped",
        "data.workers": 4,
        "train.learning_rate": 2e-4,
        "train.betas": [0.9, 0.99],
        "train.weight_decay": 0.1,
        "train.clip_norm": 1,
        "train.epochs": 2,
        "train.warmup_ratio": 0.03,
        "train.log_every": 10,
        "train.save_every": 125,
    }
    assert (config.batch_size, config.accumulation, config.template) == (16, 4, "vicuna")
    assert config.lora_ranks == {"llm": 512}
    assert config.adapters["llm"].dropout == 0.05


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("batch_size=16", "batch_size='many'"),
        ("batch_size=16", "batch_size=None"),
        ("accumulative_counts=4", "accumulative_counts=0.5"),
        ("lora_alpha=256", "lora_alpha=None"),
        ("r=512", "r='x'"),
        ("max_length=max_length", "max_length='long'"),
        ("max_length=max_length", "max_length=[1]"),
        ("end=0.06)", "end=[1])"),
        ("interval=500", "interval='often'"),
        ("data_path='a.json', image_folder='images'", "data_path='a.json', image_folder=[1]"),
    ],
)
def test_a_value_of_the_wrong_kind_is_said_to_be_one(written: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=r"c\.py: a value in it is not of its kind"):
        read_xtuner_config(SMALL.replace(written, instead, 1), "c.py")


def test_several_data_sets_are_joined_where_their_pictures_lie_together() -> None:
    two = SMALL.replace("dataset=one", "dataset=dict(datasets=[one, dict(one, data_path='b.json')])")
    two = two.replace("dict(one, data_path='b.json')", "dict(**one, data_path='b.json')")
    assert read_xtuner_config(two, "x").fields["data.path"] == ["a.json", "b.json"]
    apart = two.replace("data_path='b.json')", "data_path='b.json', image_folder='other')")
    assert "data.path" not in read_xtuner_config(apart, "x").fields
    unlike = two.replace("data_path='b.json')", "data_path='b.json', max_length=7)")
    with pytest.raises(ConfigError, match="differ in max_length"):
        read_xtuner_config(unlike, "x")


def test_a_run_of_so_many_iterations() -> None:
    fields = read_xtuner_config(SMALL.replace("max_epochs=2", "max_iters=400"), "x").fields
    assert fields["train.max_steps"] == 100
    assert fields["train.epochs"] == 100  # enough, however small the data


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("model = dict(", "modle = dict(", "no config of a LLaVA run"),
        ("bias='none'", "bias='all'", 'llm_lora: bias = "all"'),
        ("bias='none'", "use_rslora=True", "use_rslora is set"),
        ("bias='none'", "use_dora=True", "use_dora is set"),
        ("bias='none'", "modules_to_save=['lm_head']", "modules_to_save is set"),
    ],
)
def test_what_cannot_be_held_is_refused(old: str, new: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_xtuner_config(SMALL.replace(old, new), "x")


@pytest.mark.parametrize(
    ("old", "new", "note"),
    [
        ("x.CosineAnnealingLR", "x.PolyLR", "follows LinearLR and PolyLR"),
        ("end=2)", "end=2, eta_min=1e-6)", "then a cosine to 0"),
        ("torch.optim.AdamW", "torch.optim.SGD", "its optimizer is torch.optim.SGD"),
        ("weight_decay=0.1", "eps=1e-6", "eps 1e-06"),
        ("load_in_4bit", "load_in_8bit", "8 bits"),
        ("samplers.LengthGroupedSampler", "samplers.Other", "ordered by"),
    ],
)
def test_what_training_on_will_not_do_is_noted(old: str, new: str, note: str) -> None:
    (told,) = read_xtuner_config(SMALL.replace(old, new), "x").notes
    assert note in told


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_by_path_and_in_full(name: str) -> None:
    assert template_name(f"xtuner.utils.PROMPT_TEMPLATE.{name}") == name
    template = TEMPLATES[name]
    full: Any = {"SYSTEM": "x", "INSTRUCTION": template.instruction, "SUFFIX": template.suffix, "SEP": template.sep}
    same = TEMPLATES[template_name(full)]
    assert (same.instruction, same.suffix, same.sep) == (template.instruction, template.suffix, template.sep)
    assert template_name("PROMPT_TEMPLATE.unknown") == template_name({"INSTRUCTION": "?"}) == template_name(None) == ""
