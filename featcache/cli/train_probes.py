"""`featcache train-probes`."""

import click

from featcache.cli.options import device_option


@click.command()
@click.option("--grid", required=True, type=click.Path(), help="YAML file; see docs/grid.md.")
@click.option("--store", type=click.Path(), help="Store to train on.  [default: the grid's own]")
@click.option("--run", type=click.Path(), help="Where to write.  [default: runs/GRID-ID]")
@device_option
@click.option("--seed", type=int, default=0, help="Of the order of the mini-batches.")
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="For features; larger ones are streamed from the store.  [default: half of what is free]",
)
def train_probes(memory, **options):
    """Train and score a whole grid of probes on cached features.

    The same command again goes on where it was interrupted, and trains only what is missing. Under
    torchrun the processes share the work.
    """
    from featcache.probes.train import train_probes as run
    from featcache.reporting.table import (
        METRIC_NAMES,
        format_table,
        percent,
        score_rows,
    )

    finished = run(memory=int(memory * 1e9) if memory else None, **options)
    if finished is None:
        return
    click.echo(format_table(*score_rows(finished, most=10)))
    summary = finished.summary
    metric = summary["select"]["metric"]
    click.echo(
        f"best 10 of {summary['probes']} probes by {summary['select']['split']} {METRIC_NAMES[metric]}; "
        f"chance on {finished.judge}: {percent(summary['chance'][finished.judge][metric])} %; run: {finished.path}"
    )
