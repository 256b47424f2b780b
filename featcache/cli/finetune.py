"""`featcache finetune`."""

from typing import TYPE_CHECKING, Any

import click

from featcache.arguments import MOST_WORKERS
from featcache.cli.options import backbone_options, dataset_options, device_option
from featcache.cli.train_probes import print_scores

if TYPE_CHECKING:
    from featcache.finetuning.plan import TuningPlan


@click.command()
@backbone_options(required=True)
@dataset_options(required=True)
@click.option("--recipe", required=True, type=click.Path(), help="YAML file; see docs/finetuning.md.")
@click.option("--run", type=click.Path(), help="Where to write.  [default: runs/RECIPE-ID]")
@click.option(
    "--head-from", type=click.Path(), metavar="RUN", help="Start the heads from a probe of this run.  [default: random]"
)
@click.option("--select", metavar="RULE", help="Which probe of --head-from.  [default: its best]")
@device_option
@click.option(
    "--workers", type=click.IntRange(0, MOST_WORKERS), help="Decoding processes.  [default: half the cores, at most 8]"
)
@click.option("--seed", type=int, default=0, help="Draws order, augmentation, and a random backbone.")
@click.option("--parity", metavar="NAME", help="A profile of the recipe.")
@click.option("--dry-run", is_flag=True, help="Only say which parameters would be trained how; write nothing.")
@click.option("--measure", is_flag=True, help="With --dry-run: run a mini-batch to estimate the time.")
def finetune(dry_run: bool, measure: bool, run: str | None, **options: Any) -> None:
    """Train a backbone together with a head on images, for every configuration of a recipe.

    If it was interrupted, the same command again goes on from there, to the same weights. Under torchrun the processes
    share every mini-batch.
    """
    if dry_run:
        from featcache.finetuning.plan import plan_finetune

        _print_plan(plan_finetune(measure=measure, **options))
        return
    if measure:
        raise click.UsageError("--measure goes with --dry-run")
    from featcache.finetuning.finetune import finetune as train

    finished = train(run=run, **options)
    if finished is not None:
        print_scores(finished)


def _print_plan(plan: "TuningPlan") -> None:
    """Print the parameter groups of every configuration, each kind of them once."""
    from featcache.cli.train_probes import duration_text
    from featcache.reporting.table import format_table

    seen: dict[object, list[str]] = {}
    for configuration in plan.configurations:
        seen.setdefault(configuration.groups, []).append(configuration.spec.id)
    for groups, ids in seen.items():
        click.echo(f"{', '.join(ids[:5])}{f' and {len(ids) - 5} more' if len(ids) > 5 else ''}:")
        columns = ["part", "tensors", "parameters", "lr", "weight decay"]
        rows = [
            [g.name, str(g.tensors), str(g.parameters), f"{g.lr:.6g}", f"{g.weight_decay:g}"]
            for g in groups  # type: ignore[attr-defined]  # a tuple of PlannedGroups
        ]
        click.echo(format_table(columns, rows))
    steps = sum(configuration.steps for configuration in plan.configurations)
    seconds = [c.seconds for c in plan.configurations if c.seconds is not None]
    click.echo(
        f"{len(plan.configurations)} configurations of {plan.arch} on {plan.rows} images; {steps} steps in all"
        + (f"; about {duration_text(sum(seconds))} on {plan.device}, without decoding and scoring" if seconds else "")
        + "; nothing was written"
    )
