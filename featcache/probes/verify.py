"""`featcache verify`: every byte of a store or a run against its checksums; `--repair` drops what is bad."""

from pathlib import Path

from featcache.arguments import is_path
from featcache.atomic import PARTIAL as HALF_WRITTEN
from featcache.atomic import remove
from featcache.errors import BadInput
from featcache.probes.probe_file import check_probes, find_probes
from featcache.probes.run import FILE, read_summary
from featcache.probes.scores.scoring import TABLES
from featcache.probes.sweep import PARTIAL, check_state
from featcache.probes.tables import attribution_files, damaged_files
from featcache.probes.tensor_file import DAMAGE
from featcache.store.verify import Finding
from featcache.store.verify import verify as verify_store


def verify(path, repair=False):
    """Check a store or a run, byte by byte; return the list of Findings, empty if it is whole.

    path: of a store, which may be a URL, or of a run folder. repair: drop what is damaged, so that the command that
    made it makes just that anew: extract a store's shards; train-probes a run's probes and tables, and attribute its
    maps. Raises BadInput if there is neither.
    """
    if is_path(path) and is_run(path):
        return _verify_run(Path(path), repair)
    return verify_store(path, repair)


def is_run(path):
    """Whether a folder is that of a run, finished or not."""
    folder = Path(path)
    return (folder / FILE).exists() or (folder / "probes").is_dir()


def drop_damaged_probes(run, say=None):
    """Delete the damaged files of probes of a run; return what was wrong, a list of Findings."""
    found = []
    for path in sorted((Path(run) / "probes").glob("*.safetensors")):
        try:
            check_probes(path)
        except BadInput as error:
            found.append(Finding(f"probes/{path.name}", error.message.partition(": ")[2].partition(";")[0]))
            if say is not None:
                say(f"notice: {found[-1]}; its probes are trained anew")
                remove(path)
    return found


def _verify_run(run, repair):
    say = (lambda line: None) if repair else None
    try:
        summary = read_summary(run)
    except BadInput as error:
        if repair:
            # Nothing else says with which seed and on which splits the probes were trained.
            for name in (FILE, "probes", PARTIAL, *_ours(run)):
                remove(run / name)
        return [Finding(FILE, f"{error.message}; without it nothing says how the probes were trained")]
    found = drop_damaged_probes(run, say)
    for path in sorted((run / PARTIAL).glob("*.safetensors")):
        try:
            check_state(path)
        except DAMAGE as error:
            found.append(Finding(f"{PARTIAL}/{path.name}", str(error)))
            if repair:
                remove(path)
    tables = [Finding(*pair) for pair in damaged_files(run, summary.get("files", {}))]
    tables += [Finding(*pair) for pair in damaged_files(run, attribution_files(run))]
    for finding in tables if repair else ():
        remove(run / finding.where)
    found += tables
    if not found and "key" in summary and len(find_probes(run)) < summary.get("probes", 0):
        found.append(Finding("probes", "some of the run's probes are missing; the same train-probes trains them"))
    for leftover in run.rglob(f"*{HALF_WRITTEN}") if repair else ():
        leftover.unlink(missing_ok=True)
    return found


def _ours(run):
    """Names of the files that lie in a run folder beside run.json and the probes."""
    kinds = ("grid*.yaml", "attribution.*", *TABLES, *(f"{name}.gz" for name in TABLES))
    return [path.name for kind in kinds for path in run.glob(kind)]
