"""`featcache verify`."""

import sys

import click


@click.command()
@click.argument("store")
@click.option("--repair", is_flag=True, help="Drop what is damaged; the same extract again refills just that.")
def verify(store, repair):
    """Check every byte of a STORE (path or URL) against its checksums.

    Exit codes: 0 the store is whole, 1 something is damaged or missing (each on a line), 2 bad input.
    """
    from featcache.store.verify import verify as run

    findings = run(store, repair)
    for finding in findings:
        click.echo(finding)
    if findings:
        damage = f"{len(findings)} finding{'s' if len(findings) > 1 else ''} in {store}"
        advice = "run the same extract again to refill it" if repair else "--repair drops what is damaged"
        click.echo(f"{damage}; {advice}", err=True)
        sys.exit(1)
    click.echo(f"{store} is whole")
