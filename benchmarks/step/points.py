"""What is measured: a model, the lengths of a group, a precision."""

from __future__ import annotations

from dataclasses import dataclass

SMOLLM2, TINY = "smollm2-135m", "tiny"
MODELS = (SMOLLM2, TINY)
DTYPES = ("fp32", "bf16")
LENGTHS = ((64, 256), (256, 128), (512, 256), (1024, 128))
POOLS = (1, 3, 5, 15)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One problem that every arm is given."""

    model: str
    dtype: str
    prompt: int
    """Tokens of the prompt; 0 where the groups are those of a file."""
    completion: int
    """Tokens of each candidate, the last one being a target only; 0 for a file."""
    pool: int
    """Candidates besides the chosen one; of a file at most."""
    groups: int = 1
    """Prompts of the step."""
    data: str = ""
    """Name of the file the groups are from."""
    device: str = "cpu"

    @property
    def lengths(self) -> str:
        """In words."""
        if self.data:
            return f"{self.groups} rows of {self.data}"
        return f"P = {self.prompt}, C = {self.completion}"

    def __str__(self) -> str:
        place = "" if self.device == "cpu" else f", {self.device}"
        return f"{self.model}, {self.lengths}, pool of {self.pool}, {self.dtype}{place}"


GRID = tuple(f"{prompt}x{completion}x{pool}" for prompt, completion in LENGTHS for pool in POOLS)
QUICK = (Point(model=TINY, dtype="fp32", prompt=12, completion=6, pool=3),)


def parse_point(text: str, model: str, dtype: str) -> Point:
    """A point as on the command line, such as ``256x128x5``.

    Raises:
        ValueError: it is not three positive numbers, or a candidate has a single token.
    """
    sizes = [int(size) for size in text.split("x") if size.isdecimal()]
    if len(sizes) != 3 or text.count("x") != 2 or min(sizes) < 1 or sizes[1] < 2:
        raise ValueError(
            "a point must be PROMPTxCOMPLETIONxPOOL, such as 256x128x5, completions of 2 tokens "
            f"at least; got {text!r}"
        )
    return Point(model=model, dtype=dtype, prompt=sizes[0], completion=sizes[1], pool=sizes[2])
