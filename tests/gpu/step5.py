"""Step 5: packed layers and a whole packed 7B, by rows, beside bf16 in the same run.

Each is right, and those that are slower than bf16 are named.
"""

import statistics
from collections.abc import Callable
from typing import Any

from kit import GIB, Figures, Kit, release, seconds_of

ROWS = (1, 8, 9, 64, 512, 4096)
KINDS = {"int8": 8, "int8-dynamic": 8, "int4": 4}
# of the largest output: rounding of bf16 products, and of 8-bit activations
TOLERANCE = 0.03


def run(kit: Kit) -> None:
    """Run the step's parts."""
    kit.part("layers", lambda: layers(kit), needs=8 * GIB, seconds=60)
    for kind in KINDS:
        kit.part(
            f"7B in {kind}",
            lambda kind=kind: whole(kit, kind),
            needs=2 * kit.bytes_of("7B") + 8 * GIB,
            seconds=55,
        )


def _rows(kit: Kit) -> tuple[int, ...]:
    return (1, 8, 9, 300) if kit.dry else ROWS


def packed(weight: Any, bias: Any, kind: str, dtype: Any) -> Any:
    """Return the packed layer of a float matrix (O, I), on its device."""
    from torch.nn import Parameter

    from harness.models.packed import packed_module
    from methods.compression.rounding import packed_layer, round_to_nearest

    group_size = 128 if kind == "int4" else 0
    matrix = round_to_nearest(weight.float(), bits=KINDS[kind], group_size=group_size)
    spec, tensors = packed_layer("layer", matrix, bias, kind=kind)
    module = packed_module(spec, dtype)
    for leaf, tensor in tensors.items():
        setattr(module, leaf.removeprefix("layer."), Parameter(tensor, requires_grad=False))
    return module


def layers(kit: Kit) -> Figures:
    """Multiply by the matrices of a 7B: right, and how fast beside a bf16 layer."""
    import torch

    hidden, _, heads, key_heads, intermediate, _, _ = kit.shapes["7B"]
    shapes = {
        "up": (intermediate, hidden),
        "down": (hidden, intermediate),
        "key": (hidden * key_heads // heads, hidden),
    }
    dtype = getattr(torch, kit.dtype)
    figures: Figures = {}
    slower: list[str] = []
    wrong: list[str] = []
    for place, shape in shapes.items():
        weight = 0.02 * torch.randn(shape, device=kit.device)
        plain = torch.nn.Linear(shape[1], shape[0], bias=False, device=kit.device, dtype=dtype)
        plain.weight.data = weight.to(dtype)
        for kind in KINDS:
            layer = packed(weight, None, kind, dtype)
            stands_for = layer.dequantized()
            for rows in _rows(kit):
                x = torch.randn((rows, shape[1]), device=kit.device, dtype=dtype)
                with torch.inference_mode():
                    expected = x.float() @ stands_for.T
                    gap = float((layer(x).float() - expected).abs().max() / expected.abs().max())
                    ours, theirs = _milliseconds(layer, x), _milliseconds(plain, x)
                name = f"{place} {kind} {rows}"
                figures[name] = {"ms": ours, "bf16: ms": theirs, "gap": round(gap, 5)}
                slower += [name] if ours > theirs else []
                wrong += [name] if not gap <= TOLERANCE else []
    figures["slower than bf16"] = slower
    figures["kernels that work"] = _working_kernels()
    if wrong:
        raise RuntimeError(f"packed layers that compute something else: {wrong}: {figures}")
    return figures


def _working_kernels() -> dict[str, bool]:
    from harness.models.packed import _tried_kernel

    return {kind: _tried_kernel(kind) for kind in KINDS}


def _milliseconds(module: Callable[[Any], Any], x: Any) -> float:
    return round(1e3 * statistics.median(seconds_of(lambda: module(x), runs=5)), 4)


def whole(kit: Kit, kind: str) -> Figures:
    """Run a 7B of packed layers on rows of one token and on a prompt, beside the same in bf16."""
    import torch

    from harness.contract import Checkpoint
    from harness.measuring.worker import resident_bytes
    from harness.models.language_model import LanguageModel
    from harness.models.resolve import EMBEDDED
    from harness.models.unpacked import unpacked_once

    model = kit.model("7B")
    vocabulary = kit.shapes["7B"][5]
    generator = torch.Generator(kit.device).manual_seed(0)
    inputs = {
        rows: torch.randint(1, vocabulary, (rows, 1), device=kit.device, generator=generator)
        for rows in _rows(kit)
    }

    def forward(rows: int) -> Any:
        with torch.inference_mode():
            return model(input_ids=inputs[rows], use_cache=False, logits_to_keep=1).logits[:8, -1]

    def timed() -> dict[int, float]:
        return {
            rows: round(1e3 * statistics.median(seconds_of(lambda rows=rows: forward(rows))), 3)
            for rows in inputs
        }

    plain, plain_logits, plain_bytes = timed(), forward(8).float(), resident_bytes(model)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            layer = packed(module.weight.data, module.bias, kind, model.dtype)
            model.model.layers.set_submodule(name, layer)
    release()
    ours, logits = timed(), forward(8).float()
    opened = LanguageModel(
        model, None, kit.device, Checkpoint(path=EMBEDDED, name="7B", digest="random")
    )
    with unpacked_once(opened):
        kept = timed()
    deviation = float((logits - plain_logits).square().mean().sqrt() / plain_logits.std())
    figures: Figures = {
        "rows of one token": list(inputs),
        "ms": list(ours.values()),
        "bf16: ms": list(plain.values()),
        "unpacked once: ms": list(kept.values()),
        "bytes": resident_bytes(model),
        "bf16: bytes": plain_bytes,
        "deviation of logits over their spread": round(deviation, 4),
        "slower than bf16": [rows for rows in inputs if ours[rows] > plain[rows]],
        "slower than bf16, unpacked once": [rows for rows in inputs if kept[rows] > plain[rows]],
    }
    if not deviation < 0.5:
        raise RuntimeError(f"a 7B in {kind} computes something else: {figures}")
    return figures
