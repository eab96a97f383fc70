import json

import pytest

from benchmarks import ranks


@pytest.mark.thorough
def test_every_contender_is_right(tmp_path):
    assert ranks.main(["--small", "--rounds", "3", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "cpu-small.json").read_text())
    assert record["options"]["processes"] == 2
    assert [(case["divergence"], case["dtype"]) for case in record["cases"]] == [
        (divergence, dtype)
        for divergence in ("forward_kl", "jsd")
        for dtype in ("float32", "bfloat16")
    ]
    for case in record["cases"]:
        assert set(case["outcomes"]) == set(ranks.CONTENDERS)
        for outcome in case["outcomes"].values():
            assert 0 < outcome["seconds_q25"] <= outcome["seconds"] <= outcome["seconds_q75"]
