"""Every dataset layout, written small and faithfully with real pictures, beside what must be read from it.

A writer takes a folder and returns what --root must be, and {split: [(id, label)]} in order.
"""

import csv
import functools
import io
import json
import pickle
import struct
import tarfile
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
from PIL import Image
from skimage import data as photographs

WNIDS = ("n01440764", "n01443537", "n02123045")


@functools.cache
def _photograph():
    return Image.fromarray(photographs.astronaut())


def picture(number, height=30, width=40):
    """A crop of a photograph, another one for each number."""
    x, y = 7 * number % (512 - width), 13 * number % (512 - height)
    return _photograph().crop((x, y, x + width, y + height))


def save(path, number, **options):
    """Write picture `number`, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, **options).save(path)


def encoded(number, kind="JPEG"):
    """The bytes of an image file of picture `number`."""
    file = io.BytesIO()
    picture(number).save(file, kind)
    return file.getvalue()


def write_voc(root, images, year=2007, split="train"):
    """Write {id: [(name, difficult, (xmin, ymin, xmax, ymax))]} in VOC's layout, all images 60 x 50, no two alike."""
    home = root / "VOCdevkit" / f"VOC{year}"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    for image_id, objects in images.items():
        tree = ElementTree.Element("annotation")
        size = ElementTree.SubElement(tree, "size")
        for key, value in (("width", 60), ("height", 50), ("depth", 3)):
            ElementTree.SubElement(size, key).text = str(value)
        for name, difficult, box in objects:
            item = ElementTree.SubElement(tree, "object")
            ElementTree.SubElement(item, "name").text = name
            ElementTree.SubElement(item, "difficult").text = str(int(difficult))
            bounds = ElementTree.SubElement(item, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
                ElementTree.SubElement(bounds, key).text = str(value)
        ElementTree.ElementTree(tree).write(home / "Annotations" / f"{image_id}.xml")
        colour = tuple(zlib.crc32(image_id.encode()).to_bytes(4, "big")[:3])
        Image.new("RGB", (60, 50), colour).save(home / "JPEGImages" / f"{image_id}.jpg")
    (home / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in images))
    return home


def write_coco(root, images, categories=None, name="val2014", size=(30, 40)):
    """Write {image id: [annotation without id and image_id]} as one split of COCO."""
    height, width = size
    categories = categories or [
        {"id": 18, "name": "dog"},
        {"id": 1, "name": "person"},
        {"id": 90, "name": "toothbrush"},
    ]
    number = iter(range(1, 10_000))
    parsed = {
        "images": [
            {"id": i, "file_name": f"COCO_{name}_{i:012d}.jpg", "height": height, "width": width} for i in images
        ],
        "annotations": [{"id": next(number), "image_id": i, **found} for i, some in images.items() for found in some],
        "categories": categories,
    }
    for image in parsed["images"]:
        save(root / name / image["file_name"], image["id"], height=height, width=width)
    (root / "annotations").mkdir(exist_ok=True)
    path = root / "annotations" / f"instances_{name}.json"
    path.write_text(json.dumps(parsed))
    return path


def coco(root, year=2014):
    box = {"bbox": [2, 3, 20.5, 10], "area": 150, "iscrowd": 0, "segmentation": [[2, 3, 22, 3, 22, 13, 2, 13]]}
    crowd = {"counts": [0, 300, 900], "size": [30, 40]}
    write_coco(root, {9: [{"category_id": 1, **box}], 4: []}, name=f"train{year}")
    write_coco(
        root,
        {7: [{"category_id": 90, **box}, {"category_id": 18, **box, "iscrowd": 1, "segmentation": crowd}]},
        name=f"val{year}",
    )
    return root, {"train": [("4", [0, 0, 0]), ("9", [1, 0, 0])], "val": [("7", [0, 1, 1])]}


def write_imagenet_train(root):
    for n, wnid in enumerate(WNIDS):
        for k in (10, 2):
            save(root / "train" / wnid / f"{wnid}_{k}.JPEG", 10 * n + k)
    return [(f"{wnid}_{k}", n) for n, wnid in enumerate(WNIDS) for k in (10, 2)]


def imagenet(root):
    train = write_imagenet_train(root)
    for number, wnid in ((3, WNIDS[0]), (1, WNIDS[2])):
        save(root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", 100 + number)
    return root, {"train": train, "val": [("ILSVRC2012_val_00000003", 0), ("ILSVRC2012_val_00000001", 2)]}


def imagenet_flat(root, labels=(2, 0, 1)):
    """Validation images in one folder; the labels are to be added."""
    train = write_imagenet_train(root)
    for number in range(1, len(labels) + 1):
        save(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", 100 + number)
    val = [(f"ILSVRC2012_val_{n:08d}", label) for n, label in enumerate(labels, 1)]
    return root, {"train": train, "val": val}


def imagenet_meta(root):
    root, expected = imagenet_flat(root)
    (root / "meta").mkdir()
    (root / "meta" / "val.txt").write_text("".join(f"{i}.JPEG {label}\n" for i, label in expected["val"]))
    return root, expected


def imagenet100(root):
    """Lists of two classes of a whole ImageNet, numbered anew."""
    root, expected = imagenet(root)
    anew = {2: 0, 0: 1}
    kept = {split: [(i, anew[label]) for i, label in rows if label in anew] for split, rows in expected.items()}
    (root / "meta/ImageNet100").mkdir(parents=True)
    for split, rows in kept.items():
        text = "".join(f"{({0: WNIDS[2], 1: WNIDS[0]})[label]}/{i}.JPEG {label}\n" for i, label in rows)
        (root / "meta/ImageNet100" / f"{split}_labeled.txt").write_text(text)
    return root, kept


def lists(root):
    """As OpenMixup's data/NAME beside data/meta/NAME."""
    root = root / "Birds"
    rows = {"train": [("train/kea/1.png", 1), ("train/emu/2.png", 0)], "test": [("test/emu/3.png", 0)]}
    (root.parent / "meta/Birds").mkdir(parents=True)
    for split, listed in rows.items():
        text = "".join(f"{image} {label}\n" for image, label in listed)
        (root.parent / "meta/Birds" / f"{split}_labeled_full.txt").write_text(text)
        for image, _ in listed:
            save(root / image, int(image[-5]))
    return root, rows


def places205(root):
    rows = {"train": [("a/abbey/gsun_1.jpg", 0), ("y/yard/gsun_2.jpg", 1)], "val": [("y/yard/gsun_3.jpg", 1)]}
    (root / "trainvalsplit_places205").mkdir(parents=True)
    for split, listed in rows.items():
        text = "".join(f"{image},{label}\n" for image, label in listed)
        (root / "trainvalsplit_places205" / f"{split}_places205.csv").write_text(text)
        for image, _ in listed:
            save(root / "data/vision/torralba/deeplearning/images256" / image, int(image[-5]))
    return root, rows


def inaturalist2018(root):
    categories = [{"id": i, "name": name, "supercategory": "Aves"} for i, name in enumerate(("Anas", "Corvus"))]
    expected = {"train": [("3", 1), ("8", 0)], "val": [("5", 1)]}
    for split, rows in expected.items():
        images = [
            {"id": int(i), "file_name": f"train_val2018/Aves/{label}/{i}.jpg", "height": 30, "width": 40}
            for i, label in reversed(rows)
        ]
        labels = [{"id": int(i), "image_id": int(i), "category_id": label} for i, label in rows]
        for image in images:
            save(root / image["file_name"], image["id"])
        parsed = {"images": images, "annotations": labels, "categories": categories}
        (root / f"{split}2018.json").write_text(json.dumps(parsed))
    return root, expected


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, in which the CIFAR batches were pickled."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        value = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = dispatch[str] = save_string


def write_batch(path, contents):
    """Pickle a dict as the original batches are."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(contents)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def pixels(number, side=32):
    """uint8 [3, side, side] of picture `number`."""
    return np.asarray(picture(number, side, side)).transpose(2, 0, 1)


def cifar10(root):
    home, names = root / "cifar-10-batches-py", [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    write_batch(home / "batches.meta", {"num_cases_per_batch": 2, "label_names": classes, "num_vis": 3072})
    expected = {"train": [], "test": []}
    for n, name in enumerate(names):
        labels = [n, 9 - n]
        data = np.stack([pixels(2 * n + k).reshape(-1) for k in range(2)])
        files = [f"cat_s_{n:06d}.png", f"dog_s_{n:06d}.png"]
        write_batch(home / name, {"batch_label": name, "labels": labels, "data": data, "filenames": files})
        rows = [(f"{name}/{k:05d}", label) for k, label in enumerate(labels)]
        expected["test" if name == "test_batch" else "train"] += rows
    return root, expected


def cifar100(root):
    home = root / "cifar-100-python"
    names = [f"class {n:02d}" for n in range(100)]
    write_batch(home / "meta", {"fine_label_names": names, "coarse_label_names": names[:20]})
    for n, split in enumerate(("train", "test")):
        data = np.stack([pixels(2 * n + k).reshape(-1) for k in range(2)])
        batch = {"filenames": ["a.png", "b.png"], "batch_label": split, "fine_labels": [99, n], "coarse_labels": [1, 2]}
        write_batch(home / split, {**batch, "data": data})
    return root, {"train": [("train/00000", 99), ("train/00001", 0)], "test": [("test/00000", 99), ("test/00001", 1)]}


def stl10(root):
    home = root / "stl10_binary"
    home.mkdir(parents=True)
    (home / "class_names.txt").write_text("airplane\nbird\ncar\n")
    expected = {"train": [("train/00000", 2), ("train/00001", 0)], "test": [("test/00000", 1)]}
    for n, (split, rows) in enumerate(expected.items()):
        np.array([label + 1 for _, label in rows], np.uint8).tofile(home / f"{split}_y.bin")
        images = np.stack([pixels(10 * n + k, 96) for k in range(len(rows))])
        images.transpose(0, 1, 3, 2).tofile(home / f"{split}_X.bin")
    return root, expected


def folder(root):
    for n, name in enumerate(("train/cat/b.jpg", "train/cat/a/z.PNG", "train/dog/1.jpeg", "val/ant/x.webp")):
        save(root / name, n)
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    return root, {"train": [("cat/b.jpg", 1), ("cat/a/z.PNG", 1), ("dog/1.jpeg", 2)], "val": [("ant/x.webp", 0)]}


ROWS = [
    {"path": "images/1.jpg", "label": "cat", "split": "train", "id": "one"},
    {"path": "images/2.png", "label": "ant", "split": "train", "id": "two"},
    {"path": "images/3.jpg", "label": "dog", "split": "test", "id": "three"},
]


def manifest(root, kind="csv"):
    for n, row in enumerate(ROWS):
        save(root / row["path"], n)
    path = root / f"list.{kind}"
    if kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path, {"train": [("one", 1), ("two", 0)], "test": [("three", 2)]}


def huggingface(root):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    expected = {"train": [("0", 1), ("1", 0), ("2", 1)], "validation": [("0", 0)]}
    saved = datasets.DatasetDict()
    for split, rows in expected.items():
        cells = {"image": [picture(n) for n in range(len(rows))], "label": [label for _, label in rows]}
        saved[split] = datasets.Dataset.from_dict(cells, features=features)
    saved.save_to_disk(str(root))
    return root, expected


def write_tar(path, members):
    """Write {name: bytes} as a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))


def webdataset(root):
    write_tar(
        root / "train" / "0000.tar", {"a/1.jpg": encoded(1), "a/1.cls": b"2", "a/2.cls": b"0", "a/2.jpg": encoded(2)}
    )
    write_tar(root / "train" / "0001.tar", {"a/3.png": encoded(3, "PNG"), "a/3.json": b'{"label": 1}'})
    write_tar(root / "val" / "0000.tar", {"7.jpg": encoded(4), "7.txt": b"1\n"})
    return root, {"train": [("a/1", 2), ("a/2", 0), ("a/3", 1)], "val": [("7", 1)]}


LAYOUTS = {
    "coco": coco,
    "coco2017": functools.partial(coco, year=2017),
    "imagenet": imagenet,
    "imagenet100": imagenet100,
    "lists": lists,
    "places205": places205,
    "inaturalist2018": inaturalist2018,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
    "folder": folder,
    "manifest": manifest,
    "huggingface": huggingface,
    "webdataset": webdataset,
}
