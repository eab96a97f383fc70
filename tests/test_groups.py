"""Classes that are split over processes, and data that is: two and four of them, on the CPU."""

import pytest
import torch
from divergences import FEW, name_of
from processes import Pool
from top_k import PAIRS, TAILS

BACKENDS = ["native", "reference"]


@pytest.fixture(scope="module")
def pair():
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def four():
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(params=["pair", "four"])
def pool(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keywords", [{}, *FEW], ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_of_one_process(pool, backend, keywords, dtype):
    pool.run("agrees", backend, dtype, keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keywords", [{}, FEW[2]], ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_heads_of_one_process(pool, backend, keywords, dtype):
    pool.run("agrees_without_logits", backend, dtype, keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keywords", PAIRS, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_classes(pool, backend, keywords, dtype):
    pool.run("agrees_on_kept_classes", backend, dtype, keywords)


@pytest.mark.parametrize(
    "job",
    [
        "takes_a_part_of_the_group",
        "learns_alike",
        "learns_alike_without_logits",
        "explains_alone",
        "raises_everywhere",
        "waits_no_longer_than_the_group",
        "takes_model_optimizer_s_losses",
    ],
)
def test_groups(pool, job):
    pool.run(job)


def test_compiled_code(pair):
    pair.run("compiles_around")


@pytest.mark.parametrize(
    "keywords",
    [{}, {"divergence": "jsd", "beta": 0.3}, {"reduction": "none"}, {"num_classes": 7}],
    ids=name_of,
)
@pytest.mark.parametrize(("dim", "classes"), [(1, 10), (0, 10), (1, 9)])
@pytest.mark.parametrize("name", ["soft_target_loss", "distillation_loss"])
def test_dtensors(pool, name, dim, classes, keywords):
    """10 classes leave the last of 4 ranks one, and 9 none."""
    pool.run("takes_dtensors", name, dim, classes, keywords)


@pytest.mark.parametrize("tail", TAILS)
def test_dtensors_of_kept_classes(pool, tail):
    pool.run("takes_dtensors_of_kept_classes", tail)


def test_a_mesh_of_two_dimensions(four):
    four.run("takes_a_mesh_of_two_dimensions")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_recipes_of_data_parallelism(pool, kind):
    pool.run("trains_on_all_data", kind)
