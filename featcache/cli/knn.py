"""`featcache knn`."""

from collections.abc import Callable
from typing import Any

import click

from featcache.cli.options import device_option, memory_option


def _several(kind: Callable[[str], Any], what: str) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Return a callback that reads values with commas between them."""

    def read(context: click.Context, option: click.Parameter, text: str | None) -> Any:
        try:
            return None if text is None else [kind(part) for part in text.split(",")]
        except ValueError:
            raise click.BadParameter(f"{text!r} is not {what}, or several with commas between them") from None

    return read


@click.command()
@click.option("--store", required=True, type=click.Path(), help="Store with the features.")
@click.option(
    "--features",
    metavar="SPEC,...",
    default="pooled",
    callback=_several(str, "the name of a feature"),
    help="LAYER:REDUCE, each on its own; a map is averaged over its positions.",
)
@click.option(
    "--k",
    metavar="K,...",
    callback=_several(int, "a whole number"),
    help="Neighbours that vote.  [default: by --weights]",
)
@click.option(
    "--temperature",
    metavar="T,...",
    callback=_several(float, "a number"),
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
    callback=_several(int, "a whole number"),
    help="Few-shot: N training images of each class.",
)
@click.option("--tries", type=click.IntRange(min=1), default=1, help="With --shots: draws of each size.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="With --shots: of the first draw.")
@click.option(
    "--leave-one-out", is_flag=True, help="Choose on the training images, each without itself, rather than on val."
)
@click.option("--train", metavar="S,...", help="Splits whose images vote.  [default: train]")
@click.option("--val", metavar="S,...", help="Splits to choose on.  [default: val]")
@click.option("--test", metavar="S,...", help="Splits to score on.  [default: test]")
@click.option("--metric", metavar="NAME", help="To choose by.  [default: top1, or map for several labels]")
@click.option("--run", type=click.Path(), help="Where to write.  [default: runs/grid-ID]")
@device_option
@memory_option("Memory for features and similarities.  [default: half of what is free]")
@click.option("--allow-overlap", is_flag=True, help="Go on although two roles share images; the run says how many.")
def knn(train: str | None, val: str | None, test: str | None, **options: Any) -> None:
    """Score k-nearest-neighbour classifiers on cached features.

    Every k, temperature and draw comes from one search. The result is a run like that of train-probes: report, compare
    and verify take it, and the same command goes on after an interruption.
    """
    from featcache.cli.train_probes import print_scores
    from featcache.probes.knn import knn as run

    given = {"train": train, "val": val, "test": test}
    splits = {role: names.split(",") for role, names in given.items() if names}
    finished = run(splits=splits or None, **options)
    if finished is not None:
        print_scores(finished)
