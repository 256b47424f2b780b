"""The promise: a probe in a stack equals the same probe alone, and plain torch."""

import math
from dataclasses import replace

import pytest
import torch
from loop import train_block
from parts import Head, changed
from plain import assert_near, train_plain
from stacks import C, D, N, S, largest_difference, specs

from featcache.probes.engine.blocks import blocks
from featcache.probes.engine.memory import MemoryBudget
from featcache.probes.engine.predict import Predictor
from featcache.probes.engine.training import Training
from featcache.probes.heads.module import HeadModule
from featcache.probes.heads.stacked_layers import Memory

LINEAR, MLP3 = Head("linear"), Head("mlp", 3, 16, "bn")


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
    assert [t.spec for t in together] == list(block)
    for number in (0, 7, 15, 16, 31):
        (alone,) = train_block([block[number]], features, targets, C, 0)
        assert largest_difference(alone.weights, together[number].weights) < 1e-5
        assert alone.losses == pytest.approx(together[number].losses, abs=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("loss", ["bce", "ce"])
@pytest.mark.parametrize("head", [LINEAR, Head("mlp", 2, 16, "bn"), MLP3], ids=str)
def test_a_stack_equals_plain_torch(data, head, loss, optimizer):
    pooled, maps, multi, _ = data
    features = pooled if head.type == "linear" else maps
    # Rates at which training is stable: the two sum in another order, and chaos would enlarge that.
    (block,) = blocks(specs(3, head, optimizer, epochs=3, loss=loss, rate=0.03), D, S, C)
    trained = train_block(block, features, multi, C, 0)
    logits = Predictor(block, [t.weights for t in trained], C, "cpu")(features)
    for number, probe in enumerate(trained):
        steps = math.ceil(N / probe.spec.batch_size)
        rates = [probe.spec.schedule.factors(probe.spec.epochs, steps, epoch) for epoch in range(probe.spec.epochs)]
        alone = train_plain(probe.spec, maps, multi, lambda epoch, step, r=rates: float(r[epoch][step]))
        assert_near(probe.weights, alone, 2e-5)
        module = HeadModule(probe.spec.head, probe.weights)(maps.float()[..., None])
        torch.testing.assert_close(module, logits[number], rtol=1e-5, atol=1e-5)


def test_linear_on_the_map_equals_linear_on_pooled(data):
    pooled, maps, multi, _ = data
    (spec,) = specs(1, LINEAR)
    (trained,) = train_block([spec], pooled, multi, C, 0)
    module = HeadModule(spec.head, trained.weights)
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
    wild = replace(good[2], optimizer=changed(good[2].optimizer, lr=1e30))
    trained = train_block([*good[:2], wild, *good[3:]], features, multi, C, 0)
    healthy = train_block(good, features, multi, C, 0)
    assert trained[2].diverged is not None and all(w.isnan().all() for w in trained[2].weights.values())
    for number in (0, 1, 3, 4, 5):
        assert trained[number].diverged is None
        assert largest_difference(trained[number].weights, healthy[number].weights) < 1e-6


def test_blocks_hold_what_fits_and_lose_nobody():
    wanted = specs(40, LINEAR) + specs(6, MLP3) + specs(3, LINEAR, "adam") + specs(2, LINEAR, batch_size=8)
    made = blocks(wanted, 2048, 49, 1000)
    assert sorted(s.id for block in made for s in block) == sorted(s.id for s in wanted)
    assert max(len(block) for block in made) < 40, "1000 classes: forty probes do not fit a block"
    for block in made:
        assert len({(s.head, s.optimizer.type, s.batch_size, s.epochs) for s in block}) == 1
        kinds = [s.loss.type for s in block]
        assert kinds == sorted(kinds)


def test_blocks_of_heavy_probes_fit_into_memory():
    """Attention has many weights, whatever the size of the map."""
    room = MemoryBudget.of(torch.device("cpu"))
    made = blocks(specs(200, Head("attentive", heads=8)), 768, 196, 20)
    assert len(made) > 1 and max(map(len, made)) * 4 * 4 * 768**2 <= room.activations


@pytest.mark.parametrize("head", [MLP3, Head("bcos", 2, 64, "bnu", False, b=2.0, max_out=2)], ids=str)
def test_scoring_takes_no_more_memory_than_training(data, head):
    """However many images come at a time; and it says the same of few at a time."""
    maps, labels = torch.rand(256, D, 49), data[2][:32]
    training = Training(specs(3, head), D, C, labels)
    training.begin_epoch()
    training.feed(maps[:32], labels)

    def held():
        return sum(tensor.nbytes for tensor in Memory.shared()._held.values())

    before = held()
    together = training.logits(maps)
    assert held() <= before
    few = torch.cat([training.logits(part) for part in maps.split(16)], dim=1)
    torch.testing.assert_close(together, few, rtol=0, atol=1e-5)


def test_a_gpu_takes_all_probes_of_a_grid_in_one_step():
    """64 of ImageNet's size; on a CPU a few at a time, whose weights stay in the cache."""
    wanted = specs(64, LINEAR, batch_size=1024)
    assert [len(block) for block in blocks(wanted, 2048, 1, 1000, MemoryBudget.of(torch.device("cuda")))] == [64]
    assert max(len(block) for block in blocks(wanted, 2048, 1, 1000, MemoryBudget.of(torch.device("cpu")))) == 3
