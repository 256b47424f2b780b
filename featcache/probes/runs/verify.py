"""`featcache verify`: compare every byte of a run or a store with its checksums; `--repair` drops what is damaged."""

import os
from collections.abc import Iterator

from featcache.arguments import is_path
from featcache.errors import BadInput
from featcache.probes.runs.mend import damage
from featcache.probes.runs.probe_file import find_probes
from featcache.probes.runs.run import open_run
from featcache.probes.runs.run_file import FILE, PROBES, holds_run, maker, probes_held, read_summary
from featcache.store import verify as stores
from featcache.store.folder import LocalFolder
from featcache.store.verify import Finding


def verify(path: str | os.PathLike[str], repair: bool = False) -> list[Finding]:
    """Check every length and checksum of a store or a run. Returns the list of Findings, empty if it is whole.

    path: a store (path or URL), or a run folder. repair: drop what is damaged, so that the command that made it
    (`extract` for a store; `train-probes`, `attribute` or `import-probes` for a run) makes just that anew. Missing
    files are findings too. Raises BadInput if the path is neither a store nor a run.

        featcache.verify("runs/voc")  # [] if all is well
    """
    if not is_run(path):
        return stores.verify(path, repair)
    folder = LocalFolder(path)
    if not repair:
        return [finding for finding, _ in _findings(folder)]
    with folder.locked(f"waiting: another process is training into {folder}"):
        findings = list(_findings(folder))
        for finding in (finding for finding, damaged in findings if damaged):
            folder.delete(finding.where)
    return [finding for finding, _ in findings]


def is_run(path: object) -> bool:
    """Return whether a path is that of a run folder on this machine, whole or not."""
    return is_path(path) and "://" not in str(path) and holds_run(path)


def _findings(folder: LocalFolder) -> Iterator[tuple[Finding, bool]]:
    """Yield (Finding, whether it is damage that can be dropped)."""
    summary = None
    try:
        summary = read_summary(folder.path)
    except BadInput as error:
        # The message begins with the run and the file, which the finding names itself.
        yield Finding(FILE, error.message.partition(";")[0].rpartition(f"{FILE}: ")[2]), True
    wrong = list(damage(folder.path, summary))
    yield from ((Finding(name, reason), True) for name, reason in wrong)
    if summary is None:
        return
    if "key" not in summary:
        yield Finding(FILE, f"the run is not finished; the same {maker(summary)} goes on"), False
        return
    held = len(find_probes(folder.path))
    if held != probes_held(summary) and not any(name.startswith(PROBES) for name, _ in wrong):
        yield Finding(PROBES, f"it holds {held} probes, the tables are of {probes_held(summary)}"), False
    if "files" not in summary:
        yield from _what_can_be_seen(folder)


def _what_can_be_seen(folder: LocalFolder) -> Iterator[tuple[Finding, bool]]:
    """Yield what _findings does about the tables of a run without checksums."""
    try:
        run = open_run(folder.path)
        for name in ("seeds.csv", "history.csv", "calibration.csv"):
            run.table(name)
    except BadInput as error:
        yield Finding("scores.csv", error.message), False
