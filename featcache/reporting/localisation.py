"""EPG per probe and method, from a run's attribution.csv."""

import csv
from pathlib import Path

import numpy as np
import torch

from featcache.probes.run import open_run
from featcache.probes.scores.jackknife import deviations, fraction_interval, influences
from featcache.reporting.table import describe_head, known, percent


def localisation_rows(folder):
    """Return (columns, rows of strings): mean EPG with a 95% interval over images.

    The last column is what a uniform map scores: the boxes' mean share of the image. Maps without
    positive energy have no EPG; they are counted, not averaged.
    """
    run = open_run(folder)
    with open(Path(folder) / "attribution.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    groups = {}
    for row in rows:
        groups.setdefault((row["probe"], row["method"]), []).append(row)
    columns = ["probe", "head", "loss", "lr", "method", "EPG %", "uniform map %", "maps", "empty"]
    result = []
    for (probe, method), members in groups.items():
        spec = next(r for r in run.scores if r["probe"] == probe)
        scored = [r for r in members if r["epg"]]
        share = np.mean([float(r["box_share"]) for r in members])
        result.append([
            probe, describe_head(spec), spec["loss.type"], known(spec["optimizer.lr"]), method,
            percent(*_mean_with_interval(scored)), percent(share), str(len(members)), str(len(members) - len(scored)),
        ])  # fmt: skip
    return columns, result


def _mean_with_interval(rows):
    """Mean EPG of rows, with its 95% interval over images, which may have several maps each."""
    if not rows:
        return (None,)
    images = {i: n for n, i in enumerate(dict.fromkeys(r["id"] for r in rows))}
    at = torch.tensor([images[r["id"]] for r in rows])
    energy = torch.tensor([float(r["epg"]) for r in rows], dtype=torch.float64)
    sums, maps = (torch.zeros(len(images)).double().index_add_(0, at, e) for e in (energy, torch.ones_like(energy)))
    mean = sums.sum() / maps.sum()
    deviation = deviations(influences(mean, (sums.sum() - sums) / (maps.sum() - maps)))
    return tuple(end.item() for end in (mean, *fraction_interval(mean, deviation, mean.new_tensor(len(images)))))
