"""Command-line flags of a config class, one a field, and the config of the flags that were given."""

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
    own = vars(config_class)["__annotations__"]  # inherited options come last
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
