"""Opens user-supplied paths: local, http(s), or any scheme registered on `manager`."""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from typing import IO, Any
from urllib.parse import urlsplit

from iopath.common.file_io import HTTPURLHandler, PathManager, get_cache_dir

# One slash is enough: `pathlib.Path("s3://b/x")` prints as `s3:/b/x`, which is not local either.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


class _HttpHandler(HTTPURLHandler):
    """Read-only http(s); a file is downloaded once and kept in iopath's cache directory.

    iopath's own handler names cached files by URL path alone, so the same path on two hosts would
    silently share one file. It also cannot tell whether a URL exists.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return ["http://", "https://"]

    def _get_local_path(
        self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any
    ) -> str:
        host_dir = os.path.join(get_cache_dir(cache_dir), urlsplit(path).netloc)
        return super()._get_local_path(path, force=force, cache_dir=host_dir, **kwargs)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if mode not in ("r", "rb"):
            raise _read_only(path)
        self._check_kwargs(kwargs)
        return open(self._get_local_path(path), mode, encoding=_encoding(mode))

    def _exists(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        try:
            # GET, because pre-signed URLs refuse HEAD; the body is not read.
            with urllib.request.urlopen(path):
                return True
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                return False
            raise

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return self._exists(path, **kwargs)

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return False

    def _mkdirs(self, path: str, **kwargs: Any) -> None:
        raise _read_only(path)

    def _copy_from_local(
        self, local_path: str, dst_path: str, overwrite: bool = False, **kwargs: Any
    ) -> bool:
        raise _read_only(dst_path)


def _read_only(path: str) -> ValueError:
    return ValueError(
        f"{path} cannot be written: http(s) is read-only. Give a local or other remote path"
    )


manager = PathManager()
"""Register handlers of other schemes here: `paths.manager.register_handler(handler)`."""

manager.register_handler(_HttpHandler())


def open_path(path: str, mode: str = "r") -> IO[Any]:
    """Opens a file like the built-in `open`; text is UTF-8.

    Raises:
        ValueError: if the path's scheme has no handler, or the scheme does not support the mode.
        OSError: as raised by the built-in `open`.
    """
    if _is_local(path):
        return manager.open(path, mode, encoding=_encoding(mode))
    return manager.open(path, mode)


def local_path(path: str) -> str:
    """A local file with the content of `path`: the path itself, or a cached download.

    Raises:
        ValueError: if the path's scheme has no handler.
    """
    return path if _is_local(path) else manager.get_local_path(path)


def exists(path: str) -> bool:
    """Whether there is a file or directory at `path`.

    Raises:
        ValueError: if the path's scheme has no handler.
    """
    _require_known_scheme(path)
    return manager.exists(path)


def list_files(path: str, suffix: str | None = None) -> list[str]:
    """The files of a directory in sorted order, or `[path]` if `path` is a file.

    Names that start with "." or "_" are skipped: they are metadata by Hadoop's and Arrow's
    convention. Subdirectories are not searched.

    Args:
        path: a file or a directory.
        suffix: file name ending; in a directory, only matching files are listed.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if the path's scheme has no handler.
    """
    _require_known_scheme(path)
    if manager.isdir(path):
        names = sorted(
            name
            for name in manager.ls(path)
            if not name.startswith((".", "_")) and name.endswith(suffix or "")
        )
        return [file for file in (join(path, name) for name in names) if manager.isfile(file)]
    if manager.isfile(path):
        return [path]
    raise FileNotFoundError(f"no file or directory {path!r}")


def make_directories(path: str) -> None:
    """Creates the directory and any missing parents.

    Raises:
        ValueError: if the path's scheme has no handler.
        FileExistsError: if `path` is a file.
    """
    _require_known_scheme(path)
    manager.mkdirs(path)
    if manager.isfile(path):
        raise FileExistsError(f"{path!r} is a file; it must be a directory. Name another path")


def join(path: str, *parts: str) -> str:
    """Joins `path` and `parts` with one "/" between each."""
    return posixpath.join(path, *parts)


@contextlib.contextmanager
def write_atomically(path: str) -> Iterator[IO[str]]:
    """Opens a UTF-8 text file that appears at `path` whole, when the block ends, or not at all.

    An existing file at `path` is unchanged until then, and is kept if the block raises.

    Raises:
        ValueError: if the path's scheme has no handler.
        OSError: if the file cannot be written.
    """
    if _is_local(path):
        with _written_beside(path) as file:
            yield file
        return
    with tempfile.TemporaryDirectory() as directory:
        staged = os.path.join(directory, "staged")
        with open(staged, "w", encoding="utf-8") as file:
            yield file
        manager.copy_from_local(staged, path, overwrite=True)


@contextlib.contextmanager
def _written_beside(path: str) -> Iterator[IO[str]]:
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    # The rename changes the directory, so only an fsync of the directory makes it durable.
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _encoding(mode: str) -> str | None:
    return None if "b" in mode else "utf-8"


def _is_local(path: str) -> bool:
    _require_known_scheme(path)
    return not path.startswith(_registered_prefixes())


def _require_known_scheme(path: str) -> None:
    # iopath would treat a path with an unknown scheme, such as "s3:/b/x", as local.
    scheme = _SCHEME.match(path)
    if scheme and not path.startswith(_registered_prefixes()):
        raise ValueError(
            f"no handler for the scheme {scheme[1]!r} of {path!r}. Registered prefixes: "
            f"{', '.join(_registered_prefixes())}. Register another with "
            "torchrec_fmp.paths.manager.register_handler(handler), where handler is an "
            "iopath PathHandler"
        )


def _registered_prefixes() -> tuple[str, ...]:
    # iopath has no public API for this.
    return tuple(manager._path_handlers)
