"""How a grid chooses its best probes, by a split or by folds, and which it then trains again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featcache.errors import nearest, shown
from featcache.probes.grids.fields import check_known
from featcache.probes.scores.metrics import METRICS

MOST_FOLDS = 100
# As select.split: nothing is chosen.
NOTHING = "none"
# The roles whose images a refit learns from.
REFIT_ON = ("train", "val")
# The best recipe for each combination of these fields is trained again, unless the grid names others.
PER = ("name", "features", "head", "loss")


@dataclass(frozen=True)
class Selection:
    """By which metric, and on which role or in how many folds of train, probes are chosen. None: the grid does not say."""

    metric: str | None = None
    role: str | None = None
    folds: int | None = None


@dataclass(frozen=True)
class Refit:
    """Which chosen probes are trained again, on the roles `on` together: the best for each combination of fields."""

    on: tuple[str, ...] = REFIT_ON
    per: tuple[str, ...] = PER

    def to_json(self) -> dict[str, list[str]]:
        """Return the fields as run.json has them."""
        return {"on": list(self.on), "per": list(self.per)}


def read_selection(value: Any, splits: Mapping[str, object], path: str, errors: list[str]) -> Selection:
    """Read the field `select` of a grid. splits: {role: splits}."""
    if not isinstance(value, dict):
        errors.append(f"{path}: expected metric, and split or folds")
        return Selection()
    check_known(value, ("metric", "split", "folds"), f"{path}.", errors)
    metric, role, folds = value.get("metric"), value.get("split"), value.get("folds")
    if metric is not None:
        try:
            metric = METRICS.meant(metric)
        except ValueError as error:
            errors.append(f"{path}.metric: {error}")
    if role == "test":
        errors.append(f"{path}.split: choosing on test gives a score that is too good; choose on val")
    elif role is not None and role not in [*splits, NOTHING]:
        known = [*(name for name in splits if name != "test"), NOTHING]
        errors.append(f"{path}.split: {shown(role)} is not one of {', '.join(known)}{nearest(role, known)}")
    if folds is not None and (type(folds) is not int or not 2 <= folds <= MOST_FOLDS):
        errors.append(f"{path}.folds: {shown(folds)} is not a whole number from 2 to {MOST_FOLDS}")
    elif folds is not None and role is not None:
        errors.append(f"{path}: give split or folds, not both")
    return Selection(metric, None if role == NOTHING else role, folds)


def read_refit(value: Any, path: str, errors: list[str]) -> Refit | None:
    """Read the field `refit` of a grid: a list of roles, or `on` and `per`; None if the grid has none."""
    if value is None:
        return None
    fields = value if isinstance(value, dict) else {"on": value}
    check_known(fields, ("on", "per"), f"{path}.", errors)
    on, per = fields.get("on", list(REFIT_ON)), fields.get("per", list(PER))
    per = per if isinstance(per, list) else [per]
    if not isinstance(on, list) or sorted(map(str, on)) != sorted(REFIT_ON):
        errors.append(f"{path}: expected [{', '.join(REFIT_ON)}], the roles to train on again, not {shown(on)}")
    if not all(isinstance(name, str) for name in per):
        errors.append(f"{path}.per: expected fields of probes, such as [head, loss]")
        return None
    return Refit(per=tuple(per))
