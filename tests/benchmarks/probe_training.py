"""Seconds per probe-epoch: featcache's stacks against nn.Linear with a DataLoader and with tensor slicing.

    python tests/benchmarks/probe_training.py

All in one run on random features of 2048 numbers (float16 for featcache, float32 for the loops), BCE
with SGD and momentum. The peak is a float32 GEMM of 4096 x 4096, measured in the same run; the floor of a
probe-epoch is two GEMMs (logits, and the weights' gradient), 4 N D C operations. `alone` trains the
same probes one after another, each in a stack of its own.
"""

import argparse
import platform
import statistics
import time
from functools import partial

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from featcache.probes.spec import Head, Loss, Optimizer, ProbeSpec, Schedule
from featcache.probes.stack import blocks
from featcache.probes.training import train_block

DIM = 2048
# So that what is done once a probe, such as drawing its weights, weighs about as little as in a whole training.
EPOCHS = 4


def in_turn(runs, repeats):
    """Run the functions in turn, so that a change of the machine's pace meets all; return median seconds."""
    seconds = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def gemm():
    """A function that runs a float32 GEMM of 4096 x 4096, and its operations."""
    a, b = torch.randn(2, 4096, 4096).unbind()
    return lambda: a @ b, 2 * 4096**3


def loop(batches, classes):
    """Train one nn.Linear for an epoch over batches of (features, targets)."""
    model = torch.nn.Linear(DIM, classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for features, targets in batches:
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(features), targets).backward()
        optimizer.step()


def sliced(features, labels, batch_size):
    """Yield shuffled batches by indexing the tensors."""
    for rows in torch.randperm(len(features)).split(batch_size):
        yield features[rows], labels[rows]


def stacked(probes, features, labels, classes, batch_size, precision="float32", alone=False):
    """Train probes of different rates for some epochs, as train-probes does, or one after another."""
    specs = [
        ProbeSpec(
            "x",
            "layer4:pooled",
            Head("linear"),
            Loss("bce"),
            Optimizer("sgd", 0.01 * (p + 1), 0.9),
            Schedule(),
            EPOCHS,
            batch_size,
            p,
            precision=precision,
        )
        for p in range(probes)
    ]
    for block in [[spec] for spec in specs] if alone else blocks(specs, DIM, 1, classes):
        train_block(block, features, labels, classes, 0)


def main():
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{arguments.rows} rows of {DIM}; medians of {arguments.repeats} turns\n")
    columns = "C", "batch", "P", "s per probe-epoch", "peak GFLOP/s", "share of peak"
    columns += "against DataLoader", "against slicing", "against alone", "bf16 against DataLoader"
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    multiply, operations = gemm()
    for classes, batch_size, stacks in ((20, 64, (1, 8, 64)), (1000, 256, (1, 16))):
        features = torch.randn(arguments.rows, DIM).half()
        labels = (torch.rand(arguments.rows, classes) < 0.1).to(torch.int8)
        # The loops get float32 features and targets, as such scripts have them: nothing to convert.
        plain = features.float(), labels.float()
        loader = DataLoader(TensorDataset(*plain), batch_size, shuffle=True)
        for probes in stacks:
            stack = partial(stacked, probes, features, labels, classes, batch_size)
            seconds = in_turn(
                {
                    "peak": multiply,
                    "loader": partial(loop, loader, classes),
                    "slices": lambda t=plain, b=batch_size, c=classes: loop(sliced(*t, b), c),
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
                f"| {classes} | {batch_size} | {probes} | {each:.4f} | {peak / 1e9:.0f} | {share:.2f} | "
                f"{seconds['loader'] / each:.1f}x | {seconds['slices'] / each:.1f}x | "
                f"{seconds['alone'] / seconds['stack']:.2f}x | "
                f"{seconds['loader'] * probes * EPOCHS / seconds['bf16']:.1f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
