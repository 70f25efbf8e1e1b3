"""Forwards in lockstep, for engines in which a forward gathers weights from all ranks.

Ranks differ in how many forwards they make without gradients: in batches of an evaluation, in
tokens until the last of their answers has ended. Before each forward a rank tells the others that
it makes one. A rank that is done makes forwards of a few tokens for as long as it hears of others,
so nobody waits for it. They are of the same kind, through the policy or through its model: ZeRO-3
fetches weights ahead, in an order that it has learnt, and ranks must have learnt the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from mcpo.pack import move, pack
from mcpo.policy import unpacked
from mcpo.records import TokenizedGroup

if TYPE_CHECKING:
    from mcpo.engine import Engine

# Every weight takes part in a forward of it, and has a gradient in its backward.
TINY = TokenizedGroup(row_id="none", prompt_ids=(0,), candidate_ids=((0, 0), (0, 0)))


@contextmanager
def run_along(engine: Engine, when_done: Callable[[], None]) -> Generator[None]:
    """Inside, each rank makes as many forwards as it likes, of the policy or of its model.

    ``when_done`` is called once all ranks have left.
    """
    policy = engine.policy

    def announce(module: nn.Module, arguments: object) -> None:
        del arguments
        packed, plain = _running(engine, packed=module is policy, plain=module is not policy)
        if packed and plain:
            raise RuntimeError(
                "inside together() all ranks must make packed forwards or all of them plain ones, "
                f"got {packed} and {plain} of either at once; leave it in between"
            )

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
    with torch.no_grad():
        while any(running := _running(engine, packed=False, plain=False)):
            if running[0]:
                policy(move(pack([TINY], share_prefix=True), engine.device))
            else:
                with unpacked(policy) as model:
                    token_BL = torch.zeros(1, 1, dtype=torch.int64, device=engine.device)
                    model(input_ids=token_BL, use_cache=False)
    when_done()


def _running(engine: Engine, *, packed: bool, plain: bool) -> tuple[int, int]:
    """Tell all ranks what forward this one makes now; how many make one, of either kind."""
    counts = engine.sum(torch.tensor([int(packed), int(plain)], device=engine.device))
    return int(counts[0]), int(counts[1])
