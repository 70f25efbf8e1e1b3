"""Tunes the Triton kernels of the head on this GPU and keeps the tiles on disk.

    python -m mcpo_kernels.tune --hidden 4096 --dtype bfloat16

Each kernel in each tile of its space, in a forward or a backward; minutes. Several processes of one
job should find the tiles tuned, so that all of them take the same.
"""
# N scored tokens, D hidden, V vocabulary

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mcpo_kernels.linear_logprob.triton.tiles import Tile
    from mcpo_kernels.linear_logprob.triton.tuning import Key

NUM_TOKENS, NUM_VOCAB = 4096, 32768
# float32 has one tile.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def tune(
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    wanted: Sequence[Key],
    say: Callable[[str], object] = lambda _: None,
) -> None:
    """Find the fastest tile of each key and keep it."""
    from mcpo_kernels.linear_logprob.triton import tuning

    for key in wanted:
        time = timer(device, dtype, hidden, key)
        best, taken = tuning.fastest(key.space, time)
        tuning.save(key, best, taken)
        default = key.space[0]
        before = f"{taken[default]:.3f} ms" if default in taken else "does not run"
        say(f"{key.kernel}: {tuple(best)} {taken[best]:.3f} ms; {tuple(default)} {before}")
    tuning.forget()


def timer(
    device: torch.device, dtype: torch.dtype, hidden: int, key: Key
) -> Callable[[Tile], float | None]:
    """Milliseconds of the forward, or of the backward, with a tile for one of its kernels."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    from mcpo_kernels.linear_logprob.head import Head, Needs, Saved
    from mcpo_kernels.linear_logprob.triton import tiles
    from mcpo_kernels.linear_logprob.triton.backward import backward
    from mcpo_kernels.linear_logprob.triton.forward import forward
    from mcpo_kernels.linear_logprob.triton.launch import Launch, using

    hidden_ND = torch.randn(NUM_TOKENS, hidden, device=device).to(dtype)
    weight_VD = (torch.randn(NUM_VOCAB, hidden, device=device) / hidden**0.5).to(dtype)
    target_N = torch.randint(NUM_VOCAB, (NUM_TOKENS,), device=device)
    grad_N = torch.ones(NUM_TOKENS, device=device)
    head = Head(weight_VD, None, None, 1.0)
    default = tiles.default_tiles(key.family, key.operands)

    def run() -> None:
        if key.kernel == "forward":
            forward(hidden_ND, target_N, head, 0)
        else:
            backward(grad_N, saved, head, 0.0, Needs(True, True, False))

    def time(tile: Tile) -> float | None:
        chosen = {**default, key.kernel: tile}
        try:
            with using(Launch(key.family, key.operands, "ieee", chosen)):
                # One number, as no quantiles are asked for.
                taken: Any = do_bench(run)
                return float(taken)
        except OutOfResources:
            return None

    with using(Launch(key.family, key.operands, "ieee", default)):
        saved = Saved(hidden_ND, target_N, forward(hidden_ND, target_N, head, 0))
    return time


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mcpo_kernels.tune", description=__doc__)
    parser.add_argument(
        "--hidden", type=int, action="append", required=True, help="may be repeated"
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated")
    parser.add_argument("--device", default="cuda", help="such as cuda:1")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: tuning needs a CUDA or ROCm device, and torch sees none", file=sys.stderr)
        return 2
    from mcpo_kernels.linear_logprob.triton import tuning
    from mcpo_kernels.linear_logprob.triton.launch import family_of

    device = torch.device(options.device)
    for name in options.dtype or ["bfloat16"]:
        for hidden in sorted(set(map(tuning.hidden_class, options.hidden))):
            print(f"{torch.cuda.get_device_name(device)}, {name}, hidden sizes up to {hidden}")
            found = tuning.keys(device, family_of(device), DTYPES[name], hidden)
            tune(device, DTYPES[name], hidden, found, print)
    print(f"kept in {tuning.folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
