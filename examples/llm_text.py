"""Real text that is on every machine: the documentation strings of Python's standard library."""

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests say little, and what is installed beside the library differs from machine to machine.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
# The help topics of the interactive `help()`: its strings are pages of the documentation.
_TOPICS = "pydoc_data/topics.py"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
HELD_OUT = 10  # one file in so many


@dataclass(frozen=True)
class Corpus:
    """One document per file, without the strings that an earlier file has, too."""

    train: list[bytes]
    held_out: list[bytes]

    @property
    def sizes(self) -> tuple[int, int]:
        return sum(map(len, self.train)), sum(map(len, self.held_out))


def standard_library(size: int | None = None, root: Path | None = None) -> Corpus:
    """The corpus, or the files that come first until they have `size` bytes.

    A hash of a file's path decides when it comes and whether it is held out: one Python version has
    one split. Of equal strings the first is kept: what is held out has not been seen in training.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    hashes = {name: zlib.crc32(name.encode()) for name in names}
    corpus, seen = Corpus([], []), set[str]()
    for name in sorted(hashes, key=lambda name: (hashes[name], name)):
        if _LEFT_OUT.intersection(name.split("/")):
            continue
        fresh = [text for text in dict.fromkeys(_strings(root / name, name)) if text not in seen]
        seen.update(fresh)
        if fresh:
            part = corpus.held_out if hashes[name] % HELD_OUT == 0 else corpus.train
            part.append("\n\n".join(fresh).encode(errors="replace"))
        if size is not None and sum(corpus.sizes) >= size:
            break
    return corpus


def _strings(path: Path, name: str) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # Templates and samples of broken syntax that some distributions ship.
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node)
        elif name == _TOPICS and isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        # The separator of documents is the byte 0.
        if text and "\0" not in text:
            yield text.strip()
