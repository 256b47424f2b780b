"""Tables of a run: large ones are compressed, and read as if they were not."""

import gzip
from pathlib import Path

import pytest
import yaml
from folders import unpack

import featcache
from featcache.errors import BadInput
from featcache.probes.runs.tables import find_table, read_table, write_table


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder of a store and a run of before, as the working directory."""
    unpack("run_v1", tmp_path)
    monkeypatch.chdir(tmp_path)


def test_one_of_two_names(tmp_path, monkeypatch):
    for size in (10, 2000, 10):
        monkeypatch.setattr("featcache.probes.runs.tables.LARGE", 1000)
        write_table(tmp_path, "a.csv", b"x\n" * (size // 2))
        (path,) = tmp_path.iterdir()
        assert path == find_table(tmp_path, "a.csv") and path.suffix == (".gz" if size > 1000 else ".csv")
        assert list(read_table(tmp_path, "a.csv")) == [{"x": "x"}] * (size // 2 - 1)


def test_a_run_with_compressed_tables_is_read_like_others(old, monkeypatch, command):
    grid = yaml.safe_load(Path("run/grid.yaml").read_text())
    plain = featcache.train_probes(grid, run="plain")
    monkeypatch.setattr("featcache.probes.runs.tables.LARGE", 500)
    packed = featcache.train_probes(grid, run="packed")
    assert packed.scores == plain.scores and packed.fields == plain.fields
    assert not Path("packed/scores.csv").exists()
    assert gzip.decompress(Path("packed/scores.csv.gz").read_bytes()) == Path("plain/scores.csv").read_bytes()
    assert packed.table("calibration.csv") == plain.table("calibration.csv")
    code, _, err = command("train-probes", "--grid", "run/grid.yaml", "--run", "packed")
    assert code == 0 and "is finished already" in err
    assert command("report", "--run", "packed", "--out", "r.html")[0] == 0
    before = Path("packed/scores.csv.gz").read_bytes()
    Path("packed/scores.csv.gz").unlink()
    featcache.train_probes(grid, run="packed")
    assert Path("packed/scores.csv.gz").read_bytes() == before
    Path("packed/scores.csv.gz").write_bytes(before[:200])
    with pytest.raises(BadInput, match=r"damaged run packed: scores.csv"):
        featcache.open_run("packed")
    for place in range(0, len(before), 7):
        # In the header, in the compressed rows and in their checksum; a few bytes of the header say nothing.
        damaged = bytearray(before)
        damaged[place] ^= 0xFF
        Path("packed/scores.csv.gz").write_bytes(damaged)
        try:
            assert featcache.open_run("packed").scores == packed.scores
        except BadInput as error:
            assert error.message.startswith("damaged run packed: scores.csv")
