"""`info()`: versions, devices, and which backend each kind of input would take and why."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from fastrl import backend as backends

_PACKAGES = ("fastrl-kernels", "torch", "triton", "transformers", "trl")


def info() -> dict[str, Any]:
    """What this installation is and would do; plain data for a bug report.

    Keys: "versions" (None = not installed), "devices", "backends" (device and dtype -> name and reason).
    """
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    names = {str(d): torch.cuda.get_device_name(d) if d.type == "cuda" else platform.machine() for d in devices}
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    takes = {
        f"{device} {str(dtype).removeprefix('torch.')}": "{0.name}: {0.why}".format(backends.choose(device, dtype))
        for device in devices
        for dtype in dtypes
    }
    return {"versions": {name: _version(name) for name in _PACKAGES}, "devices": names, "backends": takes}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
