"""`featcache attribute`: explain chosen probes of a run and score where the maps point."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from featcache.arguments import CHECKPOINT, NAME, NAMES, PATH, takes, whole
from featcache.attribution.epg import box_mask, energy_in_boxes
from featcache.attribution.gradcam import gradcam, upsample
from featcache.attribution.input_x_gradient import input_x_gradient
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.device import choose_device, multiplying
from featcache.errors import BadInput, nearest
from featcache.extraction.images import DECODERS, load_input
from featcache.feature import Feature
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import find_probes, load_probes
from featcache.probes.runs.run import best, open_run, select, store_of
from featcache.probes.runs.run_file import ATTRIBUTION, seal_files, write_file
from featcache.store.folder import open_folder
from featcache.store.manifest import difference

# Methods, and whether they run the backbone.
METHODS = {"gradcam": False, "input_x_gradient": True}
COLUMNS = ("probe", "method", "split", "id", "class", "epg", "box_share")
BATCH = 16


@dataclass(frozen=True, eq=False)
class Target:
    """A class to explain in an image: row of the split, class, and the mask of its boxes [S, S], not empty."""

    row: int
    label: int
    mask: torch.Tensor


@multiplying("float32")
@takes(
    store=PATH, rule=NAME, methods=NAMES, split=NAME, backbone=CHECKPOINT, arch=NAME, weights_key=NAME, dataset=NAME,
    root=PATH, limit=whole(), examples=whole(), seed=whole(),
)  # fmt: skip
def attribute(
    run,
    store=None,
    probes=None,
    rule=None,
    methods=("gradcam",),
    split=None,
    backbone=None,
    arch=None,
    weights_key=None,
    dataset=None,
    root=None,
    limit=None,
    examples=6,
    device=None,
    seed=0,
):
    """Explain every class that has a box which is not difficult, and score the maps with EPG.

    run: folder. store: path, by default the run's. probes: ids; by default those that `rule` selects
    (see featcache.probes.run.select), and without a rule the best of each loss by the run's own metric, or
    all where nothing was chosen. methods: of gradcam (from the store alone) and input_x_gradient (needs
    backbone, dataset, root). split: of the store, by default the one that the run is scored on. limit: first
    images of the split that have such a class. examples: images whose maps are kept for the report. seed: of a
    random backbone.
    Writes attribution.csv (a row per probe, method, image and class) and attribution.npz into the
    run; returns the rows. Raises BadInput.
    """
    finished = open_run(run)
    methods = list(dict.fromkeys(methods))
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise BadInput(
            f"--method: unknown method {unknown[0]!r}{nearest(unknown[0], METHODS)} (known: {', '.join(METHODS)})"
        )
    opened = store_of(finished, store)
    device = choose_device(device)
    chosen, there = dict.fromkeys(_chosen(finished, probes, rule)), find_probes(finished.path)
    trained = [probe for name in chosen for probe in load_probes(finished.path, [name], there)]
    heads = [HeadModule(p.spec.head, p.weights).to(device) for p in trained]
    features = [_map_of(p.spec, opened.manifest.feature(p.spec.features)) for p in trained]
    preprocessing = Preprocessing(**opened.manifest.identity["preprocessing"])
    size = preprocessing.size
    split = split or _judged(finished)
    data = opened[split]
    targets = _targets(data, preprocessing, limit)
    pictures = None
    if backbone is not None:
        model, pictures = _open_backbone(opened, split, preprocessing, backbone, arch, weights_key, dataset, root, seed)
        model.to(device)
    kept = sorted({t.row for t in targets})[:examples]
    rows, panels = [], []
    for method in methods:
        if METHODS[method] and pictures is None:
            raise BadInput(f"--method {method} runs the backbone: give --backbone, --dataset and --root")
        with tqdm(total=len(targets) * len(heads), unit="map", desc=method) as progress:
            for batch in _batches(targets):
                if method == "gradcam":
                    results = _gradcams(data, features, heads, batch, size, device)
                else:
                    results = _input_x_gradients(model, pictures, features, heads, batch, device)
                for number, maps in enumerate(results):
                    scores = energy_in_boxes(maps, torch.stack([t.mask for t in batch])).tolist()
                    for target, map_, epg in zip(batch, maps, scores, strict=True):
                        share = float(target.mask.double().mean())
                        values = (
                            trained[number].spec.id,
                            method,
                            split,
                            data.ids[target.row],
                            opened.classes[target.label],
                            epg,
                            share,
                        )
                        rows.append(dict(zip(COLUMNS, values, strict=True)))
                        if target.row in kept:
                            panels.append((rows[-1], target.row, map_.numpy().astype(np.float32)))
                progress.update(len(batch) * len(heads))
    _write(Path(run), rows, panels, data, kept, pictures, preprocessing)
    return rows


def _chosen(run, probes, rule):
    return probes or (select(run, rule) if rule else best(run, "loss"))


def _judged(run):
    """The split of the store that a run is scored on. Raises BadInput if it is a union."""
    names = run.summary["splits"][run.judge]
    if len(names) > 1:
        raise BadInput(f"run {run.path} is scored on {' and '.join(names)}: name one with --split")
    return names[0]


def _map_of(spec, feature):
    """The map that a probe's feature is the mean of. Raises BadInput if it saw something else."""
    if feature.kind not in ("pooled", "patch_mean", "spatial"):
        raise BadInput(f"probe {spec.id} saw {feature}, which is no mean of a map: there is nothing to point at")
    return Feature(feature.layer, "spatial")


def _targets(data, preprocessing, limit):
    """Return the Targets of a split, in order, of at most `limit` images.

    A class whose boxes hold no pixel's centre of the input, as outside a crop, leaves no target.
    """
    targets, images = [], 0
    for row, (boxes, classes, difficult) in enumerate(data.boxes):
        boxes, _ = preprocessing.map_boxes(boxes, *data.sizes[row].tolist())
        masks = {int(c): box_mask(boxes[(classes == c) & ~difficult], preprocessing.size) for c in classes[~difficult]}
        found = [Target(row, c, masks[c]) for c in sorted(masks) if masks[c].any()]
        if found and (limit is None or images < limit):
            images += 1
            targets += found
    if not targets:
        raise BadInput(f"split {data.name} of store {data.store.path} has no box to score against")
    return targets


def _batches(targets):
    """Group targets, which are in order of their rows, by BATCH images."""
    rows = sorted({t.row for t in targets})
    for start in range(0, len(rows), BATCH):
        chosen = set(rows[start : start + BATCH])
        yield [t for t in targets if t.row in chosen]


def _open_backbone(store, split, preprocessing, backbone, arch, weights_key, dataset, root, seed):
    """Load backbone and images, make sure that they are those of the store, and prepare images as it did."""
    if dataset is None:
        raise BadInput("--backbone needs --dataset and --root too, for the images")
    identity = store.manifest.identity
    model = load_backbone(backbone, arch=arch, seed=seed, weights_key=weights_key, size=preprocessing.size)
    data = read_dataset(dataset, root, [split])
    given = {
        "arch": model.arch,
        "weights_sha256": model.weights_sha256,
        f"dataset {split}": data.fingerprint(split),
    }
    stored = {key: identity[key] for key in ("arch", "weights_sha256")}
    stored[f"dataset {split}"] = identity["dataset"]["splits"].get(split)
    fields = difference(stored, given)
    if fields:
        raise BadInput(f"store {store.path} was made of something else: {'; '.join(fields)}")
    model.preprocessing = preprocessing
    decoder = identity.get("decoder", DECODERS["exact"])
    return model, lambda row: load_input(data.splits[split][row], preprocessing, decoder)


def _gradcams(data, features, heads, batch, size, device):
    """Yield maps [len(batch), size, size] for each head, from the store."""
    rows, classes = [t.row for t in batch], torch.tensor([t.label for t in batch], device=device)
    for feature, head in zip(features, heads, strict=True):
        maps = torch.from_numpy(data[str(feature)].take(rows, check=True)).float().to(device)
        yield upsample(gradcam(head, maps, classes), size).cpu()


def _input_x_gradients(model, pictures, features, heads, batch, device):
    """Yield maps [len(batch), size, size] for each head, through the backbone."""
    rows = list(dict.fromkeys(t.row for t in batch))
    images = model.preprocessing.normalise(torch.stack([pictures(row) for row in rows]).to(device))
    result = [None] * len(heads)
    for feature in dict.fromkeys(features):
        mine = [number for number, f in enumerate(features) if f == feature]
        asked = [(rows.index(t.row), k, t.label) for k in range(len(mine)) for t in batch]
        maps = input_x_gradient(model, feature, [heads[n] for n in mine], images, asked).cpu()
        for n, part in zip(mine, maps.split(len(batch)), strict=True):
            result[n] = part
    return result


def _write(run, rows, panels, data, kept, pictures, preprocessing):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in rows)
    names = np.array(data.store.classes)
    size, drawn = preprocessing.size, []
    for number, row in enumerate(kept):
        boxes, classes, difficult = data.boxes[row]
        boxes, inside = preprocessing.map_boxes(boxes, *data.sizes[row].tolist())
        drawn.append((np.full(inside.sum(), number), boxes[inside], names[classes[inside]], difficult[inside]))
    nothing = (np.empty(0, int), np.empty((0, 4)), names[:0], np.empty(0, bool))
    examples, boxes, classes, difficult = (np.concatenate(parts) for parts in zip(nothing, *drawn, strict=True))
    arrays = {
        "ids": np.array([data.ids[row] for row in kept]),
        # Boxes of all examples, in pixels of the maps; box_examples says whose each is.
        "box_examples": examples,
        "boxes": boxes,
        "box_classes": classes,
        "box_difficult": difficult,
        "maps": np.stack([m for _, _, m in panels]) if panels else np.empty((0, size, size), np.float32),
        "panels": np.array([[str(r[k]) for k in COLUMNS] for r, _, _ in panels]).reshape(-1, len(COLUMNS)),
    }
    if pictures:
        arrays["images"] = np.stack([pictures(row).permute(1, 2, 0).numpy() for row in kept]) if kept else np.empty(0)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    written = dict(zip(ATTRIBUTION, (text.getvalue().encode(), buffer.getvalue()), strict=True))
    place = open_folder(run)
    with place.locked(f"waiting: another process is training into {run}"):
        # Until both are there, run.json knows of neither.
        seal_files(run, dict.fromkeys(written))
        seal_files(run, {name: write_file(run, name, data) for name, data in written.items()})
