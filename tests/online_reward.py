"""A reward for the online loop: how many different words an answer has."""

from collections.abc import Sequence


def words(prompt: str, answers: Sequence[str]) -> list[float]:
    return [float(len(set(answer.split()))) for answer in answers]
