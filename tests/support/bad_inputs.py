"""Bad inputs for every reader: valid files, and what can be wrong with each of their fields and bytes.

A case replaces one file. `free` says of which fields another value is another valid input or nobody's business:
there the result may differ. Everywhere else it is the result of the valid input, or one line that names the file.
"""

import functools
import io
import json
import pickle
import random
import re
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import layouts
import numpy as np
import torch
import yaml
from layouts import encoded, write_tar

# What may stand in the place of any value of a JSON or YAML file, as it is written there.
TOKENS = {
    "null": "null", "list": "[]", "object": "{}", "empty": '""', "blank": '"  "', "word": '"x"', "number": "7",
    "negative": "-1", "fraction": "0.5", "true": "true", "huge": "9" * 30, "digits": "9" * 5000, "NaN": "NaN",
    "inf": "Infinity", "far": "1e999", "NUL": '"a\\u0000b"', "surrogate": '"\\ud800"', "up": '"../../x"',
    "slash": '"/x"', "long": '"' + "x" * 10_000 + '"', "deep": "[" * 3000 + "]" * 3000, "lists": "[[[]]]", "of null": "[null]",
}  # fmt: skip
# The same of text without types.
WORDS = {
    "empty": "", "blank": "  ", "word": "x", "number": "7", "negative": "-1", "fraction": "0.5", "true": "true",
    "huge": "9" * 30, "digits": "9" * 5000, "nan": "nan", "inf": "inf", "far": "1e999", "NUL": "a\0b", "up": "../../x",
    "slash": "/x", "long": "x" * 10_000, "JSON": "[1, 2", "quote": '"', "percent": "%s%n", "underscores": "1_0",
}  # fmt: skip
# And of Python's values, in pickles and as arguments.
CYCLE = []
CYCLE.append(CYCLE)
VALUES = {
    "None": None, "list": [], "dict": {}, "empty": "", "text": "x", "bytes": b"x", "number": 7, "negative": -1,
    "fraction": 0.5, "bool": True, "huge": 10**30, "digits": 10**5000, "NaN": float("nan"), "inf": float("inf"),
    "NUL": "a\0b", "surrogate": "\ud800", "set": {1}, "cycle": CYCLE, "tuple": ((),), "complex": 1j, "long": "x" * 10_000,
    "array": np.zeros((2, 2), np.complex64), "deep": functools.reduce(lambda inner, _: [inner], range(500), []),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One file with other bytes. free: whether the result may be another one, silently."""

    reader: str
    file: Path
    what: str
    data: bytes | None
    free: bool = False

    def __str__(self):
        return f"{self.reader} {self.file.name} {self.what}"


def damaged_bytes(reader, file, count, free):
    """Cases of files whose bytes were hit, without regard to what they mean."""
    data, chance = file.read_bytes(), random.Random(f"{reader} {file.name}")
    for _ in range(count):
        at, bit = chance.randrange(len(data)), chance.randrange(8)
        other = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        yield Case(reader, file, f"bit {bit} of byte {at}", other, free)
    for length in sorted({0, 1, 8, len(data) // 3, len(data) // 2, len(data) - 1}):
        yield Case(reader, file, f"cut to {length}", data[:length], free or length == len(data) - 1)
    at = chance.randrange(len(data))
    yield Case(reader, file, f"NULs from byte {at}", data[:at] + bytes(16) + data[at + 16 :], free)
    yield Case(reader, file, f"no UTF-8 at byte {at}", data[:at] + b"\xff\xfe\x80" + data[at:], free)
    yield Case(reader, file, "UTF-16", data.decode("latin1").encode("utf-16"))
    yield Case(reader, file, "noise", chance.randbytes(300))
    yield Case(reader, file, "twice", data * 2, free)
    yield Case(reader, file, "gone", None, free)


def paths_of(tree, way=()):
    """Ways to the values of nested dicts and lists; of lists only to the first value."""
    yield way
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths_of(value, (*way, key))


def with_token(tree, way, token, dump=json.dumps):
    """The text of a tree with a token in the place of one value; None for a token leaves it out."""
    if not way:
        return token or ""
    tree = json.loads(json.dumps(tree))
    at = functools.reduce(lambda part, key: part[key], way[:-1], tree)
    if token is None:
        del at[way[-1]]
        return dump(tree)
    at[way[-1]] = "@@@"
    return re.sub("[\"']?@@@[\"']?", lambda _: token, dump(tree))


def structured(reader, file, tree, free, dump=json.dumps, wrap=str):
    """Cases of a JSON or YAML file in which one value is another, or missing. free: of (way, token), whether it may be."""
    for way in paths_of(tree):
        for name, token in ({"missing": None} | TOKENS).items():
            text = wrap(with_token(tree, way, token, dump))
            where = ".".join(map(str, way)) or "all"
            yield Case(reader, file, f"{where} {name}", text.encode("utf-8", "surrogatepass"), free(where, name))


def fields(reader, file, pattern, free):
    """Cases of a text file in which what a pattern's groups match is another word."""
    text = file.read_text()
    for match in list(re.finditer(pattern, text))[:2]:
        for number in range(1, len(match.groups()) + 1):
            begin, end = match.span(number)
            for name, word in WORDS.items():
                where = f"group {number} at {begin}"
                other = (text[:begin] + word + text[end:]).encode()
                yield Case(reader, file, f"{where} {name}", other, free(number, name))
    lines = text.splitlines(keepends=True)
    yield Case(reader, file, "a line twice", "".join([*lines, lines[-1]]).encode(), free(0, "twice"))
    yield Case(reader, file, "a line of blanks", ("   \n" + text).encode(), True)


def voc(root):
    """A VOC2007 of three images; returns the root."""
    home = root / "VOCdevkit/VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (home / folder).mkdir(parents=True)
    for n, split in enumerate(("train", "val", "test"), 1):
        name = f"00000{n}"
        layouts.save(home / "JPEGImages" / f"{name}.jpg", n)
        (home / "ImageSets/Main" / f"{split}.txt").write_text(f"{name}\n")
        (home / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename><size><width>40</width><height>30</height>"
            "<depth>3</depth></size><segmented>0</segmented><object><name>dog</name><pose>Left</pose><truncated>0</truncated>"
            "<difficult>0</difficult><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>25</ymax></bndbox></object>"
            "</annotation>"
        )
    return root


NUMBERS = ("number", "negative", "fraction", "huge", "true", "underscores")
TEXTS = ("word", "number", "negative", "fraction", "true", "up", "slash", "long", "huge", "digits", "nan", "inf", "far",
         "JSON", "quote", "percent", "underscores", "NaN", "null", "empty", "blank")  # fmt: skip


def voc_cases(root):
    home = root / "VOCdevkit/VOC2007"
    file = home / "Annotations/000001.xml"
    kept = r"<name>(.*?)</name>.*?<difficult>(.*?)</difficult>.*?<xmin>(.*?)</xmin><ymin>(.*?)</ymin><xmax>(.*?)</xmax>"
    # Another class is another dataset, with a notice; other coordinates that fit the image are another box.
    yield from fields(
        "voc",
        file,
        kept,
        lambda n, w: n == 1 or (n == 2 and w in ("true", "empty", "blank")) or (n > 2 and w in NUMBERS),
    )
    yield from fields("voc", file, r"<width>(.*?)</width><height>(.*?)</height>", lambda n, w: w == "number")
    yield from fields("voc", file, r"<folder>(.*?)</folder><filename>(.*?)</filename>", lambda n, w: True)
    text = file.read_text()
    for tag in ("size", "object", "bndbox", "annotation", "xmin", "name", "difficult", "width"):
        without = re.sub(rf"<{tag}>.*?</{tag}>", "", text)
        yield Case("voc", file, f"no {tag}", without.encode(), tag in ("object", "difficult"))
        yield Case(
            "voc",
            file,
            f"{tag} deep",
            text.replace(f"<{tag}>", f"<{tag}>" + f"<{tag}>" * 3000).encode(),
            tag == "object",
        )
        yield Case(
            "voc", file, f"{tag} twice", re.sub(rf"(<{tag}>.*?</{tag}>)", r"\1\1", text).encode(), tag != "annotation"
        )
    bomb = '<!DOCTYPE a [<!ENTITY a "' + "x" * 100 + '">' + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 50}">' for a, b in zip("abcdef", "bcdefg", strict=True)
    ) + "]>"  # fmt: skip
    yield Case("voc", file, "entities", (bomb + text.replace("dog", "&g;")).encode())
    yield Case(
        "voc",
        file,
        "file entity",
        ('<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/passwd">]>' + text.replace("dog", "&f;")).encode(),
    )
    yield Case("voc", file, "encoding", ('<?xml version="1.0" encoding="klingon"?>' + text).encode())
    yield from damaged_bytes("voc", file, 30, True)
    lines = home / "ImageSets/Main/train.txt"
    yield from fields("voc", lines, r"(\d+)\n", lambda n, w: False)
    yield from damaged_bytes("voc", lines, 6, False)


def coco_cases(root):
    file = root / "annotations/instances_train2014.json"
    unread = ("segmentation", "iscrowd", "area", "id", "annotations missing", "ignore")

    def free(where, token):
        if where.startswith("annotations.0."):
            # Not read, or a crowd, an ignored or an empty one, or another box.
            return any(word in where for word in unread) or (".bbox." in where and token in (*NUMBERS, "true"))
        # That the image is of another size is seen when it is decoded.
        if where in ("images.0.height", "images.0.width"):
            return token == "number"
        return (
            (where in ("categories.0.name", "categories.0.id", "annotations", "images.0.id", "annotations.0"))
            and token in (*TEXTS, "list", "missing")
            or where.startswith("info")
        )

    yield from structured("coco", file, json.loads(file.read_text()), free)
    yield from damaged_bytes("coco", file, 20, True)


def inaturalist_cases(root):
    file = root / "train2018.json"

    def free(where, token):
        if where in ("images.0.height", "images.0.width"):
            return token in ("number", "missing")
        return where in ("annotations.0.id", "categories.0.supercategory", "categories.0.name") or token in (
            "number", "word") and where.endswith("id")  # fmt: skip

    yield from structured("inaturalist2018", file, json.loads(file.read_text()), free)
    yield from damaged_bytes("inaturalist2018", file, 20, True)


def manifest_cases(root):
    boxes = [{"box": [1, 2, 20, 22], "label": "cat", "difficult": False}]
    rows = [row | {"boxes": boxes if n == 0 else []} for n, row in enumerate(layouts.ROWS)]

    def free(where, token):
        if where == "all":
            return token == "missing"
        if where in ("split", "id"):
            return token in ("word", "number", "negative", "huge", "missing", "null", "empty") or (
                where == "id" and token in TEXTS
            )
        return where in ("label", "boxes", "boxes.0", "boxes.0.label") and token in (*TEXTS, "list", "missing", "of null") or (
            where.startswith("boxes.0.box.") and token in NUMBERS) or where in ("boxes.0.difficult",) and token in ("missing", "true")  # fmt: skip

    file = root / "list.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rest = "".join(json.dumps(row) + "\n" for row in rows[1:])
    yield from structured("manifest", file, rows[0], free, wrap=lambda line: f"{line}\n{rest}")
    yield from damaged_bytes("manifest", file, 20, True)


def csv_cases(root):
    file = root / "list.csv"
    yield from fields("csv", file, r"(images/\d\.\w+),(\w+),(\w+),(\w+)", lambda n, w: n > 1)
    yield from fields("csv", file, r"(path),(label),(split),(id)", lambda n, w: n > 1)
    yield from damaged_bytes("csv", file, 20, True)


def parquet_cases(root):
    yield from damaged_bytes("parquet", root / "list.parquet", 60, True)


def places_cases(root):
    file = root / "trainvalsplit_places205/train_places205.csv"
    yield from fields("places205", file, r"([\w/]+\.jpg),(\d)", lambda n, w: n == 2 and w == "number")
    yield from damaged_bytes("places205", file, 15, True)


def imagenet_cases(root):
    file = root / "meta/val.txt"
    yield from fields("imagenet", file, r"(\S+) (\d+)", lambda n, w: n == 2 and w == "underscores")
    yield from damaged_bytes("imagenet", file, 15, True)


def imagenet_folder_cases(root):
    for split in ("train", "val"):
        # Of the images, which only their folders describe, the headers are read.
        yield from damaged_bytes("imagenet folders", min(root.glob(f"{split}/*/*.JPEG")), 25, True)


def cifar_cases(name, batch, meta, root):
    for file in (root / batch, root / meta):
        content = pickle.loads(file.read_bytes(), encoding="latin1")
        for key in content:
            for what, value in ({"missing": None} | VALUES).items():
                changed = {k: v for k, v in content.items() if k != key} | ({} if what == "missing" else {key: value})
                read = key in ("data", "labels", "label_names", "fine_labels", "fine_label_names")
                yield Case(name, file, f"{key} {what}", _pickled(changed), not read)
        for what, value in VALUES.items():
            yield Case(name, file, f"all {what}", _pickled(value))
        yield from damaged_bytes(name, file, 25, True)
        yield Case(name, file, "code", b"cposix\nmkdir\n(V/tmp/featcache-evidence\ntR.")
        yield Case(name, file, "memory", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.")


def _pickled(value):
    with suppress(RecursionError, AttributeError):
        return pickle.dumps(value, protocol=2)
    return b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."


def stl_cases(root):
    for part in ("class_names.txt", "train_X.bin", "train_y.bin"):
        file = root / "stl10_binary" / part
        yield from damaged_bytes("stl10", file, 10, True)
        yield Case("stl10", file, "a byte more", file.read_bytes() + b"\0", part == "class_names.txt")
    for label in (0, 4, 255):
        yield Case("stl10", root / "stl10_binary/train_y.bin", f"label {label}", bytes([label, 1]))


def huggingface_cases(root):
    for file in sorted(root.glob("**/*.json")):
        yield from structured("huggingface", file, json.loads(file.read_text()), lambda where, token: True)
        yield from damaged_bytes("huggingface", file, 3, True)
    yield from damaged_bytes("huggingface", next(root.glob("train/*.arrow")), 30, True)


def webdataset_cases(root):
    file = root / "train/0001.tar"

    def tar(members):
        write_tar(file.with_suffix(".new"), members)
        data = file.with_suffix(".new").read_bytes()
        file.with_suffix(".new").unlink()
        return data

    image = encoded(3, "PNG")
    for way in ((), ("label",)):
        for name, token in ({"missing": None} | TOKENS).items():
            label = with_token({"label": 1}, way, token).encode("utf-8", "surrogatepass")
            free = name in ("number", "word", "true", "negative", "fraction", *TEXTS, "list", "of null")
            yield Case(
                "webdataset", file, f"{way} {name}", tar({"a/3.png": image, "a/3.json": label}), free and way != ()
            )
    for name, word in WORDS.items():
        yield Case("webdataset", file, f"cls {name}", tar({"a/3.png": image, "a/3.cls": word.encode()}), name in TEXTS)
        if name not in ("NUL", "long"):
            yield Case("webdataset", file, f"member {name}", tar({f"{word}.png": image, f"{word}.cls": b"1"}), True)
    yield Case("webdataset", file, "no label", tar({"a/3.png": image}))
    yield Case("webdataset", file, "no image", tar({"a/3.cls": b"1"}))
    yield Case("webdataset", file, "two images", tar({"a/3.png": image, "a/3.jpg": image, "a/3.cls": b"1"}))
    yield Case("webdataset", file, "nothing", tar({}), True)
    yield from damaged_bytes("webdataset", file, 40, True)


def image_cases(root):
    for kind in ("JPEG", "PNG"):
        file = root / f"{kind}.img"
        yield from damaged_bytes("image", file, 40, True)
    yield Case("image", file, "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n")
    yield Case("image", file, "PSD", b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\36\0\0\0\50\0\10\0\3" + bytes(64))
    yield Case("image", file, "PDF", b"%PDF-1.4\n")
    yield Case("image", file, "huge", _huge_png())
    yield Case("image", file, "text", b"not an image")
    yield Case("image", file, "HTML", b"<html>404</html>")


def _huge_png():
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def grid_cases(root):
    file = root / "grid.yaml"
    tree = yaml.safe_load(file.read_text())
    # Another value of one of these is another grid; the reader knows which values there can be.
    other = (
        "name",
        "epochs",
        "batch_size",
        "seed",
        "lr",
        "loss",
        "features",
        "head",
        "optimizer",
        "weight_decay",
        "schedule",
        "all",
    )

    def free(where, token):
        return where.split(".")[-1] in other or where.endswith(".0") or token in ("null", "missing", "true", "number")

    yield from structured("grid", file, tree, free, dump=lambda t: yaml.safe_dump(t, width=10**6))
    yield from damaged_bytes("grid", file, 20, True)
    yield Case("grid", file, "bomb", b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 9)) for n in range(97, 107)))  # fmt: skip
    yield Case("grid", file, "cycle", b"probes: &a [*a]\n")
    yield Case("grid", file, "cycle in a dict", b"probes:\n- &a {head: *a}\n")
    yield Case("grid", file, "code", b"probes: !!python/object/apply:os.mkdir [/tmp/featcache-evidence]\n")
    yield Case("grid", file, "keys", b"{probes: [{[1]: 2}]}\n")
    yield Case("grid", file, "million", b"probes: [{seed: {range: [0, 99999999999]}}]\n")


def checkpoint_cases(root):
    file, content = root / "net.pth", torch.load(root / "net.pth", weights_only=True)
    first = next(iter(content))
    for zipped in (True, False):
        for what, value in VALUES.items():
            for place, changed in (
                ("beside", content | {"x": value}),
                ("all", value),
                ("a tensor", content | {first: value}),
            ):
                yield Case("checkpoint", file, f"{place} {what} {zipped=}", _saved(changed, zipped), place == "beside")
        for what, tensor in _odd_tensors(content[first]).items():
            yield Case("checkpoint", file, f"tensor {what} {zipped=}", _saved(content | {first: tensor}, zipped))
        less = {k: v for k, v in content.items() if k != first}
        yield Case("checkpoint", file, f"tensor missing {zipped=}", _saved(less, zipped))
        yield Case("checkpoint", file, f"tensor more {zipped=}", _saved(content | {"y": torch.zeros(2)}, zipped))
    yield from damaged_bytes("checkpoint", file, 120, True)
    import safetensors.torch

    data = safetensors.torch.save(content)
    yield Case("checkpoint", file, "safetensors", data, False)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for way in paths_of({first: header[first]}):
        for name, token in ({"missing": None} | TOKENS).items():
            text = with_token(header, way, token).encode("utf-8", "surrogatepass")
            yield Case(
                "checkpoint",
                file,
                f"safetensors {way} {name}",
                len(text).to_bytes(8, "little") + text + data[8 + length :],
                False,
            )
    yield Case("checkpoint", file, "zip of nothing", _zipped({}))
    yield Case("checkpoint", file, "zip of text", _zipped({"a/data.pkl": b"x"}))


def _odd_tensors(tensor):
    return {
        "int32": tensor.int(), "bool": tensor > 0, "complex": tensor.to(torch.complex64), "empty": tensor[:0],
        "other shape": tensor.reshape(-1), "NaN": tensor * float("nan"), "inf": tensor * float("inf"),
        "float8": tensor.to(torch.float8_e4m3fn), "sparse": tensor.to_sparse(), "meta": tensor.to("meta"),
        "int64": tensor.long(), "uint8": tensor.byte(),
    }  # fmt: skip


def _saved(content, zipped):
    file = io.BytesIO()
    try:
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
    except (TypeError, ValueError, NotImplementedError, RecursionError):
        return b""
    return file.getvalue()


def _zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()
