"""The command line: parse, call, print. Commands import what is heavy only when they run."""

import os
import signal
import sys
import traceback

import click

import featcache
from featcache.cli.attribute import attribute
from featcache.cli.compare import compare
from featcache.cli.convert import convert
from featcache.cli.demo import demo
from featcache.cli.export import export
from featcache.cli.extract import extract
from featcache.cli.faults import explain, scarcity
from featcache.cli.import_probes import import_probes
from featcache.cli.inspect import inspect
from featcache.cli.layers import layers
from featcache.cli.report import report
from featcache.cli.streams import drop_output, output_is_broken, prepare_streams
from featcache.cli.train_probes import train_probes
from featcache.cli.verify import verify
from featcache.errors import BadInput, one_line

BAD_INPUT, BUG, INTERRUPTED, BROKEN_PIPE = 2, 70, 130, 141


def _note(context, _option, debug):
    """Note what main() has to know of a command that fails."""
    noted = context.find_root().ensure_object(dict)
    noted["debug"] = noted.get("debug", False) or debug
    noted["options"] = {option.name for option in context.command.params}


debug_option = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_note,
    envvar="FEATCACHE_DEBUG",
    help="Show the traceback of an error too.",
)


@click.group(context_settings={"show_default": True})
@click.version_option(featcache.__version__)
@debug_option
def cli():
    """Extract frozen features once; train, score and explain whole grids of probes on them.

    Exit codes: 0 done, 1 verify or inspect --dataset found damage, 2 bad input or a fault of the machine, such as a
    full disk (one clear line), 70 a bug in featcache, 130 interrupted, 141 the reader of a pipe has gone.
    """


for command in (
    demo, layers, extract, inspect, verify, convert, train_probes, compare, attribute, report, export, import_probes,
):  # fmt: skip
    cli.add_command(debug_option(command))


def main():
    """Run the command line and exit. Whatever goes wrong is one line, and its traceback is for --debug."""
    prepare_streams()
    # A scheduler's SIGTERM ends like Ctrl-C does: worker processes are stopped, and what is begun stays whole.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    noted = {"debug": False, "options": ()}
    try:
        code = run(sys.argv[1:], noted)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = _ended(error, noted)
    sys.exit(code)


def run(words, noted):
    """Run a command by its words; return its exit code, or raise what it raises.

    Not by click's own main(), which ends with 1 where a pipe is broken. noted: see _note.
    """
    if "_FEATCACHE_COMPLETE" in os.environ:
        # The shell asks how a word may go on.
        cli.main(prog_name="featcache")
    try:
        with cli.make_context("featcache", list(words), obj=noted) as context:
            cli.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0


def _ended(error, noted):
    """Say in one line how a command ended; return its exit code."""
    if isinstance(error, BrokenPipeError) and output_is_broken():
        # The reader of a pipe, such as head, has seen enough.
        drop_output()
        return BROKEN_PIPE
    if noted["debug"]:
        traceback.print_exception(error)
    # Where Ctrl-C meets an import, the import fails.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        click.echo("interrupted", err=True)
        return INTERRUPTED
    line = scarcity(error, noted["options"])
    if line is None and isinstance(error, click.ClickException):
        usage = isinstance(error, click.UsageError) and error.ctx
        if usage:
            click.echo(f"{usage.get_usage()}\nTry '{usage.command_path} --help' for help.\n", err=True)
        # One line each, where there are several.
        said = error.message if isinstance(error, BadInput) else one_line(error.format_message())
        return _say(said, error.exit_code)
    line = line or explain(error)
    if line is not None:
        drop_output()
        return _say(one_line(line), BAD_INPUT)
    ours = [f for f in traceback.extract_tb(error.__traceback__) if os.path.dirname(featcache.__file__) in f.filename]
    where = "".join(f" in {os.path.basename(frame.filename)}, line {frame.lineno}" for frame in ours[-1:])
    return _say(
        one_line(
            f"{type(error).__name__}{where}: {error}; this is a bug in featcache {featcache.__version__}: please report it, "
            "with the command and all that it says with --debug"
        ),
        BUG,
    )


def _say(line, code):
    """Say what went wrong, once where all processes of torchrun find the same; return the exit code."""
    # Only what has met the others has imported this, and can ask them.
    ranks = sys.modules.get("featcache.ranks")
    if ranks is None or ranks.first_to_say(line):
        click.echo(f"Error: {line}", err=True)
    return code
