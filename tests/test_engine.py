"""What torchrun's variables say; what the engines do is tested by whole runs (test_run.py)."""

from __future__ import annotations

import pytest

from mcpo.engine import launched_by_torchrun, local_rank, local_world_size, rank, world_size

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("given", "launched", "numbers"),
    [
        ({}, False, (0, 1, 0, 1)),
        (dict(zip(NAMES, ("5", "8", "1", "4"), strict=True)), True, (5, 8, 1, 4)),
        # Some batch systems set one of them for jobs of one process.
        ({"RANK": "3"}, False, (0, 1, 0, 1)),
    ],
    ids=["none", "torchrun", "rank-alone"],
)
def test_the_place_in_a_group_is_what_torchrun_says(
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    launched: bool,
    numbers: tuple[int, int, int, int],
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launched_by_torchrun() == launched
    assert (rank(), world_size(), local_rank(), local_world_size()) == numbers
