"""Processes that share the work of one command, as torchrun starts them, or the one process without it.

They draw pieces of the work from a common counter, so that a slow process does not hold up the others. None ever waits
for all others, so that a dead process hangs nobody; only fine-tuning, whose processes add up their gradients, does.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from featcache.errors import BadInput, shown
from featcache.progress import say

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store as KeyValues

T = TypeVar("T")
# How long the leader waits, without any progress, for pieces that others have drawn.
PATIENCE_SECONDS = 60
# The leader may wait for another run of the same command, for as long as that takes.
FOREVER = timedelta(days=30)
# How long processes wait for each other at the start, by whether all are on one machine: there they start together,
# while a scheduler may start one of several machines late.
MEETING = {True: 40, False: 600}
TELL_SECONDS = 5
POLL_SECONDS = 1

# The Ranks of this process, once it has met the others.
_joined: list["Ranks"] = []


def join_ranks() -> "Alone":
    """Return the Ranks that torchrun's environment describes, else Alone. Raises BadInput if the others do not come."""
    if _number("WORLD_SIZE", 1) == 1:
        return Alone()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _follow_launcher()
    _joined[:] = [Ranks()]
    return _joined[0]


def _number(variable: str, default: int) -> int:
    """Return a whole number from the environment. Raises BadInput if the variable holds something else."""
    text = os.environ.get(variable, default)
    try:
        return int(text)
    except ValueError:
        raise BadInput(f"the environment's {variable} is {shown(text)}, and must be a whole number") from None


def first_to_say(line: str) -> bool:
    """Return whether this process is the first to ask this about a line, as it is if it is alone."""
    return not _joined or _joined[0].first_to_say(line)


def say_once(line: str) -> None:
    """Print a line to stderr, unless another process of this command has done so."""
    if first_to_say(line):
        say(line)


def _follow_launcher() -> None:
    """End this process when torchrun, which started it, has died.

    A thread does this, since no signal interrupts the C++ code in which processes wait for each other.
    """
    launcher = os.getppid()

    def follow() -> None:
        while os.getppid() == launcher:
            time.sleep(POLL_SECONDS)
        try:
            rank = os.environ.get("RANK")
            os.write(2, f"Error: process {rank}: torchrun has died; run the same command again\n".encode())
        finally:
            # At once, as a kill would: nothing that is whole gets lost.
            os._exit(BadInput.exit_code)

    threading.Thread(target=follow, daemon=True).start()


class Alone:
    """One process that does everything."""

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def __init__(self) -> None:
        self._done = 0

    def say(self, line: str) -> None:
        """Print a line on standard error, once for all processes."""
        if self.rank == 0:
            say(line)

    @contextmanager
    def leading(self, lock: AbstractContextManager[None]) -> Iterator[bool]:
        """Yield whether this process leads; if it does, it holds the lock."""
        with lock:
            yield True

    def share(self, todo: list[T]) -> list[T]:
        """Hand the leader's list of tuples to the others, and return it. Drawing and counting begin anew."""
        self._done = 0
        return todo

    def shared(self, otherwise: list[tuple] | None = None) -> list[tuple]:
        """Wait for the leader's next list of tuples; only a process that does not lead may ask for it.

        otherwise: what to return if the leader has ended without one. By default that raises BadInput.
        """
        raise RuntimeError("a process that is alone leads")

    def draw(self, todo: Sequence[T]) -> Iterator[T]:
        """Yield the pieces of work that fall to this process."""
        yield from todo

    def count(self, done: int) -> int:
        """Add to how much is done; return how much all processes have done together."""
        self._done += done
        return self._done

    def left_behind(self, missing: Callable[[], list[T]]) -> list[T]:
        """Return what is missing when everything is drawn and done: nothing."""
        return []

    @contextmanager
    def adding_up(self, backend: str) -> Iterator[None]:
        """Let the processes call torch's collectives within the block. backend: gloo or nccl."""
        yield

    def alone(self) -> "Alone":
        """Return this process without the others."""
        return Alone()


class Ranks(Alone):
    """This process among WORLD_SIZE, which talk through torch's key-value store."""

    def __init__(self) -> None:
        super().__init__()
        self._store, self.rank, self.size = _meet()
        self._store.set_timeout(FOREVER)
        self.local_rank = _number("LOCAL_RANK", self.rank)
        self.local_size = _number("LOCAL_WORLD_SIZE", self.size)
        # Processes that torchrun has started anew must not read what those before them left.
        self._prefix = f"featcache/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        # How many lists the leader has handed out.
        self._lists = 0

    def first_to_say(self, line: str) -> bool:
        """Return whether this process is the first to ask this about a line."""
        return self._add(self._key(f"said/{hashlib.sha256(line.encode()).hexdigest()}"), 1, 1) == 1

    def _key(self, word: str) -> str:
        return f"{self._prefix}/{word}"

    @contextmanager
    def leading(self, lock: AbstractContextManager[None]) -> Iterator[bool]:
        if self.rank == 0:
            with lock:
                yield True
        else:
            yield False

    def _of_list(self, word: str) -> str:
        """Return the key of a word about the leader's latest list."""
        return self._key(f"{self._lists}/{word}")

    def share(self, todo: list[T]) -> list[T]:
        self._lists += 1
        self._store.set(self._of_list("todo"), json.dumps(todo))
        return super().share(todo)

    def shared(self, otherwise: list[tuple] | None = None) -> list[tuple]:
        self._lists += 1
        super().share([])
        try:
            return [tuple(item) for item in json.loads(self._store.get(self._of_list("todo")))]
        except RuntimeError:
            if otherwise is not None:
                return otherwise
            raise BadInput(f"process {self.rank}: the leading process is gone; run the same command again") from None

    def draw(self, todo: Sequence[T]) -> Iterator[T]:
        while (number := self._add(self._of_list("drawn"), 1, len(todo) + 1) - 1) < len(todo):
            yield todo[number]

    def count(self, done: int) -> int:
        return self._add(self._of_list("done"), done, super().count(done))

    @contextmanager
    def adding_up(self, backend: str) -> Iterator[None]:
        import torch.distributed as distributed

        store = distributed.PrefixStore(self._key("collectives"), self._store)  # type: ignore[attr-defined]  # unlisted
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def _add(self, key: str, number: int, otherwise: int) -> int:
        """Add to a common counter and return its value, or `otherwise` once the leader, who keeps it, has ended."""
        try:
            return self._store.add(key, number)
        except RuntimeError:
            return otherwise

    def left_behind(self, missing: Callable[[], list[T]]) -> list[T]:
        """Wait for the pieces that others have drawn; return those still missing once no news comes from them."""
        done, since = self.count(0), time.monotonic()
        while left := missing():
            if self.count(0) != done:
                done, since = self.count(0), time.monotonic()
            if time.monotonic() - since > PATIENCE_SECONDS:
                return left
            time.sleep(0.2)
        return []


def _meet() -> tuple["KeyValues", int, int]:
    """Return (key-value store, rank, world size) once all processes have come. Raises BadInput if that takes too long."""
    from torch.distributed.rendezvous import rendezvous

    size, rank = _number("WORLD_SIZE", 1), os.environ.get("RANK")
    patience = MEETING[_number("LOCAL_WORLD_SIZE", 0) == size]
    met: list[tuple[KeyValues, int, int] | Exception] = []

    def meet() -> None:
        try:
            met.append(next(iter(rendezvous("env://", timeout=FOREVER))))
        except (RuntimeError, ValueError) as error:
            met.append(error)

    # torch waits twice as long as it is told, and no signal ends that; so a thread waits, and this one keeps the time.
    meeting = threading.Thread(target=meet, daemon=True)
    meeting.start()
    meeting.join(TELL_SECONDS)
    if not met:
        say(f"waiting: process {rank} of {size} for the others, for {patience} s at most")
        meeting.join(patience - TELL_SECONDS)
    if met and isinstance(met[0], tuple):
        return met[0]
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    # torch tells at once of a variable that is missing or a port that is taken.
    reason = str(met[0]).split("\n")[0].split(". ")[0] if met else f"they did not come within {patience} s"
    raise BadInput(f"process {rank} of {size} cannot meet the others at {place}: {reason}; start all of them again")
