"""Trained probes as files: probes/*.safetensors, one for the probes of a block that were done together."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from featcache.atomic import write_whole
from featcache.errors import BadInput
from featcache.probes.spec import spec_from_dict, spec_to_dict
from featcache.probes.stack import TrainedProbe, block_name
from featcache.probes.tensor_file import DAMAGE, open_tensors, pack_tensors


@dataclass(frozen=True)
class Place:
    """Where a probe lies: in which file, and how many bytes of that are its own, about."""

    path: Path
    bytes: int


def save_probes(folder, probes, store_id):
    """Write trained probes of one shape as one file: weights side by side, and as metadata specs, losses and store."""
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
    data = pack_tensors(weights, {"store_id": store_id, "probes": entries})
    write_whole(Path(folder) / "probes" / f"{block_name([p.spec for p in probes])}.safetensors", data)


def find_probes(folder):
    """Return {id: Place} of the probes that a run folder holds. Raises BadInput for a damaged file."""
    found = {}
    for path in sorted((Path(folder) / "probes").glob("*.safetensors")):
        status = path.stat()
        ids = _ids(path, status.st_mtime_ns, status.st_size)
        found |= dict.fromkeys(ids, Place(path, status.st_size // len(ids)))
    return found


def check_probes(path):
    """Compare a file of probes with its checksum, its name and the ids of its specs. Raises BadInput."""
    with _opened(path) as (_, entries):
        specs = [spec_from_dict(entry["spec"]) for _, entry in entries.values()]
        if [spec.id for spec in specs] != list(entries) or path.stem not in (block_name(specs), specs[0].id):
            raise ValueError("it holds other probes than its name and their ids say")


def remedy(run, maker="train-probes"):
    """What to do about damage of a run, for the end of an error's line. maker: the command that made what is damaged."""
    return f"run featcache verify {run} --repair, then the same {maker} again"


def load_probe(folder, probe_id):
    """Read a TrainedProbe of a run. Raises BadInput if there is none of that id or its file is damaged."""
    return next(load_probes(folder, [probe_id]))


def load_probes(folder, ids):
    """Yield the TrainedProbes of these ids, file by file, in no order of theirs. Raises BadInput as load_probe."""
    return _read(folder, ids, _probe)


def load_specs(folder, ids):
    """Yield the ProbeSpecs of these ids, as load_probes does, without reading their weights."""
    return _read(folder, ids, lambda file, row, entry: spec_from_dict(entry["spec"]))


def _read(folder, ids, make):
    there, wanted = find_probes(folder), {}
    for name in ids:
        if name not in there:
            raise BadInput(f"run {folder} has no probe {name}")
        wanted.setdefault(there[name].path, {})[name] = None
    for path, names in wanted.items():
        with _opened(path) as (file, entries):
            for name in names:
                yield make(file, *entries[name])


# What a file holds stays as it is, and is asked for often.
@lru_cache(maxsize=1 << 14)
def _ids(path, modified, size):
    check_probes(path)
    with _opened(path) as (_, entries):
        return tuple(entries)


@contextmanager
def _opened(path):
    """Open a file of probes: yield it, and {id: (row in its tensors, what it says of the probe)}."""
    try:
        with open_tensors(path) as (file, content):
            if "probes" in content:
                entries = {entry["id"]: (row, entry) for row, entry in enumerate(content["probes"])}
            else:
                # Of an older run: one probe, after which the file is called.
                entries = {path.stem: (..., content)}
            yield file, entries
    except DAMAGE as error:
        raise BadInput(f"damaged probe file {path}: {error}; {remedy(path.parent.parent)}") from None


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
