"""How a function becomes an operator of the library `fastrl` (`torch.library`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("fastrl", "DEF")
# The hidden level reads row counts on the host, which a CUDA graph cannot hold.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def operator(name: str) -> Callable[[Any], Any]:
    """Register a function as `fastrl::name` on every device; calls take the operator under torch.compile only.

    Not `torch.library.custom_op`, whose wrapper imports all of dynamo on the first call: over a second and 100 MB.
    """

    def register(function: Any) -> Any:
        library.define(name + torch.library.infer_schema(function, mutates_args=()), tags=_TAGS)
        for device in ("CPU", "CUDA", "XPU"):  # not a composite key, which would stand in for the fake one as well
            library.impl(name, function, device)
        overload = getattr(torch.ops.fastrl, name).default

        def call(*args: Any) -> Any:
            return overload(*args) if torch.compiler.is_compiling() else function(*args)

        return call

    return register


def fake(name: str) -> Callable[[Any], Any]:
    """Register the shapes and dtypes that `fastrl::name` returns."""
    return torch.library.register_fake(f"fastrl::{name}", lib=library)
