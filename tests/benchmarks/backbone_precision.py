"""Images per second of ResNet-50 at 224 x 224 in every memory layout and precision.

    python tests/benchmarks/backbone_precision.py [--device cuda] [--arch resnet50]

Random weights, noise for images, the network alone: no decoding, no writing. The contestants run in
turn, and a ratio is the median of those of single turns, so that a change of the machine's pace
meets both sides. The cosine is the lowest of any image's pooled features to float32.
"""

import argparse
import platform
import statistics
import time

import torch
from torch.nn.functional import cosine_similarity

from featcache.backbones.load import load_backbone
from featcache.backbones.precision import check_precision, running
from featcache.device import choose_device
from featcache.errors import BadInput


def timed(trunk, images, device):
    """What a network yields, and the seconds that it takes, with what is left running on a GPU."""
    started = time.perf_counter()
    result = trunk(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--device")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--precisions", nargs="+", default=["float32", "tf32", "bf16"])
    args = parser.parse_args()
    device = choose_device(args.device)
    backbone = load_backbone("random", arch=args.arch).to(device)
    size = backbone.preprocessing.size
    pixels = torch.randint(0, 256, (args.batch_size, 3, size, size), dtype=torch.uint8)
    images = backbone.preprocessing.normalise(pixels).to(device)
    as_torch = load_backbone("random", arch=args.arch).trunk.to(device, memory_format=torch.contiguous_format)

    fast = images.contiguous(memory_format=torch.channels_last)
    contestants = {("float32", "torch's default"): (as_torch, images)}
    for precision in args.precisions:
        try:
            check_precision(precision, device)
        except BadInput as error:
            print(error.message)
            continue
        contestants[precision, "channels last"] = (backbone.trunk, fast)
    seconds, results = {name: [] for name in contestants}, {}
    for turn in range(args.turns + 1):
        for name, (trunk, batch) in contestants.items():
            with running(name[0], device):
                results[name], took = timed(trunk, batch, device)
            if turn:
                seconds[name].append(took)
    print(f"{args.arch}, batch {args.batch_size}, {device}, torch {torch.__version__}, {platform.processor()}")
    print("| precision | layout | images/s | against torch's default | against channels last | cosine |")
    print("| --- | --- | --- | --- | --- | --- |")
    first, second = list(contestants)[:2]
    for name, values in seconds.items():
        ratios = [
            statistics.median(a / b for a, b in zip(seconds[other], values, strict=True)) for other in (first, second)
        ]
        cosine = cosine_similarity(results[name].double().flatten(1), results[first].double().flatten(1)).min()
        speed = args.batch_size / statistics.median(values)
        print(f"| {' | '.join(name)} | {speed:.1f} | {ratios[0]:.2f}x | {ratios[1]:.2f}x | {cosine:.6f} |")


if __name__ == "__main__":
    main()
