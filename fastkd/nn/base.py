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

    def _keywords(self, **given: Any) -> dict[str, Any]:
        """The attributes, but for what a call gives itself."""
        keywords = {name: getattr(self, name) for name in self._names}
        keywords.update({name: value for name, value in given.items() if value is not None})
        return keywords

    def extra_repr(self) -> str:
        """The keywords, as they would be written in a call."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)
