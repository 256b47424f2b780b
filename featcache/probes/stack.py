"""Which probes go into one stack, and what a stack of trained ones says."""

from dataclasses import dataclass, replace

import torch

from featcache.probes.heads import STACKS, widest

# Weights and momentum of the probes trained at a time should stay in the last-level cache, the
# activations of a spatial head in reach of it, and what a loss computes element by element in the
# second-level cache.
BLOCK_WEIGHT_BYTES = 24 << 20
BLOCK_ACTIVATION_BYTES = 64 << 20
LOSS_BYTES = 2 << 20
MIN_ROWS = 32
SCORED_ROWS = 1024


@dataclass(frozen=True)
class TrainedProbe:
    """What training leaves of a probe.

    weights: {name: float32 CPU tensor}. losses: mean training loss of every epoch. diverged: the step
    (from 0, over all epochs) at which its loss stopped being finite, or None; its weights are then NaN.
    epoch: after which the weights were taken. scores: validation metric after every epoch, NaN where it
    was not asked for. stopped: what ended training early ("patience", "halving"), or None.
    """

    spec: object
    weights: dict
    losses: list
    diverged: int | None
    epoch: int | None = None
    scores: list = ()
    stopped: str | None = None


def blocks(specs, dim, positions, classes):
    """Group specs into blocks that train together: same features, views, head, batches and rule; cache-sized.

    specs: of one feature, of which dim is the width and positions the size of the map (1 if
    pooled). Returns lists of specs, in order of first appearance.
    """
    shapes = {}
    for spec in specs:
        optimizer = replace(spec.optimizer, lr=0.0, weight_decay=0.0)
        key = (
            spec.features,
            spec.views,
            spec.head,
            optimizer,
            spec.epochs,
            spec.batch_size,
            spec.keep,
            spec.patience,
            spec.precision,
        )
        shapes.setdefault(key, []).append(spec)
    result = []
    for (_, _, head, _, _, batch_size, *_), members in shapes.items():
        # Sorted by loss, so that each loss sees one slice of the stack.
        members.sort(key=lambda s: s.loss.type)
        width = widest(head, classes)
        fit = BLOCK_WEIGHT_BYTES // (4 * width * dim)
        if head.type != "linear":
            # A probe that was trained elsewhere has no batch size: it is only scored.
            rows = batch_size or SCORED_ROWS
            fit = min(fit, BLOCK_ACTIVATION_BYTES // (4 * width * rows * positions))
        count = -(-len(members) // max(fit, 1))
        size = -(-len(members) // count)
        result += [members[i : i + size] for i in range(0, len(members), size)]
    return result


def padded(specs, classes):
    """Repeat the last probe until the block has MIN_ROWS outputs.

    BLAS libraries compute a row of a product in the same way however many rows there are, but for
    very few, where they use other kernels. So a probe alone gets the bits that it gets in a stack.
    """
    width = specs[0].head.hidden or classes
    return [*specs, *[specs[-1]] * (-(-MIN_ROWS // width) - len(specs))]


@torch.no_grad()
def predict(specs, weights, features, classes):
    """Return the logits of trained probes of one block, float32 [P, N, C] on the CPU.

    weights: one {name: tensor} a spec. features: [N, D] or [N, D, S].
    """
    full = padded(specs, classes)
    stack = STACKS[specs[0].head.type](full, features.shape[1], classes, features.device)
    weights = [*weights, *[weights[-1]] * (len(full) - len(specs))]
    for name, stacked in stack.weights.items():
        stacked.copy_(torch.stack([w[name] for w in weights]))
    parts = [stack.forward(part.float()).transpose(0, 1)[: len(specs)].cpu() for part in features.split(SCORED_ROWS)]
    return torch.cat(parts, dim=1)
