"""Options that several commands share, so that one word means one thing everywhere."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from featcache.arguments import MOST_SIDE

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Command], Command]
Callback = Callable[[click.Context, click.Parameter, str | None], Any]


def parts(text: str) -> list[str]:
    """Return what stands between the commas of a text, without blanks around it. Commas in brackets belong to a part."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text)]


def several(kind: Callable[[str], Any], what: str) -> Callback:
    """Return the callback of an option that takes values with commas between them: a list of them, or None without.

    kind: makes a value of its text, or raises ValueError. what: one value in words, such as `a number`.
    """

    def read(_context: click.Context, _option: click.Parameter, text: str | None) -> Any:
        try:
            return [kind(part) for part in parts(text)] if text else None
        except ValueError:
            raise click.BadParameter(f"{text!r} is not {what}, or several with commas between them") from None

    return read


def name(text: str) -> str:
    """Return a name as it is. Raises ValueError if it is empty."""
    if not text:
        raise ValueError("empty")
    return text


arch_option = click.option(
    "--arch",
    metavar="NAME",
    help="Architecture: a name, timm:NAME, hf:FOLDER_OR_NAME, or package.module:function.  [default: inferred from the checkpoint]",
)
weights_key_option = click.option(
    "--weights-key",
    metavar="KEY",
    help="Which encoder of a checkpoint that holds several, such as teacher.  [default: by the method's rule]",
)
size_option = click.option(
    "--size", type=click.IntRange(32, MOST_SIDE), metavar="PIXELS", help="Input side.  [default: the backbone's own]"
)


def backbone_options(required: bool, several: bool = False) -> Option:
    """Add --backbone, or --backbone several times as `backbones`, and --arch and --weights-key."""
    one = {"metavar": "CKPT", "help": 'Checkpoint file, or "random" with --arch.'}
    more = {
        "metavar": "CKPT",
        "multiple": True,
        "help": 'Checkpoint file, pattern such as "ckpts/*.pth", or text file (.txt) with a path on each line; may be '
        'repeated. Or "random" with --arch.',
    }

    def add(command: Command) -> Command:
        command = weights_key_option(arch_option(command))
        names = ("--backbone", "backbones") if several else ("--backbone",)
        return click.option(*names, required=required, **(more if several else one))(command)

    return add


def dataset_options(required: bool) -> Option:
    """Add --dataset and --root."""

    def add(command: Command) -> Command:
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
            help="voc (2007), voc2012, coco (2014), coco2017, imagenet, imagenet100, places205, inaturalist2018, cifar10, cifar100, "
            "stl10, lists, folder, manifest (--root is the file), huggingface or webdataset.",
        )(command)

    return add


def _three_numbers(context: click.Context, option: click.Parameter, text: str | None) -> Any:
    """Read R,G,B as numbers; Preprocessing checks that there are three."""
    try:
        return text and tuple(map(float, parts(text)))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not three numbers R,G,B") from None


def preprocessing_options(command: Command) -> Command:
    """Add --size, --resize, --short-side, --interpolation, --mean and --std."""
    options = (
        click.option(
            "--size",
            type=click.IntRange(32, MOST_SIDE),
            metavar="PIXELS",
            help="Input side.  [default: the dataset's protocol, else the backbone's own]",
        ),
        click.option(
            "--resize",
            metavar="RULE",
            help="squash, crop (short side, then centre crop), warp (short side, then squash) or own (the weights').  "
            "[default: the dataset's protocol]",
        ),
        click.option(
            "--short-side",
            type=click.IntRange(1, MOST_SIDE),
            metavar="PIXELS",
            help="Of crop and warp.  [default: the backbone's for crop, size * 256 / 224 for warp]",
        ),
        click.option(
            "--interpolation",
            metavar="NAME",
            help="bilinear, bicubic, or opencv_bilinear (not anti-aliased; extra opencv).  [default: the backbone's]",
        ),
        click.option(
            "--mean", metavar="R,G,B", callback=_three_numbers, help="For pixels in 0..1.  [default: the backbone's]"
        ),
        click.option(
            "--std", metavar="R,G,B", callback=_three_numbers, help="For pixels in 0..1.  [default: the backbone's]"
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


split_option = click.option(
    "--split",
    "splits",
    metavar="S,...",
    callback=several(name, "the name of a split"),
    help="Splits.  [default: all that the dataset's protocol needs]",
)


def memory_option(help: str) -> Option:
    """Add --memory, which is in GB and reaches the command in bytes."""
    return click.option(
        "--memory",
        type=click.FloatRange(min=0, min_open=True),
        metavar="GB",
        callback=lambda _context, _option, value: None if value is None else value * 1e9,
        help=help,
    )


def features_option(help: str, **settings: Any) -> Option:
    """Add --features of a command that reads each feature on its own."""
    names = several(name, "the name of a feature")
    return click.option("--features", metavar="SPEC,...", callback=names, help=help, **settings)


def splits_option(flag: str, help: str) -> Option:
    """Add an option for the splits that play a role, such as --train."""
    return click.option(flag, metavar="S,...", callback=several(name, "the name of a split"), help=help)


device_option = click.option("--device", metavar="DEV", help="cpu, cuda, cuda:1.  [default: cuda if there is one]")


def format_option(name: str, **settings: Any) -> Option:
    """Add --format, or --to, of a store."""
    return click.option(name, "format", type=click.Choice(["zarr", "hdf5"]), **settings)


compression_option = click.option(
    "--compression",
    type=click.Choice(["none", "zstd", "blosc"]),
    default="none",
    callback=lambda _context, _option, value: None if value == "none" else value,
    help="Of a Zarr store.",
)
