"""The implementations side by side, ours and others', under the names of ``--impls``.

Others' are imported when they are built, so that each can be missing on its own.
"""
# N scored tokens, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cells import DEVICES, ONE_PASS, PATTERNS, TWO_PASSES
from benchmarks.workload import Head
from mcpo_kernels import available_impls, linear_logprob
from mcpo_kernels.impl import Impl

INSTALL = "python -m pip install -c constraints.txt --no-build-isolation -e '.[bench]'"
NUM_SEQS = 8
BETA = 0.01
"""Of the scalar DPO loss; small, so that its slope depends little on errors of long sums."""


class Missing(Exception):
    """An implementation cannot run here; says which, why, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """An implementation of the head."""

    name: str
    title: str
    build: Callable[[], Head]
    package: str | None = None
    impl: Impl | None = None
    scalar: bool = False
    compiled: bool = False
    """By torch.compile, for the shapes of its arguments."""
    devices: tuple[str, ...] = DEVICES

    @property
    def ours(self) -> bool:
        """It is one of this repository's."""
        return self.impl is not None

    @property
    def jobs(self) -> list[tuple[str, str]]:
        """Patterns and ways it is measured in."""
        found = [(pattern, ONE_PASS) for pattern in PATTERNS]
        if self.scalar:
            # One number for a whole batch scores no candidates.
            return [job for job in found if job[0] != "mcpo"]
        return found if self.ours else [*found, ("mcpo", TWO_PASSES)]


def named(name: str) -> Peer:
    """The peer of a name."""
    return next(peer for peer in PEERS if peer.name == name)


def build(peer: Peer) -> Head:
    """The callable of a peer.

    Raises:
        Missing: a package is not installed, or the implementation cannot run here.
    """
    try:
        return peer.build()
    except ModuleNotFoundError as error:
        raise Missing(f"{peer.name} needs {error.name}: {INSTALL}") from error


def version(peer: Peer) -> str:
    """Of the package a peer comes from, torch if of none; of ours, what it was compiled for."""
    if peer.impl is not None:
        return available_impls()[peer.impl].reason
    package = peer.package or "torch"
    return f"{package} {metadata.version(package)}"


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What one writes without a fused head."""
    # In one expression, so that nothing is held longer than it is needed.
    logp_NV = F.linear(hidden, weight).float().log_softmax(1)
    return logp_NV.gather(1, targets[:, None]).squeeze(1)


def _compiled() -> Head:
    return torch.compile(eager, dynamic=False)


def _trl_selective() -> Head:
    selective_log_softmax = import_module("trl.trainer.utils").selective_log_softmax

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # For bf16 it goes through the first axis one by one: sequences, as in TRL's trainers.
        num_rows = targets.shape[0]
        num_seqs = next(count for count in (8, 6, 4, 2, 1) if num_rows % count == 0)
        logits = F.linear(hidden, weight).view(num_seqs, -1, weight.shape[0])
        return selective_log_softmax(logits, targets.view(num_seqs, -1)).view(-1)

    return head


def _trl_chunked() -> Head:
    function = import_module("trl.kernels").ChunkedLogProbFunction
    # As its trainers call it: temperature 1, slabs of 32768, no cap, scale 1, nothing on the side.
    return lambda hidden, weight, targets: function.apply(
        hidden, weight, None, targets, 1.0, 32768, None, 1.0, ()
    )[0]


def _cce(impl: str) -> Head:
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, targets: (
        -loss(hidden, weight, targets, impl=impl, reduction="none")
    )


def _quack() -> Head:
    loss = import_module("quack.linear_cross_entropy").linear_cross_entropy_func
    return lambda hidden, weight, targets: -loss(hidden, weight, None, targets, reduction="none")


def _liger_dpo(*, compiled: bool) -> Head:
    loss = import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(
        beta=BETA, use_ref_model=False, compiled=compiled
    )

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        hidden_STD = hidden.view(NUM_SEQS, -1, hidden.shape[1])
        return loss(weight, hidden_STD, targets.view(NUM_SEQS, -1))[0]

    return head


def _liger_scaled() -> Head:
    name = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    function = import_module(name).LigerFusedLinearScaledCrossEntropyFunction
    return lambda hidden, weight, targets: -function.apply(hidden, weight, targets)


def _torch_chunked() -> Head:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: (
        -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)
    )


def _kernel(*, cached: bool) -> Head:
    state = available_impls()[Impl.CPU]
    if not state.available:
        raise Missing(f"impl='cpu' cannot run here: {state.reason}")

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # Enough for all logits, whose columns are kept by 64.
        cache_mb = hidden.shape[0] * (weight.shape[0] + 63) * 4 / 2**20 if cached else 0.0
        return linear_logprob(hidden, weight, targets, impl=Impl.CPU, cache_mb=cache_mb)

    return head


def _ours(impl: Impl) -> Head:
    state = available_impls()[impl]
    if not state.available:
        raise Missing(f"impl={impl.value!r} cannot run here: {state.reason}")
    return lambda hidden, weight, targets: linear_logprob(hidden, weight, targets, impl=impl)


def _portable() -> Head:
    return _ours(Impl.CHUNKED)


PEERS = (
    Peer(
        name="mcpo",
        title="mcpo",
        build=lambda: _kernel(cached=False),
        impl=Impl.CPU,
        devices=("cpu",),
    ),
    Peer(
        name="mcpo_cached",
        title="mcpo cached",
        build=lambda: _kernel(cached=True),
        impl=Impl.CPU,
        devices=("cpu",),
    ),
    Peer(
        name="mcpo_triton",
        title="mcpo triton",
        build=lambda: _ours(Impl.TRITON),
        impl=Impl.TRITON,
        devices=("cuda",),
    ),
    Peer(name="mcpo_portable", title="mcpo portable", build=_portable, impl=Impl.CHUNKED),
    Peer(name="eager", title="eager", build=lambda: eager),
    Peer(name="compile", title="torch.compile(eager)", build=_compiled, compiled=True),
    Peer(
        name="trl_selective",
        title="TRL selective_log_softmax",
        build=_trl_selective,
        package="trl",
    ),
    Peer(
        name="trl_chunked",
        title="TRL ChunkedLogProbFunction",
        build=_trl_chunked,
        package="trl",
    ),
    Peer(
        name="cce",
        title="cut_cross_entropy torch_compile",
        build=lambda: _cce("torch_compile"),
        package="cut-cross-entropy",
        compiled=True,
        devices=("cpu",),
    ),
    Peer(
        name="cce_kernel",
        title="cut_cross_entropy cce",
        build=lambda: _cce("cce"),
        package="cut-cross-entropy",
        devices=("cuda",),
    ),
    Peer(
        name="quack",
        title="QuACK linear_cross_entropy",
        build=_quack,
        package="quack-kernels",
        devices=("cuda",),
    ),
    Peer(
        name="liger_scaled",
        title="Liger fused_linear_scaled_cross_entropy",
        build=_liger_scaled,
        package="liger-kernel",
    ),
    Peer(name="torch_chunked", title="F.linear_cross_entropy", build=_torch_chunked),
    Peer(
        name="liger_dpo_compiled",
        title="Liger DPO, compiled (scalar loss)",
        build=lambda: _liger_dpo(compiled=True),
        package="liger-kernel",
        scalar=True,
        compiled=True,
    ),
    Peer(
        name="liger_dpo",
        title="Liger DPO, eager (scalar loss)",
        build=lambda: _liger_dpo(compiled=False),
        package="liger-kernel",
        scalar=True,
    ),
)
"""In the order of the tables."""
