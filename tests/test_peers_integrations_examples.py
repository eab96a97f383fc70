"""The examples of fastkd.integrations run: README's, and those of the docstrings."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n([^`]*fastkd\.integrations.*?)```", README, re.DOTALL)


def test_readme(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (code,) = EXAMPLES
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["trainer"].state.global_step == 10


@pytest.mark.parametrize("name", ["lightning", "timm", "transformers", "trl", "trl_gkd"])
@pytest.mark.filterwarnings("ignore:.*experimental")
def test_docstring(name, tmp_path, monkeypatch):
    pytest.importorskip(name.removesuffix("_gkd"))
    module = importlib.import_module(f"fastkd.integrations.{name}")
    monkeypatch.chdir(tmp_path)
    (value,) = [getattr(module, name) for name in module.__all__]
    globs = {"torch": torch}
    found = doctest.DocTestFinder(recurse=False).find(value, value.__name__, globs=globs)
    assert [example for test in found for example in test.examples]
    assert [doctest.DocTestRunner().run(test).failed for test in found] == [0]
