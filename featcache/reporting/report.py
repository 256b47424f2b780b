"""`featcache report`: one self-contained page over one or more runs."""

import io
import zipfile
import zlib
from importlib import resources

import numpy as np

from featcache.arguments import PATH, PATHS, listed, takes
from featcache.atomic import local_path, write_whole
from featcache.errors import BadInput, of_the_system
from featcache.probes.run import best, open_run
from featcache.probes.scores.metrics import LOWER_IS_BETTER
from featcache.probes.spec import IMPORTED
from featcache.reporting.configuration import HEAD, LOSS, describe_head, labels, naming, recipe
from featcache.reporting.localisation import EXPLAINED, MAPS, explained, localisation_rows
from featcache.reporting.table import METRIC_NAMES, heading, score_rows, scored, seed_texts


@takes(runs=PATHS, out=PATH)
def report(runs, out="report.html"):
    """Write an HTML page: best probes beside chance, learning rates, localisation and heatmaps.

    runs: folder of a finished run, or several, which must be scored with the same metric. Returns the page's
    path. Raises BadInput for an unfinished run or a missing package (extra: report).
    """
    try:
        import jinja2
    except ImportError:
        raise BadInput("the report needs jinja2: pip install 'featcache[report]'") from None
    from featcache.reporting import plots

    out = local_path(out, "--out")
    opened = [open_run(run) for run in listed(runs)]
    if not opened:
        raise BadInput("a report needs a run: name at least one folder")
    metrics = sorted({run.metric for run in opened})
    kinds = sorted({"/".join(run.metrics) for run in opened})
    if len(metrics) > 1 or len(kinds) > 1:
        different = metrics if len(metrics) > 1 else kinds
        raise BadInput(f"runs with different metrics do not fit one page: {', '.join(different)}")
    metric = metrics[0]
    page = {
        "metric": METRIC_NAMES[metric],
        "heading": heading(metric),
        "split": next((run.chosen_on for run in opened if run.chosen_on), None),
        "judge": opened[0].judge,
        "best": [line for run in opened for line in _best_rows(run, metric)],
        "cautions": list(dict.fromkeys(run.caution for run in opened if run.caution)),
        "metrics": [heading(m) for m in opened[0].metrics],
        "measured": [line for run in opened for line in _measured(run)],
        "rates": plots.learning_rates(opened, metric),
        "classes": [
            (run.path.name, len(run.summary["classes"]), plots.class_bars(run, _pictured(run)))
            for run in opened
            if "map" in run.metrics
        ],
        "reliability": plots.reliability(opened, _pictured),
        "localisation": [_localisation(run, plots) for run in opened if explained(run, EXPLAINED)],
        "tables": [(run.path.name, *score_rows(run)) for run in opened],
        "runs": [{"name": run.path.name, **run.summary} for run in opened],
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("featcache.reporting").joinpath("page.html.jinja").read_text(encoding="utf-8")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Half a surrogate pair, which JSON may hold, has no bytes.
        write_whole(out, environment.from_string(source).render(page).encode(errors="backslashreplace"))
    except OSError as error:
        raise BadInput(f"cannot write {out}: {of_the_system(error)}") from None
    return out


def _pictured(run):
    """The probes of a run whose classes and calibration are drawn."""
    return best(run, "loss")


def _best_rows(run, metric):
    """The selected probe of every head and loss, then chance, as dicts of strings for the page."""
    seeds, probes = seed_texts(run, metric), best(run, "head,loss")
    texts = {name: text for name, text in naming(run).items() if name not in (HEAD, LOSS)}
    for probe in probes:
        test = run.value(probe, metric, run.judge)
        imported = test["optimizer.type"] == IMPORTED
        yield {
            "run": run.path.name,
            "probe": f"{describe_head(test)}, {test['loss.type']}",
            "recipe": f"imported ({test['name']})" if imported else recipe(test, texts),
            "chosen_by": scored(metric, run.value(probe, metric, run.chosen_on)["value"]) if run.chosen_on else "-",
            "test": scored(metric, test["value"], test["low"], test["high"]),
            "seeds": seeds.get(probe, ""),
            "width": None if metric in LOWER_IS_BETTER else f"{100 * test['value']:.1f}",
        }
    level = run.summary["chance"][run.judge][metric]
    if level is not None:
        yield {"run": run.path.name, "probe": "chance", "test": scored(metric, level), "width": f"{100 * level:.1f}"}


def _measured(run):
    """Of the same probes, every metric on the judged split: (run, probe, [(score, interval)])."""
    probes = best(run, "head,loss")
    for probe, name in labels(run, probes).items():
        rows = [run.value(probe, m, run.judge) for m in run.metrics]
        cells = [(scored(r["metric"], r["value"]), scored(r["metric"], r["value"], r["low"], r["high"])) for r in rows]
        yield run.path.name, name, cells


def _localisation(run, plots):
    columns, rows = localisation_rows(run.path)
    picture = None
    if explained(run, MAPS):
        data = io.BytesIO(run.read(MAPS))
        try:
            with np.load(data, allow_pickle=False) as kept:
                picture = plots.heatmaps(run, dict(kept))
        except (zipfile.BadZipFile, zlib.error, AttributeError, EOFError, LookupError, TypeError, ValueError) as error:
            raise run.damaged(MAPS, error) from None
    return {"name": run.path.name, "columns": columns, "rows": rows, "picture": picture}
