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
    "hyperclovax": (trainers.llama_like, {"kind": "HyperCLOVAX", "logits_scaling": 0.25}),
    # It divides the hidden states, before its head, by 16 / 4.
    "minicpm3": (
        trainers.llama_like,
        {
            "kind": "MiniCPM3", "dim_model_base": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        },
    ),
    # A layer is between its hidden states and its head.
    "bert": (trainers.bert, {"kind": "LMHeadModel", "is_decoder": True}),
    # It calls the decoder in its base model, but not that one itself.
    "opt": (trainers.opt, {}),
}  # fmt: skip


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


@pytest.mark.parametrize("kind", sorted(CAUSAL.keys() - {"llama", "gpt2"}))
def test_what_a_model_does_to_the_logits_of_its_head(kind, tmp_path):
    make, keywords = CAUSAL[kind]
    trainers.assert_same_training(
        *both(
            tmp_path, lambda: trainers.pair(make, **keywords), trainers.language(),
            {"linear_heads": True},
        )
    )  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (trainers.bert, "SequenceClassification"),
        (trainers.bert, "TokenClassification"),
        # Its forward takes no `num_items_in_batch`; the trainer counts all the same.
        (trainers.esm, "TokenClassification"),
        (trainers.vit, "ImageClassification"),
    ],
)
def test_a_classifier(make, kind, accumulation, tmp_path):
    trainers.assert_same_training(
        *both(
            tmp_path, lambda: trainers.pair(make, kind), trainers.classes(kind),
            {}, {"shift": False}, accumulation=accumulation,
        )
    )  # fmt: skip


@pytest.mark.parametrize("linear_heads", [False, True], ids=["logits", "heads"])
def test_a_masked_language_model(linear_heads, tmp_path):
    trainers.assert_same_training(
        *both(
            tmp_path, lambda: trainers.pair(trainers.bert, "MaskedLM"), trainers.language(),
            {"linear_heads": linear_heads}, {"shift": False}, accumulation=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("linear_heads", [False, True], ids=["logits", "heads"])
@pytest.mark.parametrize("kind", ["Bart", "M2M100"])
def test_an_encoder_decoder(kind, linear_heads, tmp_path):
    """The decoder is given what the labels say, by the model's method or without one."""
    results = []
    for trainer_class, dataset, more in [
        (trainers.Eager, trainers.translations(), {"shift": False}),
        (DistillationTrainer, trainers.language(), {**trainers.LOSS, "linear_heads": linear_heads}),
    ]:
        student, teacher = trainers.pair(trainers.encoder_decoder, kind)
        results.append(
            trainers.fit(
                trainer_class, student, dataset, tmp_path, teacher_model=teacher, accumulation=2,
                **more,
            )
        )  # fmt: skip
    trainers.assert_same_training(*results)


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


def test_a_head_of_zeros(tmp_path):
    """Its logits do not tell what they were multiplied by, so that they are computed."""
    make, keywords = CAUSAL["granite"]

    def models():
        student, teacher = trainers.pair(make, **keywords)
        torch.nn.init.zeros_(student.lm_head.weight)
        return student, teacher

    trainers.assert_same_training(*both(tmp_path, models, trainers.language(), {}))


def test_a_model_whose_logits_are_not_those_of_its_head(tmp_path):
    """As a default its logits are computed."""
    student, teacher = trainers.pair(trainers.llama_like, "Llama")
    student.lm_head.register_forward_hook(lambda _, __, logits: 2 * logits)
    trainer, batch = trainer_of(tmp_path, student, teacher), batch_of(trainers.language())
    assert trainer.linear_heads
    loss = trainer.compute_loss(student, batch)
    assert not trainer.linear_heads
    torch.testing.assert_close(loss, trainer.compute_loss(student, batch))
    trainer = trainer_of(tmp_path, student, teacher, linear_heads=True)
    with pytest.raises(ValueError, match="pass linear_heads=False"):
        trainer.compute_loss(student, batch)


@pytest.mark.parametrize(
    ("make", "arguments", "more", "message"),
    [
        (trainers.bert, ["TokenClassification"], {}, "the student does not end in a torch.nn.Lin"),
        (trainers.llama_like, ["Llama"], {"torch_compile": True}, "does not give its hidden"),
        (trainers.llama_like, ["Llama"], {"ddp_static_graph": True}, "does not give its hidden"),
    ],
)
def test_where_linear_heads_cannot_be(make, arguments, more, message, tmp_path):
    models = trainers.pair(make, *arguments)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, *models, more=more, linear_heads=True)
    assert not trainer_of(tmp_path, *models, more=more).linear_heads


@pytest.mark.parametrize("in_place", [False, True])
def test_linear_heads_are_not_for_what_a_user_has_compiled(in_place, tmp_path):
    student, teacher = trainers.pair(trainers.llama_like, "Llama")
    if in_place:
        teacher.compile(backend="eager")
    else:
        teacher = torch.compile(teacher, backend="eager")
    with pytest.raises(ValueError, match="the teacher is compiled"):
        trainer_of(tmp_path, student, teacher, linear_heads=True)
    assert not trainer_of(tmp_path, student, teacher).linear_heads


def test_the_teacher_keeps_no_cache(tmp_path):
    student, teacher = trainers.pair(trainers.llama_like, "Llama")
    caches = []
    teacher.model.register_forward_hook(lambda _, __, out: caches.append(out.past_key_values))
    trainer = trainer_of(tmp_path, student, teacher)
    trainer.compute_loss(student, batch_of(trainers.language()))
    assert caches == [None]


def test_liger_kernel_asks_for_no_logits(tmp_path):
    """In an evaluation, of models that it has patched; their loss is computed here."""
    trainer = trainer_of(tmp_path, *trainers.pair(trainers.llama_like, "Llama"))
    batch = batch_of(trainers.language())
    expected, _ = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    trainer.model.register_forward_pre_hook(
        lambda _, __, given: pytest.fail("skip_logits") if "skip_logits" in given else None,
        with_kwargs=True,
    )
    batch["skip_logits"] = True
    loss, _ = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(loss, expected)


def test_what_is_refused(tmp_path):
    student, teacher = trainers.pair(trainers.llama_like, "Llama")
    with pytest.raises(ValueError, match="compute_loss_func would not be called"):
        trainer_of(tmp_path, student, teacher, compute_loss_func=lambda *_, **__: 0)
    trainer = trainer_of(tmp_path, student, teacher)
    with pytest.raises(ValueError, match="the batch has no labels"):
        trainer.compute_loss(student, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})


def test_a_checkpoint_has_no_teacher_and_goes_on(tmp_path):
    """Ten steps, and five that go on after a checkpoint of five; Adam has a state."""
    results = []
    for steps in (10, 5, 10):
        torch.manual_seed(0)
        student, teacher = trainers.pair(trainers.llama_like, "Llama")
        before = {name: x.clone() for name, x in teacher.state_dict().items()}
        trainer = trainer_of(
            tmp_path / str(bool(results)), student, teacher, train_dataset=trainers.language(),
            more={"max_steps": steps, "save_steps": 5, "lr_scheduler_type": "constant"},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=len(results) == 2)
        results.append({name: x.detach() for name, x in student.named_parameters()})
        assert not teacher.training
        torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
        optimized = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
        assert optimized == len(results[-1])
        saved = list(tmp_path.glob("*/checkpoint-*/model.safetensors"))
        assert saved and all(x.stat().st_size < 1.2 * 4 * student.num_parameters() for x in saved)
    torch.testing.assert_close(results[0], results[2])


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
