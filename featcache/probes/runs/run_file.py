"""run.json: what a run was made from, and the checksums of its files."""

import functools
import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcache.arguments import is_path
from featcache.atomic import local_path, remove, write_whole
from featcache.errors import BadInput, of_the_system, shown
from featcache.probes.sample import FOLDS
from featcache.progress import say
from featcache.store.sealed import seal, unseal

# The content of run.json.
Summary = dict[str, Any]
# {file name: its length and crc32, as `checksum` gives them}.
Files = Mapping[str, Mapping[str, int]]

FILE = "run.json"
PROBES, PARTIAL = "probes", "partial"
# What attribute writes: its table in one of two formats, the maps that the report shows, and how both were made.
TABLES = ("attribution.csv", "attribution.parquet")
ATTRIBUTION = (*TABLES, "attribution.npz", "attribution.json")
# The folder of all maps, as a Zarr group, where they are saved.
SAVED_MAPS = "attribution.zarr"
# The fields of a RunBasis, in the order in which they are hashed.
BASIS = ("store_id", "seed", "splits", "select", "search", "parity")
GRID_FILE = re.compile(r"grid(-[0-9a-f]{8})?\.yaml")
# The files whose checksums run.json holds. Files of probes hold their own, except those of earlier versions.
SEALED_FILE = re.compile(
    rf"{GRID_FILE.pattern}|attribution\.(csv|parquet|npz|json)|attribution\.zarr(/[\w=-][\w.=-]*)+"
    r"|probes/[0-9a-f]{1,64}\.safetensors"
    r"|(scores|seeds|history|calibration|scores_per_class|costs)\.csv(\.gz)?"
)
# The form of each field: a type, a list or dict of a form, or a tuple of alternatives.
_FORMS: dict[str, Any] = {
    "store": str, "store_id": str, "seed": (int, None), "splits": {str: [str]}, "select": {str: str}, "search": (dict, None),
    "parity": (str, None), "buffers": {str: (int, None)}, "grids": {str: str}, "intervals": [str], "imported": [dict],
    "overlap": [dict], "arch": str, "weights_sha256": str, "preprocessing": dict, "dataset": str, "classes": [str],
    "probes": int, "diverged": [str], "short": [str], "rows": {str: int}, "chance": {str: {str: (float, None)}}, "device": str,
    "seconds": float, "versions": {str: str}, "key": str, "files": {str: {str: int}}, "others": {str: str},
    "samples": {str: {str: (int, str)}}, "refit": {str: [str]}, "fold_probes": int,
    "finetuned": dict, "backbones": {str: str},
}  # fmt: skip
_ALWAYS = ("store_id", "splits")
_FINISHED = ("store", "store_id", "splits", "select", "rows", "chance", "diverged", "probes", "classes")


def identity(summary: Mapping[str, Any]) -> str:
    """Return the mark of a run on its files of probes and states: 16 hex digits of a hash over the BASIS."""
    basis = [summary.get(field) for field in BASIS]
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()[:16]


def checksum(data: bytes) -> dict[str, int]:
    """Return the entry in run.json for a file with these bytes."""
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def read_file(folder: str | os.PathLike[str], name: str, files: Files | None) -> bytes:
    """Return the bytes of a file of a run. Raises ValueError, which says why, unless they fit their checksum.

    files: those of run.json, None for a run without checksums.
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


def write_file(folder: str | Path, name: str, data: bytes) -> dict[str, int]:
    """Write a file of a run, whole or not at all, over whatever has its name. Returns its checksum."""
    path = Path(folder) / name
    if path.is_dir():
        remove(path)
    write_whole(path, data)
    return checksum(data)


def holds_run(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder is that of a run, whole or not, rather than that of a store."""
    names = {name for name in (FILE, PROBES, "manifest.json", "commits") if os.path.lexists(Path(folder) / name)}
    return bool(names & {FILE, PROBES}) and not names - {FILE, PROBES}


def write_summary(folder: str | Path, summary: Summary) -> None:
    """Write run.json. summary: JSON values, whose `files` are {name: checksum(its bytes)}."""
    write_file(folder, FILE, seal(summary))


def read_summary(folder: str | os.PathLike[str]) -> Summary:
    """Read the run.json of a run, finished or not, and check the types of its fields.

    If it has no `files`, it is of an earlier version, which kept no checksums; a notice says so once. Raises BadInput
    if `folder` is no run folder, or if run.json is damaged.
    """
    if not is_path(folder):
        raise BadInput(f"run: expected the path of a folder, not {shown(folder)}")
    path = local_path(folder, "--run")
    try:
        data = (path / FILE).read_bytes()
    except OSError as error:
        problem = "is not a run folder (it has no readable run.json)" if path.exists() else "not found"
        if isinstance(error, FileNotFoundError) and holds_run(path):
            problem = "has lost its run.json; run the command that made it again"
        raise BadInput(f"run {folder} {problem}") from None
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


def _parsed(data: bytes) -> Summary:
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    # Earlier versions wrote neither of these fields: with one of them, the checksum must be there and fit.
    return unseal(data) if content.keys() & {"crc32", "files"} else content


@functools.cache
def _say_unsealed(folder: str) -> None:
    say(
        f"notice: run {folder} was made by an earlier version, which kept no checksums: damage to it may go unnoticed "
        "until another grid is trained into it"
    )


def _check_fields(summary: Summary) -> None:
    """Raise ValueError unless the fields of a run.json have the right types, and its names are those of a run's files."""
    finished = "key" in summary
    lacking = [field for field in (_FINISHED if finished else _ALWAYS) if field not in summary]
    if lacking:
        raise ValueError(f"it lacks {lacking[0]}")
    for field, form in _FORMS.items():
        if field in summary and not _fits(summary[field], form):
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


def _check_roles(summary: Summary) -> None:
    """Raise ValueError if a finished run.json lacks something about the roles that probes are chosen and scored on."""
    metric, chosen = summary["select"].get("metric"), summary["select"].get("split")
    scored_on = "test" if "test" in summary["rows"] else chosen
    # Folds are parts of train.
    for role in (scored_on, scored_on if chosen in (None, FOLDS) else chosen):
        for field in ("splits", "rows", "chance"):
            if role not in summary[field]:
                raise ValueError(f"{field} lacks {shown(role)}")
    if metric not in summary["chance"][scored_on]:
        raise ValueError(f"chance lacks {shown(metric)}")
    if not all(overlap.keys() == {"roles", "images", "of", "example"} for overlap in summary.get("overlap", [])):
        raise ValueError("overlap is not a list of what two roles share")


def _fits(value: Any, form: Any) -> bool:
    """Return whether a JSON value has one of the forms of _FORMS."""
    if isinstance(form, tuple):
        return any(_fits(value, alternative) for alternative in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(item, form[0]) for item in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(_fits(item, form[str]) for item in value.values())
    if form is float:
        return type(value) in (int, float)
    return value is None if form is None else type(value) is form


def seal_files(folder: str | Path, changes: Mapping[str, Mapping[str, int] | None]) -> None:
    """Change checksums in run.json, with the folder locked. changes: {name: entry, None for a file not yet written}.

    A run of an earlier version, which has no checksums, stays as it is.
    """
    summary = read_summary(folder)
    if "files" in summary:
        files = summary["files"] | changes
        write_summary(folder, summary | {"files": {name: entry for name, entry in files.items() if entry}})


def of_attribution(name: str) -> bool:
    """Return whether attribute writes a file of a run."""
    return name in ATTRIBUTION or name.startswith(f"{SAVED_MAPS}/")


def probes_held(summary: Summary) -> int:
    """Return how many probes the folder of a finished run holds, with those that hold folds out."""
    return summary["probes"] + summary.get("fold_probes", 0)


def maker(summary: Mapping[str, Any]) -> str:
    """Return the command that makes a run's probes and tables."""
    if "finetuned" in summary:
        return "finetune"
    return "import-probes" if "imported" in summary else "train-probes"
