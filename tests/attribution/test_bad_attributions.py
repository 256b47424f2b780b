"""What `featcache attribute` refuses: one clear line, exit code 2, and nothing left in the run."""

import json
import re
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import featcache
from featcache.attribution.methods import METHODS
from featcache.attribution.protocols import PROTOCOLS
from featcache.attribution.scores import SCORES
from featcache.datasets import read_dataset
from featcache.errors import BadInput
from featcache.words import parse_kind, written

GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": "bce", "epochs": 1, "optimizer": {"type": "sgd", "lr": 0.5}},
    ]
}  # fmt: skip


@pytest.fixture
def refused(command):
    """Run `attribute` on a run, which must be refused by one line that has some words in it, and leave no file."""

    def check(run, message, *words):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        code, out, err = command("attribute", "--run", run, *words)
        last = err.splitlines()[-1]
        assert code == 2 and last.startswith("Error: ") and message in last and "Traceback" not in err, err
        assert err.count("Error: ") == 1 and out == ""
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    return check


def network(checkpoint, root):
    """Words that name the backbone and its images."""
    return ["--backbone", checkpoint, "--dataset", "voc", "--root", root, "--limit", 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "gradcamm"], "unknown method 'gradcamm'; did you mean 'gradcam'?"),
        (["--method", "gradçam"], "unknown method 'gradçam'; did you mean 'gradcam'?"),
        (["--method", ""], "unknown method ''"),
        (["--method", "gradcam,"], "unknown method ''"),
        (["--method", "gradcam,\ud800"], r"unknown method '\ud800'"),
        (["--method", "gradcam:steps=3"], "gradcam:steps=3: 'steps=3' is no field=value of gradcam (fields: none)"),
        (["--method", "gradcam:"], "'' is no field=value of gradcam"),
        (["--method", "intgrad:step=3"], "'step=3' is no field=value of intgrad; did you mean 'steps'? (fields: steps)"),
        (["--method", "intgrad:steps"], "intgrad:steps: steps has no value; write steps=VALUE"),
        (["--method", "intgrad:steps=nan"], "intgrad:steps=nan: steps: input should be a valid integer"),
        (["--method", "intgrad:steps=0"], "steps: input should be greater than or equal to 1"),
        (["--method", "intgrad:steps=2:steps=3"], "intgrad:steps=2:steps=3: steps stands there twice"),
        (["--method", "rise:masks=0"], "rise:masks=0: masks: input should be greater than or equal to 1"),
        (["--method", "rise:masks=1e99"], "rise:masks=1e99: masks: input should be a valid integer"),
        (["--method", "rise:masks=2001-99-99"], "masks: input should be a valid integer"),
        (["--method", "rise:masks=0x10"], "masks: input should be a valid integer"),
        (["--method", f"rise:seed={'9' * 5000}"], "seed: "),
        (["--method", f"rise:masks={'[' * 3000}"], "masks: input should be a valid integer"),
        (["--method", "rise:keep=nan"], "keep: input should be a finite number"),
        (["--method", "smoothgrad:noise=-1"], "noise: input should be greater than or equal to 0"),
        (["--method", "input_x_gradient"], "runs the backbone: give --backbone, --dataset and --root"),
        (["--score", "egp"], "unknown score 'egp'; did you mean 'epg'?"),
        (["--score", "epg,"], "unknown score ''"),
        (["--score", "epg:x=1"], "'x=1' is no field=value of epg"),
        (["--score", "box_iou:threshold=0"], "threshold: input should be greater than 0"),
        (["--score", "box_iou,box_iou:threshold=0.2"], "the same score stands there twice with different fields"),
        (["--protocol", ""], "unknown protocol ''"),
        (["--protocol", "gridgp"], "unknown protocol 'gridgp'; did you mean 'gridpg'?"),
        (["--protocol", "gridpg:side=0"], "side: input should be greater than or equal to 2"),
        (["--protocol", "gridpg:grids=-1"], "grids: input should be greater than or equal to 1"),
        (["--protocol", "gridpg"], "--protocol gridpg runs the backbone"),
        (["--probe", "0123456789"], "has no probe 0123456789"),
        (["--probe", ""], "has no probe"),
        (["--split", "tset"], "did you mean 'test'"),
        (["--split", ""], "has no split ''"),
        (["--select", "best nap"], "did you mean 'map'"),
        (["--select", ""], "--select '': expected 'best METRIC'"),
        (["--run", "nowhere"], "run nowhere not found"),
        (["--store", "nowhere.zarr"], "store not found"),
        (["--memory", "nan"], "memory: expected a number of bytes, 1 or more, not nan"),
        (["--seed", "9" * 30], "seed: expected a whole number"),
    ],
)  # fmt: skip
def test_wrong_words(run, refused, words, message):
    refused(run, message, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method", "bcos"],
            "bcos: resnet18 has no B-cos layers; methods that can explain it: gradcam, gradcampp, layercam, position_logits",
        ),
        (
            ["--method", "occlusion:window=10000"],
            "a window of 10000 pixels is larger than an image, which has 64 a side",
        ),
        (["--method", "lime:kernel=1e-300:samples=4"], "in image 000061 has values that are not finite"),
        (["--protocol", "gridpg:side=2"], "needs images of one class each"),
    ],
)
def test_what_this_backbone_cannot_be_asked(run, refused, scenes, checkpoint, words, message):
    refused(run, message, *network(checkpoint, scenes), *words)


def replaced_by_another(image):
    """Write other pixels, so that the file has the size that it had."""
    data = bytearray(image.read_bytes())
    at = len(data) // 2
    data[at : at + 20] = bytes(7 - byte % 7 for byte in data[at : at + 20])
    image.write_bytes(data)
    Image.open(image).load()


def resized(image):
    picture = Image.open(image)
    picture.resize((picture.width // 2, picture.height)).save(image)


def moved_box(image):
    path = image.parents[1] / "Annotations" / f"{image.stem}.xml"
    path.write_text(re.sub(r"<xmin>\d+", "<xmin>1", path.read_text()))


CHANGES = {
    "missing": (lambda image: image.unlink(), "image not found: "),
    "empty": (lambda image: image.write_bytes(b""), "made of something else: dataset test"),
    "resized": (resized, "made of something else: dataset test"),
    "moved box": (moved_box, "made of something else: dataset test"),
    "replaced": (replaced_by_another, "is not the file that store"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_images_that_changed_since_extraction(run, refused, scenes, checkpoint, tmp_path, change, message):
    shutil.copytree(scenes, tmp_path / "scenes")
    change(tmp_path / "scenes/VOCdevkit/VOC2007/JPEGImages/000061.jpg")
    refused(run, message, *network(checkpoint, tmp_path / "scenes"), "--method", "gradient")


def test_another_backbone(run, refused, scenes):
    random = ["--backbone", "random", "--arch", "resnet18", "--dataset", "voc", "--root", scenes]
    for method in ("gradcam", "gradient"):
        refused(run, "made of something else: weights_sha256", *random, "--method", method)


def test_a_store_that_moved_or_has_no_boxes(refused, scenes, checkpoint, command, tmp_path):
    """Of two runs; the store that moved is named."""
    data, rows = read_dataset("voc", scenes), []
    for split, records in data.splits.items():
        rows += [{"path": str(r.image), "label": data.classes[r.box_classes[0]], "split": split} for r in records]
    (tmp_path / "single.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = featcache.extract(
        checkpoint, "manifest", root=tmp_path / "single.jsonl", features="pooled,spatial", size=32, device="cpu", workers=0,
        store=tmp_path / "s.zarr",
    )  # fmt: skip
    run = featcache.train_probes(GRID, store=store, run=tmp_path / "r").path
    refused(run, "has no box to score against", "--protocol", "boxes")
    (tmp_path / "s.zarr").rename(tmp_path / "moved.zarr")
    refused(run, "store not found", "--protocol", "boxes")
    refused(run, "has no box to score against", "--protocol", "boxes", "--store", tmp_path / "moved.zarr")


letters = st.text("ab1-.:=,[{!&*é١ \n\0\ud800", max_size=6)
REGISTRIES = {"--method": METHODS, "--score": SCORES, "--protocol": PROTOCOLS}
values = st.one_of(
    st.integers().map(str), st.floats().map(str), letters, st.sampled_from(["", "nan", "1_0", "١", "true", "null"])
)  # fmt: skip


@st.composite
def kinds_as_written(draw):
    """An option, and text that is more or less a kind of it."""
    option = draw(st.sampled_from(list(REGISTRIES)))
    name = draw(st.one_of(st.sampled_from(list(REGISTRIES[option])), letters))
    fields = [*REGISTRIES[option][name].model_fields, "seed"] if name in REGISTRIES[option] else ["seed"]
    settings = draw(st.lists(st.tuples(st.one_of(st.sampled_from(fields), letters), values), max_size=3))
    return option, ":".join([name, *("=".join(setting) for setting in settings)])


@given(kinds_as_written())
@example(("--method", f"rise:seed={'9' * 5000}"))
@example(("--method", "rise:masks=010:keep=1e-3"))
def test_a_kind_is_read_as_it_is_written_or_refused_in_a_line(case):
    option, text = case
    try:
        kind = parse_kind(REGISTRIES[option], text, option)
    except BadInput as error:
        assert error.message.startswith(option) and len(error.message.splitlines()) == 1
    else:
        assert parse_kind(REGISTRIES[option], written(kind), option) == kind
        assert text.split(":")[0] == kind.type
