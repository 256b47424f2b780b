"""What is damaged in a run folder is found, and dropped with a notice, so that the same command makes it anew."""

import os
from pathlib import Path

import click

from featcache.errors import BadInput
from featcache.probes.runs.probe_file import check_files, read_origin
from featcache.probes.runs.run_file import (
    ATTRIBUTION,
    FILE,
    GRID_FILE,
    PARTIAL,
    PROBES,
    SEALED_FILE,
    checksum,
    identity,
    maker,
    read_file,
)
from featcache.probes.runs.tables import find_table, tables_of
from featcache.probes.scores.metrics import task_of
from featcache.store.folder import open_folder


def damage(folder, summary):
    """Yield (name, what is wrong with it) of all that is not whole in a run folder, but for run.json itself.

    summary: of run.json, None where it is lost. Of a run without checksums little can be known.
    """
    folder = Path(folder)
    for room in (PROBES, PARTIAL):
        if os.path.lexists(folder / room) and not (folder / room).is_dir():
            yield room, "it is no folder"
    for path, reason in check_files(folder, summary):
        yield f"{path.parent.name}/{path.name}", reason
    files = (summary or {}).get("files")
    # Files of probes have been looked at.
    for name in (name for name in files or () if "/" not in name):
        try:
            read_file(folder, name, files)
        except ValueError as error:
            yield name, str(error)
    if folder.is_dir():
        odd = (path.name for path in folder.iterdir() if path.is_dir() and SEALED_FILE.fullmatch(path.name))
        yield from ((name, "it is no file") for name in sorted(odd) if name not in (files or ()))
    if summary and files is None and "key" in summary:
        task = task_of(name for values in summary["chance"].values() for name in values)
        for name in tables_of(task):
            if not find_table(folder, name).is_file():
                yield name, "it is missing"


def drop_damaged(folder, summary, grid):
    """Drop what is damaged of the files that train-probes makes, each with a notice. Returns whether all was whole.

    summary: of run.json, or of a new run what it is going to say. grid: name of the file of the grid that is trained.
    """
    place, whole = open_folder(folder), True
    for name, reason in damage(folder, summary):
        if name in ATTRIBUTION:
            continue
        mine = name == grid or not name.startswith("grid")
        click.echo(f"notice: damaged {Path(folder) / name}: {reason}; {_what_now(name, mine, summary)}", err=True)
        if mine:
            place.delete(name)
            whole = False
    return whole


def _what_now(name, mine, summary):
    if name.startswith(PROBES):
        return "its probes are trained again" if maker(summary) == "train-probes" else "import its checkpoint again"
    if name.startswith(PARTIAL):
        return "its block is trained again from the beginning"
    if name.startswith("grid"):
        return "it is written again" if mine else "the train-probes of its grid into this run writes it again"
    return "the tables are made anew"


def without_summary(folder, basis, reason):
    """What can be known of a run whose run.json is lost: fields of it, {} if nothing was trained.

    basis: of the grid that is trained. reason: what is wrong with run.json. Raises BadInput if the probes that are
    there are of another run, or do not say of which.
    """
    damaged = {path for path, _ in check_files(folder, None)}
    found, reason = [], reason.partition(";")[0]
    for path in (path for path in _files(folder) if path not in damaged):
        origin = read_origin(path)
        if origin is None:
            raise BadInput(
                f"{reason}; {path} is of an earlier version and does not say how it was trained: choose another --run"
            )
        found.append(origin)
    # How features were read decides the order of the rows.
    buffers = {read: origin.buffer for origin, read in found if origin.run == identity(basis)}
    if found and not buffers:
        raise BadInput(f"{reason}; its probes are of another store, seed, splits or selection: choose another --run")
    if found or os.path.lexists(Path(folder) / FILE):
        click.echo(
            f"notice: {reason}; it is made anew, without what it alone knew of other grids: which roles get intervals, "
            "and the checksums of their files",
            err=True,
        )
        open_folder(folder).delete(FILE)
    return {"buffers": buffers} if found else {}


def kept_files(folder, summary, own=None):
    """The checksums of a run's files that stay as they are, for its next run.json: those of all but its tables.

    A run without checksums has them from now on. own: a grid's file that is going to be written. Maps that are
    damaged or gone do not stay; a notice says so.
    """
    files = summary.get("files")
    if files is None:
        there = [path for path in _files(folder) if path.parent.name == PROBES and read_origin(path) is None]
        there += [path for path in Path(folder).iterdir() if GRID_FILE.fullmatch(path.name) or path.name in ATTRIBUTION]
        files = {p.relative_to(folder).as_posix(): checksum(p.read_bytes()) for p in sorted(there) if p.is_file()}
    stay = (name for name in files if name in ATTRIBUTION or GRID_FILE.fullmatch(name) or name.startswith(PROBES))
    return {
        name: files[name] for name in stay if name != own and not (name in ATTRIBUTION and _lost(folder, name, files))
    }


def _lost(folder, name, files):
    """Whether a file of maps is not whole; it is deleted then, for only attribute makes it again."""
    try:
        read_file(folder, name, files)
    except ValueError as error:
        click.echo(f"notice: damaged {Path(folder) / name}: {error}; attribute again", err=True)
        open_folder(folder).delete(name)
        return True
    return False


def _files(folder):
    return [path for room in (PROBES, PARTIAL) for path in sorted((Path(folder) / room).glob("*.safetensors"))]
