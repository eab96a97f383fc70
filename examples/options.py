"""What an option of the command line may be; argparse reports what is wrong with another."""

import argparse

import torch

from fastkd.dispatch import known_backend
from fastkd.facts import Backend


def backend(name: str) -> Backend:
    try:
        return known_backend(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device(name: str) -> torch.device:
    try:
        return torch.ones(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {str(error).splitlines()[0]}") from error


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
