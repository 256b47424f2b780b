"""The place of a store: a folder on this machine, or a URL that fsspec understands.

Both have the same methods. Names are relative, with "/". A file appears whole or not at all.
"""

import errno
import fcntl
import io
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, Literal, ParamSpec, TypeVar

from featcache.arguments import is_path
from featcache.atomic import PARTIAL, replacing, sync_folder
from featcache.errors import BadInput, shown
from featcache.names import path_within
from featcache.progress import say

REQUESTS_AT_ONCE = 16

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def open_folder(place: object) -> "Folder":
    """Return the LocalFolder of a path, or the RemoteFolder of a URL such as s3://bucket/x.zarr. Raises BadInput."""
    if isinstance(place, (LocalFolder, RemoteFolder)):
        return place
    if not is_path(place):
        raise BadInput(f"store: expected a path or URL, not {shown(place)}")
    place = str(place).removeprefix("file://")
    return RemoteFolder(place) if "://" in place else LocalFolder(place)


class LocalFolder:
    """A folder of a local or network file system. It need not exist yet."""

    remote: Literal[False] = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        self.shown = str(path)

    def __str__(self) -> str:
        return self.shown

    def _within(self, name: str) -> Path:
        """Return the path of a name in the store. Raises BadInput if it, or a link in it, leads out of the store."""
        path = self.path / path_within(name, "file") if name else self.path
        if not self._leads_within(path):
            raise BadInput(f"{self}/{name} leads out of the store through a link; put the file itself in its place")
        return path

    def _leads_within(self, path: Path) -> bool:
        root = os.path.realpath(self.path)
        return os.path.join(os.path.realpath(path), "").startswith(os.path.join(root, ""))

    def file(self, name: str) -> Path:
        """Return the path of a file. Raises FileNotFoundError if it is not there, or is a folder or a device."""
        path = self._within(name)
        try:
            if stat.S_ISREG(os.stat(path).st_mode):
                return path
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raises FileNotFoundError."""
        return self.file(name).read_bytes()

    def names(self, name: str = "") -> set[str]:
        """Return the names of what lies directly in a folder; none if there is no such folder."""
        try:
            return {entry.name for entry in os.scandir(self._within(name))}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def each(self, look: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return [look(item) for all items], where `look` reads a file or two."""
        # Starting threads takes longer than reading small files.
        return list(map(look, items))

    def files(self) -> Iterator[str]:
        """Yield the names of all files, at any depth, in order."""
        for folder, folders, files in os.walk(self.path):
            folders.sort()
            yield from (Path(folder, file).relative_to(self.path).as_posix() for file in sorted(files))

    def size(self, name: str) -> int | None:
        """Return the length of a file in bytes, None if it is not there."""
        try:
            return os.stat(self.file(name)).st_size
        except FileNotFoundError:
            return None

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Yield a binary file that appears under `name`, whole and durable, when the block ends well."""
        path = self._within(name)
        fresh = [folder for folder in path.parents if not folder.exists()]
        with self._free_way(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Two processes that write the same file must not write into the same partial file.
            with replacing(path, tag=f".{uuid.uuid4().hex[:8]}") as file:
                yield file
        for folder in fresh:
            sync_folder(folder.parent)

    @contextmanager
    def _free_way(self, name: str) -> Iterator[None]:
        """Raise BadInput within the block if a folder lies in a file's place, or a file in a folder's."""
        try:
            yield
        except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
            raise BadInput(
                f"{self}/{name} cannot be written, since something else is in its place ({error.strerror}: "
                f"{error.filename}); run featcache verify {self} --repair, then the same command again"
            ) from None

    def delete(self, name: str) -> None:
        """Delete a file, durably, or whatever lies in its place or in that of a folder above it.

        It is no error if nothing is there. Nothing outside the store is touched: a link goes, its target stays.
        """
        path, above = self.path, path_within(name, "file").count("/")
        for number, part in enumerate(name.split("/")):
            path = path / part
            if not os.path.lexists(path):
                return
            if path.is_dir() and (not path.is_symlink() or (number < above and self._leads_within(path))):
                continue
            path.unlink()
            sync_folder(path.parent)
            return
        shutil.rmtree(path)
        sync_folder(path.parent)

    def delete_all(self) -> None:
        """Delete the folder with everything in it."""
        shutil.rmtree(os.path.realpath(self.path))

    def sweep(self) -> None:
        """Delete what killed writers left behind; call only while no other process writes."""
        for leftover in self.path.rglob(f"*{PARTIAL}"):
            if leftover.is_symlink() or not leftover.is_dir():
                leftover.unlink(missing_ok=True)

    @contextmanager
    def locked(self, waiting: str) -> Iterator[None]:
        """Hold the advisory lock of the whole folder; print the line `waiting` first if another process has it.

        On file systems without locks this does nothing.
        """
        descriptor = self._lock(waiting)
        try:
            yield
        finally:
            try:
                # If nothing was made after all, the folder goes; if something was, it cannot.
                self.path.rmdir()
            except OSError:
                pass
            os.close(descriptor)

    def _lock(self, waiting: str) -> int:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(waiting)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:
                return descriptor
            # The process that held the lock may have removed the folder: then this is the lock of nothing.
            if self.path.exists() and os.stat(self.path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
            os.close(descriptor)

    @contextmanager
    def one_writer(self, name: str, number: int) -> Iterator[None]:
        """Hold byte `number` of the lock file `name`, so that different numbers do not wait for each other."""
        path = self._within(name)
        with self._free_way(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")  # noqa: SIM115
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX, 1, number)
            except OSError:
                pass
            yield

    def free_bytes(self) -> int | None:
        """Return how many bytes the file system still has room for."""
        path = self.path
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free


def _plainly(
    method: Callable[Concatenate["RemoteFolder", P], R],
) -> Callable[Concatenate["RemoteFolder", P], R]:
    """Turn what a remote service or its library raises into BadInput."""

    @wraps(method)
    def call(self: "RemoteFolder", /, *arguments: P.args, **named: P.kwargs) -> R:
        try:
            return method(self, *arguments, **named)
        except (FileNotFoundError, BadInput):
            raise
        except Exception as error:
            # Each library has exceptions of its own; all of them mean that the place cannot be used.
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise BadInput(f"{self.url}: {reason}") from None

    return call


class RemoteFolder:
    """A prefix in an object store, or in any other file system that fsspec knows. The library retries.

    There are no locks: two extractions into one URL at the same time do the work twice.
    """

    remote: Literal[True] = True

    def __init__(self, url: str) -> None:
        self.url = str(url).rstrip("/")
        protocol, _, place = self.url.partition("://")
        if not place or protocol == "local":
            raise BadInput(f"{url}: give a local store as a plain path, a remote one as s3://bucket/x.zarr")
        try:
            self._root = self._find()[1]
        except ImportError as error:
            raise BadInput(f"{url}: {error}; for s3:// install with: pip install 'featcache[remote]'") from None
        except ValueError as error:
            raise BadInput(f"{url}: {error}") from None

    def __str__(self) -> str:
        return self.url

    # The file system is Any, since fsspec has no types.
    def _find(self) -> tuple[Any, str]:
        import fsspec

        # Listings must show what another process has just written.
        return fsspec.core.url_to_fs(self.url, use_listings_cache=False)

    @property
    def _system(self) -> Any:
        """The file system. fsspec keeps one for each process; a fork cannot use that of its parent."""
        return self._find()[0]

    def _place(self, name: str) -> str:
        return f"{self._root}/{path_within(name, 'file')}" if name else str(self._root).rstrip("/")

    @_plainly
    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raises FileNotFoundError."""
        return self._system.cat_file(self._place(name))

    @_plainly
    def names(self, name: str = "") -> set[str]:
        """Return the names of what lies directly below a prefix."""
        try:
            return {path.rstrip("/").rsplit("/", 1)[-1] for path in self._system.ls(self._place(name), detail=False)}
        except FileNotFoundError:
            return set()

    def each(self, look: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return [look(item) for all items], where `look` asks for a file or two: many requests at once."""
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(look, items))

    @_plainly
    def files(self) -> list[str]:
        """Return the names of all files, at any depth, in order."""
        root = self._system._strip_protocol(self.url).rstrip("/")
        return [path[len(root) + 1 :] for path in sorted(self._system.find(self._root))]

    @_plainly
    def size(self, name: str) -> int | None:
        """Return the length of a file in bytes, None if it is not there."""
        try:
            return self._system.size(self._place(name))
        except FileNotFoundError:
            return None

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Yield a binary file that is uploaded as `name` when the block ends well."""
        buffer = io.BytesIO()
        yield buffer
        self._upload(name, buffer.getvalue())

    @_plainly
    def _upload(self, name: str, data: bytes) -> None:
        try:
            self._system.pipe_file(self._place(name), data)
        except FileNotFoundError as error:
            # There is no such bucket.
            raise BadInput(f"{self.url}: {error}") from None

    @_plainly
    def delete(self, name: str) -> None:
        """Delete a file; it is no error if it is not there."""
        try:
            self._system.rm_file(self._place(name))
        except FileNotFoundError:
            pass

    @_plainly
    def delete_all(self) -> None:
        """Delete everything below the prefix."""
        self._system.rm(self._root, recursive=True)

    def sweep(self) -> None:
        """Do nothing: an upload that was cut off leaves nothing behind."""

    def locked(self, waiting: str) -> AbstractContextManager[None]:
        """Do nothing: there are no locks."""
        return nullcontext()

    def one_writer(self, name: str, number: int) -> AbstractContextManager[None]:
        """Do nothing: there are no locks."""
        return nullcontext()

    def free_bytes(self) -> int | None:
        """Return None: no limit is known."""
        return None


Folder = LocalFolder | RemoteFolder
