"""`featcache schema`."""

import json

import click


@click.command()
def schema() -> None:
    """Print the JSON schema of grids, which gives editors completion and checking.

    It holds the heads, losses and other kinds of the packages that are installed here:
    featcache schema > grid.schema.json
    """
    from featcache.probes.grids.schema import schema as grid_schema

    click.echo(json.dumps(grid_schema(), indent=1))
