"""`featcache plan`."""

from typing import TYPE_CHECKING, Any

import click

from featcache.cli.extract import extraction_options, masks_options
from featcache.cli.train_probes import duration_text, size_text

if TYPE_CHECKING:
    from featcache.planning import Plan


@click.command()
@extraction_options
@masks_options
@click.option("--grid", type=click.Path(), help="As for sweep: also count what training on images would take.")
@click.option("--parity", metavar="NAME", help="A profile of the grid, such as how-to-probe.")
@click.option("--runs", type=click.Path(), help="As for sweep; it changes nothing here.")
@click.option(
    "--devices", type=click.IntRange(min=1), default=1, metavar="N", help="Also estimate the time on N devices."
)
@click.option("--measure/--no-measure", default=True, help="Measure for a few seconds how fast images come and run.")
def plan(backbones: tuple[str, ...], grid: str | None, runs: str | None, **options: Any) -> None:
    """Say what extract, or sweep, would write with the same options: rows, bytes, free disk and time. Write nothing."""
    from featcache.extraction.checkpoint_files import names_several
    from featcache.planning import plan as run

    # A sweep names its stores as an extraction of several backbones does.
    several = grid is not None or names_several(backbones)
    planned = run(list(backbones) if several else backbones[0], grid=grid, **options)
    for line in (*_stores(planned), *_passes(planned), *_forwards(planned)):
        click.echo(line)
    click.echo("nothing was written")


def _stores(plan: "Plan") -> list[str]:
    """Return lines on what is there and what is to be written."""
    from featcache.reporting.table import format_table

    rows = [
        {
            "store": store.path,
            "state": store.state,
            "feature": feature.name,
            "shape": "x".join(map(str, feature.shape)),
            "rows": f"{feature.rows:,}",
            "bytes a row": f"{feature.row_bytes:,}",
            "in all": size_text(feature.bytes),
            "to write": size_text(feature.bytes_to_write),
        }
        for store in plan.stores
        for feature in store.features
    ]
    lines = [format_table(list(rows[0]), [list(row.values()) for row in rows])]
    for store in plan.stores:
        splits = ", ".join(f"{split} {count:,}" for split, count in store.splits.items())
        lines.append(
            f"{store.path} ({store.state}): {store.rows:,} rows ({splits}), {store.images_to_run:,} to run; "
            f"{store.shards_to_write:,} of {store.shards:,} shards to write"
        )
    compressed = " before compression" * any(store.compression for store in plan.stores)
    free = "no limit is known" if plan.free is None else f"{size_text(plan.free)} are free"
    verdict = {True: "it fits", False: "it does NOT fit", None: ""}[None if plan.free is None else plan.fits]
    lines.append(f"disk: {size_text(plan.bytes_to_write)} to write{compressed}; {free}{verdict and ': ' + verdict}")
    return lines


def _passes(plan: "Plan") -> list[str]:
    """Return lines on how fast the passes over the images are."""
    lines, workers = [], f"{plan.workers or 'no'} worker{'s' * (plan.workers != 1)}"
    for one in plan.passes:
        if one.decode is None or one.forward is None or one.seconds is None:
            continue
        through = f" through {len(one.stores)} backbones" * (len(one.stores) > 1)
        lines.append(
            f"speed: {one.decode:.3g} images/s decoded by {workers}, "
            f"{one.forward:.3g} images/s forward{through} on {plan.device}: {one.bottleneck} is the bottleneck; together about "
            f"{one.images / one.seconds:.3g} images/s"
        )
    seconds, spread = plan.seconds, plan.seconds_on_devices
    if not plan.passes:
        lines.append("time: none, nothing is left to do")
    elif seconds is None or spread is None:
        lines.append("time: not measured")
    else:
        lines.append(f"time: about {duration_text(seconds)} on this machine, without writing")
        if plan.devices > 1:
            lines.append(
                f"time: about {duration_text(spread)} on {plan.devices} devices, an estimate: it scales decoding and forwards "
                f"by {plan.devices} processes, each with a device, {workers} and cores like those of this one"
            )
    return lines


def _forwards(plan: "Plan") -> list[str]:
    """Return lines on what training on images would take."""
    count = plan.forwards
    if count is None:
        return []

    def against(forwards: int) -> str:
        return f"{forwards:,} ({forwards / count.cached:,.1f} times as many)"

    backbones = f" on {count.backbones} backbones" * (count.backbones > 1)
    return [
        f"grid: {count.probes:,} probes{backbones}; featcache's one pass is {count.cached:,} backbone forwards",
        f"grid: a run for each probe, as How-to-Probe trains, is {against(count.one_run_each)}",
        f"grid: a run for each recipe with a head on each feature, as OpenMixup's multi-head trains, is "
        f"{against(count.multi_head)}",
    ]
