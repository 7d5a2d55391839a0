"""Operations of a sample, against sums made by hand and against torch's own count."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from dianjing.model.forward import forward_loss
from dianjing.plan.flops import flops
from dianjing.plan.lengths import Lengths
from dianjing.plan.shapes import INTERNLM2_1_8B, shapes_of
from tests.conftest import MakeRecipe
from tests.packs import prepare

SHORT = Lengths(tokens=616, tokens_squared=616**2, supervised=25, pictures=1)
LONG = Lengths(tokens=876, tokens_squared=876**2, supervised=150, pictures=1)


def test_known_sums_of_internlm2(make_recipe: MakeRecipe) -> None:
    """4.24 and 9.16 TFLOP: added up by hand, term by term, for q, k and v in one layer of LoRA."""
    pretrain = flops(INTERNLM2_1_8B, make_recipe("pretrain"), SHORT)
    assert pretrain.useful == pytest.approx(4.24e12, rel=2e-3)
    lora = {"tuning": "lora", "lora_rank": 512}
    finetune = make_recipe("finetune", language_model=lora, vision_tower={"tuning": "lora", "lora_rank": 64})
    apart = 6 * LONG.tokens * 512 * INTERNLM2_1_8B.layers * 2 * INTERNLM2_1_8B.hidden
    assert flops(INTERNLM2_1_8B, finetune, LONG).useful - apart == pytest.approx(9.16e12, rel=2e-3)
    assert INTERNLM2_1_8B.linear == 1_509_949_440


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tuning", ["frozen", "full"])
def test_torch_counts_the_same(make_recipe: MakeRecipe, tuning: str) -> None:
    stage = "pretrain" if tuning == "frozen" else "finetune"
    recipe = make_recipe(stage, language_model={"tuning": tuning}, vision_tower={"tuning": tuning})
    model, dataset = prepare(recipe)
    batch = dataset.batch([0])
    # Every row is supervised, so that the last layer skips none.
    rows = batch.input_ids.new_tensor(range(batch.num_tokens))
    batch = replace(batch, target_rows=rows, targets=rows % 7)
    with FlopCounterMode(display=False) as counter:
        forward_loss(model, batch).backward()
    lengths = Lengths(
        tokens=batch.num_tokens,
        tokens_squared=0,
        supervised=batch.num_tokens,
        pictures=batch.num_images,
    )
    shapes = shapes_of(model)
    # On a CPU torch counts no attention.
    passes = 1 if tuning == "frozen" else 3
    attention = passes * 4 * shapes.positions**2 * shapes.tower_width * shapes.tower_layers * batch.num_images
    assert counter.get_total_flops() == flops(shapes, recipe, lengths).useful - attention


def test_tuning_adds_what_it_computes(make_recipe: MakeRecipe) -> None:
    shapes = INTERNLM2_1_8B
    frozen = flops(shapes, make_recipe("finetune"), LONG)
    full = flops(shapes, make_recipe("finetune", language_model={"tuning": "full"}), LONG)
    head = 2 * LONG.supervised * shapes.hidden * shapes.vocabulary
    assert full.useful - frozen.useful == pytest.approx(2 * LONG.tokens * shapes.linear + head)
    assert (frozen.frozen, full.frozen) == (4 * LONG.tokens * shapes.linear, 0)
    assert frozen.again < frozen.useful / 2
