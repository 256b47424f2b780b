"""EPG per probe and method, from a run's attribution.csv."""

import click
import numpy as np
import torch

from featcache.probes.runs.run import open_run
from featcache.probes.runs.run_file import ATTRIBUTION
from featcache.probes.scores.jackknife import deviations, fraction_interval, influences
from featcache.reporting.configuration import naming
from featcache.reporting.table import percent

EXPLAINED, MAPS = ATTRIBUTION


def localisation_rows(folder):
    """Return (columns, rows of strings): mean EPG with a 95% interval over images.

    The last column is what a uniform map scores: the boxes' mean share of the image. Maps without
    positive energy have no EPG; they are counted, not averaged. Maps of probes that are not in the run any
    more are left out, with a notice.
    """
    run = open_run(folder)
    groups = {}
    for row in run.table(EXPLAINED, id=str, epg=float, box_share=float):
        groups.setdefault((row["probe"], row["method"]), []).append(row)
    texts, specs = naming(run), {r["probe"]: r for r in run.scores}
    columns = ["probe", *texts, "method", "EPG %", "uniform map %", "maps", "empty"]
    gone = list(dict.fromkeys(probe for probe, _ in groups if probe not in specs))
    if gone:
        click.echo(
            f"notice: {EXPLAINED} of run {folder} has {len(gone)} probes that the run does not have "
            f"({', '.join(gone[:3])}{', ...' if len(gone) > 3 else ''}); they are left out, attribute again",
            err=True,
        )
    result = []
    for (probe, method), members in groups.items():
        if probe in gone:
            continue
        scored = [r for r in members if r["epg"] is not None]
        share = np.mean([r["box_share"] for r in members])
        result.append([
            probe, *(text(specs[probe]) for text in texts.values()), method,
            percent(*_mean_with_interval(scored)), percent(share), str(len(members)), str(len(members) - len(scored)),
        ])  # fmt: skip
    return columns, result


def explained(run, name):
    """Whether a file that attribute writes is there. A notice says where it is missing, or was not finished."""
    files, there = run.summary.get("files"), (run.path / name).exists()
    if files is None or there == (name in files):
        return there
    click.echo(
        f"notice: {name} of run {run.path} {'has no checksum in run.json' if there else 'is missing'}; it is left out, attribute again",
        err=True,
    )
    return False


def _mean_with_interval(rows):
    """Mean EPG of rows, with its 95% interval over images, which may have several maps each."""
    if not rows:
        return (None,)
    images = {i: n for n, i in enumerate(dict.fromkeys(r["id"] for r in rows))}
    at = torch.tensor([images[r["id"]] for r in rows])
    energy = torch.tensor([r["epg"] for r in rows], dtype=torch.float64)
    sums, maps = (torch.zeros(len(images)).double().index_add_(0, at, e) for e in (energy, torch.ones_like(energy)))
    mean = sums.sum() / maps.sum()
    deviation = deviations(influences(mean, (sums.sum() - sums) / (maps.sum() - maps)))
    return tuple(end.item() for end in (mean, *fraction_interval(mean, deviation, mean.new_tensor(len(images)))))
