"""`featcache import-probes`."""

from typing import Any

import click

from featcache.cli.options import device_option


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="CKPT...")
@click.option("--store", required=True, type=click.Path(), help="Store of the backbone in the checkpoints.")
@click.option("--run", required=True, type=click.Path(), help="Folder to write, or of an earlier import to add to.")
@click.option(
    "--loss", required=True, type=click.Choice(["bce", "ce"]), help="What they were trained with; no tensor tells."
)
@click.option("--offset", metavar="X", help="Added to every logit: a number, or -ln(C-1).  [default: How-to-Probe's]")
@device_option
def import_probes(**options: Any) -> None:
    """Make a run of How-to-Probe's finished probes, as mmpretrain saves them, and score it on a store."""
    from featcache.exchange.import_probes import import_probes as run
    from featcache.reporting.table import format_table, score_rows

    finished = run(**options)
    click.echo(format_table(*score_rows(finished)))
    click.echo(f"run: {finished.path}")
