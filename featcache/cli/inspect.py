"""`featcache inspect`."""

import click
from tqdm import tqdm

# More classes than this are summed up rather than listed.
LISTED_CLASSES = 100


@click.command()
@click.argument("store")
def inspect(store):
    """Show what a STORE (path or URL) holds: identity, shapes, sizes, classes, and feature statistics.

    The statistics come last, since they read every byte.
    """
    from featcache.reporting.table import format_table
    from featcache.store.inspect import class_counts, describe, statistics

    opened, shards = describe(store)
    manifest = opened.manifest
    for words in _identity_rows(manifest.identity):
        click.echo(": ".join(words))
    storage = f"{manifest.storage['format']}, compression {manifest.storage['compression'] or 'none'}"
    compute = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in manifest.compute.items() if v is not None)
    click.echo(f"id: {opened.id}\nstorage: {storage}\ncompute: {compute}\n")
    rows = [(s, str(len(opened[s])), f"{there} of {total}") for s, (there, total) in shards.items()]
    click.echo(format_table(("split", "rows", "shards"), rows) + "\n")
    rows = [
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
    click.echo(format_table(("feature", "row", "dtype", "split", "size"), rows) + "\n")
    counts = {split: class_counts(opened[split]) for split in opened.splits}
    click.echo(format_table(*_class_rows(opened, counts)) + "\n")
    whole = [split for split, (there, total) in shards.items() if there == total]
    for split in manifest.splits:
        if split not in whole:
            click.echo(f"split {split} is not whole: the same extract again finishes it")
    arrays = [(split, name, opened[split][name]) for name in manifest.features for split in whole]
    rows = []
    size = sum(array.nbytes for _, _, array in arrays)
    with tqdm(total=size, unit="B", unit_scale=True, desc="statistics", leave=False) as progress:
        for split, name, array in arrays:
            s = statistics(array, progress)
            figures = (f"{s.mean:.4g}", f"{s.std:.4g}", f"{100 * s.zeros:.1f}", f"{s.peak:.4g}", str(s.not_finite))
            rows.append((name, split, *figures))
    click.echo(format_table(("feature", "split", "mean", "std", "zeros %", "max |x|", "not finite"), rows))


def _identity_rows(identity, prefix=""):
    for key, value in identity.items():
        if isinstance(value, dict):
            yield from _identity_rows(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _class_rows(store, counts):
    """Columns and rows: a row for each class, or the rarest, median and commonest of very many."""
    difficult = any(hard.any() for _, hard in counts.values())
    columns = ["class", *counts, *(f"{split} difficult" for split in counts if difficult)]
    rows = [
        [name, *(str(p[n]) for p, _ in counts.values()), *(str(h[n]) for _, h in counts.values() if difficult)]
        for n, name in enumerate(store.classes)
    ]
    if len(rows) <= LISTED_CLASSES:
        return columns, rows
    order = next(iter(counts.values()))[0].argsort(kind="stable")
    picked = {"rarest": order[0], "median": order[len(order) // 2], "commonest": order[-1]}
    return columns, [[f"{word} of {len(rows)}: {rows[n][0]}", *rows[n][1:]] for word, n in picked.items()]
