"""How much faster maps come when probes, classes and methods share their work, against one map after another.

    python tests/benchmarks/attribution.py [--device cuda]

A ResNet-50 with random weights at 224 pixels, linear probes on its last map. One by one is captum's way: for every image,
class and probe the whole network runs, and for GradCAM and input x gradient goes back. Both are timed in turn in one run;
one by one on a part of the maps, since each takes equally long.
"""

import argparse
import platform
import sys
from pathlib import Path

import torch
from captum.attr import InputXGradient, LayerGradCam
from torch import nn

from featcache.attribution.methods.gradcam import GradCAM
from featcache.attribution.methods.input_x_gradient import InputXGradient as SharedInputXGradient
from featcache.attribution.reading import Reading
from featcache.attribution.scores.epg import EPG
from featcache.backbones.load import load_backbone
from featcache.device import choose_device
from featcache.feature import Feature
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.module import HeadModule

# What the benchmarks share with the tests.
sys.path.append(str(Path(__file__).parents[1] / "support"))
from explaining import batch_of
from timing import seconds

SIZE, CLASSES = 224, 20
LAYER = Reading((Feature("layer4", "spatial"),))


class Whole(nn.Module):
    """The backbone up to its last map, and a head, as one network without layers that work in place."""

    def __init__(self, backbone, head):
        super().__init__()
        self.trunk, self.head = backbone.trunk, head

    def forward(self, images):
        t = self.trunk
        x = t.maxpool(t.relu(t.bn1(t.conv1(images.contiguous(memory_format=torch.channels_last)))))
        return self.head(t.layer4(t.layer3(t.layer2(t.layer1(x)))))


def explain(method, heads, batch):
    """Make all maps of a method, and drop them."""
    for _ in method.explain(heads, LAYER, batch):
        pass


def row(name, maps, shared, alone):
    """Print a line of the table. shared, alone: seconds a map."""
    print(f"| {name} | {maps} | {1e3 * shared:.3g} | {1e3 * alone:.3g} | {alone / shared:.2f} |", flush=True)


def main():
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--probes", type=int, default=64)
    parser.add_argument("--classes", type=int, default=3, help="classes explained of each image")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--alone", type=int, default=8, help="maps that are made one by one")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    device = choose_device(a.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, best of {a.repeats}\n")
    print("| maps | how many | shared, ms a map | one by one, ms a map | ratio |\n| --- | --- | --- | --- | --- |")
    torch.manual_seed(0)
    backbone = load_backbone("random", arch="resnet50", size=SIZE).to(device)
    for module in backbone.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    weights = [{"fc0.weight": torch.randn(CLASSES, 2048), "fc0.bias": torch.zeros(CLASSES)} for _ in range(a.probes)]
    heads = [HeadModule(Linear(), own).to(device) for own in weights]
    images = torch.randn(a.images, 3, SIZE, SIZE, device=device)

    def alone(method, **more):
        for number in range(a.alone):
            model = Whole(backbone, heads[number % a.probes])
            method(model).attribute(images[number % a.images][None].clone().requires_grad_(), 0, **more)

    for probes, classes in ((a.probes, a.classes), (1, 1)):
        given = [range(classes)] * a.images
        count, best = probes * classes * a.images, {"shared": [], "alone": []}
        for _ in range(a.repeats):
            batch = batch_of(backbone, LAYER, images, given)
            best["shared"].append(seconds(lambda b=batch, n=probes: explain(SharedInputXGradient(), heads[:n], b)))
            best["alone"].append(seconds(lambda: alone(InputXGradient)))
        row(
            f"input x gradient, {probes} probes x {classes}",
            count,
            min(best["shared"]) / count,
            min(best["alone"]) / a.alone,
        )
    given = [range(a.classes)] * a.images
    count, best = a.probes * a.classes * a.images, {"shared": [], "alone": []}
    for _ in range(a.repeats):
        batch = batch_of(backbone, LAYER, images, given)
        batch._cached[LAYER] = torch.randn(a.images, 2048, 7, 7, device=device)
        best["shared"].append(seconds(lambda b=batch: explain(GradCAM(), heads, b)))
        best["alone"].append(
            seconds(lambda: alone(lambda model: LayerGradCam(model, model.trunk.layer4), relu_attributions=False))
        )
    row("GradCAM from the store", count, min(best["shared"]) / count, min(best["alone"]) / a.alone)
    maps, boxes = torch.randn(a.images, 2048, 7, 7, device=device), torch.rand(a.images * CLASSES, SIZE, SIZE) < 0.3
    batch = batch_of(backbone, LAYER, images, [range(CLASSES)] * a.images)
    batch._cached[LAYER] = maps
    each = (
        seconds(lambda: [EPG().measure(made.cpu(), boxes) for made in GradCAM().explain(heads, LAYER, batch)])
        / a.images
    )
    print(
        f"\nGradCAM and EPG of {a.probes} probes x {CLASSES} classes: {each:.3g} s an image, {4952 * each / 60:.3g} minutes for VOC2007's 4952"
    )


if __name__ == "__main__":
    main()
