"""Mean scores over probes that differ only in their seed, or in the draw of their images."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

# The columns of scores.csv that may differ between the seeds and draws of one configuration.
_OWN = ("probe", "name", "split", "metric", "value", "low", "high", "epoch", "seed", "draw", "refit_of", "stop")


def over_seeds(scores: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of seeds.csv: one for each group of rows of scores.csv that differ only in seed and draw, in order.

    mean and std (with n - 1, None for a single seed) are taken over the n probes that have a score, and diverged counts
    the others. seeds, probes, and where images are drawn draws, list all of them, as text. The fields that the group
    shares follow.
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
            **({"draws": " ".join(str(m["draw"]) for m in members)} if members[0].get("draw") not in (None, "") else {}),
        } | shared_fields(members[0]))  # fmt: skip
    return result


def shared_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row of scores.csv that the seeds and draws of one configuration share."""
    return {column: value for column, value in row.items() if column not in _OWN}
