"""Several processes that share a work, as torchrun starts them; alone without it.

What is to do is drawn piece by piece from a counter, so that a slow process does not hold the rest;
nothing waits for all, so that a dead one hangs nobody.
"""

import hashlib
import json
import os
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import click

from featcache.errors import BadInput, shown

# How long the leader waits, without any progress, for what others have drawn.
PATIENCE_SECONDS = 60
# The leader may wait for another run of the same command, for as long as that takes.
FOREVER = timedelta(days=30)
# How long processes wait for each other at the start: on one machine, where they start together, and on several,
# where a scheduler may start one of them late.
MEETING = {True: 40, False: 600}
TELL_SECONDS = 5
POLL_SECONDS = 1

# The Ranks that this process is of, once it has met the others.
_joined = []


def join_ranks():
    """Return the Ranks that torchrun's environment describes, or Alone. Raises BadInput if the others do not come."""
    if _number("WORLD_SIZE", 1) == 1:
        return Alone()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _follow_launcher()
    _joined[:] = [Ranks()]
    return _joined[0]


def _number(variable, default):
    """A whole number of the environment. Raises BadInput."""
    text = os.environ.get(variable, default)
    try:
        return int(text)
    except ValueError:
        raise BadInput(f"the environment's {variable} is {shown(text)}, and must be a whole number") from None


def first_to_say(line):
    """Whether no other process has asked this of the same line yet; alone, nobody has."""
    return not _joined or _joined[0].first_to_say(line)


def _follow_launcher():
    """End this process when torchrun, which started it and looks after it, has died.

    A thread sees to it, since no signal interrupts the C++ in which processes wait for each other.
    """
    launcher = os.getppid()

    def follow():
        while os.getppid() == launcher:
            time.sleep(POLL_SECONDS)
        try:
            rank = os.environ.get("RANK")
            os.write(2, f"Error: process {rank}: torchrun has died; run the same command again\n".encode())
        finally:
            # As after a kill, which nothing whole is lost by.
            os._exit(BadInput.exit_code)

    threading.Thread(target=follow, daemon=True).start()


class Alone:
    """One process that does everything."""

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def __init__(self):
        self._done = 0

    @contextmanager
    def leading(self, lock):
        """Yield whether this process leads, in which case it holds the lock."""
        with lock:
            yield True

    def share(self, todo):
        """Hand the leader's list of tuples to the others."""
        return todo

    def draw(self, todo):
        """Yield the tuples that fall to this process."""
        yield from todo

    def count(self, done):
        """Add what is done, a whole number; return how much all processes have done."""
        self._done += done
        return self._done

    def left_behind(self, missing):
        """What is missing when all is drawn and done: nothing."""
        return []

    def alone(self):
        """The same process without the others."""
        return Alone()


class Ranks(Alone):
    """This process among WORLD_SIZE, which talk through torch's key-value store."""

    def __init__(self):
        super().__init__()
        self._store, self.rank, self.size = _meet()
        self._store.set_timeout(FOREVER)
        self.local_rank = _number("LOCAL_RANK", self.rank)
        self.local_size = _number("LOCAL_WORLD_SIZE", self.size)
        # A group that torchrun starts anew must not read what the last one left.
        self._prefix = f"featcache/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

    def first_to_say(self, line):
        """Whether no other process has asked this of the same line yet."""
        return self._add(f"said/{hashlib.sha256(line.encode()).hexdigest()}", 1, 1) == 1

    def _key(self, word):
        return f"{self._prefix}/{word}"

    @contextmanager
    def leading(self, lock):
        if self.rank == 0:
            with lock:
                yield True
        else:
            yield False

    def share(self, todo):
        self._store.set(self._key("todo"), json.dumps(todo))
        return todo

    def shared(self):
        """Wait for the leader's list. Raises BadInput if the leader ends before."""
        try:
            return [tuple(pair) for pair in json.loads(self._store.get(self._key("todo")))]
        except RuntimeError:
            raise BadInput(f"process {self.rank}: the leading process is gone; run the same command again") from None

    def draw(self, todo):
        while (number := self._add("drawn", 1, len(todo) + 1) - 1) < len(todo):
            yield todo[number]

    def count(self, done):
        return self._add("done", done, super().count(done))

    def _add(self, word, number, alone):
        """Add to a common counter; `alone` once the leader, and its store with it, has ended."""
        try:
            return self._store.add(self._key(word), number)
        except RuntimeError:
            return alone

    def left_behind(self, missing):
        """Wait for what the others have drawn; return what is missing once they have fallen silent."""
        done, since = self.count(0), time.monotonic()
        while left := missing():
            if self.count(0) != done:
                done, since = self.count(0), time.monotonic()
            if time.monotonic() - since > PATIENCE_SECONDS:
                return left
            time.sleep(0.2)
        return []


def _meet():
    """Return (store, rank, world size) once all processes are there. Raises BadInput if that takes too long."""
    from torch.distributed import rendezvous

    size, rank = _number("WORLD_SIZE", 1), os.environ.get("RANK")
    patience = MEETING[_number("LOCAL_WORLD_SIZE", 0) == size]
    met = []

    def meet():
        try:
            met.append(next(iter(rendezvous("env://", timeout=FOREVER))))
        except (RuntimeError, ValueError) as error:
            met.append(error)

    # torch takes twice the time that it is given, and no signal ends it: what waits with an eye on the clock is this.
    meeting = threading.Thread(target=meet, daemon=True)
    meeting.start()
    meeting.join(TELL_SECONDS)
    if not met:
        click.echo(f"waiting: process {rank} of {size} for the others, for {patience} s at most", err=True)
        meeting.join(patience - TELL_SECONDS)
    if met and isinstance(met[0], tuple):
        return met[0]
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    # A variable that is missing or a port that is taken is told at once.
    reason = str(met[0]).split("\n")[0].split(". ")[0] if met else f"they did not come within {patience} s"
    raise BadInput(f"process {rank} of {size} cannot meet the others at {place}: {reason}; start all of them again")
