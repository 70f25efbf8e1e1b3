"""DeepSpeed's ZeRO: optimizer (stage 1), gradients (2) and weights (3) sharded over processes.

The policy computes as on one process, in autocast over float32 weights, so DeepSpeed is configured
for float32 and does not clip or scale by itself. Its own optimizers and its extension for
communication on CPUs, which it would compile when it starts, are not used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from mcpo.config import ScaleConfig
from mcpo.engine import sharded_files, zero_files
from mcpo.engine.lockstep import run_along
from mcpo.engine.ranks import Ranks
from mcpo.engine.whole import WholeState
from mcpo.policy import Policy


class ZeroEngine(Ranks):
    """A policy whose optimizer, gradients or weights DeepSpeed shards.

    Args:
        policy: with its weights, on the host or the device; sharded in place.
        optimizer: made of the policy's whole weights; DeepSpeed hands it flat shards of them.
        device: of this rank.
        config: stage and offload.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        config: ScaleConfig,
    ) -> None:
        super().__init__(device)
        deepspeed = quiet_deepspeed(device)
        settings = zero_settings(config, device, policy)
        self._deepspeed = deepspeed
        self._stage = config.zero_stage
        if self._stage == 3:
            # Else all of it would be on the device for a moment.
            deepspeed.zero.Init(module=policy, config_dict_or_path=settings)
            for module in policy.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(device))
        self._zero: Any = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=settings, dist_init_required=False
        )[0]
        if self._stage < 3:
            # DeepSpeed looks once for the moments of all groups, after the step of the first one.
            for group in optimizer.param_groups:
                for part in group["params"]:
                    optimizer.state[part] = sharded_files.fresh_moments(part)
        self.policy = policy
        self.optimizer = optimizer
        self.lockstep = self._stage == 3

    def rounds(self, count: int) -> int:
        """A backward reduces gradients, and a forward may gather weights, by all ranks."""
        return self.largest(count)

    @contextmanager
    def micro_step(self, *, last: bool) -> Generator[None]:
        """Stage 1 reduces gradients in the last micro-batch, the others in each."""
        self._zero.set_gradient_accumulation_boundary(last)
        yield

    def __call__(self, *arguments: object) -> Tensor:
        """The policy's forward through DeepSpeed."""
        return self._zero(*arguments)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; the factor undoes the mean over ranks."""
        self._zero.backward(loss * self.world_size, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> Tensor:
        """The norm of the gradient over all ranks; DeepSpeed scales when it takes the step."""
        self._zero.optimizer.clip_grad = max_norm
        if self._stage < 3:
            return torch.as_tensor(self._zero.optimizer.scaled_global_norm(), device=self.device)
        squares = [
            self._deepspeed.utils.safe_get_local_grad(weight)
            .double()
            .square()
            .sum()
            .to(self.device)
            for weight in self.policy.parameters()
            if weight.requires_grad
        ]
        return self.sum(torch.stack(squares).sum()).sqrt().float()

    def update(self) -> None:
        """Take the step, which also drops the gradients."""
        self._zero.step()

    def together(self) -> AbstractContextManager[None]:
        """In stage 3 ranks that are done run along; before, a forward needs no other rank."""
        return run_along(self, lambda: None) if self.lockstep else nullcontext()

    def whole_state(self) -> Mapping[str, Tensor]:
        """The model's state dict, in stage 3 a tensor gathered when it is looked up."""
        return WholeState(self.policy.model.state_dict(keep_vars=True), self._whole)

    def _whole(self, tensor: Tensor) -> Tensor:
        with self._gathered(tensor):
            return tensor.detach().clone()

    def _gathered(
        self, tensor: Tensor, *, source: int | None = None
    ) -> AbstractContextManager[None]:
        """Inside, a weight of stage 3 is whole; what rank ``source`` makes of it stays."""
        return self._deepspeed.zero.GatheredParameters(
            [tensor], modifier_rank=source, enabled=hasattr(tensor, "ds_id")
        )

    def lasting_state(self) -> dict[str, Tensor]:
        """Weights and lasting buffers themselves, tied ones once."""
        return sharded_files.lasting(self.policy.model)

    def set_weight(self, tensor: Tensor, value: Tensor) -> None:
        """Of a weight that is trained, the shards that the next step starts from."""
        if tensor.requires_grad and self._stage == 3:
            utils = self._deepspeed.utils
            utils.safe_set_local_fp32_param(tensor, self._part(tensor, value))
        elif tensor.requires_grad:
            self._deepspeed.utils.safe_set_full_fp32_param(tensor, value)
        else:
            with self._gathered(tensor, source=0):
                tensor.detach().copy_(value)

    def moment(self, weight: Tensor, name: str) -> Tensor:
        """The whole of a moment, gathered by all ranks."""
        return self._deepspeed.utils.safe_get_full_optimizer_state(weight, name)

    def set_moment(self, weight: Tensor, name: str, value: Tensor) -> None:
        """This rank's part of a moment, from the whole."""
        if self._stage == 3:
            utils = self._deepspeed.utils
            utils.safe_set_local_optimizer_state(weight, self._part(weight, value), name)
        else:
            self._deepspeed.utils.safe_set_full_optimizer_state(weight, value, name)

    def _part(self, weight: Any, value: Tensor) -> Tensor:
        """What this rank holds of a flat tensor that was padded to a multiple of the ranks."""
        size = weight.ds_tensor.ds_numel
        flat = value.new_zeros(size * self.world_size)
        flat[: value.numel()] = value.flatten()
        return flat[size * self.rank : size * (self.rank + 1)]

    def save(self, folder: Path) -> None:
        """Write weights and moments, gathered one after the other, from the first rank."""
        zero_files.save(self, folder)

    def load(self, folder: Path) -> None:
        """Take up what any number of ranks wrote, of any stage."""
        zero_files.load(self, folder)


def quiet_deepspeed(device: torch.device) -> Any:
    """The package, told which device to use before it is imported, and not to compile."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # An optional engine.
    import deepspeed  # pyright: ignore[reportMissingImports]
    import deepspeed.ops  # pyright: ignore[reportMissingImports]

    if device.type == "cpu":
        # A faster all-reduce for inference, which takes a compiler and minutes. It has no option.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    # It calls collectives by names that torch is about to retire, thousands of times.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    return deepspeed


def zero_settings(config: ScaleConfig, device: torch.device, policy: Policy) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Its own sizes of buffers, half a billion weights and more, are those of one large model; here a
    buffer holds a layer, and a weight is let go of once its module has run.
    """
    layer = max(
        (
            sum(weight.numel() for weight in module.parameters())
            for module in policy.modules()
            if isinstance(module, GradientCheckpointingLayer)
        ),
        default=0,
    )
    largest = max(weight.numel() for weight in policy.parameters())
    bucket = layer or largest
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": device.type == "cuda",
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": largest + 2 * bucket,
        "stage3_max_reuse_distance": 0,
    }
    if config.offload:
        host = {"device": "cpu", "pin_memory": device.type == "cuda"}
        zero["offload_optimizer"] = host
        if config.zero_stage == 3:
            zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Only checked for being there: ``clip`` sets it.
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
