"""How much faster RISE comes when probes and classes share the masked images, and from their stored features.

    python tests/benchmarks/perturbations.py backbone [--probes 16] [--classes 3] [--masks 32] [--images 1]
    python tests/benchmarks/perturbations.py stored [--probes 1000] [--masks 2000] [--images 2] [--loss sigmoid]

`backbone`: a ResNet-50 with random weights at 224 pixels, linear probes on its last map. One by one, every map takes its
own passes of the same masks; both ways are timed in turn in one run, one by one on a part of the maps. `stored`: the masked
images' features are in a store (of random numbers, float16), and many probes are compared with one, in turn; beside them
stand the floors: reading the features, the product with all probes' weights, and writing maps.
"""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from featcache.attribution.batch import Batch, Source
from featcache.attribution.masked_features import MaskedFeatures
from featcache.attribution.methods.rise import RISE
from featcache.attribution.reading import Reading
from featcache.attribution.targets import Target
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.backbones.load import load_backbone
from featcache.feature import Feature
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.module import HeadModule

# What the benchmarks share with the tests.
sys.path.append(str(Path(__file__).parents[1] / "support"))
from explaining import batch_of
from stores import write_masked

SIZE, CLASSES, WIDTH = 224, 20, 2048
LAYER = Reading((Feature("layer4", "spatial"),))


def seconds(run):
    """Run once and return the CPU seconds of all threads, which other processes on the machine hardly change."""
    started = time.process_time()
    run()
    return time.process_time() - started


def heads_of(count, link):
    """Linear heads with random weights."""
    weights = [{"fc0.weight": torch.randn(CLASSES, WIDTH) / 45, "fc0.bias": torch.zeros(CLASSES)} for _ in range(count)]
    return [HeadModule(Linear(), own, link) for own in weights]


def explain(method, heads, batch):
    """Make all maps of a method, and drop them."""
    for _ in method.explain(heads, LAYER, batch):
        pass


def through_backbone(a):
    """RISE through the backbone: all probes and classes together, against one map after another."""
    torch.manual_seed(0)
    backbone, images = load_backbone("random", arch="resnet50", size=SIZE), torch.randn(a.images, 3, SIZE, SIZE)
    method, heads = RISE(masks=a.masks), heads_of(a.probes, a.loss)
    maps, times = a.probes * a.classes * a.images, {"shared": [], "alone": []}

    def batch(classes):
        made = batch_of(backbone, LAYER, images, classes)
        vars(made.source)["at_once"] = a.masks
        return made

    for _ in range(a.repeats):
        times["shared"].append(seconds(lambda: explain(method, heads, batch([range(a.classes)] * a.images))) / maps)
        alone = seconds(lambda: [explain(method, heads[n : n + 1], batch([[0]] * a.images)) for n in range(a.alone)])
        times["alone"].append(alone / a.alone / a.images)
    shared, alone = (min(own) for own in times.values())
    print(f"RISE, {a.masks} masks, {a.probes} probes x {a.classes} classes, {a.images} images, best of {a.repeats}:")
    print(f"{1e3 * shared:.3g} CPU ms a map together, {1e3 * alone:.3g} one by one: {alone / shared:.1f} times as fast")


def stored(a):
    """RISE from stored features: many probes against one."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        store = write_masked(Path(folder) / "s.zarr", a.images, a.masks, WIDTH, CLASSES)
        split = store["test"]
        method = RISE(masks=a.masks)
        masked = MaskedFeatures(split, {row: row for row in range(a.images)}, device)
        source = Source(
            split,
            Preprocessing(SIZE, (0, 0, 0), (1, 1, 1)),
            device,
            None,
            (LAYER,),
            a.memory * 1e9,
            masked={method.masking: masked},
        )
        targets = [Target(image, label, None) for image in range(a.images) for label in range(a.classes)]
        heads, times = heads_of(a.probes, a.loss), {1: [], a.probes: []}
        explain(method, heads[:1], Batch(targets, source))
        for _ in range(a.repeats):
            for count in times:
                times[count].append(
                    seconds(lambda n=count: explain(method, heads[:n], Batch(targets, source))) / a.images
                )
        one, many = (min(own) for own in times.values())
        read = min(seconds(lambda: masked.read("layer4:pooled", 0, a.masks)) for _ in range(3))
    columns = a.probes * (CLASSES if a.loss == "softmax" else a.classes)
    x, w = torch.randn(WIDTH, a.masks), torch.randn(min(columns, 2000), WIDTH)
    product = min(seconds(lambda: w @ x) for _ in range(3)) * columns / len(w)
    write = min(seconds(lambda: torch.zeros(64, SIZE, SIZE).add_(1)) for _ in range(3)) * a.probes * a.classes / 64
    print(
        f"RISE from a store, {a.masks} masks, {a.classes} classes of an image, {a.loss}, best of {a.repeats}, s an image:"
    )
    print(
        f"1 probe {one:.3g}, {a.probes} probes {many:.3g} ({many / one:.3g} times); a map {1e3 * many / a.probes / a.classes:.3g} ms"
    )
    print(f"floors: reading {read:.3g}, product with the weights {product:.3g}, writing the maps {write:.3g}")


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["backbone", "stored"])
    parser.add_argument("--probes", type=int)
    parser.add_argument("--classes", type=int, default=3, help="classes explained of each image")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--masks", type=int)
    parser.add_argument("--alone", type=int, default=2, help="maps of each image that are made one by one")
    parser.add_argument("--loss", choices=["sigmoid", "softmax"], default="sigmoid")
    parser.add_argument("--memory", type=float, default=2, help="GB")
    parser.add_argument("--repeats", type=int, default=2)
    a = parser.parse_args()
    is_stored = a.what == "stored"
    a.probes, a.masks = a.probes or (1000 if is_stored else 16), a.masks or (2000 if is_stored else 32)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    (stored if is_stored else through_backbone)(a)


if __name__ == "__main__":
    main()
