"""Names from data: whatever they are, nothing outside the folders that were given is made, changed or deleted."""

import contextlib
import json
import shutil

import pytest
import trust
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from layouts import encoded, write_tar

import featcache
from featcache.store.sealed import seal, unseal

# Examples of each test in the slice that always runs, and of all.
FEW, MANY = 4, 100
# OUTSIDE stands for the folder beside the one that may be written to.
HOSTILE = (
    "", " ", ".", "..", "...", "/", "//", "\\", "../x", "../../x", "../outside/victim.txt", "OUTSIDE/new", "OUTSIDE/victim.txt",
    "a/../../outside/x", "./x", "x/", "a\0b", "\0", "\ud800", "x\ud800y", "con", "nul", "aux.txt", "/dev/null", "/dev/stdout",
    "/proc/self/mem", "~", "~root", "$HOME", "%s%n", "*", "?", "a*b", "[x]", "{x}", "-rf", "--help", "a:b", "a,b", "a;b",
    "a|b", "`id`", "$(id)", "<script>alert(1)</script>", "$x^$", "$\\frac{", "_", "__", "__x__", "zarr.json", "c", "commits",
    "manifest.json", "index.h5", "lock", "x.partial", "train@1", "@", "train@", "val", "ids", "labels", "\n", "a\nb", "\r", "\t",
    "\x1b[31m", "\u202eabc", "\u200b", "é", "e\u0301", "日本", "🐜", "İ", "ß", "x" * 199, "x" * 200, "x" * 201, "x" * 255,
    "x" * 256, "x" * 10_000, "é" * 128, "NaN", "None", "true", "0", "1e5", " x", "x ", "x.", "'", '"', "''", "#x", "!x", "&x", "=1",
)  # fmt: skip
names = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(max_size=12),
    st.text(alphabet="./\\\0 ax~@_:", max_size=8),
    st.text(alphabet=st.characters(categories=["Cs", "Cc", "Cf", "Zs", "Lo"]), min_size=1, max_size=4),
)


def examples(count):
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


class Place:
    """A folder `inside` that may be written to, beside a tree that must stay as it is."""

    def __init__(self, root, monkeypatch):
        self.root, self.inside, self.outside = root, root / "a/inside", root / "outside"
        for path in (self.outside / "folder", root / "a/outside"):
            path.mkdir(parents=True)
            (path / "victim.txt").write_text("stays")
        (self.outside / "manifest.json").write_text("{}")
        monkeypatch.chdir(root / "a")

    def name(self, name):
        return name.replace("OUTSIDE", str(self.outside))

    def _others(self):
        found = {}
        for path in sorted(self.root.rglob("*")):
            if self.inside not in (path, *path.parents) and path != self.inside.parent:
                status = path.stat()
                found[str(path)] = (status.st_size, status.st_mtime_ns, path.is_dir() or path.read_bytes())
        return found

    @contextlib.contextmanager
    def watched(self):
        """Give a new, empty `inside`, and look at all else before and after."""
        shutil.rmtree(self.inside, ignore_errors=True)
        self.inside.mkdir()
        before = self._others()
        yield self.inside
        assert self._others() == before, "something outside was touched"


@pytest.fixture
def place(tmp_path, monkeypatch):
    return Place(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return trust.write_images(tmp_path_factory.mktemp("images"))


def use(action):
    """The value of an action, or None where it is refused as bad input is."""
    got = trust.outcome(action)
    assert got.kind != "fault", got.said
    return got.value if got.kind == "value" else None


def write_manifest(images, inside, **changes):
    """A manifest of the same images in which fields of the training images have other values; None if no JSON can hold them."""
    path = inside / "list.jsonl"
    with open(images, newline="") as file:
        rows = list(trust.csv.DictReader(file))
    for number, row in enumerate(rows):
        row["path"], row["boxes"] = str(images.parent / row["path"]), json.loads(row["boxes"])
        row["labels"] = row["labels"].split(";")
        if row["split"] == "train":
            for field, name in changes.items():
                row[field] = name if field != "id" or number == 0 else row[field]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def through(inside, listed, grid):
    """Extract, train and report, as far as the names are accepted; return the page."""
    store = use(lambda: trust.write_store(listed, inside / "s.zarr"))
    if store is None:
        return None
    # What extract took, all that comes after takes too.
    made = trust.outcome(lambda: featcache.train_probes(grid, store=store, run=inside / "run"))
    assert made.kind == "value", f"extract took it, train-probes does not: {made.said}"
    explained = trust.outcome(lambda: featcache.attribute(made.value.path, limit=2))
    assert explained.kind == "value", f"extract took it, attribute does not: {explained.said}"
    page = trust.outcome(lambda: featcache.report(made.value.path, inside / "page.html"))
    assert page.kind == "value", f"extract took it, report does not: {page.said}"
    other = trust.outcome(lambda: featcache.convert(store, out=inside / "other.hdf5"))
    assert other.kind == "value", f"extract took it, convert does not: {other.said}"
    assert featcache.verify(store) == [] and trust.reading(store) == trust.reading(other.value)
    return page.value


def name_a_split(place, images, name):
    if name.strip() in ("val", "test"):
        # Then it is not another split.
        return
    with place.watched() as inside:
        name = place.name(name)
        listed = write_manifest(images, inside, split=name)
        through(inside, listed, trust.GRID | {"splits": {"train": name.strip() or "all", "val": "val", "test": "test"}})


def name_an_id(place, images, name):
    with place.watched() as inside:
        through(inside, write_manifest(images, inside, id=place.name(name)), trust.GRID)


def name_a_class(place, images, name):
    with place.watched() as inside:
        name = place.name(name)
        boxes = [{"box": [1, 1, 9, 9], "label": name}]
        through(inside, write_manifest(images, inside, labels=[name], boxes=boxes), trust.GRID)


def name_a_probe(place, images, name):
    with place.watched() as inside:
        name = place.name(name)
        store = use(lambda: trust.write_store(images, inside / "s.zarr"))
        grid = {"probes": [trust.GRID["probes"][0] | {"name": name}]}
        run = use(lambda: featcache.train_probes(grid, store=store, run=inside / "run"))
        if run is not None:
            page = trust.outcome(lambda: featcache.report(run.path, inside / "page.html"))
            assert page.kind == "value", page.said


def name_a_layer(place, images, name):
    with place.watched() as inside, pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "LAYER", place.name(name))
        features = f"{place.name(name)}:pooled"
        use(lambda: trust.write_store(images, inside / "s.zarr", arch="trust:named_network", features=features))


def name_a_member(place, images, name):
    """Of a tar: names of images there are ids."""
    with place.watched() as inside:
        name = place.name(name)
        try:
            for split in ("train", "val"):
                members = {
                    f"{name}.png": encoded(1, "PNG"),
                    f"{name}.cls": b"0",
                    "b.png": encoded(2, "PNG"),
                    "b.cls": b"1",
                }
                write_tar(inside / "data" / split / "0.tar", members)
        except UnicodeEncodeError:
            return
        use(
            lambda: featcache.extract(
                "random", "webdataset", root=inside / "data", arch="trust:network", size=32, workers=0, store=inside / "s.zarr"
            )
        )  # fmt: skip


def craft_a_store(place, images, name):
    """The manifest of a store, sealed again with a name in each place where there are names; then all that reads stores."""
    name = place.name(name)
    for field in ("files", "splits", "features", "aliases"):
        for suffix in ("zarr", "hdf5"):
            with place.watched() as inside:
                store = inside / f"s.{suffix}"
                trust.quietly(lambda s=store: trust.write_store(images, s))
                content = unseal((store / "manifest.json").read_bytes())
                first = next(iter(content[field]))
                content[field] = {name if key == first else key: value for key, value in content[field].items()}
                try:
                    (store / "manifest.json").write_bytes(seal(content))
                except UnicodeEncodeError:
                    return
                use(lambda s=store: trust.reading(s))
                use(lambda s=store, i=inside: featcache.train_probes(trust.GRID, store=s, run=i / "run"))
                use(
                    lambda s=store, i=inside: featcache.convert(
                        s, out=i / "other.zarr" if s.suffix == ".hdf5" else None
                    )
                )
                use(lambda s=store: featcache.verify(s))
                use(lambda s=store: featcache.verify(s, repair=True))
                use(lambda s=store: trust.write_store(images, s))


def craft_a_run(place, images, name):
    """A run.json whose names of files and splits are others."""
    name = place.name(name)
    with place.watched() as inside:
        store = trust.quietly(lambda: trust.write_store(images, inside / "s.zarr"))[0]
        trust.quietly(lambda: trust.train(store, inside / "whole"))
        summary = unseal((inside / "whole/run.json").read_bytes())
        key = next(iter(summary["grids"]))
        for change in (
            {"grids": {key: name}},
            {"grids": {name: "grid.yaml"}},
            {"store": name},
            {"splits": {"train": [name], "val": [name], "test": [name]}},
            {"splits": {name: ["train"]}},
            {"imported": [name]},
            {"files": {name: {"bytes": 1, "crc32": 0}}},
        ):
            run = trust.copied(inside / "whole", inside / "run")
            (run / "run.json").write_bytes(seal(summary | change))
            use(lambda r=run: featcache.attribute(r, limit=1))
            use(lambda r=run: featcache.verify(r))
            use(lambda r=run: featcache.verify(r, repair=True))
            use(lambda r=run: trust.train(store, r))


NAMED = {
    "split": name_a_split, "id": name_an_id, "class": name_a_class, "probe": name_a_probe, "layer": name_a_layer,
    "member": name_a_member, "store": craft_a_store, "run": craft_a_run,
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("what", NAMED)
@examples(FEW)
@given(name=names)
def test_a_name_stays_inside(place, images, what, name):
    NAMED[what](place, images, name)


@pytest.mark.slow
@pytest.mark.parametrize("what", NAMED)
@examples(MANY)
@given(name=names)
def test_any_name_stays_inside(place, images, what, name):
    NAMED[what](place, images, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("what", NAMED)
def test_every_hostile_name_stays_inside(place, images, what, name):
    NAMED[what](place, images, name)
