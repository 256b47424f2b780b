"""Where a store lies: a folder on this machine, or a URL that fsspec understands.

Both kinds have the same methods; names are relative, with "/". A file appears whole or not at all.
"""

import errno
import fcntl
import io
import os
import shutil
import stat
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path

import click

from featcache.arguments import is_path
from featcache.atomic import PARTIAL, replacing, sync_folder
from featcache.errors import BadInput, shown
from featcache.names import path_within

REQUESTS_AT_ONCE = 16


def open_folder(place):
    """Return the LocalFolder of a path, or the RemoteFolder of a URL such as s3://bucket/x.zarr."""
    if isinstance(place, (LocalFolder, RemoteFolder)):
        return place
    if not is_path(place):
        raise BadInput(f"store: expected a path or URL, not {shown(place)}")
    place = str(place).removeprefix("file://")
    return RemoteFolder(place) if "://" in place else LocalFolder(place)


class LocalFolder:
    """A folder of a local or network file system. It need not exist yet."""

    remote = False

    def __init__(self, path):
        self.path = Path(os.path.abspath(path))
        self.shown = str(path)

    def __str__(self):
        return self.shown

    def _within(self, name):
        """The path of a name in the store. Raises BadInput if it, or a link on the way, leads out of the store."""
        path = self.path / path_within(name, "file") if name else self.path
        if not self._leads_within(path):
            raise BadInput(f"{self}/{name} leads out of the store through a link; put the file itself in its place")
        return path

    def _leads_within(self, path):
        root = os.path.realpath(self.path)
        return os.path.join(os.path.realpath(path), "").startswith(os.path.join(root, ""))

    def file(self, name):
        """The path of a file. Raises FileNotFoundError if there is none, or a folder or a device in its place."""
        path = self._within(name)
        try:
            if stat.S_ISREG(os.stat(path).st_mode):
                return path
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))

    def read(self, name):
        """Return a file's bytes. Raises FileNotFoundError."""
        return self.file(name).read_bytes()

    def names(self, name=""):
        """Names of what lies directly in a folder; empty if there is no such folder."""
        try:
            return {entry.name for entry in os.scandir(self._within(name))}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def each(self, look, items):
        """Return look(item) of all items, which looks at a file or so, in order."""
        # Starting threads takes longer than reading small files.
        return list(map(look, items))

    def files(self):
        """Yield the names of all files, at any depth, in order."""
        for folder, folders, files in os.walk(self.path):
            folders.sort()
            yield from (Path(folder, file).relative_to(self.path).as_posix() for file in sorted(files))

    def size(self, name):
        """Length of a file in bytes, None if it is not there."""
        try:
            return os.stat(self.file(name)).st_size
        except FileNotFoundError:
            return None

    @contextmanager
    def writing(self, name):
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
    def _free_way(self, name):
        """Turn into one line that a folder lies in a file's place, or a file in a folder's."""
        try:
            yield
        except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
            raise BadInput(
                f"{self}/{name} cannot be written, since something else is in its place ({error.strerror}: "
                f"{error.filename}); run featcache verify {self} --repair, then the same command again"
            ) from None

    def delete(self, name):
        """Delete a file, durably, or whatever lies in its place or in that of a folder above it.

        It is no error if nothing is there. Nothing outside the store is touched: of a link, only the link goes.
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

    def delete_all(self):
        """Delete the folder with all that is in it."""
        shutil.rmtree(os.path.realpath(self.path))

    def sweep(self):
        """Delete what killed writers left behind; call only while no other process writes."""
        for leftover in self.path.rglob(f"*{PARTIAL}"):
            if leftover.is_symlink() or not leftover.is_dir():
                leftover.unlink(missing_ok=True)

    @contextmanager
    def locked(self, waiting):
        """Hold the advisory lock of the whole folder; say `waiting` first if another process has it.

        On file systems without locks this does nothing.
        """
        descriptor = self._lock(waiting)
        try:
            yield
        finally:
            try:
                # Nothing was made after all.
                self.path.rmdir()
            except OSError:
                pass
            os.close(descriptor)

    def _lock(self, waiting):
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                click.echo(waiting, err=True)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:
                return descriptor
            # Who held the lock may have removed the folder: then this is the lock of nothing.
            if self.path.exists() and os.stat(self.path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
            os.close(descriptor)

    @contextmanager
    def one_writer(self, name, number):
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

    def free_bytes(self):
        """Bytes that the file system still has room for."""
        path = self.path
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free


def _plainly(method):
    """Turn what a remote service or its library raises into one line."""

    @wraps(method)
    def call(self, *arguments):
        try:
            return method(self, *arguments)
        except (FileNotFoundError, BadInput):
            raise
        except Exception as error:
            # Each library has exceptions of its own; all of them mean that the place cannot be used.
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise BadInput(f"{self.url}: {reason}") from None

    return call


class RemoteFolder:
    """A prefix in an object store or any other file system of fsspec's. Retries are the library's.

    There are no locks: two extractions into one URL at once do the work twice.
    """

    remote = True

    def __init__(self, url):
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

    def __str__(self):
        return self.url

    def _find(self):
        import fsspec

        # Listings must show what another process has just written.
        return fsspec.core.url_to_fs(self.url, use_listings_cache=False)

    @property
    def _system(self):
        """The file system. fsspec keeps one for each process; that of a parent is of no use after a fork."""
        return self._find()[0]

    def _place(self, name):
        return f"{self._root}/{path_within(name, 'file')}" if name else str(self._root).rstrip("/")

    @_plainly
    def read(self, name):
        """Return a file's bytes. Raises FileNotFoundError."""
        return self._system.cat_file(self._place(name))

    @_plainly
    def names(self, name=""):
        """Names of what lies directly below a prefix; empty if there is nothing."""
        try:
            return {path.rstrip("/").rsplit("/", 1)[-1] for path in self._system.ls(self._place(name), detail=False)}
        except FileNotFoundError:
            return set()

    def each(self, look, items):
        """Return look(item) of all items, which asks for a file or so, in order: many requests at once."""
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(look, items))

    @_plainly
    def files(self):
        """Names of all files, at any depth, in order."""
        root = self._system._strip_protocol(self.url).rstrip("/")
        return [path[len(root) + 1 :] for path in sorted(self._system.find(self._root))]

    @_plainly
    def size(self, name):
        """Length of a file in bytes, None if it is not there."""
        try:
            return self._system.size(self._place(name))
        except FileNotFoundError:
            return None

    @contextmanager
    def writing(self, name):
        """Yield a binary file that is uploaded as `name` when the block ends well."""
        buffer = io.BytesIO()
        yield buffer
        self._upload(name, buffer.getvalue())

    @_plainly
    def _upload(self, name, data):
        try:
            self._system.pipe_file(self._place(name), data)
        except FileNotFoundError as error:
            # There is no such bucket.
            raise BadInput(f"{self.url}: {error}") from None

    @_plainly
    def delete(self, name):
        """Delete a file; it is no error if it is not there."""
        try:
            self._system.rm_file(self._place(name))
        except FileNotFoundError:
            pass

    @_plainly
    def delete_all(self):
        """Delete everything below the prefix."""
        self._system.rm(self._root, recursive=True)

    def sweep(self):
        """Nothing to do: an upload that was cut off leaves nothing."""

    def locked(self, waiting):
        """No lock."""
        return nullcontext()

    def one_writer(self, name, number):
        """No lock."""
        return nullcontext()

    def free_bytes(self):
        """No limit is known: None."""
        return None
