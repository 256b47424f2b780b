"""`featcache attribute`."""

from typing import Any

import click

from featcache.cli.options import backbone_options, dataset_options, device_option


@click.command()
@click.option("--run", required=True, type=click.Path(), help="Folder of a finished run.")
@click.option("--store", type=click.Path(), help="Store of the run.  [default: where the run found it]")
@click.option("--probe", "probes", multiple=True, metavar="ID", help="Probe to explain; may be repeated.")
@click.option(
    "--select",
    "rule",
    metavar="RULE",
    help="Which probes, without --probe: best METRIC [per FIELD,...].  [default: by the run's metric, per loss]",
)
@click.option(
    "--method",
    "methods",
    metavar="M,...",
    help="gradcam (from the store alone), input_x_gradient (needs the backbone).  [default: gradcam]",
)
@click.option("--score", "scores", metavar="S,...", help="How well maps point at the boxes.  [default: epg]")
@click.option("--split", help="Split to explain.  [default: the one that the run is scored on]")
@backbone_options(required=False)
@dataset_options(required=False)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N images that have a box.  [default: all]"
)
@click.option("--examples", type=click.IntRange(min=0), default=6, help="Images whose maps are kept for the report.")
@device_option
@click.option("--seed", type=int, default=0, help="Of a random backbone.")
def attribute(methods: str | None, scores: str | None, **options: Any) -> None:
    """Explain probes and score the maps: share of positive energy in the object's boxes (EPG)."""
    from featcache.attribution.attribute import attribute as run
    from featcache.reporting.localisation import localisation_rows
    from featcache.reporting.table import format_table

    run(methods=_names(methods), scores=_names(scores), **options)
    click.echo(format_table(*localisation_rows(options["run"])))


def _names(text: str | None) -> list[str] | None:
    return None if text is None else text.split(",")
