"""The kernels of fused layers against torch's own operators, and a whole model's gradients, on a GPU."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from dianjing.constants import IGNORE_INDEX
from dianjing.layers import cuda_graphs
from dianjing.layers.cross_entropy import summed_cross_entropy
from dianjing.layers.fp8 import FP8, Fp8Rows
from dianjing.layers.fused import ops
from dianjing.layers.fused.ops import Augmented, Heads
from dianjing.model.compile import speed_up
from dianjing.train.optim import set_learning_rates
from dianjing.train.shards import start_engine
from tests.conftest import MakeRecipe
from tests.llm_families import write_family
from tests.packs import outcome, prepare
from tests.tiny import gentle, write_siglip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: the kernels of fused layers are not tested"),
    pytest.mark.filterwarnings("ignore"),  # torch warns of itself
]
ROWS = 70


def same(found: Any, expected: Any) -> None:
    """Compare results of the GPU with the CPU's: bf16 to its last bits, FP8 but for numbers half-way between two."""
    if isinstance(expected, Fp8Rows):
        torch.testing.assert_close(found.scale.cpu(), expected.scale, rtol=1e-2, atol=1e-8)
        one, other = (fp8.rows.float() * fp8.scale for fp8 in (Fp8Rows(*map(Tensor.cpu, found)), expected))
        assert (one - other).norm() < 5e-3 * other.norm()
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        one, other = found.cpu().float(), expected.float()
        assert (one - other).norm() <= 3e-3 * other.norm()
    elif expected is None:
        assert found is None
    else:
        for one, other in zip(found, expected, strict=True):
            same(one, other)


def on_both(function: Any, *arguments: Any, **settings: Any) -> None:
    def moved(value: Any) -> Any:
        return value.cuda() if isinstance(value, Tensor) else value

    expected = function(*arguments, **settings)
    found = function(*map(moved, arguments), **{name: moved(value) for name, value in settings.items()})
    torch.cuda.synchronize()
    same(found, expected)


def rows(columns: int, number: int = ROWS) -> Tensor:
    return torch.randn(number, columns, dtype=torch.bfloat16)


@pytest.mark.parametrize("vocabulary", [300, 92_544])
def test_the_loss_and_its_gradient(vocabulary: int) -> None:
    torch.manual_seed(0)
    logits, targets = 4 * rows(vocabulary), torch.randint(vocabulary, (ROWS,))
    targets[::9] = IGNORE_INDEX
    own, expected = logits.cuda().requires_grad_(), logits.float().requires_grad_()
    loss = summed_cross_entropy(own * 1, targets.cuda())
    plain = summed_cross_entropy(expected, targets)
    (loss * 0.3).backward()
    (plain * 0.3).backward()
    torch.testing.assert_close(loss.cpu(), plain.detach(), rtol=1e-5, atol=0)
    same(own.grad, cast(Tensor, expected.grad).bfloat16())


@pytest.mark.parametrize("columns", [48, 2048, 8192])
def test_kernels_compute_what_the_operators_do(columns: int) -> None:
    torch.manual_seed(0)
    x, y, gradient, scale = rows(columns), rows(columns), rows(columns), torch.rand(columns) + 0.5
    weight, bias = rows(columns, 1)[0], rows(columns, 1)[0]
    for shift in (None, bias):
        on_both(ops.norm, x, weight, shift, 1e-5, y=y, fp8=True)
        on_both(ops.norm, x, weight, shift, 1e-5, keep=True)
        on_both(ops.norm, x, weight, shift, 1e-5, keep=False, fp8=True)
        center = shift is not None
        on_both(ops.norm_backward, gradient, x, weight, 1e-5, center=center)
        on_both(ops.norm_backward, gradient, x, weight, 1e-5, center=center, residual=y, column_scale=scale)
    both = rows(2 * columns)
    on_both(ops.swiglu, both, fp8=True)
    on_both(ops.swiglu_backward, gradient, both, recompute=True)
    on_both(ops.swiglu_backward, gradient, both, keep=False, column_scale=torch.rand(2 * columns) + 0.5)
    taken = torch.tensor([3, -1, 0, 3, 69])
    on_both(ops.quantize_rows, x, scale)
    on_both(ops.quantize_rows, x)
    for chosen in (None, taken):
        for keep in (True, False):
            on_both(ops.gather_and_quantize, x, chosen, keep=keep)
    for kind in ops.ACTIVATIONS:
        on_both(ops.activation, x, kind)
        on_both(ops.activation_backward, gradient, x, kind)
    on_both(ops.gather_rows, x, torch.tensor([3, -1, 0, 3]))
    fp8 = x.to(FP8)
    assert torch.equal(ops.transpose_fp8(fp8.cuda()).cpu().float(), fp8.float())
    assert ops.transpose_fp8(fp8.cuda()).stride() == (1, ROWS)


def test_a_norm_goes_into_an_augmented_matrix() -> None:
    torch.manual_seed(0)
    x, weight = rows(48).cuda(), rows(48, 1)[0].cuda()
    whole = torch.full((ROWS, 4 + 48 + 10), 7.0, dtype=torch.bfloat16, device="cuda")
    found = ops.norm(x, weight, None, 1e-5, augmented=Augmented(whole, 4, 48)).rows
    assert found is not None
    assert found.data_ptr() == whole[:, 4:].data_ptr()
    assert torch.equal(found, cast(Tensor, ops.norm(x, weight, None, 1e-5).rows))
    assert (whole[:, :4] == 7).all()
    assert (whole[:, 52:] == 7).all()


@pytest.mark.parametrize("heads", [Heads(4, 2, 6), Heads(16, 8, 128), Heads(7, 1, 64)])
def test_kernels_rotate_as_the_operators_do(heads: Heads) -> None:
    torch.manual_seed(0)
    qkv, angle = rows((heads.query + 2 * heads.key_value) * heads.size), torch.rand(ROWS, heads.size // 2)
    cos, sin = (torch.cat([part, part], dim=1).bfloat16() for part in (angle.cos(), angle.sin()))
    permuted = torch.randperm(ROWS + 5)[:ROWS]
    source = torch.full((ROWS + 5,), -1).index_copy(0, permuted, torch.arange(ROWS))
    for number, tokens, slots in ((ROWS, None, None), (ROWS + 5, source, permuted)):
        on_both(ops.rope, qkv, cos, sin, heads, tokens)
        counts = (heads.query, heads.key_value, heads.key_value)
        gradients = [torch.randn(number, count, heads.size, dtype=torch.bfloat16) for count in counts]
        on_both(ops.rope_backward, *gradients, cos, sin, slots)
        on_both(ops.rope_backward, *gradients, cos, sin, slots, keep=False, column_scale=torch.rand(qkv.shape[1]) + 0.5)


@pytest.mark.parametrize("heads", [Heads(4, 2, 6), Heads(16, 8, 128), Heads(7, 1, 64)])
def test_kernels_norm_queries_and_keys_as_the_operators_do(heads: Heads) -> None:
    torch.manual_seed(0)
    qkv, gradient = (rows(heads.number * heads.size) for _ in range(2))
    q_weight, k_weight = (1 + 0.2 * rows(heads.size, 1)[0] for _ in range(2))
    on_both(ops.qk_norm, qkv, q_weight, k_weight, heads, 1e-6)
    on_both(ops.qk_norm_backward, gradient, qkv, q_weight, k_weight, heads, 1e-6)


@pytest.mark.parametrize("share", [0.05, 0.25])
def test_dropout_drops_its_share_and_the_same_again(share: float) -> None:
    x, seeds = torch.ones(1000, 513, device="cuda", dtype=torch.bfloat16), torch.tensor([5, 6, 7], device="cuda")
    found = ops.dropout(x, seeds, share)
    gone = (found == 0).float()
    for one in range(3):
        assert float(gone[one].mean()) == pytest.approx(share, abs=0.002)
        assert float(found[one].float().mean()) == pytest.approx(1, abs=0.01)
        # Of two adapters, and of neighbours, none knows of the other.
        assert float((gone[one] * gone[one - 1]).mean()) == pytest.approx(share**2, abs=0.002)
        for far in (1, 2, 4, 8):
            alike = gone[one].flatten()[far:] * gone[one].flatten()[:-far]
            assert float(alike.mean()) == pytest.approx(share**2, abs=0.002)
    assert torch.equal(found[1:2], ops.dropout(x, seeds[1:2], share))
    parts, into = torch.randn(3, 1000, 513, device="cuda").bfloat16(), torch.randn(1000, 513, device="cuda").bfloat16()
    expected = into.float() + (parts.float() * (1 - gone) / (1 - share)).sum(0)
    ops.add_dropout(into, parts, seeds, share)
    assert (into.float() - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("frozen", ["", "fp8"])
@pytest.mark.parametrize("tuning", [{}, {"tuning": "lora"}, {"tuning": "lora", "lora_dropout": 0.1}])
def test_a_fused_model_is_as_near_the_truth_as_the_plain_one(
    make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory, tuning: Any, frozen: str
) -> None:
    recipe = make_recipe(
        "finetune" if tuning else "pretrain", **gentle(tmp_path_factory.mktemp("gentle"), frozen, tuning)
    )
    found = []
    for fast in (False, True):
        model, dataset = prepare(recipe, "cuda")
        if fast:
            assert "compiled" not in speed_up(model)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and not fast:
                module.p = 0.0
        # Padded, records of different lengths, and no picture.
        batches = [dataset.batch(records).to("cuda") for records in ([1, 3, 1, 3], [0, 4, 6], [2, 7])]
        found.append(outcome(model, batches))
    plain, fused = found
    assert fused[0].item() == pytest.approx(plain[0].item(), rel=0.05 if "lora_dropout" in tuning else 0.01)
    assert fused[1].keys() == plain[1].keys()
    if "lora_dropout" in tuning:
        assert all(bool(gradient.isfinite().all()) for gradient in fused[1].values())
        return
    one, other = (torch.cat([gradient.flatten() for gradient in part[1].values()]) for part in found)
    assert (one - other).norm() < (0.1 if frozen else 0.03) * one.norm()


@pytest.mark.parametrize("frozen", ["", "fp8"])
@pytest.mark.parametrize("tuning", [{}, {"tuning": "lora"}])
def test_a_fused_qwen3_too(
    make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory, tuning: Any, frozen: str
) -> None:
    """Its queries and keys are normed, head by head."""
    folder = tmp_path_factory.mktemp("qwen3")
    sections = gentle(folder, frozen, tuning)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.05}
    sections["language_model"]["folder"] = str(write_family(folder / "qwen3", "qwen3", **sizes))
    found = []
    for fast in (False, True):
        model, dataset = prepare(make_recipe("finetune" if tuning else "pretrain", **sections), "cuda")
        if fast:
            assert "language model fused" in speed_up(model)
        batches = [dataset.batch(records).to("cuda") for records in ([1, 3, 1, 3], [0, 4, 6], [2, 7])]
        found.append(outcome(model, batches))
    plain, fused = found
    assert fused[0].item() == pytest.approx(plain[0].item(), rel=0.01)
    one, other = (torch.cat([gradient.flatten() for gradient in part[1].values()]) for part in found)
    assert (one - other).norm() < (0.15 if frozen else 0.05) * one.norm()


@pytest.mark.parametrize("records", [[0], [0, 4]])
def test_a_siglip_tower_of_one_picture_too(
    make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory, records: list[int]
) -> None:
    sections = gentle(tmp_path_factory.mktemp("gentle"), tuning={"tuning": "lora"})
    siglip = write_siglip(tmp_path_factory.mktemp("siglip"), hidden_size=32, intermediate_size=64)
    sections["vision_tower"]["folder"] = str(siglip)
    found = []
    for fast in (False, True):
        model, dataset = prepare(make_recipe("finetune", **sections), "cuda")
        if fast:
            speed_up(model)
        found.append(outcome(model, [dataset.batch(records).to("cuda")]))
    one, other = (torch.cat([gradient.flatten() for gradient in part[1].values()]) for part in found)
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=0.01)
    assert (one - other).norm() < 0.03 * one.norm()


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_replayed_tower_is_the_tower(
    make_recipe: MakeRecipe,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    dropout: float,
    multiple: int,
) -> None:
    monkeypatch.setattr(cuda_graphs, "MULTIPLE", multiple)
    tuning = {"tuning": "lora", "lora_dropout": dropout}
    recipe = make_recipe("finetune", **gentle(tmp_path_factory.mktemp("gentle"), tuning=tuning))
    plain, dataset = prepare(recipe, "cuda")
    replayed, _ = prepare(recipe, "cuda")
    speed_up(plain)
    assert speed_up(replayed, cuda_graphs=True) == "layers: language model fused, vision tower fused and in CUDA graphs"
    # Of one, two and three pictures, and the first again: graphs share their memory.
    batches = [dataset.batch(records).to("cuda") for records in ([0], [0, 1], [0, 1, 3], [0])]
    for again in range(2):
        for batch in batches:
            # Replayed or not, the same is dropped, and a capture on the way changes nothing.
            torch.manual_seed(again)
            one = outcome(plain, [batch])
            torch.manual_seed(again)
            other = outcome(replayed, [batch])
            assert other[0].item() == pytest.approx(one[0].item(), rel=1e-3)
            assert one[1].keys() == other[1].keys()
            for name, gradient in one[1].items():
                assert float((other[1][name] - gradient).norm()) <= 0.02 * float(gradient.norm()), name
        # What is made of the weights is made again when these have changed.
        for model in (plain, replayed):
            engine = start_engine(recipe, Accelerator(), model)
            set_learning_rates(engine.optimizer, 1.0)
            engine.step(one[0])


def test_an_error_during_a_capture_is_passed_on() -> None:
    weight, calls = torch.nn.Parameter(torch.tensor(2.0, device="cuda")), [0]

    def run(images: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == cuda_graphs.WARM_UP + 1:  # the first that is captured
            raise torch.OutOfMemoryError("made up")
        return images * weight

    tower = cuda_graphs.CudaGraphs(run, [weight], lambda: None)
    images = torch.arange(6.0, device="cuda").view(3, 2)
    with pytest.raises(torch.OutOfMemoryError, match="made up"):
        tower(images)
    for factor in (1.0, 3.0):
        result = tower(images * factor)
        result.sum().backward()
        assert torch.equal(result, images * factor * 2)
    assert weight.grad is not None
    assert weight.grad.item() == 15 * 4
