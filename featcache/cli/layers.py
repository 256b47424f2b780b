"""`featcache layers`."""

from typing import Any

import click

from featcache.cli.options import arch_option, size_option, weights_key_option
from featcache.progress import say


@click.command()
@click.argument("checkpoint", metavar="CKPT")
@arch_option
@weights_key_option
@size_option
def layers(checkpoint: str, **options: Any) -> None:
    """List the layers of a checkpoint's network: path, aliases, shape, allowed reductions.

    CKPT is a checkpoint, or "random" with --arch. A feature is LAYER:REDUCE, with a path or an alias for LAYER. Modules
    that yield no tensor of images are left out.
    """
    from featcache.backbones.layers import layers as run
    from featcache.backbones.load import load_backbone
    from featcache.reporting.table import format_table

    backbone = load_backbone(checkpoint, **options)
    say(f"backbone: {backbone.load_report}\n")
    rows = [
        (layer.path, " ".join(layer.aliases), " x ".join(map(str, layer.shape)), " ".join(layer.reductions))
        for layer in run(backbone)
    ]
    size = backbone.preprocessing.size
    click.echo(format_table(("layer", "aliases", f"shape at {size} x {size}", "reductions"), rows))
