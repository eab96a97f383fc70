"""A LightningModule that distils, against the same training in a plain loop."""

import copy

import pytest
import torch

import fastkd

lightning = pytest.importorskip("lightning")
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

from fastkd.integrations.lightning import DistillationMixin  # noqa: E402

K, STEPS = 7, 10
LOSS = {"temperature": 3.0, "soft_weight": 0.6, "hard_weight": 0.4}


class Classifier(DistillationMixin, lightning.LightningModule):
    def __init__(self, student, teacher):
        super().__init__(teacher=teacher, distillation=LOSS)
        self.student = student
        self.losses = []

    def forward(self, inputs):
        return self.student(inputs)

    def training_step(self, batch, batch_idx):
        parts = self.distillation_step(batch)
        self.losses.append(parts.loss.detach())
        self.log_dict({"hard": parts.hard, "soft": parts.soft})
        return parts.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.5)


class OfAllParameters(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def networks():
    return torch.nn.Linear(8, K), torch.nn.Sequential(torch.nn.Linear(8, K), torch.nn.Dropout(0.5))


def batches():
    return [(torch.randn(6, 8), torch.randint(K, (6,))) for _ in range(STEPS)]


def fit(module, data, **keywords):
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, **keywords,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return trainer


class OfTwoRanks(torch.utils.data.Dataset):
    """Half of each batch."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, step):
        rank = torch.distributed.get_rank()
        return [x.chunk(2)[rank] for x in self.data[step]]


def plain(student, teacher, data):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    losses = []
    for inputs, labels in data:
        with torch.no_grad():
            logits = teacher.eval()(inputs)
        p, q = ((x / LOSS["temperature"]).log_softmax(-1) for x in (logits, student(inputs)))
        soft = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
        hard = torch.nn.functional.cross_entropy(student(inputs), labels)
        loss = LOSS["soft_weight"] * LOSS["temperature"] ** 2 * soft + LOSS["hard_weight"] * hard
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_ten_steps(tmp_path):
    data, (student, teacher) = batches(), networks()
    expected_student = copy.deepcopy(student)
    before = copy.deepcopy(teacher.state_dict())
    module = Classifier(student, teacher)
    trainer = fit(module, data, default_root_dir=tmp_path)
    torch.testing.assert_close(module.losses, plain(expected_student, teacher, data))
    torch.testing.assert_close(student.state_dict(), expected_student.state_dict())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert module.training and not teacher.training
    assert trainer.callback_metrics.keys() == {"hard", "soft"}


def test_on_two_ranks(tmp_path):
    """An optimizer that is given all parameters leaves the teacher as it is, and DDP does, too."""
    data, (student, teacher) = batches(), networks()
    expected, before = copy.deepcopy(student), copy.deepcopy(teacher.state_dict())
    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
    fit(
        OfAllParameters(student, teacher), OfTwoRanks(data), default_root_dir=tmp_path, devices=2,
        strategy=strategy, use_distributed_sampler=False,
    )  # fmt: skip
    plain(expected, teacher, data)
    torch.testing.assert_close(student.state_dict(), expected.state_dict())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def test_a_checkpoint_without_the_teacher(tmp_path):
    module = Classifier(*networks())
    fit(module, batches(), default_root_dir=tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert list(saved) == ["student.weight", "student.bias"]
    student, teacher = networks()
    before = copy.deepcopy(teacher.state_dict())
    loaded = Classifier.load_from_checkpoint(
        tmp_path / "last.ckpt", student=student, teacher=teacher
    )
    assert loaded.student is student
    torch.testing.assert_close(student.state_dict(), module.student.state_dict())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def test_logits_of_ones_own():
    """Linear heads, for one."""

    class Heads(Classifier):
        def student_logits(self, inputs):
            return fastkd.LinearHead(inputs, self.student.weight, self.student.bias)

        def teacher_logits(self, inputs):
            return fastkd.LinearHead(inputs, self.teacher[0].weight, self.teacher[0].bias)

    pair, batch = networks(), batches()[0]
    losses = [kind(*pair).distillation_step(batch).loss for kind in (Classifier, Heads)]
    torch.testing.assert_close(*losses)
    assert all(x.requires_grad for x in losses)
