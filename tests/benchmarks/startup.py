"""CPU seconds of `featcache extract` on a finished store, beside those of the imports alone.

    python tests/benchmarks/startup.py

A ResNet-50 and 80 small scenes. One thread, the lowest of some turns.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torchvision.models import resnet50

import featcache
from featcache.demo.scenes import make_scenes

TURNS = 5


def cpu_seconds(words):
    """User and system time of a command, in one thread."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    """Print the lowest of some turns for each."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_scenes(folder / "scenes", {"train": 40, "val": 20, "test": 20})
        torch.save(resnet50().state_dict(), folder / "resnet50.pth")
        store = folder / "s.zarr"
        given = {"root": folder / "scenes", "size": 64, "store": store}
        featcache.extract(folder / "resnet50.pth", "voc", **given)
        options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        backbone = ["--backbone", str(folder / "resnet50.pth"), "--dataset", "voc"]
        contestants = {
            "import torch": ["-c", "import torch"],
            "import torch, torchvision": ["-c", "import torch, torchvision"],
            "import featcache.extraction.extract": ["-c", "import featcache.extraction.extract"],
            "featcache extract, finished store": ["-m", "featcache", "extract", *backbone, *options],
        }
        seconds = {name: [] for name in contestants}
        for _ in range(TURNS):
            for name, words in contestants.items():
                seconds[name].append(cpu_seconds(words))
        for name, all_turns in seconds.items():
            print(f"{name:40} {min(all_turns):5.2f} s  {min(all_turns) / min(seconds['import torch']):4.2f}x")


if __name__ == "__main__":
    main()
