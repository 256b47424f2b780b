"""The command line: parse, call, print. Commands import heavy modules only when they run."""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

import featcache
from featcache.cli.attribute import attribute
from featcache.cli.compare import compare
from featcache.cli.convert import convert
from featcache.cli.demo import demo
from featcache.cli.export import export
from featcache.cli.extract import extract
from featcache.cli.faults import explain, scarcity
from featcache.cli.finetune import finetune
from featcache.cli.import_probes import import_probes
from featcache.cli.inspect import inspect
from featcache.cli.knn import knn
from featcache.cli.layers import layers
from featcache.cli.options import Command
from featcache.cli.plan import plan
from featcache.cli.report import report
from featcache.cli.schema import schema
from featcache.cli.streams import drop_output, output_is_broken, prepare_streams
from featcache.cli.svm import svm
from featcache.cli.sweep import sweep
from featcache.cli.train_probes import train_probes
from featcache.cli.verify import verify
from featcache.errors import BadInput, one_line
from featcache.progress import VARIABLE, choose, choosing, mode

BAD_INPUT, BUG, INTERRUPTED, BROKEN_PIPE = 2, 70, 130, 141


def _note(context: click.Context, _option: click.Parameter, debug: bool) -> None:
    """Note what main() has to know about the command if it fails."""
    noted: dict[str, Any] = context.find_root().ensure_object(dict)
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


def _tell(context: click.Context, option: click.Parameter, given: bool) -> None:
    """Choose how progress is told. Raises UsageError for two ways at once."""
    if not given:
        return
    noted: dict[str, Any] = context.find_root().ensure_object(dict)
    if noted.setdefault("progress", option.name) != option.name:
        raise click.UsageError("--json and --quiet exclude each other")
    choose(str(option.name))


def common_options(command: Command) -> Command:
    """Add the options that stand before or after any command: --json, --quiet and --debug."""
    telling: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _tell}
    command = click.option("--json", **telling, help="Write progress and notices as JSON, an object on each line.")(
        command
    )
    quiet = f"No progress and no notices; warnings and errors alone. The environment's {VARIABLE} can say both too."
    return debug_option(click.option("--quiet", **telling, help=quiet)(command))


@click.group(context_settings={"show_default": True})
@click.version_option(featcache.__version__)
@common_options
def cli() -> None:
    """Extract frozen features once; train, score and explain whole grids of probes on them.

    Exit codes: 0 done, 1 verify or inspect --dataset found damage, 2 bad input or a fault of the machine, such as a
    full disk (one clear line), 70 a bug in featcache, 130 interrupted, 141 the reader of a pipe has gone.
    """


for command in (
    demo, layers, plan, extract, inspect, verify, convert, train_probes, sweep, knn, svm, finetune, compare, attribute, report, export,
    import_probes, schema,
):  # fmt: skip
    cli.add_command(common_options(command))


def main() -> None:
    """Run the command line and exit. Whatever goes wrong is said in one line; --debug shows the traceback too."""
    prepare_streams()
    # A scheduler's SIGTERM ends like Ctrl-C does: worker processes are stopped, and what is begun stays whole.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    noted: dict[str, Any] = {"debug": False, "options": ()}
    try:
        code = run(sys.argv[1:], noted)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = _ended(error, noted)
    sys.exit(code)


def run(words: Sequence[str], noted: dict[str, Any]) -> int:
    """Run a command by its words; return its exit code, or raise what it raises.

    click's own main() would end with 1 at a broken pipe. noted: what main() has to know if the command fails.
    """
    if "_FEATCACHE_COMPLETE" in os.environ:
        # The shell asks for completions of a word.
        cli.main(prog_name="featcache")
    try:
        with choosing(), cli.make_context("featcache", list(words), obj=noted) as context:
            # The environment is checked before anything is done.
            mode()
            cli.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0


def _ended(error: BaseException, noted: dict[str, Any]) -> int:
    """Say in one line why a command ended; return its exit code."""
    if isinstance(error, BrokenPipeError) and output_is_broken():
        # The reader of a pipe, such as head, has seen enough.
        drop_output()
        return BROKEN_PIPE
    if noted["debug"]:
        traceback.print_exception(error)
    # An import that Ctrl-C interrupts fails with another exception, which Ctrl-C is the cause or context of.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        click.echo("interrupted", err=True)
        return INTERRUPTED
    line = scarcity(error, noted["options"])
    if line is None and isinstance(error, click.ClickException):
        usage = isinstance(error, click.UsageError) and error.ctx
        if usage:
            click.echo(f"{usage.get_usage()}\nTry '{usage.command_path} --help' for help.\n", err=True)
        # A BadInput may have several lines.
        text = error.message if isinstance(error, BadInput) else one_line(error.format_message())
        return _say(text, error.exit_code)
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


def _say(line: str, code: int) -> int:
    """Say what went wrong, only once if all processes of torchrun find the same; return the exit code."""
    # Only a process that has imported this has met the others, and can ask them.
    ranks = sys.modules.get("featcache.ranks")
    if ranks is None or ranks.first_to_say(line):
        click.echo(f"Error: {line}", err=True)
    return code
