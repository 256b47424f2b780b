"""`featcache svm`."""

from typing import Any

import click

from featcache.cli.options import device_option, features_option, memory_option, parts, several, splits_option


def _costs(_context: click.Context, _option: click.Parameter, text: str) -> Any:
    """Read numbers, or leave the name of a list of costs to featcache.svm."""
    try:
        return list(map(float, parts(text)))
    except ValueError:
        return text


@click.command()
@click.option("--store", required=True, type=click.Path(), help="Store with the features.")
@features_option("LAYER:REDUCE, each on its own.  [default: all that are one vector an image]")
@click.option("--low-shot", is_flag=True, help="Train on a few images of each class, drawn several times.")
@click.option(
    "--shots",
    metavar="K,...",
    default="1,2,4,8,16,32,64,96",
    callback=several(int, "a whole number"),
    help="With --low-shot: positives of each class; 19 negatives are drawn for each.",
)
@click.option("--samples", type=click.IntRange(min=1), default=5, help="With --low-shot: draws of each size.")
@click.option(
    "--costs",
    metavar="C,...",
    default="voc07",
    callback=_costs,
    help="To choose from for each class: numbers, voc07 (19 costs) or vissl (11).",
)
@click.option("--folds", type=click.IntRange(min=2), default=3, help="Of the cross-validation.")
@click.option(
    "--metric", metavar="NAME", help="map_voc10, map_voc07, map, ...  [default: map_voc10; top1 for one label]"
)
@click.option(
    "--engine",
    type=click.Choice(["newton", "liblinear"]),
    default="newton",
    help="liblinear: scikit-learn's LinearSVC.",
)
@click.option("--parity", metavar="NAME", help="openmixup: the published protocol, with its quirks.")
@splits_option("--train", "Splits to train on.  [default: trainval, or train,val]")
@splits_option("--test", "Splits to score on.  [default: test]")
@click.option("--run", type=click.Path(), help="Where to write.  [default: runs/svm-ID, or runs/low-shot-svm-ID]")
@device_option
@click.option("--seed", type=int, default=0, help="Of the first draw of --low-shot.")
@memory_option("Memory for features.  [default: half of what is free]")
@click.option("--allow-overlap", is_flag=True, help="Go on although two roles share images; the run says how many.")
def svm(low_shot: bool, **options: Any) -> None:
    """Train linear support vector machines on cached features, as VOC07 SVM and low-shot SVM protocols do.

    Each class has a machine of its own, and chooses its cost by cross-validation. The grid is in the run folder.
    """
    from featcache.probes.svm import svm as train
    from featcache.reporting.svm import low_shot_rows, notes, svm_rows
    from featcache.reporting.table import format_table

    run = train(low_shot=low_shot, **options)
    if run is None:
        return
    click.echo(format_table(*(low_shot_rows(run) if low_shot else svm_rows(run))))
    for line in notes(run):
        click.echo(line)
    click.echo(f"run: {run.path}")
    if run.caution:
        click.echo(run.caution)
