"""`featcache sweep`."""

from typing import TYPE_CHECKING, Any

import click

from featcache.cli.extract import extraction_options

if TYPE_CHECKING:
    from featcache.sweeping import Swept


@click.command()
@extraction_options
@click.option("--grid", required=True, type=click.Path(), help="YAML file without a store; see docs/grid.md.")
@click.option("--parity", metavar="NAME", help="A profile of the grid, such as how-to-probe.")
@click.option(
    "--runs", type=click.Path(), default="runs", help="Folder for the runs, one for each store: RUNS/STORE-GRID."
)
def sweep(backbones: tuple[str, ...], **options: Any) -> None:
    """Extract the features of many checkpoints, train a grid on each, and print one table.

    The same command again does only what is missing, be it after an interruption or with more checkpoints.
    """
    from featcache.reporting.table import format_table
    from featcache.sweeping import sweep as run

    swept = run(backbones, **options)
    click.echo(format_table(*_table(swept)))


def _table(swept: "list[Swept]") -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows) with the best probe of each checkpoint."""
    from featcache.probes.runs.run import best
    from featcache.reporting.table import heading, scored

    first = swept[0].run
    metric, split, name = first.metric, first.chosen_on, heading(first.metric)
    columns = ["checkpoint", *([f"{split} {name}"] if split else []), f"{first.scored_on} {name} [95%]", "probe", "run"]
    rows = []
    for one in swept:
        for probe in [one.best] if one.best else best(one.run):
            test = one.run.row(probe, metric, one.run.scored_on)
            value = scored(metric, test["value"], test["low"], test["high"])
            chosen = [scored(metric, one.run.chosen_by(probe)["value"])] if split else []
            rows.append([one.name, *chosen, value, probe, str(one.run.path)])
    return columns, rows
