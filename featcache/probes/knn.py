"""`featcache knn`: kNN probes as a run, by the settings of published protocols."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from featcache.arguments import FLAG, NAME, PATH, listed, takes, whole
from featcache.errors import BadInput, nearest, shown
from featcache.probes.grids.grid import parse_grid
from featcache.probes.grids.selection import NOTHING
from featcache.probes.heads.knn import Knn
from featcache.probes.losses.bce import Bce
from featcache.probes.losses.ce import Ce
from featcache.probes.runs.run import Run
from featcache.probes.solvers.none import NoTraining
from featcache.probes.train import train_grid
from featcache.store.reader import open_store

USUAL_K = (10, 20, 100, 200)
_DINO: dict[str, Any] = {"k": USUAL_K, "temperature": 0.07, "weights": "exp", "distance": "cosine"}
# {name: fields of the head} of the rules that published code votes by, and of two that scikit-learn knows.
WEIGHTINGS: Mapping[str, dict[str, Any]] = {
    "dino": _DINO,
    "openmixup": _DINO,
    # Its softmax is over the longest list, which divides all votes of an image by one number.
    "dinov2": _DINO,
    "lightly": _DINO | {"k": (200,), "temperature": 0.1},
    "vissl": _DINO | {"k": (200,), "temperature": 0.1, "distance": "dot"},
    "uniform": {"k": USUAL_K, "weights": "uniform", "distance": "cosine"},
    "inverse": {"k": USUAL_K, "weights": "inverse", "distance": "cosine"},
}


@takes(
    store=PATH,
    run=PATH,
    weights=NAME,
    distance=NAME,
    metric=NAME,
    leave_one_out=FLAG,
    tries=whole(1),
    seed=whole(0),
    allow_overlap=FLAG,
)
def knn(
    store: str | PathLike[str],
    features: str | Sequence[str] = "pooled",
    k: int | Sequence[int] | None = None,
    temperature: float | Sequence[float] | None = None,
    weights: str = "dino",
    distance: str | None = None,
    shots: int | Sequence[int] | None = None,
    tries: int = 1,
    seed: int = 0,
    leave_one_out: bool = False,
    splits: Mapping[str, str | Sequence[str]] | None = None,
    metric: str | None = None,
    run: str | PathLike[str] | None = None,
    device: str | None = None,
    memory: float | None = None,
    allow_overlap: bool = False,
) -> Run | None:
    """Score nearest-neighbour classifiers on a store's features, and write a run folder.

    store: path. features: one or several, see docs/backbones.md; a map is averaged over its positions. k, temperature,
    distance: in place of those that `weights`, a name of WEIGHTINGS, stands for; several values give several probes.
    shots: few-shot, the number of training images of each class, drawn `tries` times with the seeds `seed`, `seed` + 1,
    ...; k is then at most that number, and that number itself, as in DINOv2. leave_one_out: choose k and the like on the
    training images, each without itself, rather than on val. splits: {role: splits of the store} for train, val and
    test; without val nothing is chosen, and all are reported. metric: to choose by. run: folder, by default
    runs/knn-<id>. device, memory, allow_overlap: as for train_probes.

    Returns the Run, as train_probes does of the same grid, which knn_grid() returns. Raises BadInput.

        run = featcache.knn("features/voc.zarr", k=[10, 20], temperature=[0.05, 0.07])
    """
    draws = (shots, tries, seed)
    grid, left_out = knn_grid(store, features, k, temperature, weights, distance, draws, leave_one_out, splits, metric)
    loaded = parse_grid(grid, title=Knn.word())
    return train_grid(
        loaded, Knn.word(), store, run, device, memory=memory, allow_overlap=allow_overlap, notices=left_out
    )


def knn_grid(
    store: str | PathLike[str],
    features: str | Sequence[str],
    k: int | Sequence[int] | None,
    temperature: float | Sequence[float] | None,
    weights: str,
    distance: str | None,
    draws: tuple[int | Sequence[int] | None, int, int],
    leave_one_out: bool,
    splits: Mapping[str, str | Sequence[str]] | None,
    metric: str | None,
) -> tuple[dict[str, Any], list[str]]:
    """Return the grid that knn() trains, as train_probes takes it, and lines about the k that it leaves out.

    draws: (shots, tries, seed). The other arguments and the errors are those of knn().
    """
    if weights not in WEIGHTINGS:
        raise BadInput(
            f"--weights: {shown(weights)} is not one of {', '.join(WEIGHTINGS)}{nearest(weights, WEIGHTINGS)}"
        )
    given = {"k": k, "temperature": temperature, "distance": distance}
    fields = WEIGHTINGS[weights] | {name: value for name, value in given.items() if value is not None}
    head = {"type": Knn.word()} | {name: _plain(value) for name, value in fields.items()}
    opened = open_store(store)
    group = {
        "name": weights,
        "features": _plain(features),
        "head": head | ({"leave_one_out": True} if leave_one_out else {}),
        "loss": (Bce if opened.task == "multi-label" else Ce).word(),
        "optimizer": NoTraining.word(),
        "views": 0,
    }
    others = [name for role, names in (splits or {}).items() if role != "val" for name in listed(names)]
    without_val = "val" not in (splits or {}) and ("val" not in opened.splits or "val" in others)
    split = "train" if leave_one_out else NOTHING if without_val else None
    select = ({"metric": metric} if metric else {}) | ({"split": split} if split else {})
    groups, left_out = _few_shot(group, *draws)
    grid: dict[str, Any] = {"probes": groups}
    if splits:
        grid["splits"] = {role: _plain(names) for role, names in splits.items()}
    return grid | ({"select": select} if select else {}), left_out


def _few_shot(group: dict[str, Any], shots: Any, tries: int, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the group for each number of shots, or alone without shots; and lines about the k that are left out."""
    if shots is None:
        return [group], []
    groups, lines = [], []
    for shot in shots if isinstance(shots, list | tuple) else [shots]:
        if not isinstance(shot, int) or isinstance(shot, bool) or shot < 1:
            raise BadInput(f"--shots: expected a whole number of at least 1, not {shown(shot)}")
        asked = group["head"]["k"] if isinstance(group["head"]["k"], list) else [group["head"]["k"]]
        fit = sorted({shot, *(k for k in asked if isinstance(k, int) and k <= shot)})
        few = "1 shot" if shot == 1 else f"{shot} shots"
        if left_out := [str(k) for k in asked if k not in fit]:
            lines.append(f"{few}: k {', '.join(left_out)} left out, which is more than {shot}")
        head = group["head"] | {"k": fit}
        draws = [seed + number for number in range(tries)]
        groups.append(group | {"name": f"{group['name']}, {few}", "head": head, "shots": shot, "draw": draws})
    return groups, lines


def _plain(value: Any) -> Any:
    """Return a list for several values, as YAML has them."""
    return list(value) if isinstance(value, list | tuple) else value
