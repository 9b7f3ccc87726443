"""Files on this machine: read by range, and written so that a failed write is never seen."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from semq_state.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class ReadableFile(Protocol):
    """What a reader of snapshots asks of a file, be it on this machine or under a seal."""

    path: Path
    size: int

    def read(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` from `offset`, from any thread."""

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fills `into`, which is made of bytes, from `offset`."""


class LocalFile:
    """A file open for reading by range, from any thread."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            # Asked before it is opened: a pipe would make us wait for a writer.
            if self.path.exists() and not self.path.is_file():
                raise OSError(errno.EINVAL, "no regular file")
            self._file = self.path.open("rb", buffering=0)
            self.size = os.fstat(self._file.fileno()).st_size
        except (OSError, ValueError) as error:  # a null byte in a path is a ValueError
            raise StoreError(
                str(path),
                expected="a readable file",
                found=_reason(error),
                do="check the path",
            ) from error
        self._lock = threading.Lock()

    def read(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` from `offset`.

        Raises:
            StoreError: the file ends before, or the disk fails.
        """
        try:
            if hasattr(os, "pread"):
                data = os.pread(self._file.fileno(), n_bytes, offset)
            else:
                with self._lock:
                    self._file.seek(offset)
                    data = self._file.read(n_bytes)
        except OSError as error:
            raise StoreError(str(self.path), found=str(error), do="check the disk") from error
        if len(data) < n_bytes and data:  # one system call reads at most 2 GiB
            data += self.read(offset + len(data), n_bytes - len(data))
        if len(data) != n_bytes:
            raise _shorter(self.path, n_bytes, offset, len(data))
        return data

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fills `into`, which is made of bytes, from `offset`.

        Raises:
            StoreError: as `read`.
        """
        done = 0
        while done < len(into):
            try:
                if hasattr(os, "preadv"):
                    n_bytes = os.preadv(self._file.fileno(), [into[done:]], offset + done)
                else:
                    with self._lock:
                        self._file.seek(offset + done)
                        n_bytes = self._file.readinto(into[done:]) or 0
            except OSError as error:
                raise StoreError(str(self.path), found=str(error), do="check the disk") from error
            if not n_bytes:
                raise _shorter(self.path, len(into), offset, done)
            done += n_bytes

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


Source = str | os.PathLike[str] | ReadableFile
"""What readers take: the path of a file, or one that is open already, which then stays open."""


@contextlib.contextmanager
def opened(source: Source) -> Iterator[ReadableFile]:
    """A file to read from.

    Raises:
        StoreError: there is none under that path.
    """
    if isinstance(source, (str, os.PathLike)):
        with LocalFile(source) as file:
            yield file
    else:
        yield source


def size_of(source: Source) -> int:
    """How many bytes stand on the disk, sealed or not."""
    return Path(source).stat().st_size if isinstance(source, (str, os.PathLike)) else source.size


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str], *, check: Callable[[Path], None] | None = None
) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, and leaves no trace when it does not.

    Args:
        path: where the bytes shall be.
        check: called with the finished, still hidden file; what it raises stops the write.

    Raises:
        StoreError: the folder is missing or read-only, or the disk is full.
    """
    path = Path(path)
    hidden: Path | None = None
    try:
        _check_path(path)
        _remove_leftovers(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        hidden = Path(name)
        with os.fdopen(handle, "w+b", buffering=1 << 20) as file:
            if fcntl:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if check:
                check(hidden)
            hidden.chmod(0o666 & ~_umask())
            hidden.replace(path)
        hidden = None
        _sync_folder(path.parent)
    except StoreError:
        raise
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        if hidden is not None:
            with contextlib.suppress(OSError):
                hidden.unlink()


def create_new(path: str | os.PathLike[str], data: bytes, *, mode: int) -> None:
    """Writes a small file where none stands yet, with these permissions from its first moment on.

    Raises:
        StoreError: something stands there already, or the folder or disk refused.
    """
    path = Path(path)
    try:
        _check_path(path)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink()
                raise
    except OSError as error:
        raise StoreError(
            str(path),
            expected="a path in a writable folder where nothing stands yet",
            found=_reason(error),
            do="nothing was changed there; choose another path",
        ) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuses a path that `atomic_write` could not write to, before any work is spent.

    Raises:
        StoreError: the folder is missing or read-only.
    """
    path = Path(path)
    try:
        _check_path(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _refused(path, error) from error


def _shorter(path: Path, n_bytes: int, offset: int, n_found: int) -> StoreError:
    return StoreError(
        str(path),
        expected=f"{n_bytes} bytes at {offset}",
        found=f"{n_found}",
        do="the file became shorter while it was read; use another copy",
    )


def _refused(path: Path, error: OSError) -> StoreError:
    return StoreError(
        str(path),
        expected="a folder that can be written to, with room for the file",
        found=_reason(error),
        do="nothing was changed there; free some space or choose another path",
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _check_path(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder")
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a null byte in the path")


def _remove_leftovers(path: Path) -> None:
    """Unlinks what killed writers left: their lock went with them."""
    if not fcntl:
        return
    for left in path.parent.glob(f".{_escaped(path.name)}.*.partial"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network folders cannot be synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
