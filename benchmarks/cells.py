"""What is measured: a grid of shapes, dtypes, patterns of use, and implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

DTYPES = ("bf16", "fp32")
PATTERNS = ("score", "train", "mcpo")
ONE_PASS, TWO_PASSES = "one pass", "two passes"


class Shape(NamedTuple):
    """N scored tokens, D hidden, V vocabulary."""

    num_tokens: int
    num_hidden: int
    num_vocab: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


GRID = tuple(
    Shape(num_tokens, num_hidden, num_vocab)
    for num_hidden, num_vocab in ((576, 49152), (2048, 128256))
    for num_tokens in (256, 1024, 2048)
)
QUICK = (Shape(192, 256, 16384),)
DEVICES = ("cpu", "cuda")
CUDA_GRID = (Shape(8192, 576, 49152), Shape(4096, 2048, 128256), Shape(8192, 4096, 128256))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One implementation doing one job on one set of inputs."""

    shape: Shape
    dtype: str
    pattern: str
    way: str
    impl: str
    device: str = "cpu"

    @property
    def group(self) -> str:
        """Of cells that do the same job."""
        return f"{self.pattern} {self.shape} {self.dtype}"

    def __str__(self) -> str:
        suffix = f"-{self.way.replace(' ', '_')}" if self.pattern == "mcpo" else ""
        return f"{self.impl}{suffix}"


def parse_shape(text: str) -> Shape:
    """A shape as on the command line, such as ``1024x576x49152``.

    Raises:
        ValueError: it is not three positive numbers, or the rows cannot be cut into sequences.
    """
    sizes = [int(size) for size in text.split("x") if size.isdecimal()]
    if len(sizes) != 3 or text.count("x") != 2 or min(sizes) < 1:
        raise ValueError(f"a shape must be NxDxV, such as 1024x576x49152, got {text!r}")
    if sizes[0] % 8:
        raise ValueError(f"N must be a multiple of 8, for sequences of equal length, got {text!r}")
    return Shape(*sizes)


def parse_names(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """A comma-separated selection, in the order of ``known``.

    Raises:
        ValueError: a name is not known.
    """
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{option} must be out of {', '.join(known)}; got {', '.join(unknown)}")
    return tuple(name for name in known if name in names)
