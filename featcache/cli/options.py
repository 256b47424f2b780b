"""Options that several commands share, so that one word means one thing everywhere."""

import click


def backbone_options(required):
    """Add --backbone, --arch and --weights-key."""

    def add(command):
        command = click.option(
            "--weights-key",
            metavar="KEY",
            help="Which encoder of a checkpoint that holds several, such as teacher.  [default: by the method's rule]",
        )(command)
        command = click.option("--arch", metavar="NAME", help="Architecture.  [default: inferred from the checkpoint]")(
            command
        )
        return click.option(
            "--backbone", required=required, metavar="CKPT", help='Checkpoint file, or "random" with --arch.'
        )(command)

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
        return click.option(
            "--dataset",
            required=required,
            metavar="NAME",
            help="voc (2007), voc2012, coco (2014), coco2017, imagenet, places205, inaturalist2018, cifar10, cifar100, "
            "stl10, folder, manifest (--root is the file), huggingface or webdataset.",
        )(command)

    return add


split_option = click.option(
    "--split",
    "splits",
    metavar="S,...",
    callback=lambda _context, _option, value: value.split(",") if value else None,
    help="Splits.  [default: all that the dataset's protocol needs]",
)

device_option = click.option("--device", metavar="DEV", help="cpu, cuda, cuda:1.  [default: cuda if there is one]")


def format_option(name, **settings):
    """Add --format, or --to, of a store."""
    return click.option(name, "format", type=click.Choice(["zarr", "hdf5"]), **settings)


compression_option = click.option(
    "--compression", type=click.Choice(["none", "zstd", "blosc"]), default="none", help="Of a Zarr store."
)
