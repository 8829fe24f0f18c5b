"""Strict configuration: loads any dataclass from YAML and overrides, and checks its values.

Nothing here knows a section by name: the dataclass alone defines the sections.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pydoc import locate
from types import ModuleType
from typing import Any, Generic, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from torchrec_fmp import paths

Config = TypeVar("Config")

_CLASS = "class_path"


class ConfigError(ValueError):
    """An unusable configuration; the message names the option and what would be valid."""


@dataclass(frozen=True)
class Loader(Generic[Config]):
    """Reads a dataclass whose fields are the sections of a YAML file.

    Args:
        root: dataclass to load.
        program: name of the command, for messages.
        packages: packages whose classes YAML may name without their module.
        bases: base classes of the objects that YAML selects by class name.
        defaults: option path -> its default class. A default instance could not be written into
            the composed YAML.
        former: former module -> present module of its classes; the longest match wins.
    """

    root: type[Config]
    program: str
    packages: Sequence[ModuleType] = ()
    bases: Sequence[type[Any]] = ()
    defaults: Mapping[str, type] = field(default_factory=dict)
    former: Mapping[str, str] = field(default_factory=dict)

    def load(self, path: str, overrides: Sequence[str] = ()) -> tuple[Config, str]:
        """Reads a file and applies overrides such as `--train.batch_size 512`.

        Returns:
            The configuration, and the composed YAML that loads to the same configuration.

        Raises:
            ConfigError: for unknown options, wrong types or values, and keys given twice.
            FileNotFoundError: if there is no such file.
        """
        content = self._renamed(read_yaml(path))
        self._check_sections(content, path)
        parser = self._parser()
        try:
            settings = parser.parse_object(content)
            settings = parser.parse_args(self._renamed(list(overrides)), namespace=settings)
            composed = self._shortened(yaml.safe_load(parser.dump(settings)))
            parts = parser.instantiate(settings)
            config = self.root(**{name: getattr(parts, name) for name in self._sections})
        except ArgumentError as error:
            raise ConfigError(f"{path}: {self._explain(str(error), parser)}") from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from error
        return config, yaml.safe_dump(composed, sort_keys=False)

    @property
    def _sections(self) -> list[str]:
        return [section.name for section in fields(self.root)]  # type: ignore[arg-type]

    def _parser(self) -> ArgumentParser:
        for package in self.packages:
            _import_all(package)
        parser = ArgumentParser(prog=self.program, exit_on_error=False, allow_abbrev=False)
        parser.add_class_arguments(self.root)
        parser.set_defaults(
            {name: {_CLASS: _class_path(kind)} for name, kind in self.defaults.items()}
        )
        return parser

    def _check_sections(self, content: Mapping[str, object], path: str) -> None:
        known = self._sections
        for name in content:
            if name not in known:
                near = "".join(f" Did you mean '{match}'?" for match in nearest(str(name), known))
                raise ConfigError(f"{path}: there is no section '{name}'.{near} Sections: {known}")

    def _explain(self, message: str, parser: ArgumentParser) -> str:
        """Adds the nearest valid option or class to a message about an unknown one."""
        known = [a.dest for a in parser._actions if a.dest.partition(".")[0] in self._sections]
        for class_path in re.findall(r"class_path '([\w.]+)'", message):
            located = locate(class_path)
            if callable(located):
                known += list(inspect.signature(located).parameters)
        unknown = re.findall(r"--([\w.]+)|[Oo]ption '([\w.]+)'", message)
        names = [part for match in unknown for part in match if part and part not in known]
        near = [match for name in names for match in nearest(name, known)]
        classes = [cls.__name__ for base in self.bases for cls in base.__subclasses__()]
        for name in re.findall(r"import path string: (\w+)", message):
            near += nearest(name, classes)
        return f"{message}. Did you mean '{near[0]}'?" if near else message

    def _renamed(self, content: Any) -> Any:
        """Replaces class paths in former modules with the present ones, at any depth."""
        if isinstance(content, dict):
            return {key: self._renamed(value) for key, value in content.items()}
        if isinstance(content, list):
            return [self._renamed(value) for value in content]
        return self._present(content) if isinstance(content, str) else content

    def _present(self, text: str) -> str:
        option, equals, value = text.rpartition("=")
        module, _, name = value.rpartition(".")
        for former in sorted(self.former, key=len, reverse=True):
            if module == former or module.startswith(f"{former}."):
                return f"{option}{equals}{self.former[former]}{module[len(former) :]}.{name}"
        return text

    def _shortened(self, content: Any) -> Any:
        """Shortens class paths to the class name where that suffices to find it, at any depth."""
        if isinstance(content, list):
            return [self._shortened(value) for value in content]
        if not isinstance(content, dict):
            return content
        short = {key: self._shortened(value) for key, value in content.items()}
        named = short.get(_CLASS)
        cls: Any = locate(named) if isinstance(named, str) else None
        own = tuple(f"{package.__name__}." for package in self.packages)
        if isinstance(cls, type) and cls.__module__.startswith(own):
            short[_CLASS] = cls.__name__
        return short


def read_yaml(path: str) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        ConfigError: if the file is not a YAML mapping, or gives a key twice.
        FileNotFoundError: if there is no such file.
    """
    with paths.open_path(path) as file:
        text = file.read()
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a YAML mapping of sections")
    return content


def _import_all(package: ModuleType) -> None:
    """Makes the classes of a package known, so that YAML may name them without their module."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def _class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """The known name most similar to `name`, or an empty list if none is close."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.5)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader that rejects a key given twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: '{key}' is given twice")
        return super().construct_mapping(node, deep)


def check_positive(config: object, section: str, *names: str) -> None:
    """Raises ValueError for the first named attribute that is not positive and finite."""
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{section}.{name} is {value}; it must be positive and finite")
