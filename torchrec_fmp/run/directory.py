"""The run directory: all files that a job leaves behind."""

from __future__ import annotations

import json

from torchrec_fmp import paths


class RunDirectory:
    """Names and writes the files of a run; see docs/run_directory.md.

    Args:
        path: path of the directory.
        writes: whether this rank writes; other ranks can get file names, but write nothing.
    """

    def __init__(self, path: str, writes: bool) -> None:
        self.path = path
        self._writes = writes

    def create(self) -> None:
        """Creates the directory.

        Raises:
            FileExistsError: if the path exists and is not an empty directory, because runs never
                share a directory.
        """
        if not self._writes:
            return
        # Not paths.list_files, which leaves out hidden files and subdirectories.
        manager = paths.manager
        if paths.exists(self.path) and not (manager.isdir(self.path) and not manager.ls(self.path)):
            raise FileExistsError(
                f"the run directory {self.path} exists and is not empty: name a new one with --out"
            )
        paths.make_directories(self.path)

    def file(self, name: str) -> str:
        """Path of a file in the directory."""
        return paths.join(self.path, name)

    def write_text(self, name: str, text: str) -> None:
        """Writes a file atomically."""
        if self._writes:
            with paths.write_atomically(self.file(name)) as file:
                file.write(text)

    def write_json(self, name: str, content: object) -> None:
        """Writes a JSON file atomically; NaN becomes null, because JSON has no NaN."""
        self.write_text(name, json.dumps(_without_nan(content), indent=2) + "\n")


def _without_nan(content: object) -> object:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and content != content else content
