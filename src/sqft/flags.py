"""Command-line flags of a config class, one a field; the config of the flags that were given, and the flags that give a
config."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from sqft.errors import UsageError, did_you_mean
from sqft.options import check_within, coerce, from_dict


class Parser(argparse.ArgumentParser):
    """Speaks as the rest does: one sentence, with the nearest name."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; '{self.prog} --help' lists what there is")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise UsageError(f"unknown {action.dest} '{value}': {did_you_mean(str(value), map(str, action.choices))}")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments, parsed. Raises UsageError for what is unknown, empty, or no text."""
        parsed, unknown = self.parse_known_args(arguments)
        commands = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        taking = commands[0][parsed.command] if commands and parsed.command else self
        for given in unknown:
            if not given.startswith("-"):
                raise UsageError(f"unexpected argument '{given}'; '{taking.prog} --help' shows what it takes")
            flags = [flag for action in taking._actions for flag in action.option_strings]
            near = did_you_mean(given.split("=")[0], flags)
            fix = f"'{taking.prog} --help' lists them" if near.startswith("known are") else near
            raise UsageError(f"unknown option '{given}' of '{taking.prog}': {fix}")
        for action in taking._actions:
            if not action.option_strings and getattr(parsed, action.dest, None) == "":
                raise UsageError(f"{action.metavar} is empty: '{taking.prog} --help' shows what it takes")
        for given in arguments:
            if any("\ud800" <= letter <= "\udfff" for letter in given):  # bytes that were no text
                raise UsageError(f"{given!a} is not in the locale's encoding ({sys.getfilesystemencoding()}): set "
                                 "LC_ALL=C.UTF-8, or if it is no UTF-8 either, rename it")  # fmt: skip
        return parsed


def number(name: str, within: str) -> Callable[[str], int]:
    """What reads a flag that is of no config: a whole number in an interval."""

    def read(text: str) -> int:
        try:
            value = coerce(text, int)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
        check_within(name, value, within)
        return value

    return read


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


def inherit(arguments: argparse.Namespace, before: argparse.Namespace, names: Sequence[str]) -> argparse.Namespace:
    """The flags; those of ``names`` that were not given are as they were given before."""
    for name in names:
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(before, name))
    return arguments


def changed_options(config: Any) -> dict[str, Any]:
    """The options of a config that are not the default's."""
    default = {spec.name: spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
               for spec in dataclasses.fields(config)}  # fmt: skip
    return {name: value for name, value in vars(config).items() if value != default[name]}


def written_flags(config: Any, before: Any = None, names: Sequence[str] = ()) -> list[str]:
    """The flags of a config, only of options that differ from their defaults; of ``names`` of those that differ from
    ``before``, whose they inherit. Parsed, they give it back."""
    words: list[str] = []
    changed = changed_options(config) | {name: getattr(config, name) for name in names}
    for name, value in changed.items():
        if name in names and value == getattr(before, name):
            continue
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
