"""`featcache convert`."""

from typing import Any

import click

from featcache.cli.options import compression_option, format_option


@click.command()
@click.argument("store")
@format_option("--to", help="Format of the new store.  [default: what the suffix of --out says]")
@click.option("--out", metavar="PATH", help="Folder or URL.  [default: beside STORE, with the format's suffix]")
@compression_option
def convert(store: str, **options: Any) -> None:
    """Write a STORE (path or URL) in another format, compressed, or to another place.

    Every row is checked against its checksum on the way out and in. The same command again goes on.
    """
    from featcache.store.convert import convert as run

    run(store, **options)
