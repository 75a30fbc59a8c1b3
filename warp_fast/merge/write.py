"""Outputs that appear whole or not at all: written aside, preallocated, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from warp_fast.merge.layout import OutputFile

_BEHIND = 64 << 20  # bytes after which a file is synced while more is written


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a hidden directory beside `output` that takes its name when all went well.

    What a killed merge left there is removed by the next one; a lock, which dies with its process,
    tells that from a merge that is still running.
    """
    final, aside = output.resolve(), aside_of(output)
    with _parents(final):
        lock = _locked(aside)
        try:
            _clear(aside)
            yield aside
            sync(aside)
            os.rename(aside, final)
            sync_entries(final.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            os.close(lock)


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """The parents of a path; those that were made for it go again where it fails."""
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):  # another merge writes there
                parent.rmdir()
        raise


def aside_of(output: Path) -> Path:
    """Where an output is written before it takes its name."""
    final = output.resolve()
    return final.with_name(f".{final.name}.partial")


def _locked(directory: Path) -> int:
    """Make a directory and lock it: the one that is there now, and not one removed meanwhile."""
    while True:
        directory.mkdir(exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(directory)):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise OSError(errno.EBUSY, "another merge is writing here", str(directory)) from None
        except FileNotFoundError:
            pass
        except OSError:  # no locks on this file system
            os.close(lock)
            with contextlib.suppress(OSError):
                directory.rmdir()
            raise
        os.close(lock)


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or a directory with all that lies in it, is on the disk."""
    for each in [path, *path.rglob("*")]:
        sync_entries(each)


def sync_entries(path: Path) -> None:
    """Of a directory its list of names, of a file what it holds."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Writer:
    """The safetensors files of one output directory, open for writing tensors in any order.

    What is written goes to the disk in the background, so that a sync at the end finds little left.
    """

    def __init__(self, directory: Path, files: list[OutputFile]) -> None:
        self._disk = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None
        self._waiting = 0  # bytes written since the last sync began
        self._handles: dict[Path, int] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        try:
            for file in files:
                path = directory / file.name
                self._handles[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                self._places.update({name: (path, at) for name, at in file.starts.items()})
                with _named(path):
                    _reserve(self._handles[path], file.size)
                    _write(self._handles[path], memoryview(file.header), 0)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, offset: int, content: memoryview) -> None:
        """Write bytes of a tensor, from its byte `offset` on."""
        path, start = self._places[name]
        with _named(path):
            _write(self._handles[path], content, start + offset)
        self._waiting += len(content)
        if self._waiting >= _BEHIND and (self._syncing is None or self._syncing.done()):
            self._wait()
            self._syncing = self._disk.submit(self._sync)
            self._waiting = 0

    def _sync(self) -> None:
        for path, handle in self._handles.items():
            with _named(path):
                os.fsync(handle)

    def _wait(self) -> None:
        """Until no sync is running; raises what went wrong with it."""
        if self._syncing is not None:
            self._syncing.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Raises what went wrong with the last sync: the system tells it once."""
        self._disk.shutdown()
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
        self._wait()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in an error that comes from its handle."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _reserve(handle: int, size: int) -> None:
    """Claim the space now: a full disk shows before any work, and later writes are faster."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def _write(handle: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(handle, content, offset)
        content, offset = content[written:], offset + written
