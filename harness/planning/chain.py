"""Chains of methods, `prune-depth+response+int8`: how they are written, and which stage may come
before which. No torch.

Every stage is asked about every stage before it. The order that published evidence supports is cut,
distil, quantize (Minitron, Muralidharan et al., 2024; Kim et al., 2025, arXiv 2511.19495); what it
refuses cannot be computed, or undoes the stage before.
"""

import re
from collections.abc import Callable, Sequence

from harness.contract import Method
from harness.errors import HarnessError
from harness.planning.spec import split_outside_brackets

_FAMILY_ORDER = {
    "pruning": "prune",
    "low-rank": "factorise",
    "distillation": "distil",
    "quantization": "quantize",
}

# (earlier, later) -> why not; all other pairs may stand in one chain
_REFUSED_ORDERS = {
    (
        "quantization",
        "distillation",
    ): "packed weights take no gradient (quantisation-aware distillation is not in this version)",
    ("quantization", "pruning"): "packed weights cannot be cut",
    ("quantization", "low-rank"): "packed weights cannot be factorised",
    ("quantization", "quantization"): "the weights are packed already",
    ("low-rank", "pruning"): "factors have no channels, heads or blocks of their own to cut",
    ("low-rank", "low-rank"): "the factors would be factorised again; set one rank",
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
    """Return what a method is to a chain: whatever trains distils, be it a control or not."""
    return "distillation" if method.trains else str(method.family)


def can_be_stage(method: Method | type[Method]) -> bool:
    """Tell whether a method changes what it is given: one that does not has no place in a chain."""
    return stage_kind(method) in _FAMILY_ORDER


def check_chain(names: Sequence[str], methods: Sequence[Method]) -> None:
    """Refuse an order that cannot work, naming both stages and an order that does."""
    spec = "+".join(names)
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise HarnessError(f"chain {spec}: {repeated} stands in it twice; name every method once")
    kinds = [stage_kind(method) for method in methods]
    for name, kind in zip(names, kinds, strict=True):
        if kind not in _FAMILY_ORDER:
            raise HarnessError(
                f"chain {spec}: {name} changes nothing, so it cannot be a stage; drop it"
            )
        if names.index(name) and methods[names.index(name)].discards_weights:
            raise HarnessError(
                f"chain {spec}: {name}[start=random] would throw away the stages before it; put it "
                "first"
            )
    for later in range(len(kinds)):
        for earlier in range(later):
            why = _REFUSED_ORDERS.get((kinds[earlier], kinds[later]))
            both = [one for one in (methods[earlier], methods[later]) if one.leaves_zeros]
            if len(both) == 2 and both[1].zero_share <= both[0].zero_share:
                why = (
                    f"the zeros of {names[earlier]} are as many already; give {names[later]} a "
                    "larger ratio, or drop one"
                )
            pattern = methods[earlier].zero_pattern
            if pattern != "unstructured" and methods[later].drops_inputs:
                why = (
                    f"dropping channels would break its groups of pattern {pattern}; put "
                    f"{names[later]} first"
                )
            if kinds[later] == "low-rank" and methods[earlier].leaves_zeros:
                why = (
                    "the factors of a matrix with zeros have none of them; prune channels or "
                    "blocks instead"
                )
            if not why and not methods[earlier].keeps_architecture and methods[later].needs_plain:
                why = "it needs the architecture's own shapes, and those are no longer there"
            if why:
                ordered = sorted(
                    range(len(names)), key=lambda at: list(_FAMILY_ORDER).index(kinds[at])
                )
                better = "+".join(names[at] for at in ordered)
                hint = (
                    f"; type {better}" if better != spec and len(set(kinds)) == len(kinds) else ""
                )
                raise HarnessError(
                    f"chain {spec}: {names[later]} cannot follow {names[earlier]}: {why}{hint}"
                )


def companion_chains(
    parts: Sequence[str], methods: Sequence[Method], method_named: Callable[[str], type[Method]]
) -> list[tuple[str, ...]]:
    """Return the chains that must stand beside this one, as parts: what each stage gave, and what
    it would have been without.

    The chain up to its last stage, the last stage alone (where it needs no stage before it), the
    chain without its training, and for the last stage each of its controls that can be a stage in
    its place; `method_named` gives a control's class.
    """
    if len(parts) == 1:
        return []
    kinds = [stage_kind(method) for method in methods]
    found = [tuple(parts[:-1])]
    if kinds[-1] != "distillation":
        found.append((parts[-1],))
    untrained = tuple(
        part for part, kind in zip(parts, kinds, strict=True) if kind != "distillation"
    )
    if untrained and len(untrained) < len(parts):
        found.append(untrained)
    stages = [control for control in methods[-1].controls if can_be_stage(method_named(control))]
    found += [
        (*parts[:-1], control) for control in stages if control not in map(without_settings, parts)
    ]
    return list(dict.fromkeys(found))


def without_settings(label: str) -> str:
    """Return a row's name without its settings."""
    return re.sub(r"\[[^\]]*\]", "", label)
