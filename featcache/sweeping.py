"""`featcache sweep`: from many checkpoints and a grid to one table."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from featcache.arguments import CHECKPOINTS, NAME, PATH, takes
from featcache.atomic import local_path
from featcache.errors import BadInput
from featcache.extraction.checkpoint_files import checkpoint_files, stems
from featcache.extraction.extract import extract_many
from featcache.probes.grids.grid import load_grid
from featcache.probes.runs.run import Run, best
from featcache.probes.scores.metrics import gain
from featcache.probes.train import train_probes
from featcache.ranks import join_ranks


@dataclass(frozen=True, eq=False)
class Swept:
    """A checkpoint of a sweep. name: a short one. best: the id of the probe that its run chose, None if it chose none."""

    name: str
    checkpoint: str
    store: str
    run: Run
    best: str | None


@takes(backbones=CHECKPOINTS, dataset=NAME, grid=PATH, runs=PATH, store=PATH, parity=NAME)
def sweep(
    backbones: Sequence[str | PathLike[str]],
    dataset: str,
    grid: str | PathLike[str],
    runs: str | PathLike[str] = "runs",
    store: str | PathLike[str] | None = None,
    parity: str | None = None,
    device: str | None = None,
    **extraction: Any,
) -> list[Swept]:
    """Extract the features of many checkpoints, train a grid on each, and return them, the best first.

    backbones, dataset, store: as for extract_many, which makes the stores; extraction: its other arguments. grid, parity:
    as for train_probes, which makes a run for each store, runs/<store>-<grid>. device: of both. What is finished is not
    done again, so that the same call goes on after an interruption, or takes in new checkpoints. Checkpoints are in order
    of the score by which their runs chose, on the split that they chose on; where grids choose nothing, as given. Raises
    BadInput.

        swept = featcache.sweep(["ckpts/*.pth"], "voc", "grid.yaml", root="/data")
        print(swept[0].name, swept[0].run.path)
    """
    if join_ranks().size > 1:
        raise BadInput(
            "sweep: start it without torchrun; what torchrun extracts beforehand (featcache extract with the same "
            "--backbone and features) is found and not extracted again"
        )
    content = load_grid(grid, parity)
    if content.store is not None:
        raise BadInput(f"{grid}: a sweep trains on the stores of its checkpoints; take the line store: out of the grid")
    files, folder = checkpoint_files(backbones), local_path(runs, "--runs")
    stores = extract_many(files, dataset, store=store, device=device, **extraction)
    swept = []
    for name, file, path in zip(stems(files), files, stores, strict=True):
        place = folder / f"{Path(path).stem}-{Path(grid).stem}"
        run = train_probes(grid, store=path, run=place, device=device, parity=parity)
        assert run is not None, "a process that is alone leads"
        swept.append(Swept(name, file, path, run, best(run)[0] if run.chosen_on else None))
    return sorted(swept, key=_score, reverse=True)


def _score(one: Swept) -> float:
    """Return what a checkpoint is put in order by."""
    return 0.0 if one.best is None else gain(one.run.metric, one.run.chosen_by(one.best)["value"])
