"""`featcache train-probes`."""

import click

from featcache.cli.options import device_option


@click.command()
@click.option("--grid", required=True, type=click.Path(), help="YAML file; see docs/grid.md.")
@click.option("--store", type=click.Path(), help="Store to train on.  [default: the grid's own]")
@click.option("--run", type=click.Path(), help="Where to write.  [default: runs/GRID-ID]")
@device_option
@click.option("--seed", type=int, default=0, help="Of the order of the mini-batches.")
def train_probes(**options):
    """Train and score a whole grid of probes on cached features.

    The same command again trains only what is missing.
    """
    from featcache.probes.train import train_probes as run
    from featcache.reporting.table import METRIC_NAMES, format_table, score_rows, scored

    finished = run(**options)
    click.echo(format_table(*score_rows(finished, most=10)))
    summary = finished.summary
    metric = summary["select"]["metric"]
    level = summary["chance"][finished.judge][metric]
    click.echo(
        f"best {min(10, summary['probes'])} of {summary['probes']} probes by {summary['select']['split']} {METRIC_NAMES[metric]}; "
        + (f"chance on {finished.judge}: {scored(metric, level)} %; " if level is not None else "")
        + f"run: {finished.path}"
    )
    if finished.caution:
        click.echo(finished.caution)
