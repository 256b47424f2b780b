"""B-cos heads and uncentred batch norm against the bcos package, alone and in stacks."""

import math

import pytest
import torch
from captum.attr import InputXGradient, LayerGradCam
from loop import train_block
from parts import Head
from plain import Plain
from stacks import C, D, S, largest_difference, specs
from torch import nn

import featcache
from featcache.attribution.methods.gradcam import GradCAM
from featcache.errors import BadInput
from featcache.probes.engine.blocks import blocks
from featcache.probes.engine.memory import CPU
from featcache.probes.engine.predict import Predictor
from featcache.probes.grids.grid import parse_grid
from featcache.probes.heads.module import HeadModule
from featcache.probes.weights import initial_weights
from featcache.reporting.configuration import describe_head

ONE = Head("bcos", 1, 0, "none", False, b=2.0)
HEADS = [
    ONE,
    Head("bcos", 1, 0, "none", False, b=1.5, max_out=3, offset=-1.5),
    Head("bcos", 2, 16, "bnu", False, b=2.0, offset=-math.log(C - 1)),
    Head("bcos", 3, 16, "bnu", False, b=1.25, max_out=2),
    Head("bcos", 3, 16, "none", False, b=1.0),
    Head("mlp", 3, 16, "bnu", True),
    Head("mlp", 2, 16, "bnu", False, offset=0.25),
    Head("linear", offset=-2.0),
]


def perturbed(spec, random):
    """Weights as they might be after training: norms with statistics of their own."""
    weights = initial_weights(spec, D, C)
    for name, value in weights.items():
        if name.startswith("bn"):
            value.mul_(torch.rand(value.shape, generator=random) + 0.5)
    return weights


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_values_and_gradients_equal_the_package(data, head):
    maps = data[1].float() - 0.7
    random = torch.Generator().manual_seed(1)
    several = specs(3, head)
    weights = [perturbed(spec, random) for spec in several]
    features = maps.mean(2) if head.type == "linear" else maps
    logits = Predictor(several, weights, C, "cpu")(features)
    for spec, own, got in zip(several, weights, logits, strict=True):
        published, module = Plain(head, own).eval().double(), HeadModule(spec.head, own).double()
        inputs = maps.double().unflatten(2, (2, 2)).requires_grad_()
        expected = published(inputs)
        torch.testing.assert_close(got, expected.float().detach(), rtol=1e-6, atol=2e-6)
        # In float64, where what is left is not rounding: |cos|^(b - 1) is steep at zero.
        torch.testing.assert_close(module(inputs), expected, rtol=1e-10, atol=1e-12)
        ones = torch.randn(expected.shape, generator=random, dtype=torch.float64)
        (slow,) = torch.autograd.grad(expected, inputs, ones)
        (fast,) = torch.autograd.grad(module(inputs), inputs, ones)
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_probe_in_a_stack_equals_the_same_probe_alone(data, head, optimizer):
    pooled, maps, multi, _ = data
    features = pooled if head.type == "linear" else maps
    (block,) = blocks(specs(12, head, optimizer), D, S, C)
    together = train_block(block, features, multi, C, 0)
    assert all(t.diverged is None for t in together)
    for number in (0, 5, 11):
        (alone,) = train_block([block[number]], features, multi, C, 0)
        assert largest_difference(alone.weights, together[number].weights) < 1e-5
        assert alone.losses == pytest.approx(together[number].losses, abs=1e-6)


def test_one_layer_before_and_after_pooling_are_different_models(data):
    """The linear head commutes with the mean, a B-cos layer does not: |cos| is that of a position."""
    maps = data[1].float()
    (spec,) = specs(1, ONE)
    module = HeadModule(spec.head, initial_weights(spec, D, C))
    after, before = module(maps[..., None]), module(maps.mean(2)[..., None, None])
    assert (after - before).abs().max() > 1e-2
    assert not ONE.pools_first and Head("bcos", pool="before").pools_first and Head("linear").pools_first


@pytest.mark.parametrize("head", [HEADS[1], HEADS[2], HEADS[5]], ids=str)
def test_maps_equal_captums(head):
    """GradCAM from cached maps, and input x gradient, of a head with an offset: torch's own network in front."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, D, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)).eval().requires_grad_(False)
    (spec,) = specs(1, head)
    weights = initial_weights(spec, D, C)
    model = nn.Sequential(trunk, Plain(head, weights).eval())
    images, classes = torch.randn(4, 3, 8, 8).requires_grad_(), torch.tensor([0, 3, 6, 1])
    module = HeadModule(spec.head, weights)
    oracle = LayerGradCam(model, model[0]).attribute(images, classes, relu_attributions=False)[:, 0]
    torch.testing.assert_close(
        GradCAM().small(module, trunk(images.detach()), classes), oracle.detach(), rtol=1e-5, atol=1e-6
    )
    expected = InputXGradient(model).attribute(images, classes)
    got = InputXGradient(nn.Sequential(trunk, module)).attribute(images, classes)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_blocks_of_b_cos_heads_fit_the_cache():
    """The last layer of a B-cos head runs at every position, so that its outputs count among the activations."""
    classes = 1000
    for head in (ONE, Head("bcos", 3, 64, "bnu", False, b=2.0, max_out=2)):
        made = blocks(specs(40, head, batch_size=8), 256, 49, classes)
        for block in made:
            outputs = head.max_out * classes
            assert len(block) * outputs * 256 * 4 <= CPU.weights
            assert len(block) * outputs * 8 * 49 * 4 <= CPU.activations
        assert sum(len(b) for b in made) == 40


def group(head, **change):
    return {"probes": [{"features": "last:spatial", "head": head, "loss": "bce", "epochs": 1,
                        "optimizer": {"type": "sgd", "lr": 1}, **change}]}  # fmt: skip


def test_grid_fields():
    grid = parse_grid(group({"type": "bcos", "layers": [1, 2, 3], "hidden": [64, 128], "offset": ["-ln(C-1)", "1e-1"]}))
    heads = [s.head for s in grid.specs]
    assert len(heads) == 2 + 4 + 4, "widths make one head of one layer, not two"
    assert heads[0] == Head("bcos", 1, 0, "none", False, "after", 2.0, 1, "-ln(C-1)")
    assert heads[-1] == Head("bcos", 3, 128, "bnu", False, "after", 2.0, 1, 0.1)
    (spec,) = parse_grid(group("bcos")).specs
    assert spec.head == ONE and describe_head({f"head.{k}": str(v) for k, v in vars(spec.head).items()}) == "bcos-1"
    assert parse_grid(group({"type": "mlp", "norm": "bnu"})).specs[0].head.norm == "bnu"
    assert Head("bcos", offset="-ln(C-1)").resolved(1000).offset == -math.log(999)
    assert Head("bcos", offset=0.5).resolved(1).offset == 0.5
    with pytest.raises(BadInput, match="at least two classes"):
        Head("bcos", offset="-ln(C-1)").resolved(1)
    assert Head("bcos", offset="-ln(C-1)").resolved(1000).shift == -math.log(999)
    with pytest.raises(ValueError, match="no value before resolved"):
        Head("bcos", offset="-ln(C-1)").shift  # noqa: B018


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"type": "bcos", "norm": "bn"}, "head.norm: 'bn' is not one of bnu, none"),
        ({"type": "bcos", "bias": True}, "head.bias: unknown field"),
        ({"type": "bcos", "b": 0.5}, "head.b: 0.5 is not a number of at least 1"),
        ({"type": "bcos", "max_out": 0}, "head.max_out: 0 is not a whole number of at least 1"),
        ({"type": "linear", "offset": "ln(C)"}, "head.offset: 'ln(C)' is not a number of at least -1e+06 and at most 1e+06, or -ln(C-1)"),
    ],
)  # fmt: skip
def test_errors_name_the_field(head, message):
    with pytest.raises(BadInput) as caught:
        parse_grid(group(head))
    assert message in caught.value.message


@pytest.mark.process
def test_a_run_of_b_cos_heads(store, tmp_path):
    head = {"type": "bcos", "layers": [1, 2], "hidden": 8, "offset": "-ln(C-1)"}
    run = featcache.train_probes(group(head, optimizer={"type": "adam", "lr": 0.01}), store=store, run=tmp_path / "r")
    assert {r["head.offset"] for r in run.scores} == {str(-math.log(9))}
    assert {describe_head(r) for r in run.scores} == {"bcos-1", "bcos-2 (8)"}
    with pytest.raises(BadInput, match="head of type bcos on layer4:pooled is another model.*pool: before"):
        featcache.train_probes(group("bcos", features="pooled"), store=store, run=tmp_path / "q")
