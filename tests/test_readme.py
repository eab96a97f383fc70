"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example(index):
    exec(compile(EXAMPLES[index], f"README.md, example {index}", "exec"), {})


def test_there_is_one_per_function_and_for_backends():
    assert len(EXAMPLES) >= 6
