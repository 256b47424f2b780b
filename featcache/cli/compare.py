"""`featcache compare`."""

from typing import Any

import click

from featcache.cli.options import device_option


@click.command()
@click.option(
    "--run", "runs", required=True, multiple=True, type=click.Path(),
    help="Folder of a finished run; twice to compare probes of two runs on the same images.",
)  # fmt: skip
@click.option("--probe", "probes", multiple=True, metavar="ID", help="The two probes, in the order of the runs.")
@click.option(
    "--select", "rule", metavar="RULE", help="Or a rule: best METRIC [per FIELD,...], two of one run or one of each."
)
@click.option(
    "--store", "stores", multiple=True, type=click.Path(), help="Stores of the runs.  [default: the runs know]"
)
@device_option
def compare(**options: Any) -> None:
    """Test whether two probes differ, metric by metric, on the images that the run is scored on.

    The test is paired over images; docs/scores.md has the formula.
    """
    from featcache.probes.compare import compare as run
    from featcache.reporting.table import comparison_rows, format_table

    click.echo(format_table(*comparison_rows(run(**options))))
