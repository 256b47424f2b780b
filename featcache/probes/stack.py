"""Training a stack: probes of one shape on the same mini-batches, each as if it were alone."""

import math
from dataclasses import dataclass

import torch

from featcache.probes.heads import STACKS, footprint
from featcache.probes.lbfgs import fit_lbfgs
from featcache.probes.losses import LossFunction
from featcache.probes.optimizers import OPTIMIZERS, common
from featcache.probes.schedules import factors

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

    weights: {name: float32 CPU tensor}. losses: mean training loss of every epoch. diverged: the
    epoch (from 0) in which its loss stopped being finite, or None; its weights are then NaN.
    """

    spec: object
    weights: dict
    losses: list
    diverged: int | None


def blocks(specs, dim, positions, classes):
    """Group specs into blocks that train together: same features, views, head, batches and rule; cache-sized.

    specs: of one feature, of which dim is the width and positions the size of the map (1 if
    pooled). Returns lists of specs, in order of first appearance.
    """
    shapes = {}
    for spec in specs:
        key = (spec.features, spec.views, spec.head, common(spec.optimizer), spec.epochs, spec.batch_size)
        shapes.setdefault(key, []).append(spec)
    result = []
    for (_, _, head, _, _, batch_size), members in shapes.items():
        # Sorted, so that each loss sees one slice of the stack, and that most stacks have one momentum.
        members.sort(key=lambda s: (s.optimizer.momentum or 0.0, repr(s.loss)))
        weights, activations = footprint(head, dim, classes, positions)
        fit = BLOCK_WEIGHT_BYTES // (4 * weights)
        if head.type != "linear":
            # A probe that was trained elsewhere has no batch size: it is only scored.
            rows = batch_size or SCORED_ROWS
            fit = min(fit, BLOCK_ACTIVATION_BYTES // (4 * activations * rows))
        count = -(-len(members) // max(fit, 1))
        size = -(-len(members) // count)
        result += [members[i : i + size] for i in range(0, len(members), size)]
    return result


def train_block(specs, features, labels, classes, order_seed, on_epoch=lambda: None):
    """Train the probes of one block.

    features: [N, D] or [N, D, S], any float dtype, on the device to train on; or, where the probes train
    on views, something that gives such a tensor for each view's number. labels: int8 [N, C] or int64 [N],
    same device. order_seed: of the mini-batches' order, shared by all probes of a run.
    Returns a TrainedProbe for each spec, in order.
    """
    device = labels.device
    views = {0: features} if isinstance(features, torch.Tensor) else features
    if specs[0].optimizer.type == "lbfgs":
        fitted = fit_lbfgs(specs, views[0], labels, classes)
        return [_trained(*each) for each in zip(specs, *fitted, strict=True)]
    asked = len(specs)
    specs = _padded(specs, classes)
    head, epochs, batch_size = specs[0].head, specs[0].epochs, specs[0].batch_size
    stack = STACKS[head.type](specs, views[view_of_epoch(specs[0].views, 0)].shape[1], classes, device)
    optimizer = OPTIMIZERS[specs[0].optimizer.type](stack.parameters, specs, device)
    slices = _loss_slices(specs, labels, classes)
    rates = torch.tensor([s.rate for s in specs], dtype=torch.float64)
    steps = -(-len(labels) // batch_size)
    history = torch.zeros(epochs, len(specs), dtype=torch.float64)
    for epoch in range(epochs):
        seen = views[view_of_epoch(specs[0].views, epoch)]
        order = epoch_order(len(seen), order_seed, epoch).to(device)
        factor = torch.stack([factors(s.schedule, epochs, steps, epoch) for s in specs], dim=1)  # [steps, P]
        step_rates = (factor * rates).float().to(device)
        total = torch.zeros(len(specs), dtype=torch.float64, device=device)
        for step, rows in enumerate(order.split(batch_size)):
            batch, targets = seen[rows].float(), labels[rows]
            logits = stack.forward(batch, training=True)  # [B, P, C]
            loss, gradient = _loss_and_gradient(logits.detach(), targets, slices)
            optimizer.step(stack.backward(batch, logits, gradient), step_rates[step])
            total += loss.double() * len(rows)
        history[epoch] = (total / len(seen)).cpu()
        # Let go of it, so that the next view may take its place in memory.
        del seen
        on_epoch()
    return [_finish(spec, stack, history[:, p], p) for p, spec in enumerate(specs[:asked])]


def view_of_epoch(views, epoch):
    """The number of the view that an epoch (from 0) trains on: 1 to `views` in turn; 0 if there are none."""
    return epoch % views + 1 if views else 0


def _padded(specs, classes):
    """Repeat the last probe until the block has MIN_ROWS outputs.

    BLAS libraries compute a row of a product in the same way however many rows there are, but for
    very few, where they use other kernels. So a probe alone gets the bits that it gets in a stack.
    """
    width = specs[0].head.hidden or classes
    return [*specs, *[specs[-1]] * (-(-MIN_ROWS // width) - len(specs))]


def epoch_order(rows, seed, epoch):
    """Return the order in which an epoch visits the rows: a permutation [N] from (seed, epoch)."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def _loss_slices(specs, labels, classes):
    """Return [(loss function, start, end)] over probes that are sorted by loss, each small enough for the cache."""
    most = max(LOSS_BYTES // (8 * specs[0].batch_size * classes), 1)
    functions = {loss: LossFunction(loss, labels, classes) for loss in {spec.loss for spec in specs}}
    slices = []
    for number, spec in enumerate(specs):
        function = functions[spec.loss]
        if slices and slices[-1][0] is function and number - slices[-1][1] < most:
            slices[-1] = (function, slices[-1][1], number + 1)
        else:
            slices.append((function, number, number + 1))
    return slices


def _loss_and_gradient(logits, targets, slices):
    """Return losses [P] and their gradient [B, P, C]: no probe sees another's logits."""
    loss = logits.new_empty(logits.shape[1])
    # On a CPU, exp and log round otherwise in a vector than in the few elements left over, and which
    # those are depends on the neighbours. In float64 that difference is gone after the cast back.
    dtype = torch.float64 if logits.device.type == "cpu" else logits.dtype
    # Same strides as the logits whatever the mix of losses, so that sums over it take the same order.
    gradient = torch.empty_like(logits)
    for function, start, end in slices:
        loss[start:end], gradient[:, start:end] = function(logits[:, start:end].to(dtype), targets)
    return loss, gradient


def _finish(spec, stack, losses, p):
    return _trained(spec, {name: w[p].detach().cpu().clone() for name, w in stack.weights.items()}, losses.tolist())


def _trained(spec, weights, losses):
    """A TrainedProbe of weights and losses, which are looked through for what is not finite."""
    finite = [math.isfinite(loss) for loss in losses]
    healthy = all(bool(torch.isfinite(w).all()) for w in weights.values())
    if all(finite) and healthy:
        return TrainedProbe(spec, weights, losses, None)
    diverged = finite.index(False) if not all(finite) else len(losses) - 1
    return TrainedProbe(spec, {n: torch.full_like(w, torch.nan) for n, w in weights.items()}, losses, diverged)


class Predictor:
    """Trained probes of one block, ready to be asked for their logits.

    weights: one {name: tensor} a spec. dim: width of the features.
    """

    def __init__(self, specs, weights, dim, classes, device):
        padded = _padded(specs, classes)
        self._probes = len(specs)
        self._stack = STACKS[specs[0].head.type](padded, dim, classes, device)
        weights = [*weights, *[weights[-1]] * (len(padded) - len(specs))]
        with torch.no_grad():
            for name, stacked in self._stack.weights.items():
                stacked.copy_(torch.stack([w[name] for w in weights]))

    @torch.no_grad()
    def __call__(self, features):
        """Map features [n, D] or [n, D, S], any float dtype, to logits float32 [P, n, C] where the features are."""
        return self._stack.forward(features.float()).transpose(0, 1)[: self._probes]


def predict(specs, weights, features, classes):
    """Return the logits of trained probes of one block, float32 [P, N, C] on the CPU.

    weights: one {name: tensor} a spec. features: as for train_block.
    """
    predictor = Predictor(specs, weights, features.shape[1], classes, features.device)
    return torch.cat([predictor(part).cpu() for part in features.split(SCORED_ROWS)], dim=1)
