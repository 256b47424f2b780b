"""Heads in stacks against plain torch modules and the bcos package: values, gradients, statistics; and alone."""

import math

import pytest
import torch
from loop import train_block
from parts import Head, Loss, Optimizer, Schedule, every_field
from plain import Plain, assert_near
from torch import nn

import featcache
from featcache.errors import BadInput
from featcache.probes.engine.blocks import blocks
from featcache.probes.engine.predict import Predictor
from featcache.probes.grids.grid import parse_grid
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.spec import ProbeSpec
from featcache.probes.weights import initial_weights, stacked_weights

P, B, D, C, S = 3, 24, 16, 5, 6
HEADS = [
    Head("linear"),
    Head("linear", bias=False, temperature=0.5, offset=-1.0),
    Head("mlp", 2, 12, "bn"),
    Head("mlp", 3, 12, "bn", activation="gelu", temperature=2.0, offset=0.5),
    Head("mlp", 2, 12, "bnu"),
    Head("mlp", 4, 12, "bnu", bias=False, activation="gelu"),
    Head("mlp", 2, 12, "none"),
    Head("mlp", 3, 12, "none", bias=False, activation="gelu"),
    Head("bcos", 1, 0, "none", False, b=2.0),
    Head("bcos", 1, 0, "none", False, b=1.5, max_out=3, offset=-1.5),
    Head("bcos", 2, 12, "bnu", False, b=2.0, offset=-math.log(C - 1), temperature=0.1),
    Head("bcos", 3, 12, "bnu", False, b=2.0, max_out=2),
    Head("bcos", 3, 12, "bnu", False, b=1.25, max_out=2),
    Head("bcos", 3, 12, "none", False, b=1.0),
    Head("bcos", 4, 12, "none", False, b=2.5),
    # Of 24 images 10, 10 and 4; of 19 10 and 9.
    Head("mlp", 3, 12, "bn", norm_batch=10),
    Head("bcos", 3, 12, "bnu", False, b=2.0, norm_batch=10),
    Head("attentive", heads=1),
    Head("attentive", heads=4, bias=False, temperature=0.5, offset=2.0),
    Head("attentive", heads=2, queries=3),
    Head("efficient", queries=4, temperature=0.5, offset=2.0),
    Head("efficient", queries=1, shrink=2, bias=False),
    Head("bn_linear", affine=False, eps=1e-6),
    Head("bn_linear", bias=False, temperature=0.5, offset=-1.0),
    # As for a grid of four cells, whose channels share statistics.
    Head("bn_linear", affine=False, cells=4),
    Head("bn_linear", cells=4),
]


def specs(head, count=P, **change):
    given = {
        "loss": Loss("bce"),
        "optimizer": Optimizer("adam", 0.01),
        "schedule": Schedule(),
        "epochs": 3,
        "batch_size": 7,
    }
    return [ProbeSpec("x", "l:pooled", head, seed=n, **(given | change)) for n in range(count)]


@pytest.fixture(scope="module")
def maps():
    """Features of both signs, [B, D, S]."""
    return torch.randn(B, D, S, generator=torch.Generator().manual_seed(0)) * 2 + 0.5


def perturbed(stack):
    """Move norms and biases from where they begin, as training does; in float64."""
    random = torch.Generator().manual_seed(1)
    for weight in stack.weights.values():
        if weight.ndim == 2:
            weight.mul_(torch.rand(weight.shape, generator=random) + 0.5).add_(0.1)


def of_probe(tensors, p):
    return {name: tensor[p].detach().clone() for name, tensor in tensors.items()}


def step(stack, features, gradient):
    """Gradients of a training step by name, dense, and its logits."""
    logits = stack.forward(features, training=True)
    names = [name for name in stack.weights if "running" not in name]
    found = stack.backward(features, logits, gradient)
    dense = {
        name: (g[0] @ g[1] if isinstance(g, tuple) else g).reshape(stack.weights[name].shape)
        for name, g in zip(names, found, strict=True)
    }
    return logits.detach(), dense


def in_float64(head, dim):
    """A stack whose arithmetic is float64, where what is left of a difference is no rounding."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return head.stack(stacked_weights(specs(head), dim, C, "cpu"), "float32")
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("positions", [1, S])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_training_step_equals_plain_modules(maps, head, positions):
    """Logits on batch statistics, gradients of all parameters, running statistics; twice, on batches of two sizes."""
    stack = in_float64(head, D)
    perturbed(stack)
    random = torch.Generator().manual_seed(2)
    for rows in (B, B - 5):
        features = maps[:rows, :, :positions].double()
        given = features.mean(2) if head.type in ("linear", "bn_linear") or positions == 1 else features
        start = [of_probe(stack.weights, p) for p in range(P)]
        gradient = torch.randn(rows, P, C, generator=random, dtype=torch.float64)
        logits, got = step(stack, given, gradient)
        assert logits.shape == (rows, P, C)
        for p in range(P):
            plain = Plain(head, start[p]).double().train()
            expected = plain(features.unsqueeze(3))
            torch.testing.assert_close(logits[:, p], expected.detach(), rtol=1e-9, atol=1e-11)
            expected.backward(gradient[:, p])
            slow = plain.named({n: w.grad for n, w in plain.named_parameters()})
            assert slow.keys() == got.keys()
            for name, value in slow.items():
                torch.testing.assert_close(
                    got[name][p], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
                )
            state = plain.named(plain.state_dict())
            for name in (n for n in stack.weights if "running" in n):
                torch.testing.assert_close(stack.weights[name][p], state[name], rtol=1e-10, atol=1e-12)


NORMED = [head for head in HEADS if every_field("head", head).norm != "none"]


@pytest.mark.parametrize("head", [*NORMED, Head("bn_linear"), Head("bn_linear", affine=False)], ids=str)
def test_a_row_alone_goes_by_the_running_statistics(maps, head):
    """It has no variance; as modules in eval mode do, and the statistics stay."""
    stack = in_float64(head, D)
    perturbed(stack)
    start = [of_probe(stack.weights, p) for p in range(P)]
    row, gradient = maps[:1, :, :1].double(), torch.randn(1, P, C, dtype=torch.float64)
    logits, got = step(stack, row.squeeze(2), gradient)
    for p in range(P):
        plain = Plain(head, start[p]).double().eval()
        expected = plain(row.unsqueeze(3))
        torch.testing.assert_close(logits[:, p], expected.detach(), rtol=1e-9, atol=1e-11)
        expected.backward(gradient[:, p])
        for name, value in plain.named({n: w.grad for n, w in plain.named_parameters()}).items():
            torch.testing.assert_close(got[name][p], value, rtol=1e-8, atol=1e-10)
        for name in (n for n in start[p] if "running" in n):
            assert torch.equal(stack.weights[name][p], start[p][name])


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_values_and_gradients_in_float32(maps, head):
    """As they are trained: to 1e-6 of the largest."""
    stack = head.stack(stacked_weights(specs(head), D, C, "cpu"), "float32")
    perturbed(stack)
    start = [of_probe(stack.weights, p) for p in range(P)]
    gradient = torch.randn(B, P, C, generator=torch.Generator().manual_seed(2)) / B
    logits, got = step(stack, maps.mean(2) if head.type in ("linear", "bn_linear") else maps, gradient)
    for p in range(P):
        plain = Plain(head, start[p]).double().train()
        expected = plain(maps.double().unsqueeze(3))
        expected.backward(gradient[:, p].double())
        slow = plain.named({n: w.grad for n, w in plain.named_parameters()})
        for ours, theirs in [(logits[:, p], expected), *((got[name][p], slow[name]) for name in slow)]:
            assert (ours - theirs).abs().max() <= 1e-6 * max(theirs.abs().max().item(), 1)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_prediction_and_the_single_module(maps, head):
    """A Predictor, which hands batches to one stack in turn, the module, and plain modules in evaluation mode."""
    several = specs(head)
    stack = head.stack(stacked_weights(several, D, C, "cpu"), "float32")
    perturbed(stack)
    weights = [of_probe(stack.weights, p) for p in range(P)]
    many = maps.repeat(60, 1, 1) * torch.linspace(0.5, 2, 60 * B)[:, None, None]
    assert len(many) > 1024
    predictor, inputs = (
        Predictor(several, weights, C, "cpu"),
        many.mean(2) if head.type in ("linear", "bn_linear") else many,
    )
    logits = torch.cat([predictor(part) for part in inputs.split(1024)], dim=1)
    for spec, own, got in zip(several, weights, logits, strict=True):
        expected = Plain(head, own).eval()(many.unsqueeze(3)).detach()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        module = HeadModule(spec.head, own)
        torch.testing.assert_close(module(many.view(-1, D, 2, 3)), expected, rtol=1e-5, atol=1e-5)
        assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_probe_among_many_equals_the_same_probe_alone(maps, head):
    features = maps.mean(2) if head.type in ("linear", "bn_linear") else maps
    labels = (torch.rand(B, C, generator=torch.Generator().manual_seed(3)) < 0.4).to(torch.int8)
    (block,) = blocks(specs(head, 16), D, S, C)
    together = train_block(block, features, labels, C, 0)
    for number in (0, 7, 15):
        (alone,) = train_block([block[number]], features, labels, C, 0)
        assert_near(together[number].weights, alone.weights, 1e-6)


def test_stacks_do_not_write_to_memory_that_another_one_still_needs(maps):
    members = specs(Head("mlp", 2, 12, "bn"))
    one, other = (members[0].head.stack(stacked_weights(members, D, C, "cpu"), "float32") for _ in range(2))
    logits = one.forward(maps, training=True)
    kept = logits.clone()
    other.forward(maps, training=True)
    assert torch.equal(logits, kept)
    with pytest.raises(RuntimeError, match="another stack"):
        one.backward(maps, logits, torch.ones_like(logits))


def test_initial_weights_are_torchs_distribution():
    weights = initial_weights(specs(Head("mlp", 2, 512))[0], 400, 10)
    reference = nn.Linear(400, 512)
    assert weights["fc0.weight"].std() == pytest.approx(reference.weight.std().item(), rel=0.02)
    assert weights["fc0.weight"].abs().max() <= 1 / 20
    weights = initial_weights(specs(Head("attentive", heads=4))[0], 256, 10)
    attention = nn.MultiheadAttention(256, 4)
    products = torch.cat([weights[f"attention.{n}.weight"] for n in ("query", "key", "value")])
    assert products.std() == pytest.approx(attention.in_proj_weight.std().item(), rel=0.02)
    assert products.abs().max() == pytest.approx(attention.in_proj_weight.abs().max().item(), rel=1e-3)
    assert weights["attention.out.weight"].std() == pytest.approx(attention.out_proj.weight.std().item(), rel=0.02)


def test_attention_heads_must_divide_the_width():
    with pytest.raises(BadInput, match="head attentive: 3 heads do not divide features of width 16"):
        initial_weights(specs(Head("attentive", heads=3))[0], D, C)


def test_attention_needs_little_of_the_positions():
    """What a block plans with: products with all positions, but no keys or values of them."""
    weights, activations = Head("attentive", heads=8).footprint(768, 1000, 196)
    assert weights == 4 * 768**2 and activations == 8 * (196 + 768)
    made = blocks(specs(Head("attentive", heads=8), 40, batch_size=64), 768, 196, 10)
    assert sum(map(len, made)) == 40 and max(map(len, made)) > 1


def test_grid_fields():
    group = {"features": "spatial", "loss": "bce", "epochs": 1, "optimizer": {"type": "sgd", "lr": 1}}
    heads = [
        {"type": "mlp", "activation": ["relu", "gelu"]}, "attentive", {"type": "attentive", "heads": 4, "bias": False},
        {"type": "linear", "temperature": [1, "1e-1"]},
    ]  # fmt: skip
    specs = parse_grid({"probes": [group | {"head": heads}]}).specs
    assert [s.head for s in specs] == [
        Head("mlp", 2, 2048, "bn"), Head("mlp", 2, 2048, "bn", activation="gelu"), Head("attentive", heads=8),
        Head("attentive", heads=4, bias=False), Head("linear"), Head("linear", temperature=0.1),
    ]  # fmt: skip
    assert not specs[2].head.pools_first
    with pytest.raises(BadInput, match="head.heads: 0 is not a whole number of at least 1"):
        parse_grid({"probes": [group | {"head": {"type": "attentive", "heads": 0}}]})


def test_a_run_of_many_kinds(store, tmp_path):
    """Through a grid, files and scores: the new heads, losses, optimisers and schedules."""
    base = {"loss": "bce", "epochs": 2, "batch_size": 8}
    gelu = {"type": "mlp", "hidden": 8, "activation": "gelu"}
    weighed = {"type": "ce", "label_smoothing": 0.1, "class_weights": "balanced"}
    groups = [
        {
            "features": "spatial",
            "head": [{"type": "attentive", "heads": 4}, gelu],
            "loss": ["focal", "asymmetric"],
            "optimizer": {"type": "adamw", "lr": 0.01, "weight_decay": 0.1, "clip": 1},
        },
        {
            "features": "pooled",
            "head": {"type": "linear", "temperature": [1, 2]},
            "loss": [{"type": "bce", "off_label": "1/C"}, weighed],
            "optimizer": [{"type": "lars", "lr": 0.1, "lr_base": 16}, {"type": "sgd", "lr": 0.1, "nesterov": True}],
            "schedule": {"type": "step", "every": 1, "warmup_epochs": 1, "warmup_start": "1e-7"},
        },
        {
            "features": "pooled",
            "head": "linear",
            "optimizer": {"type": "lbfgs", "weight_decay": [0.1, 0.01]},
            "views": 0,
        },
    ]
    run = featcache.train_probes({"probes": [base | g for g in groups]}, store=store, run=tmp_path / "run")
    assert run.summary["probes"] == 4 + 8 + 2 and run.summary["diverged"] == []
    for spec_id in {row["probe"] for row in run.scores}:
        probe = load_probe(run.path, spec_id)
        assert HeadModule(probe.spec.head, probe.weights)(torch.randn(2, 512, 2, 2)).shape == (2, 10)
