"""`featcache report`."""

import click


@click.command()
@click.option(
    "--run", "runs", required=True, multiple=True, type=click.Path(), help="Folder of a finished run; may be repeated."
)
@click.option("--out", default="report.html", type=click.Path(), help="Page to write.")
def report(runs: tuple[str, ...], out: str) -> None:
    """Write one self-contained page: scores, learning rates, localisation, heatmaps."""
    from featcache.reporting.report import report as run

    click.echo(f"report: {run(runs, out)}")
