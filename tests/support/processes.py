"""Processes that tests start, and ports for them."""

import os
import signal
import socket
import subprocess
import sys

# The real program, which writes its states after every epoch.
STEP = (
    "import featcache.probes.engine.sweep as s; s.SAVE_SECONDS = 0; s.TELL_SECONDS = 0.05; "
    "from featcache.cli import main; main()"
)


def start_training(grid, store, run, *more, code=STEP):
    """The command train-probes in a process of its own."""
    words = ["train-probes", "--grid", grid, "--store", store, "--run", run, *more]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def free_port():
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_group(process):
    """kill -9 a process that was started with start_new_session, and all that it started in its session."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
