"""Command-line flags of a config class, one a field; the config of the flags that were given, and the flags that give a
config."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any

from sqft.errors import UsageError
from sqft.options import from_dict


def add_flags(sub: argparse.ArgumentParser, config_class: Any) -> None:
    """One flag a field of the config class; its help and default come from there."""
    hints = typing.get_type_hints(config_class)
    group = sub.add_argument_group("settings")
    own = vars(config_class).get("__annotations__", {})  # inherited options come last
    for spec in sorted(dataclasses.fields(config_class), key=lambda spec: spec.name not in own):
        flag, hint = _flag(spec.name), hints[spec.name]
        if spec.metadata["alias"]:
            group.add_argument(_flag(spec.metadata["alias"]), dest=spec.metadata["alias"], help=argparse.SUPPRESS)
        default = spec.default if spec.default is not dataclasses.MISSING else None
        choices = ", ".join(spec.metadata["choices"])
        text = spec.metadata["help"].replace("%", "%%") + (f" ({choices})" if choices else "")
        if default not in (None, ""):
            text += f" [{str(default).replace('%', '%%')}]"
        if hint is bool:
            group.add_argument(flag, dest=spec.name, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif typing.get_origin(hint) in (list, dict):
            group.add_argument(flag, dest=spec.name, nargs="+", metavar="X", default=None, help=text)
        else:
            if typing.get_origin(hint) in (types.UnionType, typing.Union):
                hint = typing.get_args(hint)[0]
            group.add_argument(flag, dest=spec.name, metavar=hint.__name__.upper(), default=None, help=text)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_flags(arguments: argparse.Namespace, config_class: Any) -> Any:
    """The config of the flags that were given."""
    hints = typing.get_type_hints(config_class)
    aliases = {spec.metadata["alias"]: spec.name for spec in dataclasses.fields(config_class)}
    given = {}
    for name, hint in {**hints, **{old: hints[new] for old, new in aliases.items() if old}}.items():
        value = getattr(arguments, name)
        if value is None:
            continue
        if typing.get_origin(hint) is dict:
            pairs = [item.partition("=") for item in value]
            if any(not separator for _, separator, _ in pairs):
                raise UsageError(f"{_flag(name)} takes PATTERN=NUMBER, e.g. '*.down_proj=0.4'")
            value = {key: number for key, _, number in pairs}
        given[name] = value
    return from_dict(config_class, given)


def changed_options(config: Any) -> dict[str, Any]:
    """The options of a config that are not the default's."""
    default = {spec.name: spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
               for spec in dataclasses.fields(config)}  # fmt: skip
    return {name: value for name, value in vars(config).items() if value != default[name]}


def written_flags(config: Any) -> list[str]:
    """The flags of a config, only of options that differ from their defaults; parsed, they give it back."""
    words: list[str] = []
    for name, value in changed_options(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, dict):
            words += [flag, *(f"{key}={number}" for key, number in value.items())]
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
            # A value that begins with a dash would be taken for a flag.
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return words
