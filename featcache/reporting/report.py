"""`featcache report`: one self-contained page over one or more runs."""

from collections.abc import Iterator, Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from featcache.arguments import PATH, PATHS, listed, takes
from featcache.atomic import local_path, write_whole
from featcache.errors import BadInput, of_the_system
from featcache.probes.runs.run import Run, best, open_run
from featcache.probes.scores.metrics import metric_kind, task_of
from featcache.reporting.configuration import head_and_loss, labels, naming, training
from featcache.reporting.localisation import (
    Localisation,
    by_class,
    by_size,
    explained,
    means_of,
    read_localisation,
    table_of,
)
from featcache.reporting.svm import cost_table, read_costs
from featcache.reporting.svm import notes as svm_notes
from featcache.reporting.table import heading, over, score_rows, scored, seed_texts

# Probes whose costs and classes are shown in full.
MOST_COST_TABLES, MOST_PICTURED = 12, 12
# A longer table of localisation scores is folded.
MOST_TABLE_ROWS = 24


@takes(runs=PATHS, out=PATH)
def report(runs: str | PathLike | Sequence[str | PathLike], out: str | PathLike = "report.html") -> Path:
    """Write an HTML page: best probes beside chance, learning rates, localisation and heatmaps.

    runs: folder of a finished run, or several, which must be scored with the same metric. Returns the page's
    path. Raises BadInput for an unfinished run or a missing package (extra: report).

        featcache.report(["runs/imagenet", "runs/random"], "report.html")
    """
    try:
        import jinja2
    except ImportError:
        raise BadInput("the report needs jinja2: pip install 'featcache[report]'") from None
    from featcache.reporting import plots
    from featcache.reporting.page_sheets import embedded, embedded_key
    from featcache.reporting.sheets import read_sheets

    page_path = local_path(out, "--out")
    opened = [open_run(run) for run in listed(runs)]
    if not opened:
        raise BadInput("a report needs a run: name at least one folder")
    metrics = sorted({run.metric for run in opened})
    kinds = sorted({"/".join(run.metrics) for run in opened})
    if len(metrics) > 1 or len(kinds) > 1:
        different = metrics if len(metrics) > 1 else kinds
        raise BadInput(f"runs with different metrics do not fit one page: {', '.join(different)}")
    metric = metrics[0]
    places = [(run, read_localisation(run)) for run in opened if explained(run, run.attribution_table)]
    sheets = embedded([read_sheets(run, localisation) for run, localisation in places])
    page = {
        "metric": metric_kind(metric).title,
        "heading": heading(metric),
        "over": next((over(run) for run in opened if seed_texts(run, metric)), "seeds"),
        "split": next((run.chosen_on for run in opened if run.chosen_on), None),
        "scored_on": opened[0].scored_on,
        "best": [line for run in opened for line in _best_rows(run, metric)],
        "cautions": list(dict.fromkeys(run.caution for run in opened if run.caution)),
        "metrics": [heading(m) for m in opened[0].metrics],
        "measured": [line for run in opened for line in _measured(run)],
        "rates": plots.learning_rates(opened, metric),
        "classes": [
            (run.path.name, len(run.summary["classes"]), plots.class_bars(run, _pictured(run)))
            for run in opened
            if task_of(run.metrics) == "multi-label"
        ],
        "reliability": plots.reliability(opened, _pictured),
        "localisation": [
            _localisation(run, localisation, plots) | {"sheets": own, "left_out": left_out}
            for (run, localisation), (own, left_out) in zip(places, sheets, strict=True)
        ],
        "key": embedded_key(),
        "costs": [_costs(run) for run in opened if read_costs(run)],
        "tables": [(run.path.name, *score_rows(run)) for run in opened],
        "runs": [{"name": run.path.name, **run.summary} for run in opened],
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("featcache.reporting").joinpath("page.html.jinja").read_text(encoding="utf-8")
    try:
        page_path.parent.mkdir(parents=True, exist_ok=True)
        # Half a surrogate pair, which JSON may hold, has no bytes.
        write_whole(page_path, environment.from_string(source).render(page).encode(errors="backslashreplace"))
    except OSError as error:
        raise BadInput(f"cannot write {page_path}: {of_the_system(error)}") from None
    return page_path


def _pictured(run: Run) -> list[str]:
    """The probes of a run whose classes and calibration are drawn."""
    return best(run, "loss")[:MOST_PICTURED]


def _best_rows(run: Run, metric: str) -> Iterator[dict[str, str | None]]:
    """The selected probe of every head and loss, then chance, as dicts of strings for the page."""
    seeds, probes = seed_texts(run, metric), best(run, "head,loss")
    texts = naming(run)
    # A bar that is full for a perfect score.
    barred = metric_kind(metric).unit() and metric_kind(metric).higher_is_better
    for probe in probes:
        test = run.row(probe, metric, run.scored_on)
        yield {
            "run": run.path.name,
            "probe": head_and_loss(test),
            "recipe": training(test, texts),
            "chosen_by": scored(metric, run.chosen_by(probe)["value"]) if run.chosen_on else "-",
            "test": scored(metric, test["value"], test["low"], test["high"]),
            "seeds": seeds.get(probe, ""),
            "width": f"{100 * test['value']:.1f}" if barred else None,
        }
    level = run.summary["chance"][run.scored_on][metric]
    if level is not None:
        width = f"{100 * level:.1f}" if barred else None
        yield {"run": run.path.name, "probe": "chance", "test": scored(metric, level), "width": width}


def _measured(run: Run) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Yield (run, probe, [(score, score with interval)]) of the same probes: every metric on the role whose scores are reported."""
    probes = best(run, "head,loss")
    for probe, name in labels(run, probes).items():
        rows = [run.row(probe, m, run.scored_on) for m in run.metrics]
        cells = [(scored(r["metric"], r["value"]), scored(r["metric"], r["value"], r["low"], r["high"])) for r in rows]
        yield run.path.name, name, cells


def _costs(run: Run) -> dict[str, Any]:
    """Return the page's section on the costs that a run's machines chose: a table for each of the first probes."""
    costs, notes = read_costs(run), list(svm_notes(run))
    texts = labels(run, list(costs))
    shown = list(costs)[:MOST_COST_TABLES]
    if len(costs) > len(shown):
        notes.append(f"the first {len(shown)} of {len(costs)} probes; costs.csv has all")
    return {"name": run.path.name, "notes": notes, "probes": [(texts[p], *cost_table(costs[p])) for p in shown]}


def _localisation(run: Run, localisation: Localisation, plots: ModuleType) -> dict[str, Any]:
    """Return what the page's section on a run's maps shows besides sheets: a plot, tables, and explanations."""
    columns, rows = table_of(run, localisation)
    sizes = by_size(run, localisation)
    groups = [*([("by size of the objects", *sizes)] if sizes else []), ("by class", *by_class(run, localisation))]
    score = localisation.scores[0] if localisation.rows else None
    return {
        "name": run.path.name,
        "plot": score and plots.localisation_means(run, means_of(localisation, score), score),
        "heading": score and score.heading,
        "columns": columns,
        "rows": rows,
        "folded": len(rows) > MOST_TABLE_ROWS,
        "groups": groups,
        "notes": localisation.notes(),
    }
