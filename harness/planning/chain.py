"""Chains of methods such as `prune-depth+response+int8`: syntax and allowed orders. No torch.

Every stage is checked against every stage before it. The order that published evidence supports is
prune, distil, quantize (Minitron, Muralidharan et al., 2024; Kim et al., 2025, arXiv 2511.19495).
An order is refused if it cannot be computed, or if a stage would undo an earlier one.
"""

import re
from collections.abc import Callable, Sequence

from harness.contract import Method
from harness.errors import HarnessError
from harness.planning.spec import split_outside_brackets

# kinds of stages in the order that a refused chain is advised
_FAMILY_ORDER = ("pruning", "low-rank", "distillation", "quantization", "cache")

# (earlier kind, later kind) -> why the later stage cannot follow; all other pairs are allowed
_REFUSED_ORDERS = {
    (
        "quantization",
        "distillation",
    ): "packed weights take no gradient (beside int8 and int4, recipe=lora trains adapters)",
    ("quantization", "pruning"): "packed weights cannot be cut",
    ("quantization", "low-rank"): "packed weights cannot be factorised",
    ("quantization", "quantization"): "the weights are packed already",
    ("low-rank", "pruning"): "factors have no channels, heads or blocks of their own to cut",
    ("low-rank", "low-rank"): "the factors would be factorised again; set one rank",
    ("cache", "cache"): "keys and values are quantized already",
}


def split_chain(spec: str) -> list[str]:
    """Split a chain at the plus signs outside brackets; a lone method is a chain of one."""
    parts = [part.strip() for part in split_outside_brackets(spec, "+")]
    if any(not part for part in parts):
        raise HarnessError(
            f"chain {spec!r} has an empty stage; write for example prune-depth+response+int8"
        )
    return parts


def stage_kind(method: Method | type[Method]) -> str:
    """Return a method's kind as a stage: "distillation" if it trains, else its family."""
    return "distillation" if method.trains else str(method.family)


def can_be_stage(method: Method | type[Method]) -> bool:
    """Tell whether a method changes the model that it gets: only then it can be a stage."""
    return stage_kind(method) in _FAMILY_ORDER


def check_chain(names: Sequence[str], methods: Sequence[Method]) -> None:
    """Refuse a chain that cannot work: name the stages that conflict, and an order that works."""
    spec = "+".join(names)
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise HarnessError(f"chain {spec}: {repeated} is in it twice; name every method once")
    for position, (name, method) in enumerate(zip(names, methods, strict=True)):
        if not can_be_stage(method):
            raise HarnessError(
                f"chain {spec}: {name} changes nothing, so it cannot be a stage; drop it"
            )
        if position and method.discards_weights:
            raise HarnessError(
                f"chain {spec}: {name}[start=random] would discard the stages before it; put it "
                "first"
            )
    for later in range(len(methods)):
        for earlier in range(later):
            if reason := _conflict(names, methods, earlier, later):
                raise HarnessError(
                    f"chain {spec}: {names[later]} cannot follow {names[earlier]}: {reason}"
                    f"{_better_order(names, methods)}"
                )


def _conflict(
    names: Sequence[str], methods: Sequence[Method], earlier: int, later: int
) -> str | None:
    """Return why the stage `later` cannot follow the stage `earlier`; None if it can."""
    first, second = methods[earlier], methods[later]
    if second.leaves_zeros and first.leaves_zeros and second.zero_share <= first.zero_share:
        reason = (
            f"{names[earlier]} leaves as many zeros already; give {names[later]} a larger ratio, "
            "or drop one of them"
        )
    else:
        adapts = first.takes_adapters and second.trains_adapters
        kinds = stage_kind(first), stage_kind(second)
        reason = "" if adapts else _REFUSED_ORDERS.get(kinds, "")
    if first.zero_pattern != "unstructured" and second.drops_inputs:
        reason = (
            f"dropping channels would break its groups of pattern {first.zero_pattern}; put "
            f"{names[later]} first"
        )
    if second.trains_adapters and first.leaves_zeros:
        reason = (
            f"adapters would fill its zeros; train every weight ({names[later]}[recipe=full]), "
            "before anything packs them"
        )
    if stage_kind(second) == "low-rank" and first.leaves_zeros:
        reason = (
            "the factors of a matrix with zeros contain no zeros; prune channels or blocks instead"
        )
    if not reason and not first.keeps_architecture and second.needs_plain:
        reason = "it needs the shapes of the original architecture, which an earlier stage changed"
    return reason or None


def _better_order(names: Sequence[str], methods: Sequence[Method]) -> str:
    """Return advice to type the stages in the usual order; "" if that order is no help."""
    kinds = [stage_kind(method) for method in methods]
    ordered = sorted(range(len(names)), key=lambda position: _FAMILY_ORDER.index(kinds[position]))
    if ordered == [*range(len(names))] or len(set(kinds)) < len(kinds):
        return ""
    return f"; type {'+'.join(names[position] for position in ordered)}"


def companion_chains(
    parts: Sequence[str], methods: Sequence[Method], method_named: Callable[[str], type[Method]]
) -> list[tuple[str, ...]]:
    """Return the chains, as parts, that show what each stage of this chain contributes.

    They are the chain without its last stage, its last stage alone (unless that trains), the chain
    without its training, and the chain with its last stage replaced by each control of that stage.
    `method_named` returns the class of a control.
    """
    if len(parts) == 1:
        return []
    kinds = [stage_kind(method) for method in methods]
    chains = [tuple(parts[:-1])]
    if kinds[-1] != "distillation":
        chains.append((parts[-1],))
    untrained = tuple(
        part for part, kind in zip(parts, kinds, strict=True) if kind != "distillation"
    )
    if untrained and len(untrained) < len(parts):
        chains.append(untrained)
    names = [*map(without_settings, parts)]
    for control in methods[-1].controls:
        if control not in names and can_be_stage(method_named(control)):
            chains.append((*parts[:-1], control))
    return list(dict.fromkeys(chains))


def without_settings(label: str) -> str:
    """Return a row's label without the settings in brackets."""
    return re.sub(r"\[[^\]]*\]", "", label)
