"""TRL's trainers with fastkd and without it: a tiny model, ten steps, the same losses."""

import pytest
import torch
from processes import free_port

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
trainers = pytest.importorskip("trainers")
from datasets import Dataset  # noqa: E402
from trl.experimental import gkd  # noqa: E402

from fastkd.integrations.trl import DistillationTrainer  # noqa: E402
from fastkd.integrations.trl_gkd import GKDTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental")


def tokenizer():
    """Of words that are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {str(i): i for i in range(trainers.VOCABULARY)}
    fast = Tokenizer(models.WordLevel(words, unk_token="0"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="0", eos_token="1", unk_token="0", padding_side="left"
    )


def common(folder, accumulation):
    return {
        "output_dir": str(folder), "max_steps": trainers.STEPS, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation, "learning_rate": 0.02, "optim": "sgd",
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "bf16": False, "max_grad_norm": 0.0, "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant", "gradient_checkpointing": False,
    }  # fmt: skip


def train(trainer, student):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == trainers.STEPS
    return torch.tensor(losses), {name: x.detach() for name, x in student.named_parameters()}


def forbidden(*_, **__):
    raise AssertionError("TRL's own divergence was called")


def distil(trainer_class, folder, accumulation=1, beta=0.5):
    prompts = [" ".join(map(str, row["input_ids"][:5].tolist())) for row in trainers.language()]
    student, teacher = trainers.pair(trainers.llama_like, "Llama")
    arguments = trl.DistillationConfig(
        **common(folder, accumulation), beta=beta, temperature=1.5, max_completion_length=6
    )
    trainer = trainer_class(
        student, teacher, arguments, Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
    )  # fmt: skip
    return train(trainer, student)


def collate(rows):
    rows = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return {**rows, "attention_mask": torch.ones_like(rows["input_ids"])}


def distil_gkd(trainer_class, folder, accumulation=1):
    rows = [{name: x.tolist() for name, x in row.items()} for row in trainers.language()]
    student, teacher = trainers.pair(trainers.llama_like, "Llama")
    arguments = gkd.GKDConfig(**common(folder, accumulation), beta=0.3, lmbda=0.0)
    trainer = trainer_class(
        student, teacher, arguments, collate, Dataset.from_list(rows), processing_class=tokenizer()
    )
    return train(trainer, student)


@pytest.mark.parametrize(
    ("beta", "accumulation"), [(0.0, 1), (0.5, 1), (1.0, 1), (0.5, 4)], ids=str
)
def test_distillation_trainer(beta, accumulation, tmp_path, monkeypatch):
    expected = distil(trl.DistillationTrainer, tmp_path, accumulation, beta)
    monkeypatch.setattr("trl.trainer.distillation_trainer._chunked_divergence_loss", forbidden)
    found = distil(DistillationTrainer, tmp_path, accumulation, beta)
    trainers.assert_same_training(found, expected)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gkd_trainer(accumulation, tmp_path, monkeypatch):
    expected = distil_gkd(gkd.GKDTrainer, tmp_path, accumulation)
    monkeypatch.setattr(gkd.GKDTrainer, "generalized_jsd_loss", forbidden)
    trainers.assert_same_training(distil_gkd(GKDTrainer, tmp_path, accumulation), expected)


def train_in_rank(rank, port, folder):
    """Both trainers with fastkd and without it, whose results one of two ranks saves."""
    trainers.enter_rank(rank, port)
    results = [
        [training(trainer_class, folder) for trainer_class in classes]
        for training, classes in [
            (distil, (trl.DistillationTrainer, DistillationTrainer)),
            (distil_gkd, (gkd.GKDTrainer, GKDTrainer)),
        ]
    ]
    torch.save(results, f"{folder}/{rank}.pt")


def test_on_two_ranks(tmp_path):
    torch.multiprocessing.spawn(train_in_rank, (free_port(), str(tmp_path)), nprocs=2)
    for rank in range(2):
        for expected, found in torch.load(tmp_path / f"{rank}.pt"):
            trainers.assert_same_training(found, expected)
