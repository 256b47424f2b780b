"""Learning-rate schedules against torch.optim.lr_scheduler, and the published ones value by value."""

import math

import pytest
import torch
from parts import Schedule
from torch import nn
from torch.optim import lr_scheduler as torchs

from featcache.errors import BadInput
from featcache.probes.grids.grid import parse_grid
from featcache.probes.schedules.schedule import WarmedUp


def course(schedule, epochs, steps):
    return torch.cat([schedule.factors(epochs, steps, epoch) for epoch in range(epochs)]).tolist()


def torch_course(make, count):
    """Rates of `count` steps of a scheduler that make() puts on an optimizer of rate 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def each(rates, steps):
    """Rates of epochs, repeated for every step."""
    return [rate for rate in rates for _ in range(steps)]


EPOCHS, STEPS = 10, 3
PER_EPOCH = [
    (Schedule("step", (0.5, 8), 0.1), lambda o: torchs.MultiStepLR(o, [5, 8], 0.1)),
    (Schedule("step", (0.3, 0.71), 0.5), lambda o: torchs.MultiStepLR(o, [3, 7], 0.5)),
    (Schedule("step", every=3, gamma=0.2), lambda o: torchs.StepLR(o, 3, 0.2)),
    (Schedule("cosine", per="epoch"), lambda o: torchs.CosineAnnealingLR(o, EPOCHS)),
    (Schedule("cosine", per="epoch", final=0.1), lambda o: torchs.CosineAnnealingLR(o, EPOCHS, eta_min=0.1)),
    (Schedule(), lambda o: torchs.ConstantLR(o, 1.0)),
]
PER_STEP = [
    (Schedule("cosine"), lambda o: torchs.CosineAnnealingLR(o, EPOCHS * STEPS)),
    (Schedule("cosine", final=0.25), lambda o: torchs.CosineAnnealingLR(o, EPOCHS * STEPS, eta_min=0.25)),
    (Schedule("step", (0.25, 0.5), 0.1, per="step"), lambda o: torchs.MultiStepLR(o, [8, 15], 0.1)),
    (Schedule("step", every=4, gamma=0.5, per="step"), lambda o: torchs.StepLR(o, 4 * STEPS, 0.5)),
    (Schedule(warmup_epochs=2, warmup_start=0.1), lambda o: torchs.LinearLR(o, 0.1, 1.0, 2 * STEPS - 1)),
    (Schedule(warmup_epochs=4), lambda o: torchs.LinearLR(o, 1 / 12, 1.0, 4 * STEPS - 1)),
    (
        Schedule("cosine", warmup_epochs=2, warmup_start=0.1),
        lambda o: torchs.SequentialLR(
            o,
            [torchs.LinearLR(o, 0.1, 1.0, 2 * STEPS - 1), torchs.CosineAnnealingLR(o, (EPOCHS - 2) * STEPS)],
            [2 * STEPS],
        ),
    ),
]


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize(("schedule", "make"), PER_EPOCH, ids=lambda v: str(v) if isinstance(v, WarmedUp) else "")
def test_epochs_are_torchs(schedule, make):
    assert course(schedule, EPOCHS, STEPS) == pytest.approx(each(torch_course(make, EPOCHS), STEPS), abs=1e-12)


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize(("schedule", "make"), PER_STEP, ids=lambda v: str(v) if isinstance(v, WarmedUp) else "")
def test_steps_are_torchs(schedule, make):
    assert course(schedule, EPOCHS, STEPS) == pytest.approx(torch_course(make, EPOCHS * STEPS), abs=1e-12)


def test_how_to_probes_steps():
    """COCO and VOC: an epoch of warm-up from 1e-7, by iteration, and a tenth every 6 epochs from the start."""
    steps = 79
    expected = []
    for epoch in range(50):
        for step in range(steps):
            warm = 1e-7 + (1 - 1e-7) * step / (steps - 1) if epoch == 0 else 1.0
            expected.append(warm * 0.1 ** (epoch // 6))
    got = course(Schedule("step", every=6, gamma=0.1, warmup_epochs=1, warmup_start=1e-7), 50, steps)
    assert got == pytest.approx(expected, rel=1e-9)
    assert 30 * got[24 * steps] == pytest.approx(3e-3) and 30 * got[48 * steps] == pytest.approx(3e-7)
    assert got[0] == pytest.approx(1e-7) and got[steps - 1] == 1.0


def test_how_to_probes_cosine():
    """ImageNet: five epochs of warm-up from 0.01, by iteration, then a cosine over 95 epochs, by epoch."""
    steps, warm = 25, 5 * 25
    expected = [0.01 + 0.99 * i / (warm - 1) for i in range(warm)]
    expected += each([(1 + math.cos(math.pi * k / 95)) / 2 for k in range(95)], steps)
    got = course(Schedule("cosine", warmup_epochs=5, warmup_start=0.01, per="epoch"), 100, steps)
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_warm_up_ends_at_the_full_rate():
    steps, epochs = 4, 6
    warm = course(Schedule("cosine", warmup_epochs=2), epochs, steps)
    assert warm[:8] == pytest.approx([(i + 1) / 8 for i in range(8)])
    assert warm[8] == 1 and all(b < a for a, b in zip(warm[8:], warm[9:], strict=False))
    for length in (0.1, 0.25, 0.3, 6, 20):
        values = course(Schedule(warmup_epochs=length, warmup_start=0.5), epochs, steps)
        assert all(0.5 <= v <= 1 for v in values) and values == sorted(values)


def group(schedule):
    return {"probes": [{"features": "pooled", "head": "linear", "loss": "bce", "epochs": 1,
                        "optimizer": {"type": "sgd", "lr": 1}, "schedule": schedule}]}  # fmt: skip


def test_grid_fields():
    specs = parse_grid(group([
        "cosine", {"type": "step", "every": 6}, {"type": "cosine", "per": "epoch", "final": 0.1},
        {"type": "constant", "warmup_epochs": 1, "warmup_start": "1e-7"}, {"type": "step", "milestones": [2, 4]},
    ])).specs  # fmt: skip
    assert [s.schedule for s in specs] == [
        Schedule("cosine"), Schedule("step", every=6), Schedule("cosine", per="epoch", final=0.1),
        Schedule(warmup_epochs=1, warmup_start=1e-7), Schedule("step", (2.0, 4.0)),
    ]  # fmt: skip
    (said,) = parse_grid(group({"type": "cosine", "per": "step"})).specs
    assert said.id == specs[0].id, "the type's own way, said or not, is one schedule"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"type": "step"}, "probes[0]: schedule: a step needs either milestones or every"),
        ({"type": "step", "milestones": [3], "every": 2}, "schedule: a step needs either milestones or every"),
        ({"type": "constant", "per": "epoch"}, "probes[0].schedule.per: unknown field"),
        ({"type": "cosine", "final": 2}, "probes[0].schedule.final: 2 is not a number of at least 0 and at most 1"),
    ],
)  # fmt: skip
def test_errors_name_the_field(schedule, message):
    with pytest.raises(BadInput) as caught:
        parse_grid(group(schedule))
    assert message in caught.value.message
