"""Low-rank adapters (LoRA, Hu et al., 2021) through peft: what is trained beside frozen weights.

Every matrix W of a block gets alpha/r * B A beside it, with B = 0 at the start. Saving adds the
product into W, so that the student has the shapes of its architecture and nobody needs peft to open
it.
"""

from typing import Any

import torch

from harness.errors import CellFailed, Skipped, in_one_line
from methods.masks import kept_weights

# Of the learning rate of full training: best rates of LoRA lie about ten times higher, whatever the
# rank (Schulman et al., 2025, "LoRA without regret").
LEARNING_RATE_FACTOR = 10.0


def add_adapters(model: Any, *, rank: int, alpha: int, seed: int, label: str) -> int:
    """Freeze a model's weights and put adapters beside its blocks' matrices; return their weights.

    Raises `Skipped` where peft is missing, and `CellFailed` for a model that peft cannot adapt or
    whose zeros an adapter would fill.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as problem:
        raise Skipped(
            "peft is not installed; type: pip install 'compression-harness[lora]'"
        ) from problem
    _refuse_pruned(model, label)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules="all-linear"
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as problem:
            raise CellFailed(
                f"{label}: peft cannot adapt this model ({in_one_line(problem)}); use recipe=full"
            ) from problem
    count = 0
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.requires_grad_(True)
            count += weight.numel()
    if not count:
        raise CellFailed(f"{label}: peft found no layer to adapt in this model; use recipe=full")
    return count


def merge_adapters(model: Any) -> None:
    """Add every adapter into its matrix and take it out; the model answers as before, to rounding.

    The product and the sum are made in float32.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, module in adapted.items():
        module.merge(safe_merge=True)
        # peft wraps a mixture's experts twice, once for each of their two matrices
        is_inner = isinstance(adapted.get(name.rpartition(".")[0]), LoraLayer)
        if not is_inner:
            model.set_submodule(name, module.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    model.requires_grad_(True)


def _refuse_pruned(model: Any, label: str) -> None:
    """Refuse zeros that mean something: the product of two factors would fill them."""
    for weight in model.parameters():
        if weight.ndim >= 2 and kept_weights(model.config, weight.detach()) is not None:
            raise CellFailed(
                f"{label}: the student was pruned, and adapters would fill its zeros; use "
                "recipe=full"
            )
