"""What the trust harnesses share: a store and a run so small that a case takes a moment, ways to harm them, and a judge.

The network, the images, the store and the runs are real ones, only small.
"""

import csv
import json
import os
import random
import shlex
import shutil
import traceback
import warnings
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from layouts import save
from torch import nn

import featcache
from featcache.errors import BadInput
from featcache.probes.engine import sweep
from featcache.store import manifest

SIZE = 32
# Failing cases that a message shows.
MOST_SHOWN = 3000
CLASSES = ("ant", "bee", "cat")
ROWS = {"train": 20, "val": 10, "test": 10}
# The longest line that an error may have, and how many lines below the first there may be where there is more to say.
MOST_CHARACTERS, MOST_LINES = 500, 22
TRAIN = {"epochs": 2, "batch_size": 8, "loss": "bce", "optimizer": {"type": "sgd", "lr": 0.5}}
GRID = {
    "probes": [
        {"name": "linear", "features": "pooled", "head": "linear", **TRAIN, "loss": ["bce", "ce"]},
        {"name": "mlp", "features": "spatial", "head": {"type": "mlp", "hidden": 4}, **TRAIN},
    ]
}


def network():
    """A backbone of two convolutions: --arch trust:network."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, 8, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(),
    )  # fmt: skip


# The name of the layer in named_network.
LAYER = "conv"


def named_network():
    """A backbone whose only convolution has the name that LAYER says: --arch trust:named_network."""
    whole = nn.Sequential()
    whole.add_module(LAYER, nn.Conv2d(3, 4, 5, 8, 2))
    return whole


def write_images(root):
    """Write images with boxes and a manifest of them; return what --root must be."""
    rows, number = [], 0
    for split, count in ROWS.items():
        for n in range(count):
            number += 1
            save(root / f"{number}.png", number, height=20, width=24)
            boxes = [{"box": [n % 5, 2, 12 + n % 7, 15], "label": CLASSES[n % 3], "difficult": n % 4 == 3}]
            boxes += [{"box": [0, 0, 9, 20], "label": CLASSES[n % 2]}] * (n % 3 == 2)
            labels = sorted({box["label"] for box in boxes})
            rows.append(
                {"path": f"{number}.png", "labels": ";".join(labels), "split": split, "id": f"image {number}é"}
                | {"boxes": json.dumps(boxes)}
            )
    with open(root / "list.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root / "list.csv"


def write_store(images, path, **more):
    """The `extract` that every store of the harnesses comes from: several shards a split, several chunks a shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "CHUNK_ROWS", 2)
        patch.setattr(manifest, "SHARD_BYTES", 700)
        given = {"arch": "trust:network", "size": SIZE, "workers": 0, "batch_size": 8} | more
        return featcache.extract("random", "manifest", root=images, store=path, **given)


def quietly(action):
    """Run `action` without its output; return (what it returns, what it printed)."""
    said = StringIO()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(said))
        stack.enter_context(redirect_stderr(said))
        # Warnings stop no user. What was computed from odd values is compared instead.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        return action(), said.getvalue()


@dataclass(frozen=True)
class Outcome:
    """What came of an action. kind: value, line (an error as it is promised) or fault (any other error)."""

    kind: str
    value: object = None
    said: str = ""


def outcome(action, *given):
    """Run `action` as a user would, and return the Outcome."""
    try:
        value, said = quietly(lambda: action(*given))
        return Outcome("value", value, said)
    except BadInput as error:
        lines = error.message.splitlines()
        fine = 0 < len(lines) <= MOST_LINES and all(len(x) <= MOST_CHARACTERS and x.isprintable() for x in lines)
        said = error.message if fine else f"an error line that is none: {error.message[:700]!r}"
        return Outcome("line" if fine else "fault", said=said)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return Outcome("fault", said=f"{type(error).__name__} at {place}: {str(error)[:200]}")


def chosen(cases):
    """Those of {name: case} that are to run: all, or the one that the environment's TRUST_CASE names."""
    only = os.environ.get("TRUST_CASE")
    return cases if only is None else {name: case for name, case in cases.items() if name == only}


def judged(failures, cases, test):
    """Fail with what went wrong, at most 30 of it, and with what to type to see a case again."""
    if failures:
        first = next(iter(failures))
        lines = [f"{name}: {what}" for name, what in list(failures.items())[:MOST_SHOWN]]
        again = f"TRUST_CASE={shlex.quote(first)} pytest -m 'slow or not slow' {test}"
        pytest.fail(
            f"{len(failures)} of {len(cases)} cases fail\n" + "\n".join(lines) + f"\nAgain: {again}", pytrace=False
        )


def positions(size, count, chance):
    """Byte positions of a file: of its header, its end, and in between. All of them if there are no more than `count`."""
    if size <= count:
        return list(range(size))
    third = max(count // 3, 1)
    header = chance.sample(range(min(size, 512)), min(third, size, 512))
    end = chance.sample(range(max(size - 64, 0), size), min(third, 64))
    return sorted({*header, *end, *(chance.randrange(size) for _ in range(count - 2 * third))})


@dataclass(frozen=True)
class Harm:
    """Something that happens to one file of a folder. Called with the folder, it does it."""

    file: str
    what: str
    do: object

    def __str__(self):
        return f"{self.file} {self.what}"

    def __call__(self, folder):
        path = folder / self.file
        before = path.read_bytes()
        self.do(path)
        assert not path.is_file() or path.read_bytes() != before, f"{self} changes nothing"


# Fields of run.json that differ between two trainings of the same.
DIFFERS = ("seconds", "store", "crc32", "checksums", "files")
# JSON that is none of ours, and none that a program should follow into the depths.
ODD_JSON = {
    "empty object": b"{}", "null": b"null", "list": b"[]", "string": b'"x"', "number": b"7",
    "deep": b"[" * 100_000 + b"]" * 100_000, "digits": b"9" * 5000, "NaN": b"NaN", "no UTF-8": b"\xff\xfe{}",
}  # fmt: skip


def files_of(folder):
    """Names of the files below a folder that hold something."""
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file() and p.stat().st_size)


def harms(folder, file, count):
    """Yield Harms of one file of a folder, `count` of them flipped bits. The same file has the same ones every time."""
    data, chance = (folder / file).read_bytes(), random.Random(file)
    for at in positions(len(data), count, chance):
        bit = chance.randrange(8)
        yield Harm(file, f"bit {bit} of byte {at}", lambda p, at=at, bit=bit: p.write_bytes(_flipped(p, at, bit)))
    for at in positions(len(data), max(count // 6, 1), chance):
        if any(data[at : at + 16]):
            yield Harm(file, f"zeros from byte {at}", lambda p, at=at: p.write_bytes(_zeroed(p, at)))
    for length in sorted({0, len(data) // 2, len(data) - 1}):
        yield Harm(file, f"cut to {length}", lambda p, n=length: os.truncate(p, n))
    yield Harm(file, "a byte more", lambda p: p.write_bytes(p.read_bytes() + b"\0"))
    yield Harm(file, "twice", lambda p: p.write_bytes(p.read_bytes() * 2))
    yield Harm(file, "gone", lambda p: p.unlink())
    yield Harm(file, "a folder", lambda p: (p.unlink(), p.mkdir()))
    yield Harm(file, "a full folder", lambda p: (p.unlink(), p.mkdir(), (p / "x").write_text("x")))
    like = [
        n for n in files_of(folder) if n.split(".")[-1] == file.split(".")[-1] and (folder / n).read_bytes() != data
    ]
    for name in chance.sample(like, min(2, len(like))):
        yield Harm(file, f"now {name}", lambda p, n=name: shutil.copy(folder / n, p))
    if file.endswith(".json"):
        for name, text in ODD_JSON.items():
            yield Harm(file, name, lambda p, text=text: p.write_bytes(text))


def _flipped(path, at, bit):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    return data


def _zeroed(path, at):
    data = bytearray(path.read_bytes())
    data[at : at + 16] = bytes(len(data[at : at + 16]))
    return data


def copied(source, target):
    """A copy of a folder at a place of its own."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return Path(target)


def reading(store):
    """What a store holds, {name: bytes}: small arrays, and features read whole."""
    opened = featcache.open_store(store)
    found = {"": f"{opened.classes} {opened.task} {opened.id}"}
    for split in opened.splits:
        data = opened[split]
        found[f"{split} ids"] = "\n".join(data.ids)
        found[f"{split} labels"] = data.labels.tobytes()
        found[f"{split} sizes"] = data.sizes.tobytes()
        found[f"{split} boxes"] = b"|".join(
            np.concatenate([a.ravel() for a in image]).tobytes() for image in data.boxes
        )
        for feature in opened.manifest.features:
            found[f"{split} {feature}"] = data[feature][:].tobytes()
    return found


def batches(store):
    """All features again, in shuffled batches."""
    opened = featcache.open_store(store)
    return {
        f"{split} {feature}": b"".join(
            rows.tobytes() + values.tobytes() for rows, values in opened[split][feature].batches(4, shuffle=True)
        )
        for split in opened.splits
        for feature in opened.manifest.features
    }


def tensors(store):
    """All features again, as tensors."""
    opened = featcache.open_store(store)
    return {
        f"{split} {feature}": opened[split][feature].to_torch().numpy().tobytes()
        for split in opened.splits
        for feature in opened.manifest.features
    }


def run_files(run):
    """The files of a run folder, {name: content}, without what differs from one training to the next: times and places."""
    found = {name: (Path(run) / name).read_bytes() for name in files_of(run)}
    grid = [line for line in found.get("grid.yaml", b"").splitlines() if not line.startswith(b"store:")]
    summary = json.loads(found["run.json"])
    summary = {key: value for key, value in summary.items() if key not in DIFFERS}
    return found | {"grid.yaml": grid, "run.json": summary}


def train(store, run):
    """Train the harnesses' grid, or go on with it; return the run's files."""
    featcache.train_probes(GRID, store=store, run=run)
    return run_files(run)


def train_and_explain(store, run):
    """Train, and write maps too."""
    train(store, run)
    featcache.attribute(run)


def explain(run, **more):
    """Attribute and return the rows as text, in which one NaN equals another."""
    return repr(featcache.attribute(run, **more))


def train_and_stop(store, run, **more):
    """Train until states of blocks were written, then stop as a kill would: nothing is tidied up."""

    class Stopped(BaseException):
        pass

    written = sweep.Sweep.save

    def save(self, trainings):
        written(self, trainings)
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
        patch.setattr(sweep, "SAVE_SECONDS", -1)
        patch.setattr(sweep.Sweep, "save", save)
        featcache.train_probes(GRID, store=store, run=run, **more)


def opened(run):
    """What a run says from Python."""
    found = featcache.open_run(run)
    return [list(map(dict, found.scores))] + [
        found.table(name) for name in ("seeds.csv", "calibration.csv", "history.csv")
    ]


def trained_files(run):
    """The files of a run that train-probes writes."""
    return {name: content for name, content in run_files(run).items() if not name.startswith("attribution")}


def exported(run):
    """The bytes of every probe of a run, merged with the backbone."""
    files = {}
    for probe in sorted({row["probe"] for row in featcache.open_run(run).scores}):
        target = run.parent / f"{probe}.safetensors"
        featcache.export(to=target, run=run, probe=probe, backbone="random", arch="trust:network")
        files[probe] = target.read_bytes()
    return files


def page(run):
    """The report on a run, without the place that it is written to."""
    return Path(featcache.report(run, run.parent / "page.html")).read_text()


def differing(before, after):
    """Names of what differs, if both are dicts."""
    if not isinstance(before, dict):
        return ""
    return f" in {', '.join(sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k)))}"[:200]


def told(file, action, said):
    """Whether a page without maps is one that says so: maps can be lost, and the report on the rest is still right."""
    return action == "report" and file.startswith("attribution") and file in said
