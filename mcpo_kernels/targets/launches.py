"""Records the launches of Triton kernels as they would happen on a GPU, without one.

A launcher is called with tensors on torch's "meta" device, which have shapes, strides and sizes
but no memory, while Triton believes that a device of the target is active. A hook sees each launch
after Triton has specialised its arguments, and stops it before anything is compiled. What is then
compiled has the signature, the constants, the attributes (divisibility by 16, pointers that stay
within 2 GiB) and the options of a real launch: nothing of that is written down here a second time.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

    from mcpo_kernels.targets.devices import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What Triton compiles a kernel from."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def function(self) -> JITFunction[Any]:
        """The kernel."""
        return getattr(importlib.import_module(self.module), self.kernel)

    @property
    def named_constants(self) -> dict[str, Any]:
        """The constants by the name of their parameter."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constants.items()}

    @property
    def identity(self) -> str:
        """The same for launches that compile to the same binary."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return f"{self.module}.{self.kernel} {parts}"


class _PretendDriver:
    """As much of a Triton driver as a launch asks before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        # Triton keeps what it knows of a kernel by device, so each target is a device of its own.
        return self._target

    def get_current_stream(self, device: object) -> int:
        return 0


def gpu_target(target: Target) -> GPUTarget:
    """The target as Triton names it."""
    return GPUTarget(target.backend, target.arch, target.warp_size)


def record(target: Target, launcher: Callable[[], object]) -> list[Launch]:
    """The launches that a call makes on a target, in order.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    if knobs.runtime.interpret:
        raise RuntimeError(
            "kernels must be compiled to be looked at, and TRITON_INTERPRET=1 has them "
            "interpreted; unset it"
        )
    seen: list[Launch] = []
    with _pretend(target, seen):
        launcher()
    return seen


@contextmanager
def _pretend(target: Target, seen: list[Launch]) -> Generator[None]:
    # To ask for `driver.active` where there is no GPU is an error.
    settings: Any = driver
    runtime: Any = knobs.runtime
    driver_before, hook_before = settings._active, runtime.jit_cache_hook

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        seen.append(_launch_of(fn.jit_function, compile))
        return True

    settings.set_active(_PretendDriver(gpu_target(target)))
    runtime.jit_cache_hook = note
    try:
        yield
    finally:
        settings._active, runtime.jit_cache_hook = driver_before, hook_before


def _launch_of(function: JITFunction[Any], details: dict[str, Any]) -> Launch:
    # The options as Triton itself stores them: everything the launch was given, and defaults.
    options = json.loads(details["specialization_data"])["options"]
    return Launch(
        module=function.fn.__module__,
        kernel=function.fn.__name__,
        signature=dict(details["signature"]),
        constants=dict(details["constants"]),
        attributes=dict(details["configs"][0]),
        options={name: _tuples(value) for name, value in options.items()},
    )


def _tuples(value: Any) -> Any:
    """JSON knows lists only, and Triton's options hold tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
