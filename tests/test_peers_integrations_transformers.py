"""DistillationTrainer against transformers' own Trainer, with the loss in plain PyTorch."""

import pytest
import torch
from processes import free_port

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
trainers = pytest.importorskip("trainers")
from accelerate.state import AcceleratorState  # noqa: E402

from fastkd.integrations.transformers import DistillationTrainer  # noqa: E402

CAUSAL = {
    "llama": (trainers.llama_like, {"kind": "Llama"}),
    "qwen2": (trainers.llama_like, {"kind": "Qwen2"}),
    "gpt2": (trainers.gpt2, {}),
    "gemma2": (
        trainers.llama_like,
        {"kind": "Gemma2", "head_dim": 8, "final_logit_softcapping": 2.0},
    ),
    "cohere": (trainers.llama_like, {"kind": "Cohere", "logit_scale": 0.25, "pad_token_id": 0}),
    "granite": (trainers.llama_like, {"kind": "Granite", "logits_scaling": 4.0}),
}


def both(folder, models, dataset, of_fastkd, of_eager=None, **keywords):
    """The same training with fastkd and without it."""
    results = []
    for trainer_class, more in [
        (DistillationTrainer, {**trainers.LOSS, **of_fastkd}),
        (trainers.Eager, of_eager or {}),
    ]:
        student, teacher = models()
        results.append(
            trainers.fit(
                trainer_class, student, dataset, folder, teacher_model=teacher, **keywords, **more
            )
        )
    return results


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("linear_heads", [False, True], ids=["logits", "heads"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model(kind, linear_heads, accumulation, tmp_path):
    make, keywords = CAUSAL[kind]
    trainers.assert_same_training(
        *both(
            tmp_path, lambda: trainers.pair(make, **keywords), trainers.language(),
            {"linear_heads": linear_heads}, accumulation=accumulation,
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "cohere", "granite"])
def test_what_a_model_does_to_the_logits_of_its_head(kind, tmp_path):
    make, keywords = CAUSAL[kind]
    trainers.assert_same_training(
        *both(
            tmp_path, lambda: trainers.pair(make, **keywords), trainers.language(),
            {"linear_heads": True},
        )
    )  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_a_classifier(kind, accumulation, tmp_path):
    trainers.assert_same_training(
        *both(
            tmp_path, lambda: trainers.pair(trainers.bert, kind), trainers.classes(kind),
            {}, {"shift": False}, accumulation=accumulation,
        )
    )  # fmt: skip


@pytest.mark.parametrize("linear_heads", [False, True], ids=["logits", "heads"])
def test_hard_labels_alone_are_transformers_own_training(linear_heads, tmp_path):
    results = []
    for trainer_class, keywords in [
        (transformers.Trainer, {}),
        (DistillationTrainer, {"linear_heads": linear_heads, "soft_weight": 0, "hard_weight": 1}),
    ]:
        student, teacher = trainers.pair(trainers.llama_like, "Llama")
        if keywords:
            keywords["teacher_model"] = teacher
        results.append(
            trainers.fit(
                trainer_class, student, trainers.language(), tmp_path, accumulation=2, **keywords,
                more={"label_smoothing_factor": 0.1},
            )
        )  # fmt: skip
    trainers.assert_same_training(*results)


def trainer_of(folder, student, teacher, more=None, **keywords):
    arguments = transformers.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **(more or {})
    )
    return DistillationTrainer(student, arguments, teacher_model=teacher, **keywords)


def batch_of(dataset, size=4):
    return {name: torch.stack([row[name] for row in dataset[:size]]) for name in dataset[0]}


def test_the_logits_of_one_token_alone_are_computed(tmp_path):
    student, teacher = trainers.pair(trainers.llama_like, "Llama")
    trainer = trainer_of(tmp_path, student, teacher)
    assert trainer.linear_heads and not teacher.training
    shapes = []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda _, __, logits: shapes.append(logits.shape))
    batch = batch_of(trainers.language())
    loss = trainer.compute_loss(student, batch)
    assert shapes == [(4, 1, trainers.VOCABULARY)] * 2
    loss.backward()
    assert all(x.grad is not None and x.grad.any() for x in student.parameters())
    assert all(x.grad is None for x in teacher.parameters())
    assert "labels" in batch


def test_a_prediction_has_the_logits_of_all_tokens(tmp_path):
    student, teacher = trainers.pair(trainers.llama_like, "Llama")
    dataset = trainers.language()[:6]
    trainer = trainer_of(tmp_path, student, teacher, more={"per_device_eval_batch_size": 6})
    logits, labels, metrics = trainer.predict(dataset)
    assert logits.shape == (6, trainers.TOKENS, trainers.VOCABULARY)
    assert labels.shape == (6, trainers.TOKENS)
    loss = trainer.compute_loss(student.eval(), batch_of(dataset, 6))
    assert metrics["test_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_labels_that_a_collator_has_shifted(tmp_path):
    trainer = trainer_of(tmp_path, *trainers.pair(trainers.llama_like, "Llama"))
    batch = batch_of(trainers.language())
    expected = trainer.compute_loss(trainer.model, batch)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    loss = trainer.compute_loss(trainer.model, {**batch, "shift_labels": shifted})
    torch.testing.assert_close(loss, expected)


@pytest.fixture
def forget_precision(monkeypatch):
    """Accelerate keeps the precision of the first trainer for the whole process, until told."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield lambda: AcceleratorState._reset_state(True)
    AcceleratorState._reset_state(True)


def test_under_autocast(forget_precision, tmp_path):
    """Both ways compute their products in bfloat16, whose gradients are those of float32 nearly."""
    batch, gradients = batch_of(trainers.language()), []
    for keywords in (
        {"more": {"bf16": True}, "linear_heads": True},
        {"more": {"bf16": True}, "linear_heads": False},
        {"linear_heads": False},
    ):
        forget_precision()
        student, teacher = trainers.pair(trainers.llama_like, "Llama")
        trainer = trainer_of(tmp_path, student, teacher, **keywords)
        model = trainer.accelerator.prepare_model(student)
        trainer.compute_loss(model, batch).backward()
        gradients.append(torch.cat([x.grad.flatten() for x in student.parameters()]))
    heads, logits, exact = gradients
    assert not torch.equal(logits, exact)
    for one in (heads, logits):
        assert (one - exact).norm() < 0.05 * exact.norm()


def test_other_divergences_and_sizes_of_the_vocabulary(tmp_path):
    """With a teacher whose output matrix is padded to a larger size."""
    student, teacher = trainers.pair(trainers.llama_like, "Llama")
    teacher.resize_token_embeddings(trainers.VOCABULARY + 8)
    keywords = {"divergence": "jsd", "beta": 0.1, "num_classes": trainers.VOCABULARY}
    batch = batch_of(trainers.language())
    losses = [
        trainer_of(tmp_path, student, teacher, linear_heads=heads, **keywords).compute_loss(
            student, batch
        )
        for heads in (False, True)
    ]
    torch.testing.assert_close(*losses)


def test_a_model_whose_logits_are_not_those_of_its_head(tmp_path):
    student, teacher = trainers.pair(trainers.llama_like, "Llama")
    student.lm_head.register_forward_hook(lambda _, __, logits: 2 * logits)
    trainer = trainer_of(tmp_path, student, teacher)
    with pytest.raises(ValueError, match="pass linear_heads=False"):
        trainer.compute_loss(student, batch_of(trainers.language()))


@pytest.mark.parametrize(
    ("make", "arguments", "more", "message"),
    [
        (trainers.bert, ["TokenClassification"], {}, "the student is no causal language model"),
        (trainers.llama_like, ["Llama"], {"torch_compile": True}, "does not give its hidden"),
        (trainers.llama_like, ["Llama"], {"ddp_static_graph": True}, "does not give its hidden"),
    ],
)
def test_where_linear_heads_cannot_be(make, arguments, more, message, tmp_path):
    models = trainers.pair(make, *arguments)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, *models, more=more, linear_heads=True)
    assert not trainer_of(tmp_path, *models, more=more).linear_heads


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """The results of `trainers.train_in_rank` on two gloo ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(trainers.train_in_rank, (free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["logits", "heads", "heads, no search"])
def test_on_two_ranks(name, accumulation, of_two_ranks, tmp_path):
    """The training of one rank with batches of twice the size, on both ranks."""
    student, teacher = trainers.pair(trainers.llama_like, "Llama")
    alone = trainers.fit(
        trainers.Eager, student, trainers.language(), tmp_path, accumulation=accumulation,
        teacher_model=teacher,
    )  # fmt: skip
    for results in of_two_ranks:
        trainers.assert_same_training(results[name, accumulation], alone)
        trainers.assert_same_training(results["eager", accumulation], alone)
