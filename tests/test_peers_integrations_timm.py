"""timm's distillation task with fastkd and without it: a small model, ten steps."""

import copy

import pytest
import torch

timm = pytest.importorskip("timm")
from timm.task import LogitDistillationTask as Own  # noqa: E402

from fastkd.integrations.timm import LogitDistillationTask  # noqa: E402

K, STEPS = 10, 10
QUIET = {"dtype": torch.float64, "verbose": False}


def networks():
    torch.manual_seed(0)
    return [timm.create_model("test_resnet", num_classes=K).double() for _ in range(2)]


def train(task):
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    results = []
    for _ in range(STEPS):
        images = torch.randn(4, 3, 64, 64, generator=generator).double()
        result = task.train()(images, torch.randint(K, (4,), generator=generator))
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        results.append({name: x.detach() for name, x in result.items()})
    return results, task.get_trainable_module().state_dict()


@pytest.mark.parametrize("weights", [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 2.0}])
def test_ten_steps(weights):
    results = []
    for kind in (Own, LogitDistillationTask):
        student, teacher = networks()
        # Another normalisation than the student's, which the task converts.
        teacher.pretrained_cfg = {**student.pretrained_cfg, "mean": (0.4, 0.5, 0.6)}
        before = copy.deepcopy(teacher.state_dict())
        task = kind(student, teacher, temperature=4.0, **QUIET, **weights)
        results.append(train(task))
        assert not teacher.training
        torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_another_divergence():
    student, teacher = networks()
    images, target = torch.randn(4, 3, 64, 64).double(), torch.randint(K, (4,))
    keywords = {"divergence": "reverse_kl", "temperature": 2.0, "teacher_temperature": 3.0}
    found = LogitDistillationTask(student, teacher, **keywords, **QUIET)(images, target)
    with torch.no_grad():
        q, p = found["output"].div(2).log_softmax(-1), teacher.eval()(images).div(3).log_softmax(-1)
    expected = 4 * torch.nn.functional.kl_div(p, q, reduction="batchmean", log_target=True)
    torch.testing.assert_close(found["kd_loss"].detach(), expected)
