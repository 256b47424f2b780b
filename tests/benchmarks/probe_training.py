"""Seconds per probe-epoch: featcache's stacks against nn.Linear with a DataLoader and with tensor slicing.

    python tests/benchmarks/probe_training.py [--device cuda]

All in one run on random features of 2048 numbers (float16 for featcache, float32 for the loops), BCE
with SGD and momentum. The peak is a float32 GEMM of 4096 x 4096, measured in the same run; the floor of a
probe-epoch is two GEMMs (logits, and the weights' gradient), 4 N D C operations. `alone` trains the
same probes one after another, each in a stack of its own.

    python tests/benchmarks/probe_training.py --many-classes --rows 20000

One epoch of four probes of 10,000 and of 21,000 classes, single-label data, batches of 256: CPU seconds of a step and
probe, those of its two GEMMs alone, measured in turn with it, and of nn.Linear over slices of the tensors.
"""

import argparse
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from featcache.device import choose_device
from featcache.probes.engine.blocks import blocks
from featcache.probes.spec import ProbeSpec

# What the benchmarks share with the tests.
sys.path.append(str(Path(__file__).parents[1] / "support"))
from loop import train_block
from parts import Head, Loss, Optimizer, Schedule
from timing import seconds

DIM = 2048
# So that what is done once a probe, such as drawing its weights, weighs about as little as in a whole training.
EPOCHS = 4


def in_turn(runs, repeats):
    """Run the functions in turn, so that a change of the machine's pace meets all; return median seconds."""
    taken = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            each = seconds(run)
            if turn:
                taken[name].append(each)
    return {name: statistics.median(values) for name, values in taken.items()}


def gemm(device):
    """A function that runs a float32 GEMM of 4096 x 4096, and its operations."""
    a, b = torch.randn(2, 4096, 4096, device=device).unbind()
    return lambda: a @ b, 2 * 4096**3


def loop(batches, classes, function=F.binary_cross_entropy_with_logits, device="cpu"):
    """Train one nn.Linear for an epoch over batches of (features, targets)."""
    model = torch.nn.Linear(DIM, classes, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for features, targets in batches:
        optimizer.zero_grad()
        function(model(features.to(device)), targets.to(device)).backward()
        optimizer.step()


def sliced(features, labels, batch_size):
    """Yield shuffled batches by indexing the tensors."""
    for rows in torch.randperm(len(features), device=features.device).split(batch_size):
        yield features[rows], labels[rows]


def stacked(probes, features, labels, classes, batch_size, precision="float32", alone=False, loss="bce", epochs=EPOCHS):
    """Train probes of different rates for some epochs, as train-probes does, or one after another."""
    specs = [
        ProbeSpec(
            "x",
            "layer4:pooled",
            Head("linear"),
            Loss(loss),
            Optimizer("sgd", 0.01 * (p + 1), 0.9),
            Schedule(),
            epochs,
            batch_size,
            p,
            precision=precision,
        )
        for p in range(probes)
    ]
    for block in [[spec] for spec in specs] if alone else blocks(specs, DIM, 1, classes):
        train_block(block, features, labels, classes, 0)


def many_classes(rows, probes=4, batch_size=256):
    """Print CPU seconds of a step with so many classes that the loss and what is done once a probe count."""
    print("| C | loss | CPU s a step and probe | of which GEMMs | share | nn.Linear, slices |\n" + "| --- " * 6 + "|")
    features = torch.randn(rows, DIM).half()
    plain, steps = features.float(), -(-rows // batch_size)
    for classes in (10_000, 21_000):
        labels = torch.randint(classes, (rows,))
        weight, slope, logits = torch.randn(classes, DIM), torch.zeros(classes, DIM), torch.randn(classes, batch_size)

        def products(weight=weight, slope=slope, logits=logits):
            for part in plain.split(batch_size):
                weight @ part.t()
                slope.addmm_(logits[:, : len(part)], part, beta=0.9)

        for loss in ("ce", "bce"):
            targets = labels if loss == "ce" else F.one_hot(labels, classes).float()
            function = F.cross_entropy if loss == "ce" else F.binary_cross_entropy_with_logits
            seconds = {}
            for name, run, times in (
                ("products", products, 1),
                ("stack", partial(stacked, probes, features, labels, classes, batch_size, loss=loss, epochs=1), probes),
                ("slices", partial(loop, sliced(plain, targets, batch_size), classes, function), 1),
            ):
                started = time.process_time()
                run()
                seconds[name] = (time.process_time() - started) / times / steps
            print(
                f"| {classes} | {loss} | {seconds['stack']:.3f} | {seconds['products']:.3f} | "
                f"{seconds['products'] / seconds['stack']:.2f} | {seconds['slices']:.3f} |",
                flush=True,
            )


def main():
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--many-classes", action="store_true")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if arguments.many_classes:
        many_classes(arguments.rows)
        return
    print(f"{arguments.rows} rows of {DIM}; medians of {arguments.repeats} turns\n")
    columns = "C", "batch", "P", "s per probe-epoch", "peak GFLOP/s", "share of peak"
    columns += "against DataLoader", "against slicing", "against alone", "bf16 against DataLoader"
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    multiply, operations = gemm(device)
    for classes, batch_size, stacks in ((20, 64, (1, 8, 64)), (1000, 256, (1, 16))):
        features = torch.randn(arguments.rows, DIM).half()
        labels = (torch.rand(arguments.rows, classes) < 0.1).to(torch.int8)
        # The loops get float32 features and targets, as such scripts have them: nothing to convert.
        plain = features.float(), labels.float()
        loader = DataLoader(TensorDataset(*plain), batch_size, shuffle=True, pin_memory=device.type == "cuda")
        features, labels, *resident = (tensor.to(device) for tensor in (features, labels, *plain))
        for probes in stacks:
            stack = partial(stacked, probes, features, labels, classes, batch_size)
            seconds = in_turn(
                {
                    "peak": multiply,
                    "loader": partial(loop, loader, classes, device=device),
                    "slices": lambda t=resident, b=batch_size, c=classes: loop(sliced(*t, b), c, device=device),
                    "stack": stack,
                    "alone": partial(stack, alone=True),
                    "bf16": partial(stack, precision="bf16"),
                },
                arguments.repeats,
            )
            each = seconds["stack"] / (probes * EPOCHS)
            peak = operations / seconds["peak"]
            share = 4 * arguments.rows * DIM * classes / peak / each
            print(
                f"| {classes} | {batch_size} | {probes} | {each:.2g} | {peak / 1e9:.0f} | {share:.2f} | "
                f"{seconds['loader'] / each:.1f}x | {seconds['slices'] / each:.1f}x | "
                f"{seconds['alone'] / seconds['stack']:.2f}x | "
                f"{seconds['loader'] * probes * EPOCHS / seconds['bf16']:.1f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
