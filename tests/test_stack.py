"""The promise: a probe in a stack equals the same probe alone, and plain torch."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featcache.probes.heads import Head as HeadModule
from featcache.probes.losses import LOSSES, bce, ce
from featcache.probes.schedules import factors
from featcache.probes.spec import Head, Loss, Optimizer, ProbeSpec, Schedule
from featcache.probes.stack import blocks, epoch_order, predict, train_block
from featcache.probes.weights import initial_weights

N, D, C, S = 150, 48, 7, 4
LINEAR, MLP3 = Head("linear"), Head("mlp", 3, 16, "bn")


@pytest.fixture(scope="module")
def data():
    """Pooled [N, D], maps [N, D, S], multi-label int8 [N, C] with ignored entries, classes [N]."""
    random = np.random.default_rng(0)
    maps = torch.from_numpy(random.gamma(1.0, size=(N, D, S)).astype(np.float32)).half()
    multi = torch.from_numpy(random.choice([1, 0, -1], p=[0.25, 0.65, 0.1], size=(N, C)).astype(np.int8))
    return maps.float().mean(2), maps, multi, torch.from_numpy(random.integers(0, C, N))


def specs(count, head, optimizer="sgd", epochs=4, batch_size=32, rate=0.3, **fixed):
    """Probes that differ in loss, rate, decay, schedule and seed."""
    schedules = (Schedule("cosine", warmup_epochs=1), Schedule("step", (0.5,)), Schedule())
    return [
        ProbeSpec(
            name="x",
            features="layer4:pooled",
            head=head,
            loss=Loss(fixed.get("loss", ("bce", "ce")[i % 2])),
            optimizer=Optimizer(
                optimizer,
                (0.01 if optimizer == "adam" else rate) * (1 + i % 5),
                0.9 if optimizer == "sgd" else 0.0,
                1e-3 * (i % 3),
            ),
            schedule=schedules[i % 3],
            epochs=epochs,
            batch_size=batch_size,
            seed=i,
        )
        for i in range(count)
    ]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("labels", ["multi", "single"])
@pytest.mark.parametrize(
    "head",
    [LINEAR, Head("linear", bias=False), Head("mlp", 2, 16, "bn"), MLP3, Head("mlp", 2, 16, "none", bias=False)],
    ids=str,
)
def test_a_probe_among_32_equals_the_same_probe_alone(data, head, optimizer, labels):
    pooled, maps, multi, single = data
    features = pooled if head.type == "linear" else maps
    targets = multi if labels == "multi" else single
    (block,) = blocks(specs(32, head, optimizer), D, S, C)
    together = train_block(block, features, targets, C, 0)
    assert [t.spec for t in together] == block
    for number in (0, 7, 15, 16, 31):
        (alone,) = train_block([block[number]], features, targets, C, 0)
        assert largest_difference(alone.weights, together[number].weights) < 1e-5
        assert alone.losses == pytest.approx(together[number].losses, abs=1e-6)


def plain_loss(kind, logits, labels):
    """The losses as one would write them with torch, one image at a time."""
    total, count = 0, 0
    for z, y in zip(logits, labels, strict=True):
        if kind == "bce":
            y = F.one_hot(y, C) if y.ndim == 0 else y
            known = y >= 0
            total = total + F.binary_cross_entropy_with_logits(z[known], y[known].float(), reduction="sum")
            count += int(known.sum())
        else:
            count += 1
            if y.ndim == 0:
                total = total + F.cross_entropy(z[None], y[None])
            elif (y == 1).any():
                known = y >= 0
                positive = (y[known] == 1).float()
                total = total + F.cross_entropy(z[known][None], (positive / positive.sum())[None])
    return total / max(count, 1)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("labels", ["multi", "single"])
def test_losses_and_gradients_equal_torch(data, kind, labels):
    targets = (data[2] if labels == "multi" else data[3])[:20]
    logits = (torch.randn(20, 3, C) * 5).requires_grad_()
    loss, gradient = LOSSES[kind](logits.detach(), targets)
    for p in range(3):
        expected = plain_loss(kind, logits[:, p], targets)
        assert loss[p].item() == pytest.approx(expected.item(), rel=1e-5)
        (slow,) = torch.autograd.grad(expected, logits)
        torch.testing.assert_close(gradient[:, p], slow[:, p], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [bce, ce])
def test_losses_at_their_limits(loss):
    huge = torch.tensor([[[0.0, 1e4, -1e4]]])
    for labels in ([[1, 1, 0]], [[-1, -1, -1]], [[0, 0, 0]], [[-1, 1, -1]]):
        value, gradient = loss(huge, torch.tensor(labels, dtype=torch.int8))
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        assert (gradient[0, 0][torch.tensor(labels[0]) < 0] == 0).all(), (
            "an ignored class is neither pushed up nor down"
        )
    assert loss(huge, torch.tensor([[-1, -1, -1]], dtype=torch.int8))[0].item() == 0


def torch_alone(spec, features, labels):
    """Train one probe the ordinary way: a Sequential of 1x1 convolutions, autograd, torch.optim."""
    weights = initial_weights(spec, D, C)
    maps = features.float().reshape(N, D, -1, 1)
    layers = []
    for i in range(spec.head.layers):
        weight = weights[f"fc{i}.weight"]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=f"fc{i}.bias" in weights)
        conv.weight.data = weight[:, :, None, None].clone()
        if conv.bias is not None:
            conv.bias.data = weights[f"fc{i}.bias"].clone()
        layers.append(conv)
        if i < spec.head.layers - 1:
            layers += [nn.BatchNorm2d(weight.shape[0])] * (spec.head.norm == "bn") + [nn.ReLU()]
    model = nn.Sequential(*layers).train()
    o = spec.optimizer
    if o.type == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), o.lr, o.momentum, weight_decay=o.weight_decay)
    else:
        optimizer = torch.optim.Adam(model.parameters(), o.lr, weight_decay=o.weight_decay)
    steps = math.ceil(N / spec.batch_size)
    for epoch in range(spec.epochs):
        for step, rows in enumerate(epoch_order(N, 0, epoch).split(spec.batch_size)):
            optimizer.param_groups[0]["lr"] = o.lr * float(factors(spec.schedule, spec.epochs, steps, epoch)[step])
            optimizer.zero_grad()
            plain_loss(spec.loss.type, model(maps[rows]).mean((2, 3)), labels[rows]).backward()
            optimizer.step()
    return model.eval(), maps


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("loss", ["bce", "ce"])
@pytest.mark.parametrize("head", [LINEAR, Head("mlp", 2, 16, "bn"), MLP3], ids=str)
def test_a_stack_equals_plain_torch(data, head, loss, optimizer):
    pooled, maps, multi, _ = data
    features = pooled if head.type == "linear" else maps
    # Rates at which training is stable: the two sum in another order, and chaos would enlarge that.
    (block,) = blocks(specs(3, head, optimizer, epochs=3, loss=loss, rate=0.03), D, S, C)
    trained = train_block(block, features, multi, C, 0)
    logits = predict(block, [t.weights for t in trained], features, C)
    for number, probe in enumerate(trained):
        model, inputs = torch_alone(probe.spec, features, multi)
        with torch.no_grad():
            expected = model(inputs).mean((2, 3))
            module = HeadModule(probe.spec, probe.weights)(inputs)
        torch.testing.assert_close(logits[number], expected, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(module, logits[number], rtol=1e-5, atol=1e-5)
        first = model[0].weight.detach()[:, :, 0, 0]
        torch.testing.assert_close(probe.weights["fc0.weight"], first, rtol=1e-4, atol=2e-5)


def test_linear_on_the_map_equals_linear_on_pooled(data):
    pooled, maps, multi, _ = data
    (spec,) = specs(1, LINEAR)
    (trained,) = train_block([spec], pooled, multi, C, 0)
    module = HeadModule(spec, trained.weights)
    torch.testing.assert_close(module(maps.float()[..., None]), module(pooled[..., None, None]), rtol=1e-5, atol=1e-5)


def test_an_mlp_before_and_after_pooling_are_different_models(data):
    pooled, maps, multi, _ = data
    (spec,) = specs(1, Head("mlp", 2, 16, "bn"))
    after, before = (train_block([spec], x, multi, C, 0)[0].weights for x in (maps, pooled))
    assert largest_difference(after, before) > 1e-3


@pytest.mark.parametrize("head", [LINEAR, MLP3], ids=str)
def test_one_diverging_probe_costs_its_neighbours_nothing(data, head):
    pooled, maps, multi, _ = data
    features = pooled if head.type == "linear" else maps
    good = specs(6, head, loss="bce")
    from dataclasses import replace

    wild = replace(good[2], optimizer=replace(good[2].optimizer, lr=1e30))
    trained = train_block([*good[:2], wild, *good[3:]], features, multi, C, 0)
    healthy = train_block(good, features, multi, C, 0)
    assert trained[2].diverged is not None and all(w.isnan().all() for w in trained[2].weights.values())
    for number in (0, 1, 3, 4, 5):
        assert trained[number].diverged is None
        assert largest_difference(trained[number].weights, healthy[number].weights) < 1e-6


def test_step_schedule_is_torchs():
    schedule, epochs, steps = Schedule("step", (0.5, 8), 0.1), 10, 3
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 8], 0.1)
    for epoch in range(epochs):
        assert factors(schedule, epochs, steps, epoch).tolist() == pytest.approx(
            [optimizer.param_groups[0]["lr"]] * steps
        )
        optimizer.step()
        oracle.step()


def test_cosine_and_warm_up():
    steps, epochs = 4, 6
    rates = torch.cat([factors(Schedule("cosine"), epochs, steps, e) for e in range(epochs)])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    for rate in rates.tolist():
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    warm = torch.cat([factors(Schedule("cosine", warmup_epochs=2), epochs, steps, e) for e in range(epochs)])
    assert warm[:8].tolist() == pytest.approx([(i + 1) / 8 for i in range(8)])
    assert warm[8] == 1 and (warm[8:].diff() < 0).all()


def test_blocks_hold_what_fits_and_lose_nobody():
    wanted = specs(40, LINEAR) + specs(6, MLP3) + specs(3, LINEAR, "adam") + specs(2, LINEAR, batch_size=8)
    made = blocks(wanted, 2048, 49, 1000)
    assert sorted(s.id for block in made for s in block) == sorted(s.id for s in wanted)
    assert max(len(block) for block in made) < 40, "1000 classes: forty probes do not fit a block"
    for block in made:
        assert len({(s.head, s.optimizer.type, s.batch_size, s.epochs) for s in block}) == 1
        kinds = [s.loss.type for s in block]
        assert kinds == sorted(kinds)


def test_initial_weights_are_torchs_distribution():
    weights = initial_weights(specs(1, Head("mlp", 2, 512))[0], 400, 10)
    reference = nn.Linear(400, 512)
    assert weights["fc0.weight"].std() == pytest.approx(reference.weight.std().item(), rel=0.02)
    assert weights["fc0.weight"].abs().max() <= 1 / 20
