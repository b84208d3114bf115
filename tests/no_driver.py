"""Triton's launch path without a GPU: a driver that names an architecture and launches nothing. Not under
TRITON_INTERPRET=1.

What the interpreter skips happens here as on a GPU: arguments are bound and specialised, the variant is looked up by its
key and compiled when it is new. The outputs stay as they were allocated.
"""

from __future__ import annotations

import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)


class _Driver:
    """What a launch asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launches:
    """Names of the kernels launched, and the variants that had to be compiled for it."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.compiled: list[str] = []


class _Named:
    """Stands for a compiled variant that nobody needs."""

    function = packed_metadata = None

    def __init__(self, name: str) -> None:
        self.name = name


def pretend(*, compiling: bool) -> Launches:
    """From now on CPU tensors stand for those of an H100, until this process ends. `compiling`: variants are compiled as
    on a GPU, else only looked up and named."""
    from fastrl_kernels import tune

    from fastrl import backend as backends

    seen = Launches()

    def launcher(kernel: Any) -> Any:
        def launch(x: int, y: int, z: int, *_: Any) -> None:
            if not (0 < x < 2**31 and (y, z) == (1, 1)):
                raise ValueError(f"{kernel.name}: rows lie on grid x, got {(x, y, z)}")
            seen.launched.append(kernel.name)

        return launch

    def compile_or_name(self: Any, key: Any, signature: Any, device: int, *rest: Any) -> Any:
        seen.compiled.append(f"{self.fn.__name__} {key}")
        if compiling:
            return do_compile(self, key, signature, device, *rest)
        return self.device_caches[device][0].setdefault(key, _Named(self.fn.__name__))

    do_compile = JITFunction._do_compile
    driver.set_active(_Driver())
    JITFunction._do_compile = compile_or_name
    for kind in (CompiledKernel, _Named):
        kind.run = property(launcher)
        kind.launch_metadata = lambda *_: None
    backends._obstacle = lambda *_: None
    real = tune.architecture
    for name in [name for name in sys.modules if name.startswith("fastrl_kernels.")]:
        if getattr(sys.modules[name], "architecture", None) is real:
            sys.modules[name].architecture = lambda _: "sm_90"
    return seen
