"""`featcache attribute`: explain chosen probes of a run, and score where their maps point."""

from collections.abc import Iterable, Sequence
from os import PathLike
from statistics import median
from typing import Any

from torch import nn

from featcache.arguments import BACKBONE, FLAG, NAME, NAMES, PATH, PATHS, takes, whole
from featcache.attribution.examples import EXAMPLES
from featcache.attribution.explain import explain_piece
from featcache.attribution.pictured import arrays_of, pictured_by_rule, pictured_first
from featcache.attribution.pieces import Pieces
from featcache.attribution.plan import plan_attribution, total
from featcache.attribution.results import check_format, facts_of, rows_of, write_results
from featcache.attribution.saved_maps import describe, opened, write_maps
from featcache.attribution.settings import Settings
from featcache.attribution.task import Task, prepare
from featcache.device import choose_device, multiplying
from featcache.progress import Progress
from featcache.ranks import Alone, join_ranks
from featcache.store.folder import LocalFolder


@multiplying("float32")
@takes(
    store=PATH, probes=NAMES, rule=NAME, methods=NAMES, split=NAME, backbone=BACKBONE, arch=NAME, weights_key=NAME, dataset=NAME,
    root=PATH, limit=whole(), images=NAMES, examples=EXAMPLES, seed=whole(), scores=NAMES, sanity=FLAG, protocol=NAME,
    parity=NAME, masks=PATHS, save_maps=FLAG, format=NAME,
)  # fmt: skip
def attribute(
    run: str | PathLike,
    store: str | PathLike | None = None,
    probes: Sequence[str] | None = None,
    rule: str | None = None,
    methods: Sequence[str] | None = None,
    split: str | None = None,
    backbone: str | PathLike | nn.Module | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    dataset: str | None = None,
    root: str | PathLike | None = None,
    limit: int | None = None,
    images: Sequence[str] | None = None,
    examples: int | str | Sequence[str] = 6,
    device: str | None = None,
    seed: int = 0,
    scores: Sequence[str] | None = None,
    memory: float | None = None,
    sanity: bool = False,
    protocol: str | None = None,
    parity: str | None = None,
    masks: str | PathLike | Sequence[str | PathLike] | None = None,
    save_maps: bool = False,
    format: str = "csv",
) -> list[dict[str, Any]] | None:
    """Explain every class that has a box which is not difficult, or what else `protocol` says, and score the maps.

    run: folder. store: path, by default the run's. probes: ids; by default those that `rule` selects
    (see featcache.probes.runs.run.select), and without a rule the best of each loss by the run's own metric, or
    all where nothing was chosen. methods, scores: names of METHODS and SCORES (docs/attribution.md), a
    method with fields as in "rise:masks=500"; some methods run the backbone, and need backbone, dataset and root.
    split: of the store, by default the one that the run is scored on. limit: only the first images of the split that
    have such a class. images: ids of the only images to explain, whose maps are all kept. examples: the number of first
    images whose maps are kept for pictures, or rules as in "best:3,worst:3,right,wrong" (docs/attribution.md). seed: draws
    the weights of backbone="random" and of what a sanity check needs. sanity: explain a head with random weights beside
    each probe, and where `dataset` is given its own head on a backbone with random weights. protocol: of PROTOCOLS, such
    as "gridpg:side=2"; by default boxes, or gridpg where images have none. memory: bytes for what forward passes keep,
    2e9 by default. parity: "how-to-probe" evaluates as published. masks: stores of masked images, see extract; by default
    those beside the run's store that fit. save_maps: keep all maps, in attribution.zarr. format: of the table, csv or
    parquet.

    Writes attribution.csv (a row for each probe, method, image and class), attribution.json (how it was made) and
    attribution.npz (the maps that pictures show) into the run; returns the rows, in which a map without a score has NaN.
    Pieces of 16 images are saved as they are done, and the same call goes on after a kill. Under torchrun the processes
    share the pieces, and all but the first return None. Raises BadInput.

        rows = featcache.attribute("runs/voc", rule="best map per loss", limit=100)
        featcache.report("runs/voc")
    """
    check_format(format)
    ranks = join_ranks()
    settings = Settings(
        run=run, store=store, probes=probes, rule=rule, methods=methods, scores=scores, protocol=protocol, split=split,
        backbone=backbone, arch=arch, weights_key=weights_key, dataset=dataset, root=root, limit=limit, images=images,
        examples=examples, seed=seed, memory=memory, sanity=sanity, parity=parity, masks=masks, save_maps=save_maps,
        format=format,
    )  # fmt: skip
    task = prepare(settings, choose_device(device, ranks.local_rank))
    if save_maps:
        ranks.say(describe(task))
    pieces = Pieces(task.run.path, task.key(), len(task.pieces))
    folder = LocalFolder(pieces.folder)
    with ranks.leading(folder.locked(f"waiting: another process is attributing into {task.run.path}")) as leads:
        _fill(task, pieces, ranks)
        if not leads:
            return None
        finished = [pieces.read(number) for number in range(pieces.count)]
        rows = rows_of(task, finished)
        maps = write_maps(task, pieces, finished, facts_of(task)) if task.settings.save_maps else None
        pictured, notices = pictured_first(task, finished), list[str]()
        if task.examples.rules:
            pictured, notices = pictured_by_rule(task, finished, pieces, pictured)
        write_results(task, rows, arrays_of(task, pictured), maps)
        folder.delete_all()
    for notice in notices:
        ranks.say(notice)
    passes = total([*(piece.passes for piece in finished), pictured.piece.passes])
    alone = plan_attribution(task).alone
    if passes != total(()):
        ranks.say(f"passes of an image through the backbone: {passes}; one by one: {alone}")
    _say_columns(task, rows, ranks)
    return rows


def _say_columns(task: Task, rows: Sequence[dict[str, Any]], ranks: Alone) -> None:
    """Say what methods report of their maps beside the scores."""
    for method in task.methods:
        for column in method.columns:
            values = [row[column] for row in rows if row["method"] == method.label and row[column] == row[column]]
            if values:
                ranks.say(f"{method.label}: {column}: median {median(values):.2g}, largest {max(values):.2g}")


def _fill(task: Task, pieces: Pieces, ranks: Alone) -> None:
    """Compute the pieces that are missing, together with the other processes; the first returns when all are there."""
    if ranks.rank == 0:
        pieces.drop_others()
        todo = [number for (number,) in ranks.share([(number,) for number in pieces.missing()])]
    else:
        todo = [number for (number,) in ranks.shared()]
    each = len(task.explained) * len(task.methods)
    maps = each * sum(map(len, task.pieces))
    done = maps - each * sum(len(task.pieces[number]) for number in todo)
    with Progress("attribute", maps, unit="map", done=done) as progress:

        def tell(count: int) -> None:
            progress.reach(done + ranks.count(count))

        def work(numbers: Iterable[int]) -> None:
            for number in numbers:
                with opened(task, pieces, number) as saved:
                    piece = explain_piece(task, task.pieces[number], tell, saved)
                pieces.write(number, piece)

        work(ranks.draw(todo))
        while ranks.rank == 0 and (left := ranks.left_behind(pieces.missing)):
            ranks.say(f"notice: no news of {len(left)} pieces that other processes took; doing them here")
            work(left)
        # The others have finished meanwhile.
        tell(0)
