"""`featcache extract`."""

from typing import Any

import click

from featcache.arguments import MOST_WORKERS
from featcache.cli.options import (
    Command,
    Option,
    backbone_options,
    compression_option,
    dataset_options,
    device_option,
    format_option,
    parts,
    preprocessing_options,
    split_option,
)


def _two_numbers(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[float, float] | None:
    """Read LO,HI as numbers."""
    try:
        low, high = map(float, parts(text)) if text is not None else (None, None)
    except ValueError:
        raise click.UsageError(f"--crop-scale {text!r}: expected two numbers, as in 0.08,1") from None
    return None if low is None or high is None else (low, high)


EXTRACTION: tuple[Option, ...] = (
    backbone_options(required=True, several=True),
    dataset_options(required=True),
    split_option,
    click.option(
        "--features",
        metavar="SPEC,...",
        help="LAYER:REDUCE, see featcache layers; a bare REDUCE means the last layer.  "
        "[default: pooled,spatial, and cls if there is a class token]",
    ),
    click.option(
        "--store",
        metavar="PATH",
        help="Folder or URL to write to; of several backbones, the folder for their stores.  "
        "[default: features/DATASET-ARCH-ID.zarr]",
    ),
    format_option("--format", help="Of the store.  [default: what the store's suffix says, else zarr]"),
    compression_option,
    click.option(
        "--dtype",
        type=click.Choice(["float16", "float32", "bfloat16"]),
        default="float16",
        help="Of the stored features.",
    ),
    preprocessing_options,
    click.option(
        "--precision",
        default="float32",
        metavar="NAME",
        help="The network's arithmetic: float32, tf32, bf16 or fp16.",
    ),
    click.option("--batch-size", type=click.IntRange(min=1), default=32, help="Images per forward pass."),
    click.option(
        "--workers",
        type=click.IntRange(0, MOST_WORKERS),
        help="Decoding processes.  [default: half the cores, at most 8]",
    ),
    device_option,
    click.option(
        "--views",
        type=click.IntRange(min=0),
        default=0,
        metavar="K",
        help="Augmented views of every training image to add.",
    ),
    click.option(
        "--crop-scale",
        metavar="LO,HI",
        help="Share of the image in the views' crops.  [default: the dataset's protocol]",
        callback=_two_numbers,
    ),
    click.option(
        "--decoder",
        type=click.Choice(["exact", "draft"]),
        default="exact",
        help="draft: quicker on large JPEGs, not exact.",
    ),
)


def extraction_options(command: Command) -> Command:
    """Add the options of extract that say what is extracted, and how, but not --masks and --seed."""
    for option in reversed(EXTRACTION):
        command = option(command)
    return command


def masks_options(command: Command) -> Command:
    """Add --masks, --limit and --seed."""
    options = (
        click.option(
            "--masks",
            metavar="KIND:N",
            help="Write the features of N masked variants of every image that has a box, for attribute, to a store of "
            "their own: rise:2000, lime:1000, kernel_shap:1000 or occlusion, with fields as in rise:2000:cells=7. Needs "
            "--split.",
        ),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            metavar="N",
            help="With --masks: only the first N images that have a box.",
        ),
        click.option("--seed", type=int, default=0, help="Of a random backbone, and of views."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@extraction_options
@masks_options
def extract(backbones: tuple[str, ...], **options: Any) -> None:
    """Run a frozen backbone once over a dataset and write its features to a store.

    Of several backbones, those that see images alike share the decoding, and each has a store of its own. The same
    command again finishes what was interrupted, or says that nothing is left to do. Under torchrun, with one process for
    each GPU, the processes share the work.
    """
    from featcache.extraction.checkpoint_files import names_several
    from featcache.extraction.extract import extract as run
    from featcache.extraction.extract import extract_many

    if names_several(backbones):
        extract_many(backbones, **options)
    else:
        run(backbones[0], **options)
