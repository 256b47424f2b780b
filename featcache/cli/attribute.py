"""`featcache attribute`."""

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from featcache.cli.options import backbone_options, dataset_options, device_option, memory_option, parts

if TYPE_CHECKING:
    from featcache.attribution.plan import AttributionPlan


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
    help="How to explain, with fields as in NAME:FIELD=VALUE; docs/attribution.md lists them.  [default: gradcam]",
)
@click.option(
    "--score", "scores", metavar="S,...",
    help="How good maps are; docs/attribution.md lists scores.  [default: epg; faithfulness: insertion,deletion]",
)  # fmt: skip
@click.option(
    "--protocol",
    metavar="P",
    help="What is explained: boxes, masks (needs the data set), gridpg with fields as in gridpg:side=2, or faithfulness "
    "(both need the backbone).  [default: boxes, or gridpg where there are none]",
)
@click.option("--split", help="Split to explain.  [default: the one that the run is scored on]")
@backbone_options(required=False)
@dataset_options(required=False)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only the first N images that have something to explain.  [default: all]",
)
@click.option(
    "--masks",
    multiple=True,
    type=click.Path(),
    metavar="STORE",
    help="Store of extract --masks, from which rise and others read the masked images' features; may be repeated.  "
    "[default: those beside the run's store that fit]",
)
@click.option("--images", metavar="ID,...", help="Only these images, and keep their maps for pictures.")
@click.option(
    "--examples",
    metavar="N|RULE,...",
    default="6",
    help="Images whose maps are kept for pictures: the first N, or by rules, best[:N], worst[:N], right[:N], wrong[:N].  "
    "[default: 6, or all of --images]",
)
@click.option(
    "--pictures",
    metavar="DIR",
    type=click.Path(),
    help="Folder for the kept maps as PNG sheets (extra report).  [default: RUN/pictures, with --images or a rule]",
)
@device_option
@click.option("--seed", type=int, default=0, help="Of a random backbone, and of random heads.")
@memory_option("Memory for what passes through the backbone keep.  [default: 2]")
@click.option("--sanity", is_flag=True, help="Explain random heads and backbones beside each probe.")
@click.option(
    "--parity",
    metavar="PROFILE",
    help="how-to-probe evaluates as published, quirks included; docs/attribution.md lists them.  [default: corrected]",
)
@click.option("--save-maps", is_flag=True, help="Keep all maps, as float16 in RUN/attribution.zarr.")
@click.option("--to", "format", type=click.Choice(["csv", "parquet"]), default="csv", help="Format of the table.")
@click.option("--dry-run", is_flag=True, help="Only count maps and passes through the backbone; write nothing.")
def attribute(
    methods: str | None,
    scores: str | None,
    images: str | None,
    pictures: str | None,
    device: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Explain probes and score the maps, by default by the share of positive energy in the objects' boxes (EPG).

    If it was interrupted, the same command again goes on from there. Under torchrun the processes share the images.
    """
    options |= {"methods": _names(methods), "scores": _names(scores), "images": _names(images)}
    if dry_run:
        from featcache.attribution.plan import plan_attribution
        from featcache.attribution.saved_maps import describe
        from featcache.attribution.settings import Settings
        from featcache.attribution.task import prepare
        from featcache.device import choose_device

        task = prepare(Settings(**options), choose_device(device))
        _print_plan(plan_attribution(task))
        if task.settings.save_maps:
            click.echo(describe(task))
        return
    from featcache.attribution.attribute import attribute as run
    from featcache.probes.runs.run import open_run
    from featcache.reporting.localisation import MARK, MARKED, read_localisation, table_of

    drawn = pictures is not None or images is not None or not options["examples"].isdigit()
    if drawn:
        # It says before all the work if a package is missing.
        from featcache.reporting.pictures import check_folder, write_pictures

        if pictures is not None:
            check_folder(pictures)
    if run(device=device, **options) is not None:
        finished = open_run(options["run"])
        localisation = read_localisation(finished)
        columns, rows = table_of(finished, localisation)
        click.echo(_fitted(columns, rows))
        if any(MARK in cell for row in rows for cell in row):
            click.echo(MARKED)
        for line in localisation.settings():
            click.echo(line)
        if drawn:
            paths = write_pictures(options["run"], pictures)
            click.echo(
                f"pictures: {len(paths)} sheet{'s' * (len(paths) > 1)} in {paths[0].parent}"
                if paths
                else "pictures: none were kept"
            )


def _fitted(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table of scores; on a terminal that is too narrow for it, as several."""
    from featcache.reporting.localisation import narrow_tables
    from featcache.reporting.table import format_table

    table = format_table(columns, rows)
    if sys.stdout.isatty() and len(table.partition("\n")[0]) > shutil.get_terminal_size().columns:
        return "\n\n".join(format_table(*part) for part in narrow_tables(columns, rows))
    return table


def _print_plan(plan: "AttributionPlan") -> None:
    """Print the passes through the backbone that methods take, and those of the same maps one by one."""
    from featcache.reporting.table import format_table

    columns = ["methods", "forward", "backward", "one by one: forward", "backward"]
    rows = [
        [", ".join(shared.methods), *(f"{n:,}" for p in (shared.passes, shared.alone) for n in (p.forward, p.backward))]
        for shared in plan.shared
    ]
    work = plan.work
    again = f"; then up to {plan.again} images again, for pictures" if plan.again else ""
    click.echo(format_table(columns, rows))
    click.echo(
        f"{plan.maps:,} maps: {work.probes:,} probes, {work.pairs:,} pairs of image and class, {work.images:,} images; "
        f"passes of an image through the backbone: {plan.passes}; one by one: {plan.alone}{again}; nothing was written"
    )


def _names(text: str | None) -> list[str] | None:
    return None if text is None else parts(text)
