"""`featcache train-probes`."""

from typing import TYPE_CHECKING, Any

import click

from featcache.cli.options import device_option, memory_option

if TYPE_CHECKING:
    from featcache.probes.plan import Plan
    from featcache.probes.runs.run import Run


@click.command()
@click.option("--grid", required=True, type=click.Path(), help="YAML file; see docs/grid.md.")
@click.option("--store", type=click.Path(), help="Store to train on.  [default: the grid's own]")
@click.option("--run", type=click.Path(), help="Where to write.  [default: runs/GRID-ID]")
@device_option
@click.option("--seed", type=int, default=0, help="Draws the order of the mini-batches.")
@memory_option("Memory for features; what needs more is streamed from the store.  [default: half of what is free]")
@click.option("--parity", metavar="NAME", help="A profile of the grid, such as how-to-probe: the published protocol.")
@click.option("--allow-overlap", is_flag=True, help="Train although two roles share images; the run says how many.")
@click.option("--dry-run", is_flag=True, help="Only say what would be trained, with memory and time; write nothing.")
def train_probes(dry_run: bool, run: str | None, seed: int, **options: Any) -> None:
    """Train and score a whole grid of probes on cached features.

    If it was interrupted, the same command again goes on from there, and trains only what is missing. Under torchrun
    the processes share the work.
    """
    if dry_run:
        from featcache.probes.plan import plan_probes

        _print_plan(plan_probes(**options))
        return
    from featcache.probes.train import train_probes as train

    finished = train(run=run, seed=seed, **options)
    if finished is not None:
        print_scores(finished)


def print_scores(finished: "Run") -> None:
    """Print the best probes of a run."""
    from featcache.probes.scores.metrics import metric_kind
    from featcache.reporting.table import format_table, score_rows, scored

    click.echo(format_table(*score_rows(finished, most=10)))
    summary, metric = finished.summary, finished.metric
    level = summary["chance"][finished.scored_on][metric]
    chosen = f" by {finished.chosen_on} {metric_kind(metric).title}" if finished.chosen_on else ""
    click.echo(
        f"{'best' if chosen else 'first'} {min(10, summary['probes'])} of {summary['probes']} probes{chosen}; "
        + (
            f"chance on {finished.scored_on}: {scored(metric, level)} {metric_kind(metric).unit()}; "
            if level is not None
            else ""
        )
        + f"run: {finished.path}"
    )
    if finished.caution:
        click.echo(finished.caution)
    if short := summary.get("short"):
        more = f" and {len(short) - 5} more" if len(short) > 5 else ""
        click.echo(
            f"short of their optimum, or with a fold that is: {', '.join(short[:5])}{more}; "
            "give them more optimizer.iterations, or regularise more"
        )


def _print_plan(plan: "Plan") -> None:
    """Print the stacks of a plan, with their memory and time."""
    from featcache.reporting.table import format_table

    if plan.missing:
        click.echo(format_table(["group", "probes"], [[name, str(count)] for name, count in plan.groups]))
        click.echo(
            f"{plan.probes} probes; no stacks, memory or time without a store ({plan.missing}); nothing was written"
        )
        return
    rows = [
        {
            "features": s.features,
            "head": s.head.label,
            "loss": ", ".join(f"{count} {kind}" for kind, count in s.loss.items()),
            "optimiser": s.optimizer,
            "epochs": "full batch" if s.full_batch else str(s.epochs),
            "precision": s.precision,
            "batch": str(s.batch_size),
            "probes": str(s.probes),
            "blocks": str(s.blocks),
            "data": size_text(s.feature_bytes) + " streamed" * s.streamed,
            "memory": size_text(s.weight_bytes + s.activation_bytes),
            "GFLOP": f"{s.flops / 1e9:.3g}",
            "about": duration_text(s.seconds),
        }
        for s in plan.stacks
    ]
    click.echo(format_table(list(rows[0]), [list(row.values()) for row in rows]))
    streamed = sum(s.streamed for s in plan.stacks)
    click.echo(
        f"{plan.probes} probes in {len(plan.stacks)} stacks on {plan.rows} images; about {duration_text(plan.seconds)} "
        f"of training on {plan.device}, without reading and scoring; about {size_text(plan.memory)} of memory, "
        f"{size_text(plan.free)} are free"
        + (f"; {streamed} stacks do not fit into the memory for features and are streamed" if streamed else "")
        + ("; what is trained again comes on top" if plan.grid.refit else "")
        + "; nothing was written"
    )


def size_text(count: float) -> str:
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1024:.3g} GiB"


def duration_text(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
