"""Find the damaged files of a run folder and drop them with a notice, so that the same command makes them anew."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from featcache.errors import BadInput
from featcache.probes.runs.probe_file import check_files, find_probes, read_origin
from featcache.probes.runs.run_file import (
    FILE,
    GRID_FILE,
    PARTIAL,
    PROBES,
    SEALED_FILE,
    Summary,
    checksum,
    holds_run,
    identity,
    maker,
    of_attribution,
    read_file,
    read_summary,
)
from featcache.probes.runs.tables import find_table, tables_of
from featcache.probes.runs.tuned import BACKBONES, IMAGES, LOGITS, is_tuned, tuned_damage
from featcache.probes.scores.metrics import metrics_of, task_of
from featcache.progress import say
from featcache.store.folder import open_folder
from featcache.store.reader import Store


def damage(folder: str | Path, summary: Summary | None) -> Iterator[tuple[str, str]]:
    """Yield (name, what is wrong with it) for everything in a run folder that is not whole, except run.json itself.

    summary: the content of run.json, None where it is lost. Without checksums only some damage can be seen.
    """
    folder = Path(folder)
    for room in (PROBES, PARTIAL):
        if os.path.lexists(folder / room) and not (folder / room).is_dir():
            yield room, "it is no folder"
    for path, reason in check_files(folder, summary):
        yield f"{path.parent.name}/{path.name}", reason
    if summary and is_tuned(summary):
        yield from tuned_damage(folder, summary, list(find_probes(folder)))
    files = (summary or {}).get("files")
    # Files of probes were checked above.
    for name in (name for name in files or () if not name.startswith(f"{PROBES}/")):
        try:
            read_file(folder, name, files)
        except ValueError as error:
            yield name, str(error)
    if folder.is_dir():
        odd = (path.name for path in folder.iterdir() if path.is_dir() and SEALED_FILE.fullmatch(path.name))
        yield from ((name, "it is no file") for name in sorted(odd) if name not in (files or ()))
    if summary and files is None and "key" in summary:
        task = task_of(name for values in summary["chance"].values() for name in values)
        for name in tables_of(metrics_of(task)):
            if not find_table(folder, name).is_file():
                yield name, "it is missing"


def drop_damaged(folder: str | Path, summary: Summary, grid: str | None) -> bool:
    """Drop the damaged files among those that train-probes makes, each with a notice. Returns whether all were whole.

    summary: the content of run.json; for a new run, what it is going to be. grid: file name of the grid that is
    trained, None if it has no file yet.
    """
    place, whole = open_folder(folder), True
    for name, reason in damage(folder, summary):
        if of_attribution(name):
            continue
        mine = name == grid or not name.startswith("grid")
        say(f"notice: damaged {Path(folder) / name}: {reason}; {_what_now(name, mine, summary)}")
        if mine:
            place.delete(name)
            whole = False
    return whole


def _what_now(name: str, mine: bool, summary: Summary) -> str:
    """Say what happens to a damaged file. mine: whether this command may drop it."""
    if name.startswith(PROBES):
        return "import its checkpoint again" if maker(summary) == "import-probes" else "its probes are trained again"
    if name.startswith((BACKBONES, LOGITS, IMAGES)):
        return "its probe is trained again"
    if name.startswith(PARTIAL):
        return "its block is trained again from the beginning"
    if name.startswith("grid"):
        return "it is written again" if mine else "the train-probes of its grid into this run writes it again"
    return "the tables are made anew"


def without_summary(folder: str | Path, basis: Mapping[str, Any], reason: str) -> Summary:
    """Return the fields of a lost run.json that the files of probes still tell: {} if nothing was trained.

    basis: the RunBasis of the grid that is trained, as JSON values. reason: what is wrong with run.json. Raises
    BadInput if the probes in the folder belong to another run, or do not say to which.
    """
    damaged = {path for path, _ in check_files(folder, None)}
    origins, reason = [], reason.partition(";")[0]
    for path in (path for path in _files(folder) if path not in damaged):
        origin = read_origin(path)
        if origin is None:
            raise BadInput(
                f"{reason}; {path} is of an earlier version and does not say how it was trained: choose another --run"
            )
        origins.append(origin)
    # How features were read decides the order of the rows.
    buffers = {read: origin.buffer for origin, read in origins if origin.run == identity(basis)}
    if origins and not buffers:
        raise BadInput(f"{reason}; its probes are of another store, seed, splits or selection: choose another --run")
    if origins or os.path.lexists(Path(folder) / FILE):
        say(
            f"notice: {reason}; it is made anew, without what it alone knew of other grids: which roles get intervals, "
            "and the checksums of their files"
        )
        open_folder(folder).delete(FILE)
    return {"buffers": buffers} if origins else {}


def known_store(store: Store, folder: str | Path) -> Store:
    """Return a store as the run in a folder knows it: it may have grown since. If there is no such run, it is as it is."""
    if len(store.ids) == 1 or not holds_run(folder):
        return store
    try:
        id = read_summary(folder).get("store_id")
    except BadInput:
        damaged = {path for path, _ in check_files(folder, None)}
        origins = [read_origin(path) for path in _files(folder) if path not in damaged]
        id = next((origin[0].store_id for origin in origins if origin), None)
    return store.known_as(id) if id in store.ids else store


def kept_files(folder: str | Path, summary: Summary, own: str | None = None) -> dict[str, dict[str, int]]:
    """Return the checksums that a run's next run.json takes over: those of all files but the tables.

    They are computed for a run of an earlier version, which has none. own: file name of a grid that is about to be
    written, which is left out. Maps that are damaged or gone are left out too; a notice says so.
    """
    files = summary.get("files")
    if files is None:
        paths = [path for path in _files(folder) if path.parent.name == PROBES and read_origin(path) is None]
        paths += [
            path for path in Path(folder).iterdir() if GRID_FILE.fullmatch(path.name) or of_attribution(path.name)
        ]
        files = {p.relative_to(folder).as_posix(): checksum(p.read_bytes()) for p in sorted(paths) if p.is_file()}
    stay = (name for name in files if of_attribution(name) or GRID_FILE.fullmatch(name) or name.startswith(PROBES))
    return {
        name: files[name] for name in stay if name != own and not (of_attribution(name) and _lost(folder, name, files))
    }


def _lost(folder: str | Path, name: str, files: dict[str, dict[str, int]]) -> bool:
    """Say whether a file of maps is not whole; it is deleted then, for only attribute makes it again."""
    try:
        read_file(folder, name, files)
    except ValueError as error:
        say(f"notice: damaged {Path(folder) / name}: {error}; attribute again")
        open_folder(folder).delete(name)
        return True
    return False


def _files(folder: str | Path) -> list[Path]:
    return [path for room in (PROBES, PARTIAL) for path in sorted((Path(folder) / room).glob("*.safetensors"))]
