"""Mean scores over probes that differ only in their seed."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

# The columns of scores.csv that may differ between the seeds of one configuration.
_OWN = ("probe", "name", "split", "metric", "value", "low", "high", "epoch", "seed")


def over_seeds(scores: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of seeds.csv: one for each group of rows of scores.csv that differ only in the seed, in order.

    mean and std (with n - 1, None for a single seed) are taken over the n probes that have a score, and diverged counts
    the others. seeds and probes list all of them, as text. The fields that the group shares follow.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    configurations: dict[str, str] = {}
    for row in scores:
        if row["probe"] not in configurations:
            configurations[row["probe"]] = str(shared_fields(row))
        groups.setdefault((configurations[row["probe"]], row["split"], row["metric"]), []).append(row)
    result = []
    for members in groups.values():
        values = [m["value"] for m in members if m["value"] is not None and m["value"] == m["value"]]
        result.append({
            "name": members[0]["name"], "split": members[0]["split"], "metric": members[0]["metric"],
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values), "diverged": len(members) - len(values),
            "seeds": " ".join(str(m["seed"]) for m in members), "probes": " ".join(m["probe"] for m in members),
        } | shared_fields(members[0]))  # fmt: skip
    return result


def shared_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row of scores.csv that the seeds of one configuration share."""
    return {column: value for column, value in row.items() if column not in _OWN}
