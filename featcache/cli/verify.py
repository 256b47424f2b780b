"""`featcache verify`."""

import sys

import click


@click.command()
@click.argument("path", metavar="STORE|RUN")
@click.option("--repair", is_flag=True, help="Drop what is damaged; the same command again makes just that anew.")
def verify(path: str, repair: bool) -> None:
    """Check every byte of a STORE (path or URL), or of a RUN folder, against its checksums.

    Exit codes: 0 it is whole, 1 something is damaged or missing (each on a line), 2 bad input.
    """
    from featcache.probes.runs.verify import is_run
    from featcache.probes.runs.verify import verify as run

    findings = run(path, repair)
    for finding in findings:
        click.echo(finding)
    if findings:
        damage = f"{len(findings)} finding{'s' if len(findings) > 1 else ''} in {path}"
        command = "train-probes, and attribute if maps are damaged," if is_run(path) else "extract"
        advice = f"run the same {command} again to make it anew" if repair else "--repair drops what is damaged"
        click.echo(f"{damage}; {advice}", err=True)
        sys.exit(1)
    click.echo(f"{path} is whole")
