"""A byte-pair vocabulary (Sennrich et al. 2016) over bytes, learnt in seconds, and its windows."""

import collections
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

BYTES = 256
# Begins every document, in whose text it does not occur.
SEPARATOR = 0
# The label of a padded position, which no loss counts.
PADDING = -100
# Merges stay within words, runs of digits, of signs and of blanks; a blank belongs to what follows.
_WORDS = re.compile(rb" ?[A-Za-z_]+| ?[0-9]+| ?[^\sA-Za-z_0-9]+|\s+(?!\S)|\s+")

Pair = tuple[int, int]


class Vocabulary:
    """Bytes, and a token for each merge of two tokens; without merges the bytes alone."""

    def __init__(self, merges: Sequence[Pair]) -> None:
        self.merges = list(merges)
        self._token = {pair: BYTES + rank for rank, pair in enumerate(merges)}
        self._known: dict[bytes, list[int]] = {}

    def __len__(self) -> int:
        return BYTES + len(self.merges)

    @classmethod
    def learn(cls, documents: Iterable[bytes], size: int) -> "Vocabulary":
        """Merge the most frequent pair of neighbours until there are `size` tokens."""
        counts = collections.Counter(word for text in documents for word in cls.words(text))
        words = [(list(word), count) for word, count in counts.items()]
        frequency: collections.Counter[Pair] = collections.Counter()
        places: dict[Pair, set[int]] = collections.defaultdict(set)
        for place, (word, count) in enumerate(words):
            for pair in pairwise(word):
                frequency[pair] += count
                places[pair].add(place)
        merges: list[Pair] = []
        while len(merges) < size - BYTES and frequency:
            best = max(frequency, key=frequency.__getitem__)
            if frequency[best] < 2:
                break
            for place in sorted(places.pop(best)):
                word, count = words[place]
                for pair in pairwise(word):
                    frequency[pair] -= count
                word[:] = _merged(word, best, BYTES + len(merges))
                for pair in pairwise(word):
                    frequency[pair] += count
                    places[pair].add(place)
            del frequency[best]
            merges.append(best)
        return cls(merges)

    @staticmethod
    def words(text: bytes) -> list[bytes]:
        """What merges stay within; joined they are the text."""
        return _WORDS.findall(text)

    def encode(self, text: bytes) -> list[int]:
        return [token for word in self.words(text) for token in self._tokens(word)]

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self._bytes(token) for token in tokens)

    def _bytes(self, token: int) -> bytes:
        if token < BYTES:
            return bytes([token])
        return self.decode(self.merges[token - BYTES])

    def _tokens(self, word: bytes) -> list[int]:
        if word not in self._known:
            tokens = list(word)
            while merges := self._token.keys() & set(pairwise(tokens)):
                first = min(merges, key=self._token.__getitem__)
                tokens = _merged(tokens, first, self._token[first])
            self._known[word] = tokens
        return self._known[word]


def _merged(tokens: list[int], pair: Pair, token: int) -> list[int]:
    merged, place = [], 0
    while place < len(tokens):
        if tuple(tokens[place : place + 2]) == pair:
            merged.append(token)
            place += 2
        else:
            merged.append(tokens[place])
            place += 1
    return merged


def windows(documents: Iterable[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels, (windows, length) each; none crosses from one document into the next.

    The last window of a document is padded. Each token of a document is the label of one position.
    """
    inputs, labels = [], []
    for document in documents:
        tokens = torch.tensor([SEPARATOR, *document])
        for piece, following in zip(
            tokens[:-1].split(length), tokens[1:].split(length), strict=True
        ):
            missing = (0, length - len(piece))
            inputs.append(torch.nn.functional.pad(piece, missing, value=SEPARATOR))
            labels.append(torch.nn.functional.pad(following, missing, value=PADDING))
    return torch.stack(inputs), torch.stack(labels)
