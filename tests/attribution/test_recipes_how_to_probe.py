"""The recipes of pipelines/how_to_probe that go from images to localisation scores, on small data in the true layouts."""

import json
import os
import shlex
import stat
import subprocess

import pytest
from folders import CHECKOUT
from layouts import picture, write_coco

import featcache

PIPELINES = CHECKOUT / "pipelines/how_to_probe"
PARITY = ("--parity", "how-to-probe")
# A stand-in for the program that writes down what it is called with.
SPY = '#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done >> "$SPY"\nprintf "\\n\\0" >> "$SPY"\n'
LINEAR = """
splits: {train: train, val: val}
select: {metric: top1, split: val}
probes: [{features: last:pooled, head: linear, loss: [bce, ce], optimizer: {type: sgd, lr: 0.5}, epochs: 20, batch_size: 4}]
profiles: {how-to-probe: {change: [{set: {batch_size: 6}}]}}
"""
SMALL = ["--size", 72, "--workers", 0, "--views", 0, "--device", "cpu"]


def commands(recipe, tmp_path, *words, **variables):
    """The commands of a recipe, as lists of words."""
    spy = tmp_path / "bin/featcache"
    spy.parent.mkdir(exist_ok=True)
    spy.write_text(SPY)
    spy.chmod(spy.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "spy"
    settings = os.environ | {"PATH": f"{spy.parent}:{os.environ['PATH']}", "SPY": str(log)} | variables
    subprocess.run(["sh", PIPELINES / recipe, *map(str, words)], check=True, env=settings)
    lines = log.read_text().split("\n\0")
    log.unlink()
    return [line.rstrip("\0").split("\0") for line in lines if line]


def small_grid(name, path):
    """Linear probes, and for VOC and COCO the recipe's B-cos head of one layer."""
    recipe = {"voc": "voc07_resnet50.yaml", "coco": "coco14_resnet50.yaml"}.get(name)
    path.write_text(
        f"include: {PIPELINES / recipe}\nexclude: [{{head: mlp}}, {{head: {{layers: [2, 3]}}}}]\n" if recipe else LINEAR
    )
    return str(path)


def coco(root):
    """A true layout of COCO 2014 with two classes."""
    boxes = [{"bbox": [2, 3, 20.5, 10], "area": 150, "iscrowd": 0}, {"bbox": [18, 20, 15, 9], "area": 90, "iscrowd": 0}]
    for first, name in ((1, "train2014"), (21, "val2014")):
        images = {n: [{"category_id": (1, 18, 90)[n % 3], **boxes[n % 2]}] for n in range(first, first + 12)}
        write_coco(root, images, name=name)


def imagenet(root):
    """A true layout of ImageNet with four classes, of which val shows images that are in train too."""
    number = 0
    for wnid in ("n01440764", "n01443537", "n02123045", "n02124075"):
        for _ in range(3):
            number += 1
            for path in (
                root / "train" / wnid / f"{wnid}_{number}.JPEG",
                root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG",
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(40 * number, 96, 96).save(path, quality=95 if "train" in str(path.relative_to(root)) else 90)


@pytest.mark.process
@pytest.mark.parametrize("parity", [(), PARITY], ids=["default", "how-to-probe"])
@pytest.mark.parametrize("recipe", ["epg_voc", "epg_coco", "gridpg_imagenet"])
def test_recipes_go_from_images_to_a_page(recipe, parity, scenes, checkpoint, command, tmp_path):
    name, root = recipe.rpartition("_")[2], scenes
    if name != "voc":
        root = tmp_path / "data"
        root.mkdir()
        {"coco": coco, "imagenet": imagenet}[name](root)
    grid = small_grid(name, tmp_path / "grid.yaml")
    out = tmp_path / "out"
    variables = {"GRID": grid, "METHODS": "gradcam", "PROTOCOL": "gridpg:side=2:grids=2:confidence=0.0"}
    lines = commands(f"{recipe}.sh", tmp_path, checkpoint, root, out, *parity, **variables)
    assert [words[0] for words in lines] == [
        "extract",
        "train-probes",
        "attribute",
        *(["compare"] if name == "imagenet" else []),
        "report",
    ]
    for words in lines:
        more = SMALL if words[0] == "extract" else ["--device", "cpu"] if words[0] == "attribute" else []
        code, text, err = command(*words, *more)
        assert code == 0, (shlex.join(words), err)
    facts = json.loads((out / "run/attribution.json").read_bytes())
    assert facts["parity"] == (parity[1] if parity else None) and facts["preprocessing"]["size"] == (
        144 if name == "imagenet" else 72
    )
    assert featcache.open_run(out / "run").summary["parity"] == facts["parity"]
    assert ("Localisation" in (out / "report.html").read_text()) and "EPG %" in (out / "report.html").read_text()


def test_recipes_without_variables_ask_for_what_is_published(tmp_path):
    """Of both forms, each command's words; and that whoever reads the README finds them."""
    index = (PIPELINES / "README.md").read_text()
    for recipe, grid, protocol in (
        ("epg_voc.sh", "voc07_resnet50.yaml", None),
        ("epg_coco.sh", "coco14_resnet50.yaml", None),
        ("gridpg_imagenet.sh", "in1k_resnet50.yaml", "gridpg:confidence=0.95"),
    ):
        assert recipe in index and recipe in (CHECKOUT / "pipelines/README.md").read_text()
        default, parity = (commands(recipe, tmp_path, "c.pth", "data", "out", *more) for more in ((), PARITY))
        for words, published in zip(default, parity, strict=True):
            assert published == [*words, *PARITY] if words[0] in ("train-probes", "attribute") else published == words
        assert default[1][default[1].index("--grid") + 1] == str(PIPELINES / grid)
        assert protocol is None or protocol in default[2]
