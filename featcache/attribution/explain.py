"""Explaining a piece of the images with all methods, for all probes, and scoring the maps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from featcache.attribution.batch import Batch, batches_of
from featcache.attribution.explained import Explained
from featcache.attribution.methods.method import Explanation, Method
from featcache.attribution.passes import Passes
from featcache.attribution.pieces import Piece
from featcache.attribution.saved_maps import in_half_precision
from featcache.attribution.targets import Target
from featcache.attribution.task import REGION, Task
from featcache.errors import BadInput

NOTHING = float("nan")


def explain_piece(
    task: Task, targets: Sequence[Target], tell: Callable[[int], None], saved: np.ndarray | None = None
) -> Piece:
    """Explain the targets of a piece, and score the maps.

    saved: float16 [M, P, T, S, S] to save all maps to, if that is wanted. tell: is called with the number of new maps.
    Raises BadInput.
    """
    source, before = task.source, replace(task.source.passes)
    place = {(target.row, target.label): number for number, target in enumerate(targets)}
    shown = {number: at for at, number in enumerate(n for n, target in enumerate(targets) if target.pictured)}
    colours: dict[tuple[int, int, int], torch.Tensor] = {}
    predictions = torch.full((len(task.explained), len(targets), 3), NOTHING, dtype=torch.float64)
    shape, columns = (len(task.methods), len(task.explained)), {name: n for n, name in enumerate(task.columns)}
    cells = torch.full((*shape, len(targets), len(columns)), NOTHING, dtype=torch.float64)
    pictures = torch.zeros(*shape, len(shown), source.preprocessing.size, source.preprocessing.size)
    scales = None if saved is None else torch.zeros(*shape, len(targets))
    cells[..., columns[REGION]] = torch.tensor([target.pixels for target in targets], dtype=torch.float64)
    for batch, probes in _batches(task, targets):
        rows = torch.tensor([place[target.row, target.label] for target in batch.targets])
        heads = [(task.explained[probe].head, task.explained[probe].feature) for probe in probes]
        judges = [score.judge(batch, heads) for score in task.scores]
        for method, probe, explanation in _explanations(task, batch, probes):
            maps, own = explanation.maps.cpu(), cells[method, probe]
            if (batch.pictured or task.examples.rules) and predictions[probe, rows].isnan().all():
                predictions[probe, rows] = _predictions(task.explained[probe], batch)
            _check(task, batch, method, probe, maps)
            for score, judge in zip(task.scores, judges, strict=True):
                scored = task.profile.scored(score, task.methods[method], task.protocol, batch, judge)
                for name, values in zip(score.columns, scored(maps, probes.index(probe)), strict=True):
                    own[rows, columns[name]] = values
            for name, values in explanation.cells.items():
                own[rows, columns[name]] = values.double().cpu()
            for number, at in enumerate(rows.tolist()):
                if at in shown:
                    pictures[method, probe, shown[at]] = maps[number]
                if number in explanation.colours:
                    colours[method, probe, shown[at]] = explanation.colours[number]
            if saved is not None and scales is not None:
                halved, scales[method, probe, rows] = in_half_precision(maps)
                saved[method, probe, rows.numpy()] = halved.numpy()
            tell(len(maps))
    taken = Passes(source.passes.forward - before.forward, source.passes.backward - before.backward)
    size = pictures.shape[-1]
    coloured = torch.tensor(list(colours), dtype=torch.int64).view(-1, 3)
    drawn = torch.stack(list(colours.values())) if colours else torch.empty(0, size, size, 4, dtype=torch.uint8)
    return Piece(cells, pictures, taken, predictions, drawn, coloured, scales)


@torch.no_grad()
def _predictions(one: Explained, batch: Batch) -> torch.Tensor:
    """Return what a probe says of each pair's class, if its maps are at hand: float64 [T, 3], see Piece."""
    maps = batch.at_hand(one.feature)
    if maps is None:
        return torch.full((len(batch.targets), 3), NOTHING, dtype=torch.float64)
    logits = one.head(maps)
    probabilities = one.head.of_logits(logits)
    chosen, single = (batch.images, batch.classes), batch.source.split.labels.ndim == 1
    right = logits.argmax(1)[batch.images] == batch.classes if single else probabilities[chosen] >= 0.5
    return torch.stack([logits[chosen], probabilities[chosen], right.float()], 1).double().cpu()


def _batches(task: Task, targets: Sequence[Target]) -> Iterator[tuple[Batch, Sequence[int]]]:
    """Yield (a Batch of the targets, numbers of the probes to explain in it), for each of the task's sources."""
    for source, probes in task.by_source():
        for batch in batches_of(targets, source, len(probes)):
            yield batch, probes


def _explanations(task: Task, batch: Batch, probes: Sequence[int]) -> Iterator[tuple[int, int, Explanation]]:
    """Yield (number of a method, number of one of these probes, what the method makes of the batch).

    Methods that share passes through the backbone come together, and so do heads that read the same map. Of their maps
    only those of one head are held at a time.
    """
    for group in task.sharing():
        numbers = [task.methods.index(method) for method in group]
        for reading in batch.source.features:
            alike = [number for number in probes if task.explained[number].feature == reading]
            if not alike:
                continue
            heads = [task.explained[number].head for number in alike]
            with task.profile.explaining(heads, batch.source):
                for probe, maps in zip(alike, group[0].explain_together(group, heads, reading, batch), strict=True):
                    for number, made in zip(numbers, maps, strict=True):
                        yield number, probe, made if isinstance(made, Explanation) else Explanation(made)


def _check(task: Task, batch: Batch, method: int, probe: int, maps: torch.Tensor) -> None:
    """Raise BadInput for maps of another shape, as a plugin's may be, or with values that are not finite."""
    kind: Method = task.methods[method]
    expected = (len(batch.targets), batch.size, batch.size)
    if tuple(maps.shape) != expected:
        raise BadInput(f"--method {kind.type}: its maps are {tuple(maps.shape)}, and must be {expected}")
    # One pass over the maps, where isfinite() takes five.
    if not torch.stack(maps.aminmax()).isfinite().all():
        target = batch.targets[int((~maps.isfinite()).flatten(1).any(1).nonzero()[0])]
        source = batch.source
        raise BadInput(
            f"--method {task.explained[probe].named(kind)}: the map of probe {task.explained[probe].probe} for class "
            f"{source.split.store.classes[target.label]} in image {source.id_of(target.row)} has values that are not finite"
        )
