"""How much of the float32 GEMM peak deep heads on the map reach: forward, backward and update.

    python tests/benchmarks/spatial_heads.py [--device cuda]

MLPs and B-cos heads of three layers on random maps, trained with BCE and SGD with momentum by train_block: in the
blocks that train-probes would make, and all in one. The operations are those of the products that cannot be left
out: of every layer forward, weights' gradient and, but for the first, input's gradient; an MLP's last layer works on
means over positions. The peak is a float32 GEMM of 4096 x 4096. Peak and heads run in turn, and the best of each
counts.
"""

import argparse
import platform
import sys
from pathlib import Path

import torch

from featcache.device import choose_device
from featcache.probes.engine.blocks import blocks
from featcache.probes.spec import ProbeSpec

# What the benchmarks share with the tests.
sys.path.append(str(Path(__file__).parents[1] / "support"))
from loop import train_block
from parts import Head, Loss, Optimizer, Schedule
from timing import seconds

DIM = 2048


def operations(head, rows, positions, classes):
    """Multiplications and additions of one probe on so many images."""
    wide = rows * positions
    last = wide if head.type == "bcos" else rows
    products = 2 * wide * DIM * head.hidden + 3 * (head.layers - 2) * wide * head.hidden**2
    return 2 * (products + 3 * last * head.hidden * classes)


def main():
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--positions", type=int, default=49)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    device = choose_device(a.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"P={a.probes}, hidden {a.hidden}, {a.positions} positions, batch {a.batch}, C={a.classes}")
    print(f"best of {a.repeats}\n")
    rows = a.batch * a.steps
    features = torch.rand(rows, DIM, a.positions).half().to(device)
    labels = (torch.rand(rows, a.classes) < 0.1).to(torch.int8).to(device)
    left, right = torch.randn(2, 4096, 4096, device=device).unbind()
    print("| head | probes a block | ms per probe and step | GFLOP/s | peak GFLOP/s | share of peak |")
    print("| --- | --- | --- | --- | --- | --- |")
    for head in (Head("mlp", 3, a.hidden, "bn"), Head("bcos", 3, a.hidden, "bnu", False, b=2.0)):
        optimizer, schedule = Optimizer("sgd", 0.01, 0.9), Schedule()
        specs = [
            ProbeSpec("x", "l:pooled", head, Loss("bce"), optimizer, schedule, 1, a.batch, p) for p in range(a.probes)
        ]
        cuts = {len(made[0]): made for made in (blocks(specs, DIM, a.positions, a.classes), [specs])}
        runs = {
            size: lambda made=made: [train_block(block, features, labels, a.classes, 0) for block in made]
            for size, made in cuts.items()
        }
        runs["peak"] = lambda: left @ right
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(a.repeats):
            for name, run in runs.items():
                best[name] = min(best[name], seconds(run))
        peak = 2 * 4096**3 / best["peak"]
        for size in cuts:
            rate = a.probes * operations(head, rows, a.positions, a.classes) / best[size]
            each = 1e3 * best[size] / a.probes / a.steps
            print(
                f"| {head.type}-3 | {size} | {each:.3g} | {rate / 1e9:.0f} | {peak / 1e9:.0f} | {rate / peak:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
