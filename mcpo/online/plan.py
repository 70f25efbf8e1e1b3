"""What is sampled for a prompt: so many answers at each temperature, a seed of its own for each.

The paper draws two at each of three temperatures (arXiv 2502.04567, section 5.3) and does not say
which; these are the ones of the verifiable data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mcpo.records import Candidate, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What is to be answered."""

    row_id: str
    """Unique: seeds, files and messages name prompts by it."""
    prompt: str | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingPlan:
    """How a prompt is answered."""

    temperatures: tuple[float, ...] = (0.4, 0.7, 1.0)
    samples_per_temperature: int = 2
    max_new_tokens: int = 256
    """At which an answer is cut; it then is no finished one."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these."""
    seed: int = 0
    round: int = 0
    """Of the online loop: the same prompt gets other random numbers each time."""

    def __post_init__(self) -> None:
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(
                f"temperatures must be one or more numbers from 0 on, got {self.temperatures}"
            )
        for name in ("samples_per_temperature", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if "" in self.stop:
            raise ValueError(f"a stop string must not be empty, got {self.stop}")
        if 0 in self.temperatures and self.samples_per_temperature > 1:
            raise ValueError(
                "temperature 0 gives one answer however often it is asked for; set "
                f"samples_per_temperature to 1, got {self.samples_per_temperature}"
            )

    @property
    def settings(self) -> tuple[tuple[float, int], ...]:
        """Temperature and number of every answer to a prompt, in the order they are kept in."""
        return tuple(
            (temperature, index)
            for temperature in self.temperatures
            for index in range(self.samples_per_temperature)
        )

    def seed_of(self, row_id: str, temperature: float, index: int) -> int:
        """The seed of one answer: the same whatever else is asked, and when."""
        name = f"{self.seed}/{self.round}/{row_id}/{temperature}/{index}"
        # Servers take seeds of 63 bits at most.
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


Answers = tuple[Prompt, list[Candidate]]
"""A prompt and one candidate per setting of the plan, in that order."""


class Generator(Protocol):
    """Anything that answers prompts."""

    def sample(self, prompts: Sequence[Prompt], plan: SamplingPlan) -> Iterable[Answers]:
        """Every prompt with its answers as they come, in any order."""
        ...


def cut_at_stop(candidate: Candidate, stop: Sequence[str]) -> Candidate:
    """The answer up to the first stop string, and finished if there is one."""
    places = [place for each in stop if (place := candidate.text.find(each)) >= 0]
    if not places:
        return candidate
    return replace(candidate, text=candidate.text[: min(places)].strip(), finished=True)


OnPrompt = Callable[[int], None]
"""Called with the number of prompts that were answered since the last call."""
