"""A `transformers.Trainer` that distils; the extra is `fastkd[transformers]`."""

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers.loss.loss_utils import ForCausalLMLoss

from fastkd.logits import LinearHead
from fastkd.losses.distillation import distillation_loss

__all__ = ["DistillationTrainer"]


class DistillationTrainer(transformers.Trainer):
    """`transformers.Trainer` whose loss is `fastkd.distillation_loss` with a teacher.

    `hard_weight * CE(student, labels) + soft_weight * T^2 * KL(teacher ‖ student at T)`, over the
    rows whose label is not -100. `compute_loss` is all that is overridden. Labels are shifted for
    causal language models and stay as they are for others, such as classifiers of sequences, tokens
    or images. Where the trainer counts the labels of a step (`num_items_in_batch`), over
    accumulated batches and ranks, the loss is divided by that count, as transformers' own is.
    `args.label_smoothing_factor` smooths the hard target. Losses that a model adds itself, such as
    the balance of a mixture of experts, are left out.

    The teacher runs in eval mode and without gradient, on the inputs of the student except for the
    labels.

    With linear heads no logits exist as a whole in training: either model computes the hidden
    states of all tokens and the logits of the last one alone, and the loss takes the hidden states
    and the weight of the head as a `fastkd.LinearHead`. Evaluation returns logits, and computes
    them.

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
        linear_heads: whether to use linear heads. Default: None, where both models are causal,
            accept `logits_to_keep` and end in a `torch.nn.Linear`, and neither is compiled, split
            over ranks (FSDP, DeepSpeed, tensor parallelism) or in DDP with a static graph.
        **kwargs: those of `transformers.Trainer`.

    Raises:
        ValueError: linear heads are asked for where they cannot be used, or a model's logits are
            not those of its head; or the trainer would use `torch.nn.DataParallel`.

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
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process would be used through torch.nn.DataParallel: start "
                "one process for each with torchrun, or show one with CUDA_VISIBLE_DEVICES"
            )
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
        if linear_heads is not False:
            obstacle = _obstacle(self, teacher_model)
            if linear_heads and obstacle:
                raise ValueError(f"linear_heads=True cannot be done: {obstacle}")
            linear_heads = obstacle is None
        self.linear_heads = linear_heads
        self.heads_are_checked = False  # until the first step
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
        labels, shifted = inputs.pop("labels"), inputs.pop("shift_labels", None)
        outputs = None
        student: Tensor | LinearHead
        teacher: Tensor | LinearHead
        if self.linear_heads and not return_outputs:
            student = _head(self, model, inputs)
            with torch.no_grad():
                teacher = _head(self, self.teacher_model, inputs)
            self.heads_are_checked = True
        else:
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


def _obstacle(trainer: transformers.Trainer, teacher: nn.Module) -> str | None:
    """Why linear heads cannot be used, if they cannot."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.get_tp_size() > 1:
        return "the weights of the heads are split over ranks"
    if trainer.args.torch_compile or trainer.args.ddp_static_graph:
        return "a compiled model, or DDP with a static graph, does not give its hidden states away"
    for name, model in (("student", trainer.model), ("teacher", teacher)):
        whole = _base(model)
        if not _is_causal(whole):
            return f"the {name} is no causal language model"
        if type(whole.get_output_embeddings()) is not nn.Linear:
            return f"the {name} does not end in a torch.nn.Linear"
        if "logits_to_keep" not in inspect.signature(whole.forward).parameters:
            return f"the {name}'s forward does not take logits_to_keep"
    return None


def _head(trainer: DistillationTrainer, model: nn.Module, inputs: dict[str, Any]) -> LinearHead:
    """Hidden states of all tokens, and the weights that make logits of them.

    The model is called as a whole, as what wraps it expects, but for the logits of one token.
    """
    whole = _base(trainer.accelerator.unwrap_model(model))
    hidden: list[Tensor] = []
    hook = whole.base_model.register_forward_hook(lambda *call: hidden.append(call[-1][0]))
    try:
        logits = model(**inputs, logits_to_keep=1).logits
    finally:
        hook.remove()
    head, config = whole.get_output_embeddings(), whole.config.get_text_config()
    parameters = [head.weight, head.bias]
    if not torch.is_grad_enabled():
        parameters = [None if x is None else x.detach() for x in parameters]
    softcap = getattr(config, "final_logit_softcapping", None)
    result = LinearHead(hidden[0], *parameters, scale=_scale(config), softcap=softcap)
    if not trainer.heads_are_checked:
        with trainer.accelerator.autocast():
            _check(whole, result, logits)
    return result


def _scale(config: Any) -> float:
    """What a model multiplies the logits of its head with, under the names of various models."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return 1 / (getattr(config, "logits_scaling", None) or 1)


def _check(model: nn.Module, head: LinearHead, logits: Tensor) -> None:
    """Raise unless the head gives the logits of the last token, to bfloat16's precision."""
    found = head.scale * linear(head.hidden[:, -1:], head.weight, head.bias)
    if head.softcap is not None:
        found = head.softcap * torch.tanh(found / head.softcap)
    found, logits = found.detach().float(), logits.detach().float()
    if not torch.allclose(found, logits, 0.02, 0.02 * logits.abs().max().item(), equal_nan=True):
        raise ValueError(
            f"the logits of {type(model).__name__} are not those of its head: "
            "pass linear_heads=False"
        )
