"""What an option is: a field with a default and a line of help, and rules that hold for it."""

from __future__ import annotations

from dataclasses import Field, field, fields
from typing import Any


def option(default: Any, text: str) -> Any:
    """A field with its default and the line that ``--help`` prints."""
    return field(default=default, metadata={"help": text})


def help_of(option: Field[Any]) -> str:
    """The line that ``--help`` prints for a field."""
    return str(option.metadata["help"])


def default_of(cls: type, name: str) -> Any:
    """The default of a field."""
    return next(option.default for option in fields(cls) if option.name == name)


def require(holds: bool, rule: str, got: object) -> None:
    """Refuse a value.

    Raises:
        ValueError: the rule does not hold.
    """
    if not holds:
        raise ValueError(f"{rule}, got {got!r}")
