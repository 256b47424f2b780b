"""Runs: a file of another run, a lost run.json, hostile fields and tables, kills between two writes. What harms one file
of a run at random is in test_damage.py.
"""

import gzip
import json
import random
import shutil
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import trust
import yaml
from folders import unpack

import featcache
from featcache.errors import BadInput
from featcache.probes import finish, train
from featcache.probes.runs import probe_file
from featcache.probes.runs.probe_file import find_probes, load_probe
from featcache.probes.runs.run import open_run
from featcache.probes.runs.tables import write_table
from featcache.store.sealed import seal, unseal

# Many networks, or many runs: longer together than the fast tests may take.
pytestmark = pytest.mark.process

# Bytes for features: less than any has, so that all are streamed.
SMALL = 100.0
OTHER = {"probes": [trust.GRID["probes"][0] | {"name": "more", "seed": 7}]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with a store and a run with maps."""
    folder = tmp_path_factory.mktemp("parts")
    store = trust.write_store(trust.write_images(folder), folder / "s.zarr")
    trust.train_and_explain(store, folder / "run")
    return folder


@pytest.fixture
def run(parts, tmp_path):
    """A copy of the run."""
    return trust.copied(parts / "run", tmp_path / "run")


def again(parts, run, grid=trust.GRID, **more):
    return featcache.train_probes(grid, store=parts / "s.zarr", run=run, **more)


def change(run, **fields):
    """Change fields of run.json and seal it again, as somebody would who knows how."""
    content = unseal((run / "run.json").read_bytes())
    (run / "run.json").write_bytes(seal(content | fields))


def without_seals(run):
    """Make of a run one of before there were checksums, in every file."""
    content = unseal((run / "run.json").read_bytes())
    del content["files"]
    (run / "run.json").write_text(json.dumps(content, indent=1))
    for room in ("probes", "partial"):
        for path in (run / room).glob("*.safetensors"):
            with safetensors.safe_open(path, "pt") as file:
                held = json.loads(file.metadata()["featcache"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            held = {k: v for k, v in held.items() if k not in ("crc32", "run", "buffer", "name")}
            if room == "partial":
                del held["store_id"]
            path.write_bytes(safetensors.torch.save(tensors, metadata={"featcache": json.dumps(held)}))


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def said(capsys):
    return capsys.readouterr().err


def uses(run):
    """What takes probes of a run, {name: action}."""
    probe = open_run(run).scores[0]["probe"]
    return {
        "compare": lambda: featcache.compare(run, rule="best map per loss"),
        "attribute": lambda: featcache.attribute(run, limit=1),
        "export": lambda: featcache.export(
            to=run.parent / "x.pth", run=run, probe=probe, backbone="random", arch="trust:network"
        ),
    }


@pytest.mark.parametrize(
    "more", [{"seed": 1}, {"memory": SMALL}, {"grid": trust.GRID | {"splits": {"train": "val", "val": "train"}}}]
)
def test_a_probe_of_the_same_id_from_another_run_is_told(parts, run, tmp_path, more, capsys):
    """Seed, splits and how features were read are no part of a probe's id, and change its weights."""
    other = again(parts, tmp_path / "other", **more)
    assert find_probes(other.path).keys() == find_probes(run).keys()
    expected = trust.run_files(run)
    for path in (other.path / "probes").iterdir():
        shutil.copy(path, run / "probes")
    assert {f.where for f in featcache.verify(run)} >= {f"probes/{p.name}" for p in (run / "probes").iterdir()}
    for name, action in uses(run).items():
        with pytest.raises(BadInput, match="damaged probe file .*: it is of a.*; run the same train-probes again"):
            action()
            pytest.fail(f"{name} took it")
    again(parts, run)
    assert said(capsys).count("its probes are trained again") == len(list((run / "probes").iterdir()))
    assert trust.run_files(run) == expected


def test_a_state_of_another_run_costs_its_training(parts, run, tmp_path, capsys):
    trust.train_and_stop(parts / "s.zarr", tmp_path / "stopped")
    trust.train_and_stop(parts / "s.zarr", tmp_path / "other", seed=5)
    for path in (tmp_path / "other/partial").iterdir():
        shutil.copy(path, tmp_path / "stopped/partial")
    again(parts, tmp_path / "stopped")
    assert "it is of another run; its block is trained again from the beginning" in said(capsys)
    assert trust.trained_files(tmp_path / "stopped") == trust.trained_files(run)


def test_a_lost_run_json_costs_no_training(parts, run, capsys):
    expected = trust.run_files(run)
    before = {path: path.stat().st_mtime_ns for path in (run / "probes").iterdir()}
    for harm in (Path.unlink, flip, lambda path: (path.unlink(), path.mkdir()), lambda path: path.write_text("[1")):
        harm(run / "run.json")
        assert [f.where for f in featcache.verify(run)] == ["run.json"]
        with pytest.raises(BadInput, match="run.json"):
            open_run(run)
        # With another seed it would be another run.
        with pytest.raises(
            BadInput, match="its probes are of another store, seed, splits or selection: choose another"
        ):
            again(parts, run, seed=1)
        again(parts, run)
        assert "notice:" in said(capsys)
        featcache.attribute(run)
        assert trust.run_files(run) == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_lost_run_json_does_not_change_how_features_are_read(parts, run, tmp_path):
    """Of a streamed run that was stopped: its states say how large the buffer was."""
    again(parts, tmp_path / "whole", memory=SMALL)
    trust.train_and_stop(parts / "s.zarr", tmp_path / "stopped", memory=SMALL)
    (tmp_path / "stopped/run.json").unlink()
    (state,) = (tmp_path / "stopped/partial").iterdir()
    again(parts, tmp_path / "stopped")
    whole, other = (tmp_path / name / "probes" / state.name for name in ("whole", "stopped"))
    assert whole.read_bytes() == other.read_bytes()


def test_a_damaged_file_does_not_stop_the_use_of_others(parts, run):
    linear = [row["probe"] for row in open_run(run).scores if row["name"] == "linear"]
    mlp = next(row["probe"] for row in open_run(run).scores if row["name"] == "mlp")
    expected = featcache.compare(run, probes=list(dict.fromkeys(linear)))
    flip(find_probes(run)[mlp].path)
    assert featcache.compare(run, probes=list(dict.fromkeys(linear))) == expected
    with pytest.raises(
        BadInput, match="damaged probe file .*its checksum does not fit its content; run the same train"
    ):
        load_probe(run, mlp)


def test_a_probe_that_is_not_there_names_the_damaged_file(run):
    probe, place = next(iter(find_probes(run).items()))
    place.path.write_bytes(b"")
    with pytest.raises(BadInput, match=f"has no probe {probe} that is whole: damaged probe file {place.path}: "):
        load_probe(run, probe)


def test_every_byte_of_a_file_of_probes_counts(run):
    path = min((run / "probes").iterdir(), key=lambda path: path.stat().st_size)
    whole, chance = path.read_bytes(), random.Random(0)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        assert [f.where for f in featcache.verify(run)] == [f"probes/{path.name}"], at


def test_a_run_lists_its_probes_once_a_command(parts, run, monkeypatch):
    listed, files = [], probe_file._files
    monkeypatch.setattr(probe_file, "_files", lambda *words: listed.append(words) or files(*words))
    for action in uses(run).values():
        listed.clear()
        action()
        assert len(listed) <= 2, "once for each of two probes at most"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A run of before, one file a probe, and its store; they lie in the working directory."""
    unpack("run_v1", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_runs_of_before_are_read_with_one_notice_and_sealed_when_they_grow(old, command):
    grid = yaml.safe_load((old / "grid.yaml").read_text())
    probes = list(find_probes(old))
    code, _, err = command("compare", "--run", old, "--probe", probes[0], "--probe", probes[1])
    assert code == 0 and err.count("kept no checksums") == 1
    first, second = (old / f"probes/{probe}.safetensors" for probe in probes[:2])
    kept = first.read_bytes()
    shutil.copy(second, first)
    code, _, err = command("compare", "--run", old, "--probe", probes[0], "--probe", probes[2])
    assert code == 2 and f"it is the file {probes[1]} under another name" in err
    first.write_bytes(kept)
    grid["probes"] = [grid["probes"][0] | {"seed": 9}]
    featcache.train_probes(grid, run=old)
    assert featcache.verify(old) == []
    for name in (f"probes/{probes[0]}.safetensors", "grid.yaml", "seeds.csv"):
        whole = (old / name).read_bytes()
        flip(old / name)
        assert [f.where for f in featcache.verify(old)] == [name]
        (old / name).write_bytes(whole)


def test_packed_runs_without_checksums_go_on(parts, run, tmp_path, capsys):
    expected = trust.trained_files(run)
    trust.train_and_stop(parts / "s.zarr", tmp_path / "stopped")
    for folder in (run, tmp_path / "stopped"):
        without_seals(folder)
        again(parts, folder)
        assert said(capsys).count("kept no checksums") == 1
        tables = {name: content for name, content in trust.trained_files(folder).items() if name.endswith("csv")}
        assert tables == {name: content for name, content in expected.items() if name.endswith("csv")}
    assert featcache.verify(run) == [] and "kept no checksums" not in said(capsys), "it was said already"
    # One that has no checksum among those that have one is none of theirs.
    again(parts, tmp_path / "new")
    shutil.copy(next((run / "probes").iterdir()), tmp_path / "new/probes")
    assert [f.what for f in featcache.verify(tmp_path / "new")] == ["it has no checksum"]


HOSTILE = {
    "select": [[], {}, {"metric": 3}, {"metric": "map", "split": "nope"}, {"metric": "nope", "split": "val"}],
    "splits": [7, {}, {"train": "train"}, {"train": [1]}], "rows": [None, {}, {"test": "5"}], "chance": [{}, {"test": 1}],
    "overlap": [[1], [{"roles": 1}], "x"], "diverged": [3, [3]], "classes": ["x", [1]], "store": [5], "probes": ["9", 1.5],
    "grids": [{"k": "../../evil.yaml"}, {"k": "run.json"}, {"k": "/evil.yaml"}, ["grid.yaml"]], "buffers": [3, {"a": "b"}],
    "files": [{"../victim": {"bytes": 1, "crc32": 1}}, {"run.json": {"bytes": 1, "crc32": 1}}, {"seeds.csv": 3}, []],
    "imported": [[{"probe": "../x", "nofile": 1}], 3], "preprocessing": [3, {"evil": 1}], "store_id": [None], "key": [None],
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("field", HOSTILE)
def test_fields_of_a_crafted_run_json_are_one_line(parts, run, field):
    victim = run.parent / "victim"
    victim.write_text("stays")
    for value in HOSTILE[field]:
        copy = trust.copied(run, run.parent / "copy")
        change(copy, **{field: value})
        actions = uses(run) | {"report": lambda c=copy: featcache.report(c, c.parent / "p.html")}
        actions = {name: action for name, action in actions.items() if name == "report"} | uses_of_copy(copy)
        kinds = {name: trust.outcome(action) for name, action in actions.items()}
        assert {got.kind for got in kinds.values()} <= {"line", "value"}, kinds
        if field not in ("preprocessing", "imported"):
            assert {got.kind for got in kinds.values()} == {"line"}, (value, kinds)
        assert trust.outcome(featcache.verify, copy).kind == "value"
        assert trust.outcome(lambda c=copy: featcache.verify(c, repair=True)).kind == "value"
        assert trust.outcome(again, parts, copy).kind in ("line", "value")
    assert victim.read_text() == "stays"


def uses_of_copy(copy):
    return {
        "compare": lambda: featcache.compare(copy, rule="best map per loss"),
        "attribute": lambda: featcache.attribute(copy, limit=1),
        "open": lambda: open_run(copy),
        "export": lambda: featcache.export(
            to=copy.parent / "x.pth", run=copy, probe="0123456789", backbone="random", arch="trust:network"
        ),
    }


@pytest.mark.parametrize("text", trust.ODD_JSON.values(), ids=trust.ODD_JSON)
def test_a_run_json_that_is_something_else_is_one_line(run, text):
    (run / "run.json").write_bytes(text)
    for action in uses_of_copy(run).values():
        got = trust.outcome(action)
        assert got.kind == "line" and "run.json" in got.said


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("scores.csv", b"linear", b"x" * 200_000),
        ("scores.csv", b",linear,1,", b",linear,x,"),
        ("scores.csv", b"probe,", b"p,"),
        ("scores.csv", b"map", b"\xff\xfe"),
        ("scores.csv", b"\n", b""),
        ("calibration.csv", b"pairs", b"p"),
        ("calibration.csv", b",1,", b",x,"),
        ("scores.csv", b"0.", b"0\0."),
        ("scores_per_class.csv", b"positives", b"p"),
        ("attribution.csv", b"epg", b"e"),
        ("attribution.csv", b",0.", b",x."),
    ],
)
def test_odd_tables_of_a_run_without_checksums_are_one_line(run, name, old, new):
    without_seals(run)
    data = (run / name).read_bytes()
    assert old in data
    (run / name).write_bytes(data.replace(old, new, 1 if name == "scores_per_class.csv" else -1))
    got = trust.outcome(lambda: featcache.report(run, run.parent / "p.html"))
    assert got.kind == "line" and f"damaged run {run}: {name}" in got.said


@pytest.mark.process
@pytest.mark.parametrize("content", [bytes(1 << 20), b"\n" * (1 << 20), b"a,b\n" * (1 << 18)])
def test_a_table_that_is_a_bomb_is_one_line(run, content):
    without_seals(run)
    (run / "scores.csv").unlink()
    with gzip.open(run / "scores.csv.gz", "wb") as file:
        for _ in range(64):
            file.write(content)
    got = trust.outcome(open_run, run)
    assert got.kind == "line" and "scores.csv" in got.said


def test_a_table_that_would_look_like_a_bomb_is_not_compressed(tmp_path, monkeypatch):
    monkeypatch.setattr("featcache.probes.runs.tables.LARGE", 1000)
    assert write_table(tmp_path, "a.csv", b"x\n" * 100_000).keys() == {"a.csv"}


def test_a_relative_store_is_found_from_another_folder(parts, tmp_path, monkeypatch):
    shutil.copytree(parts / "s.zarr", tmp_path / "a/s.zarr")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    featcache.train_probes(trust.GRID, store="s.zarr", run="runs/x")
    monkeypatch.chdir(tmp_path / "b")
    expected = featcache.compare(parts / "run", rule="best map per loss")
    assert featcache.compare("../a/runs/x", rule="best map per loss") == expected
    shutil.move(tmp_path / "a/runs/x", tmp_path / "b/x")
    for action in (featcache.compare, featcache.attribute):
        with pytest.raises(
            BadInput, match=r"made from store s\.zarr, which is not found from here; say .* with --store"
        ):
            action("x", rule="best map per loss")
    assert featcache.compare("x", rule="best map per loss", stores=["../a/s.zarr"]) == expected


@pytest.mark.parametrize("lost", ["probes", "history.csv", "seeds.csv", "grid.yaml", "run.json", "scores.csv", ""])
def test_what_is_lost_while_a_run_is_made_is_not_claimed(parts, tmp_path, monkeypatch, lost):
    opened = finish.open_run

    def lose(folder):
        path = folder / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return opened(folder)

    monkeypatch.setattr(finish, "open_run", lose)
    with pytest.raises(BadInput):
        again(parts, tmp_path / "run")


def test_names_stay_when_a_second_grid_is_killed_amid_its_tables(parts, run, tmp_path, monkeypatch):
    """Names are no part of a probe's id, and only the scores hold them: those that are there, or are being written."""
    renamed = {"probes": [trust.GRID["probes"][0] | {"name": "renamed"}, *trust.GRID["probes"][1:]]}
    again(parts, tmp_path / "r", renamed)
    again(parts, tmp_path / "undisturbed", renamed)
    again(parts, tmp_path / "undisturbed", OTHER)

    class Killed(BaseException):
        pass

    writes = []
    write = finish.write_table

    def killed(folder, name, data):
        if len(writes) == stop:
            raise Killed
        writes.append(name)
        return write(folder, name, data)

    for stop in range(4):  # noqa: B007 (killed() reads it)
        writes.clear()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(finish, "write_table", killed)
            again(parts, tmp_path / "r", OTHER)
        assert all("not finished" in f.what for f in featcache.verify(tmp_path / "r"))
        with pytest.raises(BadInput, match="is not finished"):
            open_run(tmp_path / "r")
    again(parts, tmp_path / "r", OTHER)
    assert trust.run_files(tmp_path / "r") == trust.run_files(tmp_path / "undisturbed")
    assert {row["name"] for row in open_run(tmp_path / "r").scores} == {"renamed", "mlp", "more"}


def test_maps_that_were_not_finished_are_left_out_with_a_notice(run, monkeypatch, capsys):
    """A kill between the two files of attribute, or before their checksums."""
    attribution = __import__("featcache.attribution.results", fromlist=["x"])
    write = attribution.write_file

    class Killed(BaseException):
        pass

    def killed(folder, name, data):
        if name == "attribution.npz":
            raise Killed
        return write(folder, name, data)

    expected = trust.run_files(run)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(attribution, "write_file", killed)
        featcache.attribute(run, limit=1)
    featcache.report(run, run.parent / "p.html")
    assert "attribution.csv of run" in said(capsys)
    featcache.attribute(run)
    assert trust.run_files(run) == expected


def test_a_grid_of_another_key_that_is_damaged_is_said_and_written_by_its_own_command(parts, run, capsys):
    again(parts, run, OTHER)
    (name,) = (path.name for path in run.glob("grid-*.yaml"))
    whole = trust.run_files(run)
    flip(run / name)
    again(parts, run)
    assert f"{name}: its checksum does not fit its content; the train-probes of its grid" in said(capsys)
    assert [f.where for f in featcache.verify(run)] == [name]
    again(parts, run, OTHER)
    assert trust.run_files(run) == whole and featcache.verify(run) == []


def test_verify_from_the_command_line(parts, run, command):
    assert command("verify", run)[:2] == (0, f"{run} is whole\n")
    flip(run / "history.csv")
    code, out, err = command("verify", run)
    assert code == 1 and out == "history.csv: its checksum does not fit its content\n" and "--repair" in err
    code, _, err = command("verify", run, "--repair")
    assert code == 1 and "run the same train-probes" in err and not (run / "history.csv").exists()
    again(parts, run)
    assert command("verify", run)[0] == 0
    code, _, err = command("verify", run.parent / "nothing")
    assert code == 2 and "Traceback" not in err
    assert train.GRID in {path.name for path in run.iterdir()}
