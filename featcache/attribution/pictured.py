"""What is kept for pictures: attribution.npz, with the maps of some images, their boxes and the images themselves."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from featcache.attribution.batch import Source
from featcache.attribution.examples import Measured, choose, missing
from featcache.attribution.explain import explain_piece
from featcache.attribution.passes import Passes
from featcache.attribution.pieces import Piece, Pieces
from featcache.attribution.results import IDENTITY
from featcache.attribution.saved_maps import read_map
from featcache.attribution.targets import Target
from featcache.attribution.task import Task

# Of a map with less of its energy than this on the positive side, a picture that a score chose says so.
FAIR = 0.1


class Pictured(NamedTuple):
    """K targets whose maps are kept, and their results.

    reasons: why they were chosen, "" where they are the first or were named. order: in which they are shown.
    """

    targets: Sequence[Target]
    piece: Piece
    reasons: Sequence[str]
    order: Sequence[int]


def pictured_first(task: Task, pieces: Sequence[Piece]) -> Pictured:
    """Take the targets from finished pieces that were known before to be pictured."""
    targets, parts, done = list[Target](), list[Piece](), 0
    for own, piece in zip(task.pieces, pieces, strict=True):
        numbers = [number for number, target in enumerate(own) if target.pictured]
        targets += [own[number] for number in numbers]
        shift = torch.tensor([0, 0, done])
        parts.append(
            replace(
                piece,
                cells=piece.cells[:, :, numbers],
                predictions=piece.predictions[:, numbers],
                coloured=piece.coloured + shift,
                passes=Passes(),
            )
        )
        done += len(numbers)
    return Pictured(targets, _joined(parts), [""] * done, range(done))


def pictured_by_rule(task: Task, pieces: Sequence[Piece], files: Pieces, first: Pictured) -> tuple[Pictured, list[str]]:
    """Choose further targets by the rules of the task, and explain them again for their maps, unless these are saved.

    first: what is kept already. Returns both together, and lines for people.
    """
    targets = [target for piece in task.pieces for target in piece]
    measured = _measured(task, pieces)
    chosen = {
        (targets[number].row, targets[number].label): reason
        for number, reason in choose(task.examples.rules, targets, measured).items()
    }
    known = {(target.row, target.label) for target in first.targets}
    wanted = [pair for pair in chosen if pair not in known]
    kept = set(wanted[: max(1, int(task.pictured_at_most) - len(known))])
    more = [t.as_pictured() for t in targets if (t.row, t.label) in kept]
    notices = missing(task.examples.rules, targets, measured)
    if len(kept) < len(wanted):
        notices.append(
            f"notice: the maps of {len(kept)} pairs of image and class that rules choose are kept, not of {len(wanted)}; "
            "--memory holds no more"
        )
    parts = [first.piece]
    if more:
        saved = task.settings.save_maps and not any(method.coloured for method in task.methods)
        piece = _saved(task, pieces, files, more) if saved else _again(task, targets, pieces, more)
        parts.append(replace(piece, coloured=piece.coloured + torch.tensor([0, 0, len(first.targets)])))
    both, piece = [*first.targets, *more], _joined(parts)
    reasons = [
        _cautious(chosen.get((target.row, target.label), ""), measured, map_)
        for target, map_ in zip(both, piece.maps[0, 0], strict=True)
    ]
    places = {pair: place for place, pair in enumerate(chosen)}
    order = sorted(range(len(both)), key=lambda number: places.get((both[number].row, both[number].label), -1))
    return Pictured(both, piece, reasons, order), notices


def _cautious(reason: str, measured: Measured, map_: torch.Tensor) -> str:
    """Add to a reason that goes by a score that hardly anything of the map [S, S] is positive, which is all that scores see."""
    share = float(map_.clamp(min=0).sum() / map_.abs().sum())
    return (
        f"{reason}; {share:.1%} of that map's energy is positive" if measured.by in reason and share < FAIR else reason
    )


def _again(task: Task, targets: Sequence[Target], pieces: Sequence[Piece], more: Sequence[Target]) -> Piece:
    """Return the results of more targets, whose maps are computed a second time. Their scores are known.

    targets: all, those of the finished pieces.
    """
    places = {(target.row, target.label): number for number, target in enumerate(targets)}
    cells = torch.cat([piece.cells for piece in pieces], 2)
    known = cells[:, :, [places[target.row, target.label] for target in more]]
    return replace(explain_piece(replace(task, scores=()), more, lambda count: None), cells=known)


def _saved(task: Task, pieces: Sequence[Piece], files: Pieces, targets: Sequence[Target]) -> Piece:
    """Return the results of targets whose maps are saved, without a pass."""
    wanted, size = {(target.row, target.label) for target in targets}, task.source.preprocessing.size
    parts = []
    for number, (own, piece) in enumerate(zip(task.pieces, pieces, strict=True)):
        for at in (at for at, target in enumerate(own) if (target.row, target.label) in wanted):
            part = replace(
                piece,
                cells=piece.cells[:, :, at : at + 1],
                maps=read_map(files, number, piece, at)[:, :, None],
                predictions=piece.predictions[:, at : at + 1],
                colours=torch.empty(0, size, size, 4, dtype=torch.uint8),
                coloured=torch.empty(0, 3, dtype=torch.int64),
                passes=Passes(),
            )
            parts.append(part)
    return _joined(parts)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """Put pieces together of which all targets are pictured."""
    return Piece(
        cells=torch.cat([piece.cells for piece in pieces], 2),
        maps=torch.cat([piece.maps for piece in pieces], 2),
        passes=sum((piece.passes for piece in pieces), Passes()),
        predictions=torch.cat([piece.predictions for piece in pieces], 1),
        colours=torch.cat([piece.colours for piece in pieces]),
        coloured=torch.cat([piece.coloured for piece in pieces]),
    )


def _measured(task: Task, pieces: Sequence[Piece]) -> Measured:
    """Return what rules go by: the first probe, method and score."""
    one, method, score = task.explained[0], task.methods[0], task.scores[0]
    predictions = torch.cat([piece.predictions[0] for piece in pieces])
    scores = torch.cat([piece.cells[0, 0, :, task.columns.index(score.columns[0])] for piece in pieces])
    _, probabilities, right = predictions.unbind(1)
    by = f"{method.label} maps of probe {one.probe}"
    return Measured(one.probe, by, score.heading, scores.tolist(), probabilities.tolist(), right.tolist())


def arrays_of(task: Task, pictured: Pictured) -> dict[str, np.ndarray]:
    """Return the arrays of attribution.npz.

    ids, boxes and, where they are known, images: of the pictured images. masks bool [K, S, S]: the objects of each target,
    where maps are scored on masks. maps [N, S, S] and panels, what attribution.csv
    says of each as text; logits and probabilities of its class, and reasons. colours uint8 [n, S, S, 4] of the maps with
    numbers coloured [n].
    """
    source, piece, size = task.source, pictured.piece, task.source.preprocessing.size
    kept = list(dict.fromkeys(target.row for target in pictured.targets))
    places = [
        (method, probe, number)
        for method in range(len(task.methods))
        for probe in range(len(task.explained))
        for number in pictured.order
    ]
    at = {place: number for number, place in enumerate(places)}
    panels = [
        [
            *task.identity(method, probe, pictured.targets[number]),
            *map(str, piece.cells[method, probe, number].tolist()),
        ]
        for method, probe, number in places
    ]
    arrays = {
        "ids": np.array([source.id_of(row) for row in kept]),
        **_boxes(kept, source),
        "maps": piece.maps[:, :, list(pictured.order)].reshape(-1, size, size).numpy(),
        "panels": np.array(panels).reshape(-1, len(IDENTITY) + len(task.columns)),
        "logits": np.array([piece.predictions[probe, number, 0] for _, probe, number in places]),
        "probabilities": np.array([piece.predictions[probe, number, 1] for _, probe, number in places]),
        "reasons": np.array([pictured.reasons[number] for _, _, number in places], str),
        "colours": piece.colours.numpy(),
        "coloured": np.array([at[tuple(place)] for place in piece.coloured.tolist()], int),
    }
    if task.protocol.region == "masks":
        masks = [pictured.targets[number].mask for number in pictured.order]
        arrays["masks"] = np.array([mask.numpy() for mask in masks if mask is not None], bool).reshape(-1, size, size)
    pictures = [picture.permute(1, 2, 0).numpy() for row in kept if (picture := source.picture(row)) is not None]
    if pictures:
        arrays["images"] = np.stack(pictures)
    return arrays


def _boxes(kept: Sequence[int], source: Source) -> dict[str, np.ndarray]:
    """The boxes of all kept images, in pixels of the maps; box_examples says which image each box is in."""
    names = np.array(source.split.store.classes)
    parts = [(np.empty(0, int), np.empty((0, 4)), names[:0], np.empty(0, bool))]
    for number, row in enumerate(kept):
        boxes, classes, difficult = source.boxes_of(row)
        parts.append((np.full(len(boxes), number), boxes, names[classes], difficult))
    arrays = ("box_examples", "boxes", "box_classes", "box_difficult")
    return {name: np.concatenate(part) for name, part in zip(arrays, zip(*parts, strict=True), strict=True)}
