"""The cases that are drawn of each test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import cases, pytest

@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    cases.draw(metafunc, 2, SEED, lambda call: call.params.get("number") != 7)
"""
TESTS = """
import pytest

@pytest.fixture(params=["left", "right"])
def side(request):
    return request.param

@pytest.mark.parametrize("number", [*range(9), pytest.param(9, marks=pytest.mark.slow)])
def test_many(number, side):
    pass

@pytest.mark.parametrize("number", [0, 1])
def test_two(number):
    pass

def test_one():
    pass
"""


@pytest.fixture
def collect(tmp_path):
    (tmp_path / "test_few.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")

    # Plugins take longer than all else.
    environment = {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def collected(*options, seed=0):
        (tmp_path / "conftest.py").write_text(CONFTEST.replace("SEED", str(seed)))
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *options, str(tmp_path)]
        found = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert found.returncode in (0, 5), found.stdout + found.stderr
        return re.findall(r"::(test_\S+)", found.stdout)

    return collected


def test_a_few_cases_of_each_test_are_drawn(collect):
    draws = {tuple(collect(seed=seed)) for seed in range(3)}
    assert len(draws) > 1
    for drawn in draws:
        assert len(drawn) == 5
        assert drawn[2:] == ("test_two[0]", "test_two[1]", "test_one")
        assert all(name.startswith("test_many[") for name in drawn[:2])
        assert not any("7" in name for name in drawn)
    assert tuple(collect(seed=2)) in draws


def test_what_the_command_line_selects_is_drawn_from(collect):
    for seed in range(2):
        assert collect("-k", "many and left and (7 or 3 or 5)", seed=seed) == [
            "test_many[left-3]",
            "test_many[left-5]",
        ]
        assert sorted(collect("-m", "slow", seed=seed)) == [
            "test_many[left-9]",
            "test_many[right-9]",
        ]
        assert all("9" not in name for name in collect("-m", "not slow", seed=seed))
    assert collect("-k", "nothing") == []
