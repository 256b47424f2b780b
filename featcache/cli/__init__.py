"""The command line: parse, call, print. Commands import what is heavy only when they run."""

import signal
import sys

import click

import featcache
from featcache.cli.attribute import attribute
from featcache.cli.compare import compare
from featcache.cli.convert import convert
from featcache.cli.demo import demo
from featcache.cli.export import export
from featcache.cli.extract import extract
from featcache.cli.import_probes import import_probes
from featcache.cli.inspect import inspect
from featcache.cli.layers import layers
from featcache.cli.report import report
from featcache.cli.train_probes import train_probes
from featcache.cli.verify import verify


@click.group(context_settings={"show_default": True})
@click.version_option(featcache.__version__)
def cli():
    """Extract frozen features once; train, score and explain whole grids of probes on them.

    Exit codes: 0 done, 1 verify or inspect --dataset found damage, 2 bad input (one clear line), 130 interrupted.
    """


for command in (
    demo, layers, extract, inspect, verify, convert, train_probes, compare, attribute, report, export, import_probes,
):  # fmt: skip
    cli.add_command(command)


def main():
    """Run the command line and exit."""
    # A scheduler's SIGTERM ends like Ctrl-C does: worker processes are stopped, and what is begun stays whole.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        cli.main(prog_name="featcache", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe, such as head, has seen enough.
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        # A full disk, a folder without permission: nothing of ours, so the path and the system's word.
        click.echo(f"Error: {error.filename or 'input or output'}: {error.strerror or error}", err=True)
        sys.exit(2)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except RuntimeError as error:
        # By name, for torch is only there where a command needed it.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        said = str(error).split(". ")
        click.echo(f"Error: {'. '.join(said[:2])}; take smaller batches, less --memory, or --device cpu", err=True)
        sys.exit(2)
