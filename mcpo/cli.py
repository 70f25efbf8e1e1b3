"""From a YAML file and the command line to a ``Config``: unknown names and wrong types are refused.

Every field of every section of ``Config`` is one option, under its own name, everywhere:
``learning_rate: 1e-6`` in the file, ``--learning_rate 1e-6`` on the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mcpo.config import Config, help_of
from mcpo.data.mixture import SourceSpec, parse_source

# Presets of engines; an installed package has none, a checkout does.
LAUNCH = Path(__file__).parents[1] / "recipes" / "launch"


C = TypeVar("C", bound=Config)


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """The options of ``python -m mcpo.train``; see ``parse_args_of``."""
    return parse_args_of(Config, "mcpo.train", "Train a causal LM with MC-PO.", argv)


def parse_args_of(root: type[C], program: str, what: str, argv: Sequence[str] | None = None) -> C:
    """Read ``--launch NAME``, ``--config FILE`` and the options; a later one overrides.

    Args:
        root: ``Config``, or a subclass with further sections.
        program: what ``python -m`` runs.
        what: a sentence for ``--help``.
        argv: the words of the command line; None: those of this process.

    Raises:
        ValueError: an unknown name, a value of the wrong type, or a file that is no YAML.
        FileNotFoundError: there is no such configuration file, or no such preset.
    """
    parser = _parser(root, program, what)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            raise ValueError(
                _unknown_key(root, word.removeprefix("--").split("=")[0], "the command line")
            )
    if unknown:
        raise ValueError(f"options must be written --name value, got the stray words {unknown}")
    given = {name: value for name, value in vars(known).items() if value is not None}
    preset, config_file = given.pop("launch", None), given.pop("config", None)
    values = read_yaml(launch_file(preset), root) if preset else {}
    values |= read_yaml(config_file, root) if config_file else {}
    return make_config_of(root, values | given)


def launch_file(name: str) -> str:
    """The preset of that name in recipes/launch of this checkout.

    Raises:
        FileNotFoundError: there is none.
    """
    names = sorted(path.stem for path in LAUNCH.glob("*.yaml"))
    if name not in names:
        known = f"one of {', '.join(names)}" if names else f"a file in {LAUNCH}, which has none"
        raise FileNotFoundError(
            f"--launch must name {known}; got {name!r}. A file of your own goes by --config"
        )
    return str(LAUNCH / f"{name}.yaml")


def read_yaml(path: str, root: type[Config] = Config) -> dict[str, Any]:
    """The mapping in a YAML file, its names checked."""
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"--config must name a YAML file, got {path!r}, which is not there")
    try:
        with Path(path).open("rb") as file:
            loaded = yaml.safe_load(file)
    # Nesting too deep for the parser is no YAMLError.
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {type(loaded).__name__}")
    for name in loaded:
        if name not in option_names(root):
            raise ValueError(_unknown_key(root, str(name), path))
    return loaded


def make_config(values: Mapping[str, Any]) -> Config:
    """Build a ``Config`` from flat names, converting each value to the type of its field."""
    return make_config_of(Config, values)


def make_config_of(root: type[C], values: Mapping[str, Any]) -> C:
    """The same for a subclass with further sections."""
    for name in values:
        if name not in option_names(root):
            raise ValueError(_unknown_key(root, name, "the configuration"))
    sections: dict[str, Any] = {}
    for section, cls in _sections(root).items():
        hints = get_type_hints(cls)
        mine = {
            field.name: convert(values[field.name], hints[field.name], field.name)
            for field in dataclasses.fields(cls)
            if field.name in values
        }
        sections[section] = cls(**mine)
    return root(**sections)


def to_flat(config: Config) -> dict[str, Any]:
    """The same names and values as a YAML file of this run would hold."""
    flat: dict[str, Any] = {}
    for section in _sections(type(config)):
        flat |= dataclasses.asdict(getattr(config, section))
    return flat


def option_names(root: type[Config] = Config) -> frozenset[str]:
    """Every name that a file or the command line may set."""
    return frozenset(
        field.name for cls in _sections(root).values() for field in dataclasses.fields(cls)
    )


def convert(value: Any, kind: Any, name: str) -> Any:
    """Turn a YAML value or a word of the command line into the type of its field."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None or value == "none":
            return None
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        return convert(value, kind, name)
    if origin is Literal:
        if "on" in arguments:
            # YAML reads on and off as true and false.
            value = {"true": "on", "false": "off"}.get(str(value).lower(), value)
        if value not in arguments:
            raise ValueError(f"{name} must be one of {', '.join(arguments)}, got {value!r}")
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(convert(item, arguments[0], name) for item in items)
    if kind is SourceSpec:
        return _source(value, name)
    return _convert_scalar(value, kind, name)


def _source(value: Any, name: str) -> SourceSpec:
    if isinstance(value, str):
        return parse_source(value)
    if isinstance(value, SourceSpec):
        return value
    fields = {field.name for field in dataclasses.fields(SourceSpec)}
    if not isinstance(value, dict) or "path" not in value or not fields.issuperset(value):
        raise ValueError(
            f"{name} must hold file or dataset names, or mappings with path and any of "
            f"{', '.join(sorted(fields - {'path'}))}; got {value!r}"
        )
    hints = get_type_hints(SourceSpec)
    return SourceSpec(
        **{field: convert(one, hints[field], f"{name}: {field}") for field, one in value.items()}
    )


def _convert_scalar(value: Any, kind: type, name: str) -> Any:
    if kind is bool:
        words = {"true": True, "false": False}
        if isinstance(value, bool) or str(value).lower() in words:
            return value if isinstance(value, bool) else words[str(value).lower()]
    elif kind is str:
        if isinstance(value, str):
            return value
    # YAML reads 1e-6 as text: numbers come as words from both sides.
    elif not isinstance(value, bool):
        try:
            return kind(value) if kind is float else int(str(value))
        except (TypeError, ValueError):
            pass
    raise ValueError(f"{name} must be {_kind_name(kind)}, got {value!r}")


def _kind_name(kind: type) -> str:
    names = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}
    return names[kind]


def _sections(root: type[Config]) -> dict[str, Any]:
    return typing.get_type_hints(root)


def _unknown_key(root: type[Config], name: str, where: str) -> str:
    nearest = difflib.get_close_matches(name.replace("-", "_"), option_names(root), n=1, cutoff=0)
    return f"unknown option {name!r} in {where}; did you mean {nearest[0]!r}? (--help lists all)"


def _parser(root: type[Config], program: str, what: str) -> argparse.ArgumentParser:
    """One option per field, grouped by section; values stay words until ``convert``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=f"{what} `torchrun --nproc-per-node 2 -m {program}` runs the same job on "
        "several processes.",
        epilog=f"example: python -m {program} --config recipes/default.yaml --learning_rate 5e-6",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the names below")
    parser.add_argument("--launch", metavar="NAME", help="an engine of recipes/launch, by name")
    for cls in _sections(root).values():
        group = parser.add_argument_group((cls.__doc__ or "").splitlines()[0].rstrip("."))
        for field in dataclasses.fields(cls):
            many = get_origin(get_type_hints(cls)[field.name]) is tuple
            flag_only = get_type_hints(cls)[field.name] is bool
            group.add_argument(
                f"--{field.name}",
                nargs="+" if many else ("?" if flag_only else None),
                const="true" if flag_only else None,
                metavar="VALUE",
                help=f"{help_of(field)} (default: {_shown(field.default)})".replace("%", "%%"),
            )
    return parser


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "unset"}[default]
    return str(default)
