"""Trained probes as files: probes/*.safetensors, one for the probes of a block that were done together."""

import hashlib
import json
import math
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import safetensors
import torch

from featcache.errors import BadInput, shown
from featcache.probes.heads.weights import initial_weights
from featcache.probes.identity import spec_to_dict
from featcache.probes.inputs.input import Input
from featcache.probes.runs.run_file import FILE, PARTIAL, PROBES, identity, maker, read_file, read_summary
from featcache.probes.runs.sealed_tensors import read_content, unseal, write_sealed
from featcache.probes.spec import ProbeSpec, spec_from_dict
from featcache.probes.trained import TrainedProbe

# What is wrong with the description of a file that nobody but featcache writes.
_ODD = (AttributeError, LookupError, TypeError, ValueError, BadInput)


@dataclass(frozen=True)
class Place:
    """Where a probe lies: in which file, and how many bytes of that are its own, about."""

    path: Path
    bytes: int


@dataclass(frozen=True)
class Origin:
    """What a file of probes, or a state, is of: the store, the identity of its run, and how features were read.

    buffer: rows of the shuffle buffer, None where features were in memory.
    """

    store_id: str
    run: str
    buffer: int | None = None


def save_probes(folder, probes, origin):
    """Write trained probes of one shape as one file: weights side by side, and as metadata origin, specs and losses."""
    entries = [
        {
            "id": probe.spec.id,
            "spec": spec_to_dict(probe.spec),
            "losses": [loss if math.isfinite(loss) else None for loss in probe.losses],
            "scores": [score if math.isfinite(score) else None for score in probe.scores],
            "diverged": probe.diverged,
            "epoch": probe.epoch,
            "stopped": probe.stopped,
        }
        for probe in probes
    ]
    weights = {name: torch.stack([probe.weights[name] for probe in probes]) for name in probes[0].weights}
    path = Path(folder) / PROBES / f"{block_name([p.spec for p in probes])}.safetensors"
    write_sealed(path, weights, vars(origin) | {"probes": entries})


def block_name(specs: Iterable[ProbeSpec]) -> str:
    """Return the name for the file of some probes, from their ids."""
    return hashlib.sha256(" ".join(spec.id for spec in specs).encode()).hexdigest()[:16]


def find_probes(folder):
    """Return {id: Place} of the probes that a run folder holds, by what the beginnings of its files say.

    A file that cannot be read holds none. What is in a file is checked when its probes are loaded.
    """
    found = {}
    for path in _files(folder, PROBES):
        stamp = _stamp(path)
        if ids := _ids(path, stamp):
            found |= dict.fromkeys(ids, Place(path, stamp.st_size // len(ids)))
    return found


def load_probe(folder, probe_id):
    """Read a TrainedProbe of a run. Raises BadInput if there is none of that id or its file is damaged."""
    return next(load_probes(folder, [probe_id]))


def load_probes(folder, ids, there=None):
    """Yield the TrainedProbes of these ids, file by file, in no order of theirs. Raises BadInput as load_probe.

    there: what find_probes(folder) gave, so that the folder is not listed again.
    """
    return _read(folder, ids, there, _probe)


def load_specs(folder, ids, there=None):
    """Yield the ProbeSpecs of these ids, as load_probes does, without reading their weights."""
    return _read(folder, ids, there, lambda file, row, entry: spec_from_dict(entry["spec"]))


def check_files(folder, summary):
    """Return [(path, what is wrong)] of the files of probes, and of the states, that are not whole, or of another run.

    summary: of run.json, or None where it is lost.
    """
    wrong = []
    for room in (PROBES, PARTIAL):
        for path in _files(folder, room):
            try:
                check_file(path, summary)
            except ValueError as error:
                wrong.append((path, str(error)))
    return wrong


def check_file(path, summary):
    """Check all of a file of probes, or a state. Raises ValueError unless it is whole, and of the run of a run.json.

    It is read once per process, unless it changes.
    """
    known = None
    if summary is not None:
        name = f"{path.parent.name}/{path.name}"
        files = summary.get("files")
        known = {
            "store_id": summary["store_id"],
            "run": identity(summary),
            "buffers": summary.get("buffers", {}),
            # A file of an earlier version may have its checksum in run.json.
            "files": files and {name: files[name]} if name in (files or ()) else files and {},
        }
    _check(path, _stamp(path), json.dumps(known))


def read_origin(path):
    """Return (Origin, the name of the input that its probes read) of a file with a checksum; None for one without."""
    content = read_content(path)
    if "crc32" not in content:
        return None
    specs = _specs(content, path)
    return Origin(content["store_id"], content["run"], content["buffer"]), Input.of(specs[0]).name


def _files(folder, room):
    return sorted((Path(folder) / room).glob("*.safetensors"))


@dataclass(frozen=True)
class _Stamp:
    """What of a file's status changes when the file does."""

    st_ino: int = 0
    st_size: int = 0
    st_mtime_ns: int = 0
    st_ctime_ns: int = 0


def _stamp(path):
    try:
        status = path.stat()
    except OSError:
        return _Stamp()
    return _Stamp(*(getattr(status, field) for field in _Stamp.__annotations__))


def _read(folder, ids, there, make):
    wanted, there = {}, find_probes(folder) if there is None else there
    summary = read_summary(folder) if (Path(folder) / FILE).exists() else None
    for name in ids:
        if name not in there:
            raise BadInput(_not_there(folder, name, summary))
        wanted.setdefault(there[name].path, {})[name] = None
    for path, names in wanted.items():
        with _named(path, summary), safetensors.safe_open(path, "pt") as file:
            check_file(path, summary)
            entries = _entries(read_content(path), path)
            for name in names:
                yield make(file, *entries[name])


def _not_there(folder, name, summary):
    """Say that a run has no such probe, and which of its files are damaged, for the probe may be in one of them."""
    damaged = check_files(folder, summary)
    if not damaged:
        return f"run {folder} has no probe {name}"
    path, reason = damaged[0]
    return f"run {folder} has no probe {name} that is whole: {_damaged(path, reason, summary)}"


@contextmanager
def _named(path, summary):
    try:
        yield
    except (safetensors.SafetensorError, OSError, RuntimeError, *_ODD) as error:
        raise BadInput(_damaged(path, error, summary)) from None


def _damaged(path, reason, summary):
    return f"damaged probe file {path}: {reason}; run the same {maker(summary or {})} again, which makes it anew"


# What a file holds stays as it is, and is asked for often.
@lru_cache(maxsize=1 << 14)
def _ids(path, stamp):
    try:
        return tuple(_entries(read_content(path), path))
    except _ODD:
        return ()


@lru_cache(maxsize=1 << 14)
def _outcome(path, stamp, known):
    """What is wrong with a file, an empty string if nothing is. known: JSON of what run.json says, or of None."""
    try:
        _check_all(path, json.loads(known))
    except (safetensors.SafetensorError, OSError, *_ODD) as error:
        return str(error) if type(error) is ValueError else f"its description is odd ({type(error).__name__}: {error})"
    return ""


def _check(path, stamp, known):
    if reason := _outcome(path, stamp, known):
        raise ValueError(reason)


def _check_all(path, known):
    content, sealed = unseal(path)
    room, specs = path.parent.name, _specs(content, path)
    if not sealed:
        _check_unsealed(path, content, specs, known)
    elif content.keys() != {field.name for field in fields(Origin)} | _OWN[room]:
        raise ValueError(f"it has the fields {shown(sorted(content))}")
    if known and room == PARTIAL and not sealed:
        # Of an earlier version: what it is of, only its place says.
        content["store_id"] = known["store_id"]
    if known and (content["store_id"] != known["store_id"] or (sealed and content["run"] != known["run"])):
        raise ValueError("it is of another run")
    read = Input.of(specs[0]).name
    if known and sealed and content["buffer"] != known["buffers"].get(read):
        raise ValueError(f"it is of a run that read {read} otherwise")
    if room == PROBES:
        _check_names(path, content, specs)
    elif sealed and path.stem != content["name"]:
        raise ValueError(f"it is the state {shown(content['name'])} under another name")


# The fields of a file besides those of its origin, by the folder that it lies in.
_OWN = {PROBES: {"probes"}, PARTIAL: {"name", "specs", "epoch", "counts"}}


def _check_unsealed(path, content, specs, known):
    """What can be known of a file from before there were checksums."""
    if known and known["files"] is not None:
        name = f"{path.parent.name}/{path.name}"
        if name not in known["files"]:
            raise ValueError("it has no checksum")
        read_file(path.parents[1], name, known["files"])
    if path.parent.name == PARTIAL:
        known_fields = [_OWN[PARTIAL] - {"name"}]
    else:
        alone = {"spec", "losses", "diverged", "epoch", "scores", "stopped", "store_id"}
        known_fields = [{"probes", "store_id"}, alone]
    if content.keys() not in known_fields:
        raise ValueError(f"it has the fields {shown(sorted(content))}")
    if path.parent.name == PROBES:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        # The names do not depend on the width of the features, and the number of classes; attention heads must divide it.
        if shapes.keys() != initial_weights(specs[0], getattr(specs[0].head, "heads", 1), 2).keys():
            raise ValueError(f"it has the tensors {', '.join(map(shown, shapes))}")
        if "probes" in content and {shape[0] for shape in shapes.values()} != {len(specs)}:
            raise ValueError(f"its tensors are not those of {len(specs)} probes")


def _check_names(path, content, specs):
    """Compare a file's ids with what they are hashes of, and its name with its ids."""
    for spec, entry in zip(specs, content.get("probes", ()), strict="probes" in content):
        if spec.id != entry["id"]:
            raise ValueError(f"it calls {spec.id} {shown(entry['id'])}")
    name = block_name(specs) if "probes" in content else specs[0].id
    if path.stem != name:
        raise ValueError(f"it is the file {name} under another name")


def _specs(content, path):
    """The ProbeSpecs that a file's dict tells of."""
    if "specs" in content:
        return [spec_from_dict(spec) for spec in content["specs"]]
    return [spec_from_dict(entry["spec"]) for _, entry in _entries(content, path).values()]


def _entries(content, path):
    """{id: (row in the file's tensors, what it says of the probe)}."""
    if "probes" in content:
        return {entry["id"]: (row, entry) for row, entry in enumerate(content["probes"])}
    # Of an older run: one probe, after which the file is called.
    return {path.stem: (..., content)}


def _probe(file, row, entry):
    return TrainedProbe(
        spec=spec_from_dict(entry["spec"]),
        # Copies, for the slices hold on to the whole file.
        weights={name: file.get_slice(name)[row].clone() for name in file.keys()},
        losses=[math.nan if loss is None else loss for loss in entry["losses"]],
        diverged=entry["diverged"],
        epoch=entry["epoch"],
        scores=[math.nan if score is None else score for score in entry["scores"]],
        stopped=entry["stopped"],
    )
