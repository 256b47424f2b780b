"""Random features for probes, and probes that differ, for tests of stacks."""

import numpy as np
import torch
from parts import Loss, Optimizer, Schedule

from featcache.probes.spec import ProbeSpec

# Images, width, classes, positions.
N, D, C, S = 150, 48, 7, 4


def random_data():
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
