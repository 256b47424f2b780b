"""A process that dies, or gets an error, at the Nth thing that it does to the file system below a folder."""

import os
import signal
import sys
import traceback

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")
# What in_child returns if the fault was never reached.
NOT_REACHED = 3


def in_child(work, path, nth, mode, refusals=()):
    """Do work(path) in a child, which meets its fault at the nth operation below path; 0 is none. mode: kill or error.

    Returns 0 if the work was done, NOT_REACHED, minus SIGKILL, 5 for the error that was raised or one of `refusals`, 6
    for another error of the system, and 7 for anything else.
    """
    child = os.fork()
    if child == 0:
        os._exit(_outcome(work, path, nth, mode, refusals))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _outcome(work, path, nth, mode, refusals):
    count = [0]

    def hook(event, arguments):
        if event in EVENTS and str(path) in str(arguments[0]):
            count[0] += 1
            if count[0] == nth:
                if mode == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(5, "Input/output error", str(arguments[0]))

    if nth:
        sys.addaudithook(hook)
    try:
        work(path)
    except OSError as error:
        return 5 if error.errno == 5 else 6
    except refusals:
        return 5
    except BaseException:
        traceback.print_exc()
        return 7
    return NOT_REACHED if nth and count[0] < nth else 0
