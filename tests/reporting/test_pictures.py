"""Pictures of maps: their pixels, sheets as files and on the page, and which images are chosen for them."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from bcos.common import gradient_to_image
from PIL import Image

import featcache
from featcache.attribution.batch import Source
from featcache.attribution.examples import Measured, Rule, choose, missing, only, parse_examples
from featcache.attribution.methods.bcos import BcosContributions
from featcache.attribution.targets import Target
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.errors import BadInput
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import load_probe
from featcache.reporting import page_sheets
from featcache.reporting.localisation import localisation_rows, narrow_tables, read_localisation
from featcache.reporting.overlay import EDGE, LINES, Box, overlay, resized, with_boxes, with_contour
from featcache.reporting.pictures import GAP, MARGIN, draw_sheet
from featcache.reporting.sheets import _sheets, read_sheets

GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 4, "optimizer": {"type": "sgd", "lr": 0.5}},
    ]
}  # fmt: skip
GREEN, WHITE = LINES[True][0], LINES[False][0]


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    return featcache.train_probes(GRID, store=store, run=tmp_path_factory.mktemp("runs") / "r")


@pytest.fixture
def run(trained, tmp_path):
    """A folder with a finished run of a BCE and a CE probe."""
    shutil.copytree(trained.path, tmp_path / "r")
    return tmp_path / "r"


def brightness(pixels):
    return pixels.astype(int).sum(2)


@pytest.mark.parametrize("shade", [None, 0, 255])
def test_an_overlay_of_one_pixel_is_brightest_there(shade):
    """Whatever the photograph; orange for the class and blue against it, on the same scale."""
    values = np.zeros((32, 32), np.float32)
    values[20, 7] = 5
    picture = None if shade is None else np.full((32, 32, 3), shade, np.uint8)
    for sign in (1, -1):
        pixels = overlay(sign * values, picture)
        assert np.unravel_index(brightness(pixels).argmax(), (32, 32)) == (20, 7)
        red, _, blue = pixels[20, 7].astype(int)
        assert (red > blue) == (sign > 0)
        others = np.delete(pixels.reshape(-1, 3), 20 * 32 + 7, 0)
        assert (others == others[0]).all(), "where a map is 0 there is the photograph alone"
    assert (overlay(np.zeros((32, 32)), picture) == others[0]).all()


def test_an_overlay_has_one_scale_for_both_signs():
    """A map and a multiple of it look the same; half of the peak is as strong on either side."""
    values = np.random.default_rng(0).normal(size=(40, 40))
    assert (overlay(values) == overlay(7 * values)).all()
    steps = np.zeros((40, 40))
    steps[:4], steps[10:14], steps[20:24] = 2, 1, -1
    pixels = overlay(steps)
    assert brightness(pixels)[0, 0] > brightness(pixels)[10, 0]
    assert (
        pixels[10, 0].tolist() == overlay(-steps)[20, 0].tolist()
        and pixels[20, 0].tolist() == overlay(-steps)[10, 0].tolist()
    )


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_boxes_are_drawn_where_they_are_after_resize_and_crop(shade):
    """An image of 200 x 100 whose short side becomes 56, of which the middle 48 pixels are seen."""
    preprocessing = Preprocessing(48, (0, 0, 0), (1, 1, 1), resize="crop", short_side=56)
    (edges,), _ = preprocessing.map_boxes([(90, 25, 120, 60)], 100, 200)
    # x: 112 wide, 32 cut off on the left; y: 56 high, 4 cut off above.
    assert edges.tolist() == pytest.approx([90 * 0.56 - 32, 25 * 0.56 - 4, 120 * 0.56 - 32, 60 * 0.56 - 4])
    pixels = np.full((192, 192, 3), shade, np.uint8)
    drawn = with_boxes(pixels, [Box(edges, True, False)], 48)
    y, x = np.nonzero((drawn == GREEN).all(2))
    around = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    # The line has its middle on the edge, and is three pixels wide.
    assert around == pytest.approx(4 * edges + [-1.5, -1.5, 1.5, 1.5], abs=0.5)
    inside = drawn[y.min() + 4 : y.max() - 3, x.min() + 4 : x.max() - 3]
    assert (inside == shade).all() and (pixels == shade).all(), "nothing else changes, nor the picture given"
    contrast = max(abs(brightness(drawn) - 3 * shade).flat)
    assert contrast > 250 and (drawn == EDGE).all(2).any()


def test_boxes_of_the_class_explained_lie_on_top_and_difficult_ones_are_dashed():
    pixels = np.full((64, 64, 3), 90, np.uint8)
    own, other = Box((10, 10, 40, 40), True, False), Box((40, 0, 64, 40), False, False)
    drawn = with_boxes(pixels, [own, other], 64)
    assert drawn[25, 40].tolist() == list(GREEN), "the line that both have"
    assert drawn[25, 62].tolist() == list(WHITE) and drawn[25, 63].tolist() == list(EDGE), "wholly within the picture"
    dashed = with_boxes(pixels, [Box((10, 10, 40, 40), True, True)], 64)
    assert 0.3 < (dashed[10, 12:38] == GREEN).all(1).mean() < 0.7


def test_bcos_colours_equal_those_of_the_package():
    torch.manual_seed(0)
    image = torch.rand(3, 40, 40)
    image, weights = torch.cat([image, 1 - image]), torch.randn(6, 40, 40) * torch.rand(1, 40, 40)
    weights[:, :8, :8] = 0
    weights[:, 30:, 30:] = -weights[:, 30:, 30:].abs()
    got = BcosContributions().colour(image, weights).numpy() / 255
    assert got == pytest.approx(gradient_to_image(image, weights), abs=0.51 / 255)
    assert BcosContributions().colour(image, torch.zeros(6, 40, 40))[..., 3].max() == 0, "no weights, no colour"


def test_a_contour_lies_on_the_border_of_a_mask():
    mask = np.zeros((64, 64), bool)
    mask[20:40, 10:50] = True
    drawn = with_contour(np.full((64, 64, 3), 77, np.uint8), mask)
    light, dark = (drawn == LINES[True][0]).all(2), (drawn == EDGE).all(2)
    assert light[19:21, 10:50].all() and light[20:40, 49:51].all() and dark[18, 10:50].all() and dark[21, 13:47].all()
    assert (drawn[23:37, 13:47] == 77).all() and (drawn[:17] == 77).all() and not (light | dark)[43:].any()


def test_rules_choose_by_hand():
    nan = float("nan")
    targets = [Target(row, label, None) for row, label in ((0, 1), (0, 2), (1, 1), (2, 5), (3, 0))]
    measured = Measured(
        "p", "m maps of probe p", "EPG", [0.5, 0.9, nan, 0.9, 0.1], [0.8, 0.6, 0.1, 0.7, 0.2], [1, 1, 0, 1, 0]
    )
    assert choose([Rule("best", 2)], targets, measured) == {
        1: "highest EPG (90%) of m maps of probe p", 3: "highest EPG (90%) of m maps of probe p",
    }  # fmt: skip
    both = choose([Rule("worst", 1), Rule("wrong", 9), Rule("right", 2)], targets, measured)
    # The second class of image 0 is right too, and an image is chosen once by a rule.
    assert list(both) == [4, 2, 0, 3]
    assert both[4] == "lowest EPG (10%) of m maps of probe p; wrong by probe p (probability 20%)"
    unknown = measured._replace(right=[nan] * 5, probabilities=[nan] * 5)
    rules = [Rule("best", 1), Rule("right", 1)]
    assert list(choose(rules, targets, unknown)) == [1]
    (line,) = missing(rules, targets, unknown)
    assert "--examples right, by probe p" in line and "the store lacks" in line
    (line,) = missing([Rule("wrong", 1)], targets[:1], Measured("p", "", "EPG", [0.1], [0.9], [1]))
    assert "there is none" in line


@pytest.mark.process
def test_images_by_name_become_sheets(run, trained, scenes, command, tmp_path):
    """From the command line to files, pixel by pixel, and onto the page; without photographs, from the store alone."""
    test = featcache.open_store(trained.summary["store"])["test"]
    rows = [row for row, (_, classes, difficult) in enumerate(test.boxes) if (~difficult).any()][3:5]
    ids = [test.ids[row] for row in rows]
    words = ["attribute", "--run", run, "--method", "gradcam,cached_occlusion", "--images", ",".join(reversed(ids))]
    code, out, err = command(*words, "--pictures", tmp_path / "p")
    pairs = [(test.ids[r], featcache.open_store(trained.summary["store"]).classes[c]) for r in rows
             for c in sorted(set(test.boxes[r][1][~test.boxes[r][2]].tolist()))]  # fmt: skip
    files = sorted((tmp_path / "p").iterdir())
    assert code == 0 and f"pictures: {len(pairs)} sheets in {tmp_path / 'p'}" in out, err
    assert [file.name for file in files] == [f"{n:03d}-{i}_{c}.png" for n, (i, c) in enumerate(pairs, 1)]
    with open(run / "attribution.csv", newline="") as file:
        assert {(row["id"], row["class"]) for row in csv.DictReader(file)} == set(pairs)
    opened = featcache.open_run(run)
    sheets = read_sheets(opened, read_localisation(opened))
    kept, sheet = np.load(run / "attribution.npz"), sheets[0]
    assert "images" not in kept and len(kept["maps"]) == 4 * len(pairs) and sheet.picture is None
    assert sheet.methods == ["gradcam", "cached_occlusion"] and len(sheet.probes) == 2
    drawn = np.array(Image.open(files[0]))
    assert (drawn == np.array(draw_sheet(sheet))).all()
    side = 192
    for (probe, method), panel in sheet.panels.items():
        number = [list(p[:2]) for p in kept["panels"]].index([probe, method])
        assert (panel.pixels == overlay(kept["maps"][number])).all()
        expected = with_boxes(resized(panel.pixels, side), sheet.boxes, 64)
        x = MARGIN + sheet.methods.index(method) * (side + GAP)
        tops = [y for y in range(len(drawn) - side) if (drawn[y, x : x + side] == expected[0]).all()]
        assert any((drawn[y : y + side, x : x + side] == expected).all() for y in tops)
    code, _, err = command("report", "--run", run, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and all(f"<strong>{i}: {c}</strong>" in page for i, c in pairs), err
    # The same command with other images leaves no sheet of before, but others' files. With the data set, photographs are below the maps.
    data = ["--dataset", "voc", "--root", scenes]
    Image.new("RGB", (2, 2)).save(tmp_path / "p/001-of-mine.png")
    code, out, err = command(*words[:-1], ids[0], *data, "--sanity", "--pictures", tmp_path / "p")
    assert code == 0 and 0 < len(list((tmp_path / "p").iterdir())) - 1 < len(pairs), err
    assert (tmp_path / "p/001-of-mine.png").exists()
    (sheet, *_), images = (
        read_sheets(featcache.open_run(run), read_localisation(featcache.open_run(run))),
        np.load(run / "attribution.npz")["images"],
    )
    assert images.shape == (1, 64, 64, 3) and (sheet.picture == images[0]).all()
    assert sheet.methods[:3] == ["gradcam", "gradcam (random head)", "gradcam (random backbone)"]


def test_captions_say_what_the_probe_says(run, trained):
    """The logits of the heads on the stored features, and the class whose probability that is."""
    featcache.attribute(run, examples=2)
    store = featcache.open_store(trained.summary["store"])
    test, kept = store["test"], np.load(run / "attribution.npz")
    for panel, logit, probability in zip(kept["panels"], kept["logits"], kept["probabilities"], strict=True):
        probe = load_probe(run, panel[0])
        head = HeadModule(probe.spec.head, probe.weights, probe.spec.loss.link)
        maps = torch.from_numpy(test["spatial"][test.ids.index(panel[3])][None])
        label = store.classes.index(panel[4])
        assert logit == pytest.approx(head(maps)[0, label].item(), abs=1e-4)
        assert probability == pytest.approx(head.probabilities(maps)[0, label].item(), abs=1e-5)
    opened = featcache.open_run(run)
    localisation = read_localisation(opened)
    (sheet, *_) = read_sheets(opened, localisation)
    assert all(": logit " in text and "probability" in text for text in sheet.probes.values())
    # A file of an earlier version lacks them.
    earlier = {
        name: kept[name]
        for name in kept.files
        if name not in ("logits", "probabilities", "reasons", "colours", "coloured")
    }
    assert [s.reason for s in _sheets(opened, earlier, localisation)] == [""] * len(
        _sheets(opened, earlier, localisation)
    )


def passes(text):
    """How many forward passes of an image a command says it took."""
    return re.search(r"through the backbone: (\d+) forward", text).group(1)


@pytest.mark.process
def test_examples_by_rule_are_the_extremes_of_the_table(run, scenes, checkpoint, command, tmp_path):
    """Their maps are explained again, the passes are counted, and the pictures say why and by which probe."""
    backbone = ["--backbone", checkpoint, "--dataset", "voc", "--root", scenes]
    line = ["attribute", "--run", run, "--method", "input_x_gradient", "--examples", "1,best:2,worst:1,right:1,wrong:1"]
    code, out, err = command(*line, *backbone, "--dry-run")
    assert code == 0 and "; then up to 5 images again, for pictures" in out, err
    code, out, err = command(*line, *backbone)
    assert code == 0 and f"sheets in {run / 'pictures'}" in out, err
    with open(run / "attribution.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]["probe"]
    own = [row for row in rows if row["probe"] == first]
    scores = {(row["id"], row["class"]): float(row["epg"]) for row in own if row["epg"]}
    kept = np.load(run / "attribution.npz")
    reasons = {
        tuple(panel[3:5]): reason for panel, reason in zip(kept["panels"], kept["reasons"].tolist(), strict=True)
    }
    (highest,) = [pair for pair, reason in reasons.items() if reason.startswith("highest")][:1]
    (lowest,) = [pair for pair, reason in reasons.items() if "lowest" in reason]
    assert scores[highest] == max(scores.values()) and scores[lowest] == min(scores.values())
    assert f"of input_x_gradient maps of probe {first}" in reasons[highest]
    assert all(panel[0] == first for panel in kept["panels"][: len(reasons)])
    right = kept["probabilities"][: len(reasons)] >= 0.5
    for panel, correct in zip(kept["panels"], right, strict=False):
        for word in ("right", "wrong"):
            if f"{word} by probe" in reasons[tuple(panel[3:5])]:
                assert correct == (word == "right")
    # What is explained again gives the maps that were scored.
    for panel, values in zip(kept["panels"], kept["maps"], strict=True):
        row = next(r for r in rows if [r[c] for c in ("probe", "method", "split", "id", "class")] == list(panel[:5]))
        assert float(panel[5]) == pytest.approx(float(row["epg"]), abs=1e-4) and np.abs(values).max() > 0
    # With saved maps, those are shown, and nothing is explained again.
    code, out, saved = command(*line, *backbone, "--save-maps")
    again = np.load(run / "attribution.npz")
    assert code == 0 and int(passes(saved)) < int(passes(err)), saved
    assert (again["panels"] == kept["panels"]).all() and (again["reasons"] == kept["reasons"]).all()
    peaks = np.abs(kept["maps"]).max((1, 2), keepdims=True)
    assert again["maps"] / peaks == pytest.approx(kept["maps"] / peaks, abs=1e-3)
    page = featcache.report(run, tmp_path / "page.html").read_text()
    assert f"highest EPG ({100 * scores[highest]:.0f}%) of input_x_gradient maps of probe {first}" in page


@pytest.mark.process
def test_colours_of_a_bcos_network(scenes, tmp_path, command):
    """From extract to a sheet with a column of colours, those of the package for the probe's own weights."""
    backbone = ["--backbone", "random", "--arch", "bcos_resnet18"]
    data = ["--dataset", "voc", "--root", scenes]
    store, place = tmp_path / "b.zarr", tmp_path / "r"
    code, _, err = command("extract", *backbone, *data, "--size", 32, "--workers", 0, "--store", store)
    assert code == 0, err
    run = featcache.train_probes({"probes": GRID["probes"]}, store=store, run=place)
    code, _, err = command(
        "attribute", "--run", place, "--method", "gradcam,bcos", *backbone, *data, "--examples", "3,best:1"
    )
    assert code == 0, err
    kept = np.load(place / "attribution.npz")
    assert len(kept["colours"]) == len(kept["maps"]) // 2 and kept["colours"].shape[1:] == (32, 32, 4)
    assert {kept["panels"][number][1] for number in kept["coloured"]} == {"bcos"}
    # Opaque pixels lie where the map of the same class is not negative, to the smoothing.
    for number, colours in zip(kept["coloured"], kept["colours"], strict=True):
        assert (colours[..., 3] > 0).any() == (kept["maps"][number] > 0).any()
    run = featcache.open_run(place)
    sheet = read_sheets(run, read_localisation(run))[0]
    assert sheet.methods == ["gradcam", "bcos", "bcos colours"] and sheet.picture.shape == (32, 32, 3)
    assert sheet.coloured and "In a column of colours" in featcache.report(place, tmp_path / "page.html").read_text()


def test_sheets_are_left_out_of_a_page_that_would_be_too_large(run, monkeypatch, tmp_path):
    featcache.attribute(run)
    whole = featcache.report(run, tmp_path / "whole.html").read_text()
    opened = featcache.open_run(run)
    sheets = read_sheets(opened, read_localisation(opened))
    one = page_sheets.embedded([sheets[:1]])[0][0][0].length
    monkeypatch.setattr(page_sheets, "PAGE_BYTES", 3 * one + one // 2)
    ((own, left),) = page_sheets.embedded([sheets])
    assert 0 < len(own) < len(sheets) and left == len(sheets) - len(own)
    assert sum(sheet.length for sheet in own) <= 3 * one + one // 2
    small = featcache.report(run, tmp_path / "small.html").read_text()
    assert len(small) < len(whole) and f"{left} more images and classes would make this page too large" in small
    shared = page_sheets.embedded([sheets, [], sheets[:1]])
    assert [len(own) + left for own, left in shared] == [len(sheets), 0, 1] and len(shared[2][0]) == 1


def test_the_table_for_a_narrow_terminal(run):
    featcache.attribute(
        run, methods=["gradcam", "cached_occlusion"], scores=["epg", "compactness"], limit=3, examples=0
    )
    columns, rows = localisation_rows(run)
    probes, epg, compactness = narrow_tables(columns, rows)
    assert probes[0][0] == "probe" and "loss" in probes[0] and len(probes[1]) == 2
    assert epg[0] == ["probe", "method", "EPG %", "uniform map %", "maps", "empty"]
    assert [row[:2] for row in epg[1]] == [row[:2] for row in compactness[1]] and len(epg[1]) == 4
    assert [row[2] for row in compactness[1]] == [row[columns.index("compactness %")] for row in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "0000061"], "split test has no such image; did you mean '000061'?"),
        (["--images", "000003"], "split test has no such image; it is in split train: give --split train"),
        (["--images", ""], "split test has no such image"),
        (["--images", "000061", "--limit", 2], "--images names the images, and --limit takes the first"),
        (["--examples", "bets:3"], "did you mean 'best'?"),
        (["--examples", "best:0"], "a number from 1 to 1000"),
        (["--examples", "best:x"], "a number from 1 to 1000"),
        (["--pictures", __file__], "it is a file; name a folder"),
        (["--examples", "-1"], "expected a number of first images, or rules of best, worst, right, wrong"),
    ],
)
def test_wrong_words(trained, command, words, message):
    code, _, err = command("attribute", "--run", trained.path, *words)
    assert code == 2 and message in err and "Traceback" not in err


def test_an_image_without_a_target_is_named(store):
    """All its boxes are difficult, or it has none."""
    test = featcache.open_store(store)["test"]
    source = Source(test, Preprocessing(64, (0, 0, 0), (1, 1, 1)), torch.device("cpu"), None, (), 1e9)
    targets = [Target(0, 1, None), Target(0, 2, None), Target(2, 1, None)]
    assert only([test.ids[2], test.ids[0]], source, targets) == targets
    with pytest.raises(BadInput, match=f"--images '{test.ids[1]}': nothing is explained in this image"):
        only([test.ids[0], test.ids[1]], source, targets)


def test_examples_from_python():
    assert parse_examples(6) == parse_examples("6") == (6, ())
    assert parse_examples(["2", "best"]) == parse_examples("2,best:3") == (2, (Rule("best", 3),))
    with pytest.raises(BadInput, match="examples: expected a number or a list of rules"):
        featcache.attribute("nowhere", examples=2.5)
