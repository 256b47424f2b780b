"""Processes that tests start, and ports for them."""

import os
import signal
import socket


def free_port():
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_group(process):
    """kill -9 a process that was started with start_new_session, and all that it started in its session."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
