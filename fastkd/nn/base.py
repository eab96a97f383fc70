"""What the modules have in common."""

from typing import Any

import torch


class Loss(torch.nn.Module):
    """A module whose attributes are the keywords of one loss: what is set, the next call takes."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self._names = tuple(keywords)
        for name, value in keywords.items():
            setattr(self, name, value)

    def _keywords(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """The keywords, as they would be written in a call."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)
