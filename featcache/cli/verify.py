"""`featcache verify`."""

import sys

import click


@click.command()
@click.argument("path")
@click.option(
    "--repair", is_flag=True, help="Drop what is damaged; the command that made it, run again, makes just that anew."
)
def verify(path, repair):
    """Check every byte of a store (path or URL) or of a run folder against its checksums.

    Exit codes: 0 it is whole, 1 something is damaged or missing (each on a line), 2 bad input.
    """
    from featcache.probes.verify import is_run
    from featcache.probes.verify import verify as run

    made_by_training = is_run(path)
    findings = run(path, repair)
    for finding in findings:
        click.echo(finding)
    if findings:
        damage = f"{len(findings)} finding{'s' if len(findings) > 1 else ''} in {path}"
        again = "the same train-probes or attribute" if made_by_training else "the same extract"
        advice = f"run {again} again to refill it" if repair else "--repair drops what is damaged"
        click.echo(f"{damage}; {advice}", err=True)
        sys.exit(1)
    click.echo(f"{path} is whole")
