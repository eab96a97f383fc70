"""The text of the language models in `examples/`, its tokens and its windows."""

import collections
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from llm_text import HELD_OUT, standard_library
from llm_tokens import BYTES, PADDING, SEPARATOR, Vocabulary, windows

TEXT = b"the cat sat on the mat, the cat ate the rat; 1234 cats\n    \xc3\xa9t\xc3\xa9\n" * 20


def library(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return standard_library(root=root)


def test_text_is_every_documentation_string_once(tmp_path):
    corpus = library(
        tmp_path,
        {
            "one.py": b'"""Module."""\nclass A:\n    """Class.\n\n    More.\n    """\n',
            "two.py": b'async def f():\n    """Class.\n\n    More.\n    """\n    "no"\n',
            "three.py": b'def f():\n    """Function."""\n    return "no"\n',
            "test/four.py": b'"""No."""',
            "package/tests/five.py": b'"""No."""',
            "six.py": b'"""No."""\ndef broken(',
            "seven.py": b'"""With\\0separator."""',
            "pydoc_data/topics.py": b"topics = {'a': 'Page.'}",
        },
    )
    texts = b"\n\n".join(corpus.train + corpus.held_out).decode().split("\n\n")
    counts = collections.Counter(texts)
    assert {"Module.", "Function.", "Class.", "More.", "Page."} <= counts.keys()
    assert counts["Class."] == 1
    assert "No." not in counts
    assert not any("\0" in text for text in texts)


def test_a_hash_of_the_path_holds_a_file_out(tmp_path):
    names = [f"module_{number}.py" for number in range(60)]
    corpus = library(tmp_path, {name: f'"""{name}"""'.encode() for name in names})
    out = [name.encode() for name in names if zlib.crc32(name.encode()) % HELD_OUT == 0]
    assert sorted(corpus.held_out) == sorted(out)
    assert len(corpus.train) == 60 - len(out)
    assert 0 < len(out) < 20
    assert standard_library(root=tmp_path) == corpus
    first = standard_library(100, tmp_path)
    assert 100 <= sum(first.sizes) < 120
    assert first.train == corpus.train[: len(first.train)]


def test_the_standard_library_is_there():
    corpus = standard_library(200_000)
    trained, held_out = corpus.sizes
    assert 200_000 <= trained + held_out < 1_000_000
    assert 0.02 < held_out / trained < 0.4
    assert b"Return" in b"".join(corpus.train)


def test_merges_are_of_the_most_frequent_pairs():
    """Against counting all over again before each merge."""
    documents = [bytes(np.random.default_rng(torch.initial_seed()).choice(list(TEXT), 3000)), TEXT]
    vocabulary = Vocabulary.learn(documents, 300)
    tokens = Vocabulary([])
    for rank, merge in enumerate(vocabulary.merges):
        counts = collections.Counter()
        for text in documents:
            for word in tokens.words(text):
                counts.update(pairwise(tokens.encode(word)))
        assert counts[merge] == max(counts.values())
        tokens = Vocabulary(vocabulary.merges[: rank + 1])
    assert len(vocabulary) == 300


@pytest.mark.parametrize("size", [BYTES, 300])
def test_tokens_give_back_the_bytes(size):
    vocabulary = Vocabulary.learn([TEXT], size)
    for text in (TEXT, bytes(range(1, 256)), b""):
        tokens = vocabulary.encode(text)
        assert vocabulary.decode(tokens) == text
        assert all(token < size for token in tokens)
    assert (len(vocabulary.encode(TEXT)) < len(TEXT)) == (size > BYTES)


def test_there_are_no_more_merges_than_pairs_that_repeat():
    assert len(Vocabulary.learn([b"abcd"], 1000)) == BYTES
    assert len(Vocabulary.learn([b"ab,ab"], 1000)) == BYTES + 1


def test_every_token_is_a_label_once():
    documents = [list(range(1, 9)), [9], list(range(10, 14))]
    inputs, labels = windows(documents, 4)
    assert labels[labels != PADDING].tolist() == list(range(1, 14))
    assert inputs[:, 0].tolist() == [SEPARATOR, 4, SEPARATOR, SEPARATOR]
    counted = labels[:, :-1] != PADDING
    counted &= labels[:, 1:] != PADDING
    assert torch.equal(inputs[:, 1:][counted], labels[:, :-1][counted])
