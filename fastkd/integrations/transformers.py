"""A `transformers.Trainer` that distils; the extra is `fastkd[transformers]`."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.bart.modeling_bart import shift_tokens_right

from fastkd.logits import LinearHead
from fastkd.losses.distillation import distillation_loss

__all__ = ["DistillationTrainer"]

# Under which names models have what they multiply the logits of their heads with or divide them by,
# and what then bounds them.
SCALES = "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"
SOFTCAPS = "final_logit_softcapping", "softcap", "logits_soft_cap", "output_logit_soft_cap"


class DistillationTrainer(transformers.Trainer):
    """`transformers.Trainer` whose loss is `fastkd.distillation_loss` with a teacher.

    `hard_weight * CE(student, labels) + soft_weight * T^2 * KL(teacher ‖ student at T)`, over the
    rows whose label is not -100. `compute_loss` is all that is overridden. Labels are shifted for
    causal language models and stay as they are for others: masked language models,
    encoder-decoders, whose decoder is given the labels one token later, and classifiers of
    sequences, tokens or images. The loss is divided by the labels of a step
    (`num_items_in_batch`), over accumulated batches and ranks, as transformers' own is for most
    models. `args.label_smoothing_factor` smooths the hard target. Losses that a model adds itself,
    such as the balance of a mixture of experts, are left out.

    The teacher runs in eval mode, without gradient and without a cache of keys, on the inputs of
    the student except for the labels. It is whole on every rank, under FSDP as well.

    With linear heads no logits exist as a whole in training: either head is given the hidden states
    of one token alone, and the loss takes those of all tokens and the weight of the head as a
    `fastkd.LinearHead`. Evaluation returns logits, and computes them.

    Args:
        *args: those of `transformers.Trainer`.
        teacher_model: the teacher, an instance. Required.
        temperature: T of the soft term. Default: 1.0, usual for language; 4.0 is for images.
        teacher_temperature: the teacher's own T. Default: None, the student's.
        divergence: of the soft term, by a name of `fastkd.distillation_loss`. Default:
            `"forward_kl"`.
        beta: in [0, 1], of `"jsd"` and the skew divergences. Default: 0.5.
        soft_weight: the weight of the soft term. Default: 0.5.
        hard_weight: the weight of the cross-entropy; 0 switches it off. Default: 0.5.
        num_classes: how many classes exist, where an output matrix is padded. Default: None, all
            do, and both models have as many.
        linear_heads: whether to use linear heads. Default: None, where both models make logits of
            tokens by a `torch.nn.Linear` (the first step finds out, up to a scale and a softcap),
            and neither is compiled, split over ranks or devices, or in DDP with a static graph.
        **kwargs: those of `transformers.Trainer`.

    Raises:
        ValueError: `linear_heads=True` cannot be done; with `compute_loss_func`,
            `torch.nn.DataParallel` or sequence parallelism; for a batch without labels.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from fastkd.integrations.transformers import DistillationTrainer
        >>> small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
        >>> config = LlamaConfig(**small, num_hidden_layers=1, num_attention_heads=2)
        >>> student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
        >>> tokens = torch.randint(64, (8, 12))
        >>> trainer = DistillationTrainer(
        ...     student,
        ...     TrainingArguments(max_steps=2, report_to=[], save_strategy="no", disable_tqdm=True),
        ...     train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        ...     teacher_model=teacher,
        ... )
        >>> trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
    """

    def __init__(
        self,
        *args: Any,
        teacher_model: nn.Module,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        soft_weight: float = 0.5,
        hard_weight: float = 0.5,
        num_classes: int | None = None,
        linear_heads: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        _refuse(self)
        self.model_accepts_loss_kwargs = True  # so that labels are counted, for compute_loss
        self.distillation = {
            "temperature": temperature,
            "teacher_temperature": teacher_temperature,
            "divergence": divergence,
            "beta": beta,
            "soft_weight": soft_weight,
            "hard_weight": hard_weight,
            "num_classes": num_classes,
            "label_smoothing": self.args.label_smoothing_factor,
        }
        self.is_causal = _is_causal(self.model)
        obstacle = "" if linear_heads is False else _obstacle(self, teacher_model)
        if linear_heads and obstacle:
            raise ValueError(f"linear_heads=True cannot be done: {obstacle}")
        self.linear_heads, self.linear_heads_are_required = obstacle is None, bool(linear_heads)
        self.after_heads: dict[nn.Module, dict[str, Any]] = {}  # found in the first step
        teacher: Any = teacher_model
        if getattr(teacher, "config", None) is not None:
            teacher.config.use_cache = self.args.use_cache  # as the student's is set
        if self.is_fsdp_enabled and not hasattr(teacher_model, "hf_device_map"):
            teacher_model.to(self.args.device)  # which Accelerate leaves to FSDP
        self.teacher_model = self.accelerator.prepare_model(
            teacher_model.eval(), evaluation_mode=True
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch; see `transformers.Trainer.compute_loss`."""
        inputs = dict(inputs)
        inputs.pop("skip_logits", None)  # with Liger-Kernel, which would leave out what is needed
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        if labels is None and shifted is None:
            raise ValueError("the batch has no labels, which say which rows count")
        _add_decoder_inputs(self.accelerator.unwrap_model(model), inputs, labels)
        outputs = student = None
        teacher: Tensor | LinearHead
        if self.linear_heads and not return_outputs:
            try:
                student = _head(self, model, inputs)
                with torch.no_grad():
                    teacher = _head(self, self.teacher_model, inputs)
            except _NotOfItsHead:
                if self.linear_heads_are_required:
                    raise
                self.linear_heads, student = False, None
        if student is None:
            outputs = model(**inputs)
            student = outputs.logits
            with torch.no_grad():
                teacher = self.teacher_model(**inputs).logits
        if shifted is not None:
            labels = shifted
        elif self.is_causal:
            # The logits of a token are those of the next one, and those of the last one of none.
            labels = pad(labels[..., 1:], (0, 1), value=-100)
        with self.accelerator.autocast():
            loss = distillation_loss(
                student, teacher, labels, normalizer=num_items_in_batch, **self.distillation
            )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is that of all ranks, over whose gradients DDP averages.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss


def _refuse(trainer: transformers.Trainer) -> None:
    """Raise for what would be left out, or would give other numbers in silence."""
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func would not be called: this class has its own loss")
    if trainer.get_sp_size() > 1:
        raise ValueError("a sequence that is split over ranks by DeepSpeed is not supported")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "several GPUs in one process would be used through torch.nn.DataParallel: start "
            "one process for each with torchrun, or show one with CUDA_VISIBLE_DEVICES"
        )


class _NotOfItsHead(ValueError):
    """The logits of a model are not made by its head alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            f"the logits of {type(model).__name__} are not those of its head: pass "
            "linear_heads=False"
        )


def _base(model: Any) -> Any:
    """The model without what peft wraps around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_causal(model: Any) -> bool:
    """Whether the logits of a token are those of the next one, as transformers decides it."""
    model = _base(model)
    return (
        getattr(model, "loss_function", None) is ForCausalLMLoss
        and model.get_output_embeddings() is not None
        and not model.config.is_encoder_decoder
    )


def _add_decoder_inputs(model: Any, inputs: dict[str, Any], labels: Tensor | None) -> None:
    """What an encoder-decoder for tokens would make of labels, which it is not given."""
    model = _base(model)
    if (
        labels is None
        or not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        or model.get_output_embeddings() is None
        or inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
    ):
        return
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        config = model.config
        inputs["decoder_input_ids"] = shift_tokens_right(
            labels, config.pad_token_id, config.decoder_start_token_id
        )


def _obstacle(trainer: transformers.Trainer, teacher: nn.Module) -> str | None:
    """Why linear heads cannot be used, if they cannot."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.get_tp_size() > 1:
        return "the weights of the heads are split over ranks"
    if trainer.args.torch_compile or trainer.args.ddp_static_graph:
        return "a compiled model, or DDP with a static graph, does not give its hidden states away"
    for name, model in (("student", trainer.model), ("teacher", teacher)):
        if is_compiled_module(model) or model._compiled_call_impl is not None:
            return f"the {name} is compiled, and does not give its hidden states away"
        find_head = getattr(_base(model), "get_output_embeddings", lambda: None)
        if type(head := find_head()) is not nn.Linear:
            return f"the {name} does not end in a torch.nn.Linear that makes logits of tokens"
        if hasattr(head, "_hf_hook"):
            return f"the {name} is split over devices"
    return None


def _head(trainer: DistillationTrainer, model: nn.Module, inputs: dict[str, Any]) -> LinearHead:
    """The hidden states of all tokens, and the weights that make logits of them.

    The model is called as a whole, as what wraps it expects, but its head computes the logits of
    one token alone.
    """
    whole = _base(trainer.accelerator.unwrap_model(model))
    head = whole.get_output_embeddings()
    hidden: list[Tensor] = []

    def leave_the_last(_: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        hidden.extend(arguments)
        return arguments[0][..., -1:, :]

    hook = head.register_forward_pre_hook(leave_the_last)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    if len(hidden) != 1:
        raise _NotOfItsHead(whole)
    parameters = [head.weight, head.bias]
    if not torch.is_grad_enabled():
        parameters = [None if x is None else x.detach() for x in parameters]
    result = LinearHead(hidden[0], *parameters)
    if whole not in trainer.after_heads:
        with torch.no_grad(), trainer.accelerator.autocast():
            trainer.after_heads[whole] = _after_head(whole, result, logits)
    return dataclasses.replace(result, **trainer.after_heads[whole])


def _after_head(model: Any, head: LinearHead, logits: Tensor) -> dict[str, Any]:
    """What a model does to the logits of its head, by the first numbers that give its own ones.

    Raises unless some do, to the precision of the head's product.
    """
    plain, logits = linear(head.hidden[..., -1:, :], head.weight, head.bias), logits.float()
    tolerance = 1e-3 if plain.dtype.itemsize > 2 else 0.02
    plain, margin = plain.float(), tolerance * logits.abs().max().item()
    if not logits.any():  # of zeros every number makes the same
        raise _NotOfItsHead(model)
    config = model.config.get_text_config()
    scales = [x for s in _numbers(config, SCALES) for x in (s, 1 / s)]
    for scale, softcap in itertools.product([*scales, 1.0], [*_numbers(config, SOFTCAPS), None]):
        found = scale * plain
        if softcap is not None:
            found = softcap * torch.tanh(found / softcap)
        if found.shape == logits.shape and torch.allclose(found, logits, tolerance, margin, True):
            return {"scale": scale, "softcap": softcap}
    raise _NotOfItsHead(model)


def _numbers(config: Any, names: Iterable[str]) -> list[float]:
    return [x for name in names if (x := getattr(config, name, None))]
