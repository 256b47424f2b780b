"""Several processes that share a work, as torchrun starts them; alone without it.

What is to do is drawn piece by piece from a counter, so that a slow process does not hold the rest;
nothing waits for all, so that a dead one hangs nobody.
"""

import json
import os
import time
from contextlib import contextmanager
from datetime import timedelta

from featcache.errors import BadInput

# How long the leader waits, without any progress, for what others have drawn.
PATIENCE_SECONDS = 60
# The leader may wait for another run of the same command, for as long as that takes.
FOREVER = timedelta(days=30)


def join_ranks():
    """Return the Ranks that torchrun's environment describes, or Alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Alone()
    return Ranks()


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
        from torch.distributed import rendezvous

        super().__init__()
        self._store, self.rank, self.size = next(iter(rendezvous("env://")))
        self._store.set_timeout(FOREVER)
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        # A group that torchrun starts anew must not read what the last one left.
        self._prefix = f"featcache/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

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
