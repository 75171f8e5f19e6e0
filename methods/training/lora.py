"""Low-rank adapters (LoRA, Hu et al., 2021) through peft: what is trained beside frozen weights.

Every matrix W of a block gets alpha/r * B A beside it, with B = 0 at the start. Saving adds the
product into W, so that the student has the shapes of its architecture and nobody needs peft to open
it. Packed weights cannot take the product without being rounded again: there the factors are saved
beside them (`harness.models.packed_training`), and nobody needs peft either.
"""

import warnings
from typing import Any

import torch

from harness.errors import CellFailed, Skipped, in_one_line
from harness.models.packed import is_plain, packed_modules
from harness.models.packed_training import (
    Adapter,
    adaptable_layers,
    make_differentiable,
    use_kernels_again,
)
from methods.masks import kept_weights, zeros_stay

# Of the learning rate of full training: best rates of LoRA lie about ten times higher, whatever the
# rank (Schulman et al., 2025, "LoRA without regret").
LEARNING_RATE_FACTOR = 10.0


def add_adapters(model: Any, *, rank: int, alpha: int, seed: int, label: str) -> int:
    """Freeze a model's weights and put adapters beside its blocks' matrices; return their weights.

    Packed layers then compute with a gradient, and without their kernels. Raises `Skipped` where
    peft is missing, and `CellFailed` for a model that peft cannot adapt or whose zeros an adapter
    would fill.
    """
    require_peft()
    from peft import inject_adapter_in_model

    _refuse_pruned(model, label)
    config = _lora_config(model, rank=rank, alpha=alpha)
    model.requires_grad_(False)
    make_differentiable(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft warns about layers that are not its own, which are given to it on purpose
        warnings.filterwarnings("ignore", message="Unsupported layer type")
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


def require_peft() -> None:
    """Raise `Skipped` where peft is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as problem:
        raise Skipped(
            "peft is not installed; type: pip install 'compression-harness[lora]'"
        ) from problem


def _lora_config(model: Any, *, rank: int, alpha: int) -> Any:
    """Return peft's configuration for every matrix of the blocks, float or packed."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    options = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none"}
    has_factors = any(spec.get("factors") for spec in packed_modules(model).values())
    if is_plain(model) and not has_factors:
        return LoraConfig(**options, target_modules="all-linear")
    layers = adaptable_layers(model)
    config = LoraConfig(**options, target_modules=list(layers))
    # peft's own adapter of a linear layer asks its layer for nothing but sizes and an output
    config._register_custom_module({type(layer): Linear for layer in layers.values()})
    return config


def take_adapters(model: Any) -> dict[str, Adapter]:
    """Take every adapter out of a packed model; return them by the names of their layers.

    The layers compute with their kernels again.
    """
    from peft.tuners.lora import LoraLayer

    adapters = {}
    for name, module in [*model.named_modules()]:
        if isinstance(module, LoraLayer):
            [adapter] = module.active_adapters
            up = module.lora_B[adapter].weight.detach() * module.scaling[adapter]
            adapters[name] = Adapter(module.lora_A[adapter].weight.detach(), up)
            model.set_submodule(name, module.get_base_layer())
    _forget_peft(model)
    use_kernels_again(model)
    return adapters


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
    _forget_peft(model)
    model.requires_grad_(True)


def _forget_peft(model: Any) -> None:
    """Remove what peft noted in a model."""
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in model.__dict__:
            delattr(model, attribute)


def _refuse_pruned(model: Any, label: str) -> None:
    """Refuse zeros that mean something: the product of two factors would fill them.

    Codes of few bits are often zero, so a packed student was pruned where it says so.
    """
    if is_plain(model):
        matrices = (weight.detach() for weight in model.parameters() if weight.ndim >= 2)
        was_pruned = any(kept_weights(model.config, matrix) is not None for matrix in matrices)
        advice = "use recipe=full"
    else:
        was_pruned = zeros_stay(model.config)
        advice = "train it with recipe=full before it is packed"
    if was_pruned:
        raise CellFailed(
            f"{label}: the student was pruned, and adapters would fill its zeros; {advice}"
        )
