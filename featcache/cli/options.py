"""Options that several commands share, so that one word means one thing everywhere."""

import click


arch_option = click.option(
    "--arch",
    metavar="NAME",
    help="Architecture: a name, timm:NAME, or package.module:function.  [default: inferred from the checkpoint]",
)
size_option = click.option(
    "--size", type=click.IntRange(min=32), metavar="PIXELS", help="Input side.  [default: the backbone's own]"
)


def backbone_options(required):
    """Add --backbone and --arch."""

    def add(command):
        return click.option(
            "--backbone", required=required, metavar="CKPT", help='Checkpoint file, or "random" with --arch.'
        )(arch_option(command))

    return add


def dataset_options(required):
    """Add --dataset and --root."""

    def add(command):
        command = click.option(
            "--root",
            type=click.Path(),
            metavar="DIR",
            help="Data folder.  [default: $FEATCACHE_DATA/NAME, else data/NAME]",
        )(command)
        return click.option("--dataset", required=required, metavar="NAME", help="voc (2007) or voc2012.")(command)

    return add


device_option = click.option("--device", metavar="DEV", help="cpu, cuda, cuda:1.  [default: cuda if there is one]")


def format_option(name, **settings):
    """Add --format, or --to, of a store."""
    return click.option(name, "format", type=click.Choice(["zarr", "hdf5"]), **settings)


compression_option = click.option(
    "--compression", type=click.Choice(["none", "zstd", "blosc"]), default="none", help="Of a Zarr store."
)
