"""Trained probes as files: each of probes/*.safetensors holds the probes of a block that were finished together."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch

from featcache.errors import BadInput, shown
from featcache.probes.inputs.input import Source
from featcache.probes.runs.run_file import FILE, PARTIAL, PROBES, Summary, identity, maker, read_file, read_summary
from featcache.probes.runs.sealed_tensors import read_content, unseal, write_sealed
from featcache.probes.solvers.solver import Choice, Optimality
from featcache.probes.spec import ProbeSpec, spec_from_dict, spec_to_dict
from featcache.probes.trained import TrainedProbe
from featcache.probes.weights import initial_weights

T = TypeVar("T")
# What reading a description raises that was written by anything but featcache.
_ODD = (AttributeError, LookupError, TypeError, ValueError, BadInput)


@dataclass(frozen=True)
class Place:
    """Where a probe lies: the file, and about how many bytes of it belong to the probe."""

    path: Path
    bytes: int


@dataclass(frozen=True)
class Origin:
    """What a file of probes, or a state, comes from.

    store_id: id of the store. run: identity() of the run. buffer: rows of the shuffle buffer through which features
    were read, None where they were in memory.
    """

    store_id: str
    run: str
    buffer: int | None = None


def save_probes(folder: str | Path, probes: Sequence[TrainedProbe], origin: Origin) -> None:
    """Write trained probes of one shape into one file: stacked weights, with origin, specs and losses as metadata."""
    entries = [
        {
            "id": probe.spec.id,
            "spec": spec_to_dict(probe.spec),
            "losses": [loss if math.isfinite(loss) else None for loss in probe.losses],
            "scores": [score if math.isfinite(score) else None for score in probe.scores],
            "diverged": probe.diverged,
            "epoch": probe.epoch,
            "stopped": probe.stopped,
            **({"choice": probe.choice.to_json()} if probe.choice else {}),
        }
        | _optimality(probe)
        for probe in probes
    ]
    weights = {name: torch.stack([probe.weights[name] for probe in probes]) for name in probes[0].weights}
    path = Path(folder) / PROBES / f"{block_name([p.spec for p in probes])}.safetensors"
    write_sealed(path, weights, vars(origin) | {"probes": entries})


def _optimality(probe: TrainedProbe) -> dict[str, Any]:
    """Return how far from its optimum a probe is, for its entry; nothing where that is not known."""
    if probe.optimality is None:
        return {}
    return {"optimality": {name: v if math.isfinite(v) else None for name, v in vars(probe.optimality).items()}}


def block_name(specs: Iterable[ProbeSpec]) -> str:
    """Return the name of the file that holds these probes, without its ending: a hash of their ids."""
    return hashlib.sha256(" ".join(spec.id for spec in specs).encode()).hexdigest()[:16]


def find_probes(folder: str | Path) -> dict[str, Place]:
    """Return {id: Place} for the probes that a run folder holds, from the metadata of its files alone.

    A file that cannot be read counts as empty. The rest of a file is checked when its probes are loaded.
    """
    places: dict[str, Place] = {}
    for path in _files(folder, PROBES):
        stamp = _stamp(path)
        if ids := _ids(path, stamp):
            places |= dict.fromkeys(ids, Place(path, stamp.st_size // len(ids)))
    return places


def load_probe(folder: str | Path, probe_id: str) -> TrainedProbe:
    """Read a TrainedProbe of a run. Raises BadInput if the run has no probe of that id, or its file is damaged.

    load_probe("runs/voc", run.scores[0]["probe"]).weights["fc0.weight"]  # [C, D]
    """
    return next(load_probes(folder, [probe_id]))


def load_probes(
    folder: str | Path, ids: Iterable[str], places: Mapping[str, Place] | None = None
) -> Iterator[TrainedProbe]:
    """Yield the TrainedProbes of these ids, file by file, whatever the order of the ids. Raises BadInput as load_probe.

    places: the result of find_probes(folder), by default found anew.
    """
    return _read(folder, ids, places, _probe)


def load_specs(
    folder: str | Path, ids: Iterable[str], places: Mapping[str, Place] | None = None
) -> Iterator[ProbeSpec]:
    """Yield the ProbeSpecs of these ids, as load_probes does, without reading their weights."""
    return _read(folder, ids, places, lambda file, row, entry: spec_from_dict(entry["spec"]))


def check_files(folder: str | Path, summary: Summary | None) -> list[tuple[Path, str]]:
    """Return [(path, what is wrong)] for the files of probes and states that are damaged or belong to another run.

    summary: the content of run.json, or None where it is lost.
    """
    wrong = []
    for room in (PROBES, PARTIAL):
        for path in _files(folder, room):
            try:
                check_file(path, summary)
            except ValueError as error:
                wrong.append((path, str(error)))
    return wrong


def check_file(path: Path, summary: Summary | None) -> None:
    """Check all of a file of probes, or of a state. Raises ValueError if it is damaged or belongs to another run.

    summary: as for check_files. The file is read once per process, and again if it changes.
    """
    known: dict[str, Any] | None = None
    if summary is not None:
        name = f"{path.parent.name}/{path.name}"
        files = summary.get("files")
        known = {
            "store_id": summary["store_id"],
            "run": identity(summary),
            "buffers": summary.get("buffers", {}),
            # Earlier versions kept the checksums of files of probes in run.json.
            "files": files and {name: files[name]} if name in (files or ()) else files and {},
        }
    if fault := _fault(path, _stamp(path), json.dumps(known)):
        raise ValueError(fault)


def read_origin(path: Path) -> tuple[Origin, str] | None:
    """Return (Origin, name of the Source that the probes read) from a file with a checksum; None for one without."""
    content = read_content(path)
    if "crc32" not in content:
        return None
    specs = _specs(content, path)
    return Origin(content["store_id"], content["run"], content["buffer"]), Source.of(specs[0]).name


def _files(folder: str | Path, room: str) -> list[Path]:
    return sorted((Path(folder) / room).glob("*.safetensors"))


@dataclass(frozen=True)
class _Stamp:
    """The part of a file's status that changes whenever the file does."""

    st_ino: int = 0
    st_size: int = 0
    st_mtime_ns: int = 0
    st_ctime_ns: int = 0


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError:
        return _Stamp()
    return _Stamp(*(getattr(status, field) for field in _Stamp.__annotations__))


def _read(
    folder: str | Path,
    ids: Iterable[str],
    places: Mapping[str, Place] | None,
    make: Callable[[Any, Any, dict[str, Any]], T],
) -> Iterator[T]:
    """Yield make(open file, row in its tensors, entry in its metadata) for the probes of these ids, file by file."""
    wanted: dict[Path, dict[str, None]] = {}
    places = find_probes(folder) if places is None else places
    summary = read_summary(folder) if (Path(folder) / FILE).exists() else None
    for name in ids:
        if name not in places:
            raise BadInput(_missing(folder, name, summary))
        wanted.setdefault(places[name].path, {})[name] = None
    for path, names in wanted.items():
        with _named(path, summary), safetensors.safe_open(path, "pt") as file:
            check_file(path, summary)
            entries = _entries(read_content(path), path)
            for name in names:
                yield make(file, *entries[name])


def _missing(folder: str | Path, name: str, summary: Summary | None) -> str:
    """Say that a run has no such probe, and name the first damaged file, which may hold it."""
    damaged = check_files(folder, summary)
    if not damaged:
        return f"run {folder} has no probe {name}"
    path, reason = damaged[0]
    return f"run {folder} has no probe {name} that is whole: {_damaged(path, reason, summary)}"


@contextmanager
def _named(path: Path, summary: Summary | None) -> Iterator[None]:
    """Turn what reading a file raises into a BadInput that names it."""
    try:
        yield
    except (safetensors.SafetensorError, OSError, RuntimeError, *_ODD) as error:
        raise BadInput(_damaged(path, error, summary)) from None


def _damaged(path: Path, reason: object, summary: Summary | None) -> str:
    return f"damaged probe file {path}: {reason}; run the same {maker(summary or {})} again, which makes it anew"


# The stamp is an argument so that a file is read again when it has changed.
@lru_cache(maxsize=1 << 14)
def _ids(path: Path, stamp: _Stamp) -> tuple[str, ...]:
    """Return the ids of the probes in a file, () if it cannot be read."""
    try:
        return tuple(_entries(read_content(path), path))
    except _ODD:
        return ()


@lru_cache(maxsize=1 << 14)
def _fault(path: Path, stamp: _Stamp, known: str) -> str:
    """Say what is wrong with a file, "" if nothing is. known: JSON of what run.json says, null where it is lost."""
    try:
        _check_all(path, json.loads(known))
    except (safetensors.SafetensorError, OSError, *_ODD) as error:
        return str(error) if type(error) is ValueError else f"its description is odd ({type(error).__name__}: {error})"
    return ""


def _check_all(path: Path, known: dict[str, Any] | None) -> None:
    """Raise whatever is wrong with a file, mostly a ValueError that says it. known: what run.json says."""
    content, sealed = unseal(path)
    room, specs = path.parent.name, _specs(content, path)
    if not sealed:
        _check_unsealed(path, content, specs, known)
    elif content.keys() != {field.name for field in fields(Origin)} | _OWN[room]:
        raise ValueError(f"it has the fields {shown(sorted(content))}")
    if known and room == PARTIAL and not sealed:
        # States of earlier versions do not name their store: only the folder that they lie in tells it.
        content["store_id"] = known["store_id"]
    if known and (content["store_id"] != known["store_id"] or (sealed and content["run"] != known["run"])):
        raise ValueError("it is of another run")
    read = Source.of(specs[0]).name
    if known and sealed and content["buffer"] != known["buffers"].get(read):
        raise ValueError(f"it is of a run that read {read} otherwise")
    if room == PROBES:
        _check_names(path, content, specs)
    elif sealed and path.stem != content["name"]:
        raise ValueError(f"it is the state {shown(content['name'])} under another name")


# The fields of a description besides those of its origin, by the folder of the file.
_OWN = {PROBES: {"probes"}, PARTIAL: {"name", "specs", "epoch", "counts"}}


def _check_unsealed(
    path: Path, content: dict[str, Any], specs: Sequence[ProbeSpec], known: dict[str, Any] | None
) -> None:
    """Check what can be checked of a file from before there were checksums. Raises ValueError."""
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
        # The names depend neither on the width, which the attention heads must divide, nor on the number of classes.
        if shapes.keys() != initial_weights(specs[0], specs[0].head.narrowest, 2).keys():
            raise ValueError(f"it has the tensors {', '.join(map(shown, shapes))}")
        if "probes" in content and {shape[0] for shape in shapes.values()} != {len(specs)}:
            raise ValueError(f"its tensors are not those of {len(specs)} probes")


def _check_names(path: Path, content: dict[str, Any], specs: Sequence[ProbeSpec]) -> None:
    """Compare the ids in a file with its specs, and its name with its ids. Raises ValueError."""
    for spec, entry in zip(specs, content.get("probes", ()), strict="probes" in content):
        if spec.id != entry["id"]:
            raise ValueError(f"it calls {spec.id} {shown(entry['id'])}")
    name = block_name(specs) if "probes" in content else specs[0].id
    if path.stem != name:
        raise ValueError(f"it is the file {name} under another name")


def _specs(content: dict[str, Any], path: Path) -> list[ProbeSpec]:
    """Return the ProbeSpecs in a description."""
    if "specs" in content:
        return [spec_from_dict(spec) for spec in content["specs"]]
    return [spec_from_dict(entry["spec"]) for _, entry in _entries(content, path).values()]


def _entries(content: dict[str, Any], path: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return {id: (row in the file's tensors, entry of the probe)} from a description."""
    if "probes" in content:
        return {entry["id"]: (row, entry) for row, entry in enumerate(content["probes"])}
    # Older runs have one file for each probe, named after it.
    return {path.stem: (..., content)}


def _probe(file: Any, row: Any, entry: dict[str, Any]) -> TrainedProbe:
    return TrainedProbe(
        spec=spec_from_dict(entry["spec"]),
        # Slices are copied because they keep the whole file in memory.
        weights={name: file.get_slice(name)[row].clone() for name in file.keys()},
        losses=[math.nan if loss is None else loss for loss in entry["losses"]],
        diverged=entry["diverged"],
        epoch=entry["epoch"],
        scores=[math.nan if score is None else score for score in entry["scores"]],
        stopped=entry["stopped"],
        choice=Choice.from_json(entry["choice"]) if "choice" in entry else None,
        optimality=_read_optimality(entry.get("optimality")),
    )


def _read_optimality(values: dict[str, float | None] | None) -> Optimality | None:
    if values is None:
        return None
    return Optimality(**{name: math.inf if value is None else value for name, value in values.items()})
