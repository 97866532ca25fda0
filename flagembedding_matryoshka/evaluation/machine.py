"""On what something was computed."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

PACKAGES = ("flagembedding_matryoshka", "torch", "transformers", "peft")


def machine(devices: Sequence[str]) -> dict[str, Any]:
    """Devices by name, how much of the processor there is, and versions."""
    return {
        "devices": [device_name(device) for device in devices],
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def device_name(device: str) -> str:
    """What a device is called by who made it, as far as torch knows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return str(capabilities.get("cpu_name", platform.processor()))
