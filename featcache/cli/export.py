"""`featcache export`."""

from typing import Any

import click

from featcache.cli.options import backbone_options


@click.command()
@click.argument("checkpoints", nargs=-1, metavar="[CKPT]...")
@click.option("--to", required=True, metavar="FILE", help="Its suffix says the format; or a folder, for several CKPT.")
@click.option("--run", type=click.Path(), help="Folder of a finished run: export one of its probes.")
@click.option("--probe", metavar="ID", help="The probe.")
@click.option("--select", "rule", metavar="RULE", help="Or a rule that selects one: best METRIC.")
@backbone_options(required=False)
def export(**options: Any) -> None:
    """Write backbones, or a probe merged with its backbone, for programs that know nothing of featcache.

    \b
    featcache export CKPT --to backbone.safetensors
    featcache export A.pth B.pth --to FOLDER/
    featcache export --run RUN --probe ID --backbone CKPT --to merged.pt2

    .safetensors, .pth and .pt hold a state dict. .pt2 is a program, from normalised images to logits.
    """
    from featcache.exchange.export import export as run

    run(**options)
