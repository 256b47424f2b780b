"""`featcache inspect`."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from featcache.cli.options import dataset_options, split_option
from featcache.errors import BadInput
from featcache.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from featcache.store.reader import Store

# More classes than this are summed up rather than listed.
LISTED_CLASSES = 100
# Of images that are in two splits only so many are listed, and the rest are counted. All damaged ones are listed.
LISTED_LEAKS = 20


@click.command()
@click.argument("store", required=False)
@dataset_options(required=False)
@split_option
def inspect(store: str | None, dataset: str | None, root: str | None, splits: list[str] | None) -> None:
    """Show what a STORE (path or URL) holds, or with --dataset what a dataset on disk does.

    Of a store: identity, shapes, sizes, classes, and feature statistics; these come last, since they
    read every byte. Of a dataset: images, boxes, sizes and classes of each split; every image is
    decoded, and compared with all others. Exit code 1 if one is damaged or an id comes twice.
    """
    if (store is None) == (dataset is None):
        raise BadInput("give either a STORE or --dataset NAME, not both")
    if dataset is not None:
        _show_dataset(dataset, root, splits)
    elif root or splits:
        raise BadInput("--root and --split go with --dataset, not with a STORE")
    elif store is not None:
        _show_store(store)


def _show_store(store: str) -> None:
    """Print what a store holds."""
    from featcache.reporting.table import format_table
    from featcache.store.inspect import describe

    opened, shards = describe(store)
    manifest = opened.manifest
    for words in _identity_rows(manifest.identity):
        click.echo(": ".join(words))
    storage = f"{manifest.storage['format']}, compression {manifest.storage['compression'] or 'none'}"
    compute = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in manifest.compute.items() if v is not None)
    click.echo(f"id: {opened.id}\nstorage: {storage}\ncompute: {compute}")
    for line in _growth(opened):
        click.echo(line)
    click.echo()
    counts = [(s, str(len(opened[s])), f"{done} of {total}") for s, (done, total) in shards.items()]
    click.echo(format_table(("split", "rows", "shards"), counts) + "\n")
    sizes = [
        (
            name,
            " x ".join(map(str, spec["shape"])),
            spec["dtype"],
            split,
            f"{len(opened[split]) * manifest.row_bytes(name) / 1e6:.1f} MB",
        )
        for name, spec in manifest.features.items()
        for split in manifest.splits
    ]
    click.echo(format_table(("feature", "row", "dtype", "split", "size"), sizes) + "\n")
    labels = {split: opened[split].labels for split in opened.splits}
    click.echo(format_table(*_class_rows(opened.classes, labels)) + "\n")
    whole = [split for split, (done, total) in shards.items() if done == total]
    for split in manifest.splits:
        if split not in whole:
            click.echo(f"split {split} is not whole: the same extract again finishes it")
    columns = ("feature", "split", "mean", "std", "zeros %", "max |x|", "not finite")
    click.echo(format_table(columns, _statistics_rows(opened, whole)))


def _growth(store: "Store") -> Iterator[str]:
    """Yield lines about what was added to a store, and what is being added."""
    from featcache.store.additions import find_additions
    from featcache.store.inspect import count_shards

    for part in store.parts[1:]:
        yield f"added: {', '.join(part.features)} of {', '.join(part.splits)}"
    if len(store.parts) > 1:
        yield f"earlier ids: {', '.join(store.ids[:-1])}"
    for addition in find_additions(store.folder):
        if addition.after is None:
            counts = count_shards(store.folder, [addition]).values()
            done, total = (sum(numbers) for numbers in zip(*counts, strict=True))
            yield (
                f"being added: {', '.join(addition.features)} of {', '.join(addition.splits)} ({done} of {total} shards); "
                "the same extract again finishes it"
            )


def _statistics_rows(store: "Store", splits: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a row for each feature and split; reads every byte."""
    from featcache.store.inspect import statistics

    arrays = [(split, name, store[split][name]) for name in store.manifest.features for split in splits]
    rows: list[tuple[str, ...]] = []
    size = sum(array.nbytes for _, _, array in arrays)
    with Progress("statistics", size, unit="B", fleeting=True) as progress:
        for split, name, array in arrays:
            s = statistics(array, progress)
            figures = (f"{s.mean:.4g}", f"{s.std:.4g}", f"{100 * s.zeros:.1f}", f"{s.peak:.4g}", str(s.not_finite))
            rows.append((name, split, *figures))
    return rows


def _identity_rows(identity: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) of the fields of an identity."""
    for key, value in identity.items():
        if isinstance(value, dict):
            yield from _identity_rows(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _show_dataset(name: str, root: str | None, splits: list[str] | None) -> None:
    """Print what a dataset on disk holds. Exits with 1 if an image is damaged or an id comes twice."""
    from featcache.datasets.class_counts import describe_classes
    from featcache.datasets.inspect import inspect_dataset
    from featcache.reporting.table import format_table

    inspection = inspect_dataset(name, root, splits)
    data = inspection.dataset
    click.echo("\n".join(describe_classes(data)) + "\n")
    counts = ("images", "boxes", "difficult", "crowd", "overhanging", "masks", "copies")
    rows = [(split, *(str(getattr(s, count)) for count in counts)) for split, s in inspection.splits.items()]
    click.echo(format_table(("split", *counts), rows) + "\n")
    rows = [
        (split, side, str(values.min()), f"{sorted(values)[len(values) // 2]}", str(values.max()))
        for split, s in inspection.splits.items()
        if len(s.sizes)
        for side, values in zip(("height", "width"), s.sizes.T, strict=True)
    ]
    click.echo(format_table(("split", "side", "min", "median", "max"), rows) + "\n")
    labels = {split: data.labels(split) for split in data.splits}
    click.echo(format_table(*_class_rows(data.classes, labels)))
    for (one, first), (other, second) in inspection.leaks[:LISTED_LEAKS]:
        click.echo(f"leak: {one} {first} has the same bytes as {other} {second}")
    if len(inspection.leaks) > LISTED_LEAKS:
        click.echo(f"leak: {len(inspection.leaks) - LISTED_LEAKS} more images are in two splits")
    for split, s in inspection.splits.items():
        for image_id in s.repeated_ids:
            click.echo(f"{split}: id {image_id} comes twice")
        for image_id, reason in s.bad:
            click.echo(f"{split} {image_id}: {reason}")
    if inspection.damaged:
        sys.exit(1)


def _class_rows(classes: Sequence[str], labels: Mapping[str, "np.ndarray"]) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows): a row for each class, or if there are very many the rarest, median and commonest."""
    from featcache.datasets.class_counts import count_classes

    counts = {split: count_classes(values, len(classes)) for split, values in labels.items()}
    difficult = any(hard.any() for _, hard in counts.values())
    columns = ["class", *counts, *(f"{split} difficult" for split in counts if difficult)]
    rows = [
        [name, *(str(p[n]) for p, _ in counts.values()), *(str(h[n]) for _, h in counts.values() if difficult)]
        for n, name in enumerate(classes)
    ]
    if len(rows) <= LISTED_CLASSES:
        return columns, rows
    order = next(iter(counts.values()))[0].argsort(kind="stable")
    picked = {"rarest": order[0], "median": order[len(order) // 2], "commonest": order[-1]}
    return columns, [[f"{word} of {len(rows)}: {rows[n][0]}", *rows[n][1:]] for word, n in picked.items()]
