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
@click.option("--localisation", is_flag=True, help="Compare their maps instead, as featcache attribute scored them.")
@click.option(
    "--method", "methods", multiple=True, metavar="M",
    help="Maps to compare with --localisation; twice to compare two methods, of one probe too.  [default: all]",
)  # fmt: skip
@device_option
def compare(localisation: bool, methods: tuple[str, ...], **options: Any) -> None:
    """Test whether two probes differ, metric by metric, on the images that the run is scored on.

    With --localisation it tests whether their maps differ, score by score. The test is paired over images;
    docs/scores.md has the formula.
    """
    from featcache.reporting.table import format_table

    if not localisation:
        from featcache.probes.compare import compare as run
        from featcache.reporting.table import comparison_rows

        if methods:
            raise click.UsageError("--method goes with --localisation")
        click.echo(format_table(*comparison_rows(run(**options))))
        return
    from featcache.reporting.compare_localisation import compare_localisation
    from featcache.reporting.compare_localisation import comparison_rows as localisation_rows
    from featcache.reporting.localisation import MARK, MARKED

    if options["stores"]:
        raise click.UsageError("--store does not go with --localisation, which reads the runs alone")
    columns, rows = localisation_rows(
        compare_localisation(options["runs"], options["probes"] or None, options["rule"], list(methods) or None)
    )
    click.echo(format_table(columns, rows))
    if any(MARK in cell for row in rows for cell in row):
        click.echo(MARKED)
