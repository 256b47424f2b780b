"""`featcache extract`."""

import click

from featcache.cli.options import (
    backbone_options,
    compression_option,
    dataset_options,
    device_option,
    format_option,
    size_option,
)


@click.command()
@backbone_options(required=True)
@dataset_options(required=True)
@click.option("--split", "splits", metavar="S,...", help="Splits.  [default: all that the dataset's protocol needs]")
@click.option(
    "--features",
    metavar="SPEC,...",
    help="LAYER:REDUCE, see featcache layers; a bare REDUCE means the last layer.  "
    "[default: pooled,spatial, and cls if there is a class token]",
)
@click.option("--store", metavar="PATH", help="Folder or URL to write to.  [default: features/DATASET-ARCH-ID.zarr]")
@format_option("--format", help="Of the store.  [default: what the store's suffix says, else zarr]")
@compression_option
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32", "bfloat16"]),
    default="float16",
    help="Of the stored features.",
)
@size_option
@click.option("--batch-size", type=click.IntRange(min=1), default=32, help="Images per forward pass.")
@click.option("--workers", type=click.IntRange(min=0), help="Decoding processes.  [default: half the cores, at most 8]")
@device_option
@click.option("--seed", type=int, default=0, help="Of a random backbone.")
def extract(splits, compression, **options):
    """Run a frozen backbone once over a dataset and write its features to a store.

    The same command again finishes what was interrupted, or says that nothing is left to do. Under
    torchrun, with one process for each GPU, the processes share the work.
    """
    from featcache.extraction.extract import extract as run

    compression = None if compression == "none" else compression
    run(splits=splits.split(",") if splits else None, compression=compression, **options)
