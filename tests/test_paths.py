"""Paths: local, http and registered schemes behave alike, anything else is refused."""

from __future__ import annotations

import functools
import http.server
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iopath.common.file_io import PathHandler

from torchrec_fmp import paths


class _BucketHandler(PathHandler):
    """Maps `bucket://name` to a file in a local directory."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def _get_supported_prefixes(self) -> list[str]:
        return ["bucket://"]

    def _local(self, path: str) -> Path:
        return self._root / path.removeprefix("bucket://")

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return str(self._local(path))

    def _copy_from_local(
        self, local_path: str, dst_path: str, overwrite: bool = False, **kwargs: Any
    ) -> bool:
        self._local(dst_path).write_bytes(Path(local_path).read_bytes())
        return True

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return open(self._local(path), mode)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._local(path).exists()

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return self._local(path).is_file()

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return self._local(path).is_dir()

    def _ls(self, path: str, **kwargs: Any) -> list[str]:
        return os.listdir(self._local(path))

    def _mkdirs(self, path: str, **kwargs: Any) -> None:
        self._local(path).mkdir(parents=True, exist_ok=True)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths.manager, "_path_handlers", dict(paths.manager._path_handlers))
    root = tmp_path / "bucket"
    root.mkdir()
    paths.manager.register_handler(_BucketHandler(root))
    return root


class _QuietRequests(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str, str]]:
    """A directory and its URL under two host names that both reach it."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "served"
    root.mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_QuietRequests, directory=str(root))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    yield root, f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["s3://b/x", "s3:/b/x", "gs://b", "ftp://h/x", "file:///x"])
@pytest.mark.parametrize(
    "use",
    [
        paths.open_path,
        paths.local_path,
        paths.exists,
        paths.list_files,
        paths.make_directories,
        lambda path: paths.write_atomically(path).__enter__(),
    ],
)
def test_unknown_scheme_is_refused_with_the_registered_schemes_and_how_to_add_one(
    path: str, use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scheme = path.split(":")[0]
    with pytest.raises(ValueError, match=f"scheme '{scheme}'.*https://.*register_handler"):
        use(path)
    assert not list(tmp_path.iterdir())


@given(st.text(alphabet="ab1.-_ :é", min_size=1).filter(lambda name: name not in (".", "..")))
def test_a_name_without_a_scheme_is_a_local_path(name: str) -> None:
    assert paths.local_path(name) == name
    assert not paths.exists(f"no_such_directory/{name}")


def test_text_is_written_and_read_as_utf8(tmp_path: Path) -> None:
    path = paths.join(str(tmp_path), "a", "b.txt")
    paths.make_directories(os.path.dirname(path))
    with paths.open_path(path, "w") as file:
        file.write("é")
    assert Path(path).read_bytes() == "é".encode()
    with paths.open_path(path, "rb") as file:
        assert file.read() == "é".encode()


def test_list_files_is_sorted_and_omits_metadata_and_directories(tmp_path: Path) -> None:
    for name in ["b.parquet", "a.parquet", "c.csv", "_SUCCESS", ".a.parquet.crc"]:
        (tmp_path / name).touch()
    (tmp_path / "d.parquet").mkdir()
    root = str(tmp_path)
    parquet = [f"{root}/a.parquet", f"{root}/b.parquet"]
    assert paths.list_files(root, ".parquet") == parquet
    assert paths.list_files(root) == [*parquet, f"{root}/c.csv"]


def test_list_files_of_a_file_is_the_file_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "data.txt").touch()
    path = str(tmp_path / "data.txt")
    assert paths.list_files(path, ".parquet") == [path]


def test_list_files_of_a_missing_path_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no_such_place"):
        paths.list_files(str(tmp_path / "no_such_place"))


def test_make_directories_twice_is_fine_but_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    paths.make_directories(str(tmp_path / "a" / "b"))
    paths.make_directories(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="'.*file' is a file; it must be a directory"):
        paths.make_directories(str(tmp_path / "file"))


@pytest.mark.parametrize("target", ["local", "bucket"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    target: str, tmp_path: Path, bucket: Path
) -> None:
    path = "bucket://f" if target == "bucket" else str(tmp_path / "out" / "f")
    directory = bucket if target == "bucket" else tmp_path / "out"
    directory.mkdir(exist_ok=True)
    (directory / "f").write_text("old")
    with pytest.raises(KeyboardInterrupt), paths.write_atomically(path) as file:
        file.write("half of the ne")
        file.flush()
        assert (directory / "f").read_text() == "old"
        raise KeyboardInterrupt
    assert [entry.name for entry in directory.iterdir()] == ["f"]
    assert (directory / "f").read_text() == "old"


@pytest.mark.parametrize("target", ["local", "bucket"])
def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(
    target: str, tmp_path: Path, bucket: Path
) -> None:
    path = "bucket://f" if target == "bucket" else str(tmp_path / "out" / "f")
    directory = bucket if target == "bucket" else tmp_path / "out"
    directory.mkdir(exist_ok=True)
    (directory / "f").write_text("old and longer")
    with paths.write_atomically(path) as file:
        file.write("néw")
    assert [entry.name for entry in directory.iterdir()] == ["f"]
    assert (directory / "f").read_bytes() == "néw".encode()


def test_an_atomic_write_has_the_permissions_of_a_plain_one(tmp_path: Path) -> None:
    with paths.open_path(str(tmp_path / "plain"), "w"):
        pass
    with paths.write_atomically(str(tmp_path / "atomic")):
        pass
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_an_atomic_write_takes_a_bare_file_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with paths.write_atomically("here.json") as file:
        file.write("{}")
    assert (tmp_path / "here.json").read_text() == "{}"


def test_a_registered_scheme_is_used_by_every_function(bucket: Path) -> None:
    paths.make_directories("bucket://d")
    with paths.open_path(paths.join("bucket://d", "x.txt"), "w") as file:
        file.write("1")
    assert paths.exists("bucket://d/x.txt")
    assert paths.list_files("bucket://d", ".txt") == ["bucket://d/x.txt"]
    assert paths.local_path("bucket://d/x.txt") == str(bucket / "d" / "x.txt")


def test_http_is_read_through_a_local_copy(served: tuple[Path, str, str]) -> None:
    root, url, _ = served
    (root / "x.txt").write_text("é", encoding="utf-8")
    assert paths.exists(f"{url}/x.txt")
    assert not paths.exists(f"{url}/y.txt")
    assert paths.list_files(f"{url}/x.txt") == [f"{url}/x.txt"]
    with paths.open_path(f"{url}/x.txt") as file:
        assert file.read() == "é"
    assert Path(paths.local_path(f"{url}/x.txt")).read_text(encoding="utf-8") == "é"
    with pytest.raises(FileNotFoundError, match="y.txt"):
        paths.list_files(f"{url}/y.txt")


def test_http_hosts_do_not_share_their_cached_copies(served: tuple[Path, str, str]) -> None:
    root, one_host, other_host = served
    (root / "x.txt").write_text("one")
    assert Path(paths.local_path(f"{one_host}/x.txt")).read_text() == "one"
    (root / "x.txt").write_text("other")
    assert Path(paths.local_path(f"{other_host}/x.txt")).read_text() == "other"


def _write_whole(path: str) -> None:
    with paths.write_atomically(path) as file:
        file.write("x")


@pytest.mark.parametrize(
    "write", [lambda path: paths.open_path(path, "w"), paths.make_directories, _write_whole]
)
def test_http_cannot_be_written(write: Any, served: tuple[Path, str, str]) -> None:
    _, url, _ = served
    with pytest.raises(ValueError, match=r"x cannot be written: http\(s\) is read-only"):
        write(f"{url}/x")
