"""What every record says about where its figures come from."""

import argparse
import datetime
import platform
from typing import Any

import torch

import fastkd
from benchmarks.cpu import Cpu
from benchmarks.cuda import Cuda
from benchmarks.measure import Device
from fastkd import info


def open_device(name: str, allocator: str = "keep") -> Device:
    if name == "cpu":
        return Cpu(allocator)
    if not torch.cuda.is_available():
        raise SystemExit(f"--device {name}: torch finds no GPU here")
    return Cuda()


def versions(device: Device) -> dict[str, str]:
    return {
        "fastkd": fastkd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **device.versions(),
    }


def origin(device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """The first fields of a record; where its file goes is nobody's business."""
    return {
        "device": device.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": info.collect()["fastkd"]["commit"] or "unknown",
        "machine": device.machine(),
        "versions": versions(device),
        "options": {name: value for name, value in vars(options).items() if name != "output"},
    }
