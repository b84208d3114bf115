"""`info()`: versions, devices, and which backend each kind of input would take and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fastrl import backend as backends

_PACKAGES = (
    "fastrl-kernels", "torch", "triton", "transformers", "accelerate", "peft", "trl", "verl", "openrlhf",
    "liger-kernel", "kernels",
)  # fmt: skip
_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "TRITON_CACHE_DIR", "TRITON_INTERPRET")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def info() -> dict[str, Any]:
    """What this installation is and would do; plain data for a bug report. `python -m fastrl` prints it.

    Keys: "versions" (None = not installed as a distribution; torch's names its build, e.g. "+cu130"), "location" (the
    package's folder), "platform", "devices", "environment" (None = not set), "backends" (device and dtype -> name and
    reason). Nothing is logged.
    """
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    takes = {
        f"{device} {str(dtype).removeprefix('torch.')}": "{0.name}: {0.why}".format(
            backends.choose(device, dtype, warn=False)
        )
        for device in devices
        for dtype in _DTYPES
    }
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "location": str(Path(__file__).parent),
        "platform": platform.platform(),
        "devices": {str(device): _describe(device) for device in devices},
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
        "backends": takes,
    }


def _describe(device: torch.device) -> str:
    """Name, architecture and memory of an accelerator; the instruction set and threads of a CPU."""
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    kind = getattr(properties, "gcnArchName", "") if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return f"{properties.name}, {kind}, {properties.total_memory / 2**30:.1f} GiB"


def _version(package: str) -> str | None:
    if package == "torch":  # its distribution's may lack the build
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
