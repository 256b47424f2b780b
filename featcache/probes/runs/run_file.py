"""run.json: what a run is a run of, and the checksums of its files."""

import functools
import hashlib
import json
import os
import re
import zlib
from pathlib import Path

import click

from featcache.arguments import is_path
from featcache.atomic import local_path, remove, write_whole
from featcache.errors import BadInput, of_the_system, shown
from featcache.store.sealed import seal, unseal

FILE = "run.json"
PROBES, PARTIAL = "probes", "partial"
ATTRIBUTION = ("attribution.csv", "attribution.npz")
# What decides the weights of a probe of a given id: it is the same for all probes of a run.
BASIS = ("store_id", "seed", "splits", "select", "search", "parity")
GRID_FILE = re.compile(r"grid(-[0-9a-f]{8})?\.yaml")
# The files that run.json has checksums of; new files of probes have their own.
SEALED_FILE = re.compile(
    rf"{GRID_FILE.pattern}|attribution\.(csv|npz)|probes/[0-9a-f]{{1,64}}\.safetensors"
    r"|(scores|seeds|history|calibration|scores_per_class)\.csv(\.gz)?"
)
# A kind is a type, a list or dict of a kind, or a tuple of alternatives.
_KINDS = {
    "store": str, "store_id": str, "seed": (int, None), "splits": {str: [str]}, "select": {str: str}, "search": (dict, None),
    "parity": (str, None), "buffers": {str: (int, None)}, "grids": {str: str}, "intervals": [str], "imported": [dict],
    "overlap": [dict], "arch": str, "weights_sha256": str, "preprocessing": dict, "dataset": str, "classes": [str],
    "probes": int, "diverged": [str], "rows": {str: int}, "chance": {str: {str: (float, None)}}, "device": str,
    "seconds": float, "versions": {str: str}, "key": str, "files": {str: {str: int}}, "others": {str: str},
}  # fmt: skip
_ALWAYS = ("store_id", "splits")
_FINISHED = ("store", "store_id", "splits", "select", "rows", "chance", "diverged", "probes", "classes")


def identity(summary):
    """What the probes of a run, and the states of its blocks, are marked with: 16 hex digits over the BASIS."""
    basis = [summary.get(field) for field in BASIS]
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()[:16]


def checksum(data):
    """What run.json says of a file of these bytes."""
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def read_file(folder, name, files):
    """Return the bytes of a file of a run. Raises ValueError unless they are those that `files`, of run.json, says.

    files: None for a run without checksums.
    """
    if files is not None and name not in files:
        raise ValueError("it was not finished")
    try:
        data = (Path(folder) / name).read_bytes()
    except FileNotFoundError:
        raise ValueError("it is missing") from None
    except OSError as error:
        raise ValueError(of_the_system(error)) from None
    if files is not None and files[name] != checksum(data):
        raise ValueError("its checksum does not fit its content")
    return data


def write_file(folder, name, data):
    """Write a file of a run, bytes, whole or not at all, in the place of whatever is there. Returns its checksum."""
    path = Path(folder) / name
    if path.is_dir():
        remove(path)
    write_whole(path, data)
    return checksum(data)


def holds_run(folder):
    """Whether a folder is that of a run, whole or not, and not that of a store."""
    there = {name for name in (FILE, PROBES, "manifest.json", "commits") if os.path.lexists(Path(folder) / name)}
    return bool(there & {FILE, PROBES}) and not there - {FILE, PROBES}


def write_summary(folder, summary):
    """Write run.json: summary, a dict of JSON values, whose `files` are {name: checksum(its bytes)}."""
    write_file(folder, FILE, seal(summary))


def read_summary(folder):
    """Read run.json, finished or not: a dict whose fields are of the types that they should be.

    One without `files` is of an earlier version, which kept no checksums; that is said once. Raises BadInput if
    `folder` is no run folder, or run.json is damaged.
    """
    if not is_path(folder):
        raise BadInput(f"run: expected the path of a folder, not {shown(folder)}")
    path = local_path(folder, "--run")
    try:
        data = (path / FILE).read_bytes()
    except OSError as error:
        there = "is not a run folder (it has no readable run.json)" if path.exists() else "not found"
        if isinstance(error, FileNotFoundError) and holds_run(path):
            there = "has lost its run.json; run the command that made it again"
        raise BadInput(f"run {folder} {there}") from None
    try:
        summary = _parsed(data)
        _check_fields(summary)
    except ValueError as error:
        raise BadInput(
            f"damaged run {folder}: {FILE}: {error}; run featcache verify {folder} --repair, then the command that made "
            "it again"
        ) from None
    if "files" not in summary:
        _say_unsealed(str(folder))
    return summary


def _parsed(data):
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    # A checksum or files that it covers: not of an earlier version, so that it must fit.
    return unseal(data) if content.keys() & {"crc32", "files"} else content


@functools.cache
def _say_unsealed(folder):
    click.echo(
        f"notice: run {folder} was made by an earlier version, which kept no checksums: damage to it may go unnoticed "
        "until another grid is trained into it",
        err=True,
    )


def _check_fields(summary):
    """Raise ValueError unless the fields of a run.json are of the right types, and its names those of a run's files."""
    finished = "key" in summary
    lacking = [field for field in (_FINISHED if finished else _ALWAYS) if field not in summary]
    if lacking:
        raise ValueError(f"it lacks {lacking[0]}")
    for field, kind in _KINDS.items():
        if field in summary and not _fits(summary[field], kind):
            raise ValueError(f"{field} is {shown(summary[field])}")
    for name in summary.get("grids", {}).values():
        if not GRID_FILE.fullmatch(name):
            raise ValueError(f"{shown(name)} is not the name of a grid's file")
    for name in summary.get("files", {}):
        if not SEALED_FILE.fullmatch(name):
            raise ValueError(f"{shown(name)} is not the name of a file of a run")
    if not all(entry.keys() == {"probe", "file"} for entry in summary.get("imported", [])):
        raise ValueError("imported is not a list of probes and files")
    if finished:
        _check_roles(summary)


def _check_roles(summary):
    metric, chosen = summary["select"].get("metric"), summary["select"].get("split")
    scored_on = "test" if "test" in summary["rows"] else chosen
    for role in (scored_on, chosen or scored_on):
        for field in ("splits", "rows", "chance"):
            if role not in summary[field]:
                raise ValueError(f"{field} lacks {shown(role)}")
    if metric not in summary["chance"][scored_on]:
        raise ValueError(f"chance lacks {shown(metric)}")
    if not all(found.keys() == {"roles", "images", "of", "example"} for found in summary.get("overlap", [])):
        raise ValueError("overlap is not a list of what two roles share")


def _fits(value, kind):
    if isinstance(kind, tuple):
        return any(_fits(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(one, kind[0]) for one in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(one, kind[str]) for one in value.values())
    if kind is float:
        return type(value) in (int, float)
    return value is None if kind is None else type(value) is kind


def seal_files(folder, changes):
    """Note other checksums in run.json: changes is {name: entry, or None for a file that is to be written}.

    The run of an earlier version, without checksums, stays as it is. Call it with the folder locked.
    """
    summary = read_summary(folder)
    if "files" in summary:
        files = summary["files"] | changes
        write_summary(folder, summary | {"files": {name: entry for name, entry in files.items() if entry}})


def maker(summary):
    """The command that makes what a run's tables and probes hold."""
    return "import-probes" if "imported" in summary else "train-probes"
