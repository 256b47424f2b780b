"""What an attribution leaves in a run: its table as CSV or Parquet, how it was made, and all maps as Zarr."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import zarr

import featcache
from featcache.attribution.pieces import FOLDER

GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 2, "optimizer": {"type": "sgd", "lr": 0.5}},
    ]
}  # fmt: skip


def test_parquet_holds_what_csv_does(run, command, tmp_path):
    words = ["attribute", "--run", run, "--limit", 5, "--sanity", "--score", "epg,pointing_game"]
    tables = {}
    for format in ("csv", "parquet"):
        code, out, err = command(*words, "--to", format)
        assert code == 0, err
        tables[format] = out, featcache.open_run(run).table(f"attribution.{format}", epg=float, box_share=float)
    assert tables["csv"] == tables["parquet"] and len(tables["csv"][1]) > 10
    assert not (run / "attribution.csv").exists()
    file = pyarrow.parquet.read_table(run / "attribution.parquet")
    assert file.schema.field("epg").type == "double" and file.num_rows == len(tables["csv"][1])
    facts = json.loads((run / "attribution.json").read_bytes())
    assert json.loads(file.schema.metadata[b"featcache"]) == facts
    assert (facts["protocol"], facts["parity"], facts["seed"], facts["random_heads"]) == ("boxes", None, 0, True)
    assert command("verify", run)[:2] == (0, f"{run} is whole\n")
    code, _, err = command("report", "--run", run, "--out", tmp_path / "page.html")
    assert code == 0 and facts["set"] in (tmp_path / "page.html").read_text(), err
    (run / "attribution.parquet").write_bytes(b"PAR1")
    code, out, _ = command("verify", run)
    assert code == 1 and "attribution.parquet" in out
    code, _, err = command("attribute", "--run", run, "--to", "parket")
    assert code == 2 and "parquet" in err


def test_all_maps_are_read_by_plain_zarr(run, store, command, monkeypatch):
    """The table follows from the maps, row by row, over several shards of several chunks."""
    monkeypatch.setattr("featcache.attribution.saved_maps.CHUNK_BYTES", 2 * 2 * 64**2)
    monkeypatch.setattr("featcache.attribution.saved_maps.SHARD_BYTES", 3 * 2 * 2 * 64**2)
    methods = "gradcam,cached_occlusion:window=2"
    words = ["attribute", "--run", run, "--limit", 6, "--method", methods, "--examples", 0, "--sanity"]
    code, _, err = command(*words, "--save-maps")
    assert code == 0, err
    rows = featcache.open_run(run).table("attribution.csv")
    size = 64 * 64 * 2 * len(rows) / 1e6
    assert f"maps to save: 2 x {len(rows) // 2} of 64 x 64 pixels, {size:,.1f} MB as float16" in err
    code, out, _ = command(*words, "--save-maps", "--dry-run")
    assert code == 0 and f"maps to save: 2 x {len(rows) // 2} of 64 x 64" in out
    group = zarr.open_group(run / "attribution.zarr", mode="r")
    facts, test = group.attrs["attribution"], featcache.open_store(store)["test"]
    assert facts == json.loads((run / "attribution.json").read_bytes())
    numbers = {name: group[name][:] for name in ("probe", "image", "class")}
    labels = [group.attrs["probes"][n] for n in numbers["probe"]]
    ids, classes = (
        [group.attrs[key][n] for n in numbers[name]] for key, name in (("ids", "image"), ("classes", "class"))
    )
    assert len(set(labels)) == 4 and sum("(random head)" in label for label in labels) == len(labels) / 2
    at = 0
    for name in ("gradcam", "cached_occlusion-window=2"):
        maps, scales = group[name], group[f"{name}.scale"][:]
        assert maps.shape == (len(rows) // 2, 64, 64) and maps.dtype == np.float16
        assert maps.chunks == (2, 64, 64) and maps.shards == (6, 64, 64) and maps.shape[0] > 6
        for number, map_ in enumerate(maps[:].astype(np.float32) * scales[:, None, None]):
            row, at = rows[at], at + 1
            assert (row["probe"], row["id"], row["class"]) == (labels[number].split()[0], ids[number], classes[number])
            assert row["method"].partition(" ")[0] == maps.attrs["method"]
            boxes, own, difficult = test.boxes[test.ids.index(row["id"])]
            chosen = boxes[(own == group.attrs["classes"].index(row["class"])) & ~difficult] / (5, 3.75, 5, 3.75)
            centres = np.arange(64) + 0.5
            inside = np.zeros((64, 64), bool)
            for x0, y0, x1, y1 in chosen:
                inside |= ((centres >= y0) & (centres < y1))[:, None] & ((centres >= x0) & (centres < x1))
            positive = map_.clip(min=0)
            if row["epg"]:
                assert positive[inside].sum() / positive.sum() == pytest.approx(float(row["epg"]), abs=2e-3)
            else:
                assert not positive.any()
    assert command("verify", run)[0] == 0
    # Another grid into the same run leaves them alone.
    more = {"probes": [GRID["probes"][0] | {"seed": 1}]}
    featcache.train_probes(more, store=store, run=run)
    assert command("verify", run)[0] == 0 and (run / "attribution.zarr/gradcam").is_dir()
    chunk = next((run / "attribution.zarr/gradcam/c").rglob("0"))
    chunk = chunk if chunk.is_file() else next(path for path in chunk.rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    code, out, _ = command("verify", run, "--repair")
    assert code == 1 and "attribution.zarr/gradcam/c" in out and not chunk.exists()
    code, _, err = command(*words)
    assert code == 0 and not (run / "attribution.zarr").exists() and command("verify", run)[0] == 0, err


def test_saved_maps_are_resumed(run, monkeypatch):
    """Whole pieces are taken over; one whose maps were harmed is made again."""
    monkeypatch.setattr("featcache.attribution.pieces.IMAGES", 2)

    def files():
        return {p.relative_to(run): p.read_bytes() for p in (run / "attribution.zarr").rglob("*") if p.is_file()}

    featcache.attribute(run, limit=6, save_maps=True)
    expected = files()

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("featcache.attribution.attribute.write_maps", killed)
        featcache.attribute(run, limit=6, save_maps=True)
    harmed, whole = run / FOLDER / "000001.npy", run / FOLDER / "000000.npy"
    harmed.write_bytes(harmed.read_bytes()[:-1] + b"x")
    before = whole.stat().st_mtime_ns
    seen = []

    def watched(*_):
        seen.append(whole.stat().st_mtime_ns)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("featcache.attribution.attribute.write_maps", watched)
        featcache.attribute(run, limit=6, save_maps=True)
    assert seen == [before]
    featcache.attribute(run, limit=6, save_maps=True)
    assert files() == expected and not (run / FOLDER).exists()


def test_maps_that_do_not_fit_on_the_disk_are_refused(run, command, monkeypatch):
    usage = shutil.disk_usage(run)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    code, _, err = command("attribute", "--run", run, "--save-maps")
    assert code == 2 and "--save-maps: the maps take up to" in err
