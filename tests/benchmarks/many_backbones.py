"""Several checkpoints in one pass against one command for each: python tests/benchmarks/many_backbones.py [--backbones 8].

Both read the same 500x375 JPEGs with the same settings; the ratio is that of the whole commands, start-up included.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models import resnet18


def make(place, backbones, images):
    """Write checkpoints and images into a folder."""
    chance = np.random.default_rng(0)
    # Noise that was enlarged is about as hard to decode as a photograph.
    for split, count in {"train": images * 3 // 4, "val": images - images * 3 // 4}.items():
        for number in range(count):
            folder = place / "data" / split / str(number % 4)
            folder.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(chance.integers(0, 255, (47, 63, 3), dtype=np.uint8))
            small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    for number in range(backbones):
        torch.manual_seed(number)
        torch.save(resnet18().state_dict(), place / f"epoch_{number}.pth")


def seconds(place, *words):
    """Return how long a featcache command takes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "featcache", *words], cwd=place, check=True, capture_output=True)
    return time.perf_counter() - started


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--backbones", type=int, default=8)
    options.add_argument("--images", type=int, default=240)
    options.add_argument("--size", type=int, default=224)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(place, given.backbones, given.images)
        words = ["extract", "--dataset", "folder", "--root", "data", "--size", str(given.size), "--features", "pooled"]
        together = seconds(place, *words, "--store", "together", "--backbone", "epoch_*.pth")
        each = [
            seconds(place, *words, "--store", f"alone/{n}.zarr", "--backbone", f"epoch_{n}.pth")
            for n in range(given.backbones)
        ]
        again = seconds(place, *words, "--store", "together", "--backbone", "epoch_*.pth")
    print(
        f"{given.backbones} ResNet-18, {given.images} images: together {together:.1f} s, one by one {sum(each):.1f} s "
        f"({sum(each) / together:.2f} times as long); again, with nothing left to do, {again:.1f} s"
    )


if __name__ == "__main__":
    main()
