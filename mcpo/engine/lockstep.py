"""Forwards in lockstep, for engines in which a forward gathers weights from all ranks.

Ranks differ in how many forwards they make without gradients: in batches of an evaluation, in
tokens until the last of their answers has ended. Before each forward a rank tells the others that
it makes one. A rank that is done makes forwards of one token for as long as it hears of others, so
nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from mcpo.policy import unpacked

if TYPE_CHECKING:
    from mcpo.engine import Engine


@contextmanager
def run_along(engine: Engine, when_done: Callable[[], None]) -> Generator[None]:
    """Inside, each rank makes as many forwards as it likes, of the policy or of its model.

    ``when_done`` is called once all ranks have left.
    """
    policy = engine.policy

    def announce(module: torch.nn.Module, arguments: object) -> None:
        del module, arguments
        _others(engine, running=True)

    # The policy's forward does not go through its model's, so either is heard of once. Hooks that
    # are prepended run before those that gather.
    handles = [
        module.register_forward_pre_hook(announce, prepend=True)
        for module in (policy, policy.model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    token_BL = torch.zeros(1, 1, dtype=torch.int64, device=engine.device)
    with torch.no_grad():
        while _others(engine, running=False):
            with unpacked(policy) as model:
                model(input_ids=token_BL, use_cache=False)
    when_done()


def _others(engine: Engine, *, running: bool) -> bool:
    """Tell all ranks whether this one makes a forward now, and hear whether any does."""
    return bool(engine.sum(torch.tensor(int(running), device=engine.device)))
