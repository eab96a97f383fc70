"""Tiny models in the training loops of other libraries, with fastkd and without it."""

import os

import torch
import torch.nn.functional as F
import transformers

VOCABULARY, TOKENS, SAMPLES, STEPS = 128, 12, 64, 10
LOSS = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}

# What is common to the configurations of student and teacher.
LLAMA_LIKE = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 2, "n_positions": 32}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def llama_like(hidden, kind, **other):
    config = getattr(transformers, f"{kind}Config")(
        **LLAMA_LIKE, num_key_value_heads=2, hidden_size=hidden, intermediate_size=hidden, **other
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def gpt2(hidden):
    """Its head is tied to the embeddings."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2, **NO_DROPOUT, n_embd=hidden)
    )


def bert(hidden, kind, **other):
    return _bert_like("Bert", hidden, kind, **other)


def esm(hidden, kind):
    other = {"mask_token_id": 3, "position_embedding_type": "rotary", "token_dropout": False}
    return _bert_like("Esm", hidden, kind, pad_token_id=0, **other)


def vit(hidden, kind):
    return _bert_like("ViT", hidden, kind, image_size=8, patch_size=4)


def _bert_like(family, hidden, kind, **other):
    size = LLAMA_LIKE if family != "ViT" else {**LLAMA_LIKE, "vocab_size": None}
    config = getattr(transformers, f"{family}Config")(
        **{name: x for name, x in size.items() if x}, num_labels=5, hidden_size=hidden,
        intermediate_size=hidden, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        **other,
    )  # fmt: skip
    name = kind if kind.endswith("Model") else f"For{kind}"
    return getattr(transformers, f"{family}{name}")(config)


def opt(hidden):
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **LLAMA_LIKE, hidden_size=hidden, ffn_dim=hidden, word_embed_proj_dim=8,
            max_position_embeddings=32, dropout=0.0,
        )
    )  # fmt: skip


def encoder_decoder(hidden, kind):
    both = {"layers": 1, "attention_heads": 2, "ffn_dim": hidden}
    both = {f"{part}_{name}": x for part in ("encoder", "decoder") for name, x in both.items()}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, d_model=hidden, max_position_embeddings=32, dropout=0.0,
        pad_token_id=1, decoder_start_token_id=2, **both,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def pair(make, *arguments, **keywords):
    """A student and a wider teacher, whose logits are far from uniform."""
    torch.manual_seed(0)
    student, teacher = make(16, *arguments, **keywords), make(32, *arguments, **keywords)
    with torch.no_grad():
        for parameter in (*student.parameters(), *teacher.parameters()):
            if parameter.ndim == 2:
                parameter.mul_(4)
    return student, teacher


def language(seed=1):
    """Rows of tokens whose first ones, as many as chance says, are a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (SAMPLES, TOKENS), generator=generator)
    prompts = torch.randint(1, TOKENS - 1, (SAMPLES, 1), generator=generator)
    labels = tokens.masked_fill(torch.arange(TOKENS) < prompts, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def translations():
    """The same, and what a decoder is given: the labels, one token later."""
    rows = language()
    for row in rows:
        later = row["labels"].roll(1).masked_fill(torch.arange(TOKENS) == 0, 2)
        row["decoder_input_ids"] = later.masked_fill(later == -100, 1)
    return rows


def classes(kind):
    """Rows of tokens with a class for each row, or for each token but some; or images."""
    if kind == "ImageClassification":
        return [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 5} for i in range(SAMPLES)]
    tokens = torch.randint(VOCABULARY, (SAMPLES, TOKENS))
    if kind == "SequenceClassification":
        labels = torch.randint(5, (SAMPLES,))
    else:
        labels = torch.randint(5, (SAMPLES, TOKENS))
        labels[torch.rand(SAMPLES, TOKENS) < 0.3] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


class Eager(transformers.Trainer):
    """The loss in plain PyTorch, which transformers itself scales over batches and ranks."""

    def __init__(self, *arguments, teacher_model, shift=True, **keywords):
        super().__init__(*arguments, compute_loss_func=self.formula, **keywords)
        self.teacher_model, self.shift = teacher_model.eval(), shift

    def compute_loss(self, model, inputs, *arguments, **keywords):
        others = {name: x for name, x in inputs.items() if name != "labels"}
        with torch.no_grad():
            self.teacher_logits = self.teacher_model(**others).logits
        return super().compute_loss(model, inputs, *arguments, **keywords)

    def formula(self, outputs, labels, num_items_in_batch=None):
        s, t = outputs.logits, self.teacher_logits
        if self.shift:
            s, t, labels = s[:, :-1], t[:, :-1], labels[:, 1:]
        kept = labels != -100
        s, t, labels = s[kept], t[kept], labels[kept]
        temperature = LOSS["temperature"]
        p, q = (x.div(temperature).log_softmax(-1) for x in (t, s))
        soft = temperature**2 * F.kl_div(q, p, reduction="sum", log_target=True)
        hard = F.cross_entropy(s, labels, reduction="sum")
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        return (LOSS["soft_weight"] * soft + LOSS["hard_weight"] * hard) / count


def fit(trainer_class, student, dataset, folder, *, batch=4, accumulation=1, more=None, **keywords):
    """The losses of ten steps, and the student's parameters after them."""
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=batch, learning_rate=0.05,
        gradient_accumulation_steps=accumulation, optim="sgd", lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        max_grad_norm=0.0, dataloader_pin_memory=False, **(more or {}),
    )  # fmt: skip
    trainer = trainer_class(student, arguments, train_dataset=dataset, **keywords)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return torch.tensor(losses), {name: x.detach() for name, x in student.named_parameters()}


def assert_same_training(one, other):
    """The same to float32's rounding, which ten steps pass on."""
    torch.testing.assert_close(one[0], other[0], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=2e-5)


def enter_rank(rank, port):
    """Make this process one of two ranks."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)


def train_in_rank(rank, port, folder):
    """What one of two ranks does: every training, whose results it saves."""
    from fastkd.integrations.transformers import DistillationTrainer

    enter_rank(rank, port)
    results = {}
    # DDP searches the graph of what forward returned for parameters that are not used.
    search, no_search = ({"ddp_find_unused_parameters": x} for x in (True, False))
    for name, trainer_class, more, keywords in [
        ("eager", Eager, search, {}),
        ("logits", DistillationTrainer, search, {**LOSS, "linear_heads": False}),
        ("heads", DistillationTrainer, search, {**LOSS, "linear_heads": True}),
        ("heads, no search", DistillationTrainer, no_search, {**LOSS, "linear_heads": True}),
    ]:
        for accumulation in (1, 4):
            student, teacher = pair(llama_like, kind="Llama")
            results[name, accumulation] = fit(
                trainer_class, student, language(), folder, batch=2, accumulation=accumulation,
                more={"ddp_backend": "gloo", **more}, teacher_model=teacher, **keywords,
            )  # fmt: skip
    torch.save(results, f"{folder}/{rank}.pt")
