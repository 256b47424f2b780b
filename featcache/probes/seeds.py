"""Probes that differ in their seed alone, taken together."""

import statistics

# What of a row of scores.csv is no part of how the probe was trained, or is the seed's doing.
_OWN = ("probe", "name", "value", "low", "high", "epoch", "seed")


def over_seeds(scores):
    """Return a dict for every group of rows of scores.csv that differ in the seed alone, in order.

    mean and std (with n - 1, None for a single seed) of the n probes that have a score; diverged: how many
    have none; seeds, probes: of all, as text. Then the fields that the rows share.
    """
    groups = {}
    for row in scores:
        key = tuple((column, str(value)) for column, value in row.items() if column not in _OWN)
        groups.setdefault(key, []).append(row)
    result = []
    for members in groups.values():
        values = [m["value"] for m in members if m["value"] is not None and m["value"] == m["value"]]
        shared = {column: value for column, value in members[0].items() if column not in _OWN}
        result.append({
            "name": members[0]["name"], "split": shared.pop("split"), "metric": shared.pop("metric"),
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values), "diverged": len(members) - len(values),
            "seeds": " ".join(str(m["seed"]) for m in members), "probes": " ".join(m["probe"] for m in members),
        } | shared)  # fmt: skip
    return result
