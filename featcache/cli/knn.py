"""`featcache knn`."""

from typing import Any

import click

from featcache.cli.options import device_option, features_option, memory_option, several, splits_option


@click.command()
@click.option("--store", required=True, type=click.Path(), help="Store with the features.")
@features_option("LAYER:REDUCE, each on its own; a map is averaged over its positions.", default="pooled")
@click.option(
    "--k",
    metavar="K,...",
    callback=several(int, "a whole number"),
    help="Neighbours that vote.  [default: by --weights]",
)
@click.option(
    "--temperature",
    metavar="T,...",
    callback=several(float, "a number"),
    help="Of exp(s / T).  [default: by --weights]",
)
@click.option(
    "--weights",
    metavar="NAME",
    default="dino",
    help="dino, openmixup, dinov2, lightly, vissl, uniform or inverse; see docs/knn.md.",
)
@click.option("--distance", metavar="NAME", help="cosine, euclidean or dot.  [default: by --weights]")
@click.option(
    "--shots",
    metavar="N,...",
    callback=several(int, "a whole number"),
    help="Few-shot: N training images of each class.",
)
@click.option("--tries", type=click.IntRange(min=1), default=1, help="With --shots: draws of each size.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="With --shots: of the first draw.")
@click.option(
    "--leave-one-out", is_flag=True, help="Choose on the training images, each without itself, rather than on val."
)
@splits_option("--train", "Splits whose images vote.  [default: train]")
@splits_option("--val", "Splits to choose on.  [default: val]")
@splits_option("--test", "Splits to score on.  [default: test]")
@click.option("--metric", metavar="NAME", help="To choose by.  [default: top1, or map for several labels]")
@click.option("--run", type=click.Path(), help="Where to write.  [default: runs/knn-ID]")
@device_option
@memory_option("Memory for features and similarities.  [default: half of what is free]")
@click.option("--allow-overlap", is_flag=True, help="Go on although two roles share images; the run says how many.")
def knn(train: list[str] | None, val: list[str] | None, test: list[str] | None, **options: Any) -> None:
    """Score k-nearest-neighbour classifiers on cached features.

    Every k, temperature and draw comes from one search. The result is a run like that of train-probes: report, compare
    and verify take it, and the same command goes on after an interruption.
    """
    from featcache.cli.train_probes import print_scores
    from featcache.probes.knn import knn as run

    given = {"train": train, "val": val, "test": test}
    splits = {role: names for role, names in given.items() if names}
    finished = run(splits=splits or None, **options)
    if finished is not None:
        print_scores(finished)
