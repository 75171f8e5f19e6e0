"""Rounding of the shared path in bf16 beside the model's own attention.

Both are compared with float32 at the same weights.

Random models of many families at two spreads of their weights, the embedded pair, depth cuts of it,
and folders that are named. Prints each model's gap in float32 (the path's logic), its widest gap in
bf16, and the ratio of the two deviations; a path that is wrong in float32 is not judged further.

python tests/benchmarks/shared-rounding.py [FOLDER...]
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import quantiles

import torch

from harness.models.artefacts import default_cache
from harness.models.language_model import LanguageModel, open_model
from harness.models.resolve import resolve
from harness.models.shaping import student_of
from harness.scoring.admission import (
    _TOLERANCE,
    _float32_reference,
    _probe_texts,
    _shared_path_logits,
    _widest_gap,
    shared_path_refusal,
)
from harness.scoring.rounding import (
    MIN_LOG_PROBABILITY,
    at_places,
    own_log_probabilities,
    own_rms_deviation,
    rms_deviation,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from families import FAMILIES, random_family

# of the weights: the second makes logits so wide that a step of bf16 is a tenth of a nat
SPREADS = (0.1, 0.3)


def models(folders: Sequence[str]) -> Iterator[tuple[str, LanguageModel]]:
    """Yield names and models in bf16."""
    tiny = open_model(resolve("tiny", cache=Path("unused")))
    for name in FAMILIES:
        for spread in SPREADS:
            yield (
                f"{name}, {spread}",
                LanguageModel(
                    random_family(name, spread=spread, seed=1),
                    tiny.tokenizer,
                    "cpu",
                    tiny.checkpoint,
                ),
            )
    for name in ("tiny", "tiny-math"):
        base = resolve(name, cache=Path("unused"))
        yield name, open_model(base)
        for recipe in ("depth:0.5", "depth:0.25"):
            yield (
                f"{recipe} of {name}",
                student_of(recipe, base, seed=0, device="cpu", dtype="float32"),
            )
    for folder in folders:
        yield folder, open_model(resolve(folder, cache=default_cache()))


def judged(opened: LanguageModel) -> tuple[float, float, float]:
    """Return the widest gaps in float32 and bf16, and the deviation over the own attention's."""
    texts = _probe_texts(opened)
    places, logits = _shared_path_logits(opened, texts)
    gap = _widest_gap(
        logits, at_places(own_log_probabilities(opened, texts), places), MIN_LOG_PROBABILITY
    )
    in_full = _float32_reference(opened, texts)
    assert in_full is not None
    truth, fault = in_full
    return (
        fault,
        gap,
        rms_deviation(logits, at_places(truth, places))
        / own_rms_deviation(opened, texts, truth, places),
    )


def main(folders: Sequence[str]) -> None:
    """Print a line a model, and the quantiles of the ratios of those that are right in float32."""
    ratios: list[float] = []
    for name, opened in models(folders):
        if getattr(opened.model, "is_quantized", False):
            continue
        opened.model.to(torch.bfloat16)
        why = shared_path_refusal(opened)
        if why and "moved by" not in why:
            print(f"{name[-50:]:50} {why[:80]}")
            continue
        fault, gap, ratio = judged(opened)
        print(
            f"{name[-50:]:50} float32 {fault:8.1e}  bf16 {gap:6.3f}  ratio {ratio:6.2f}  {why[:60]}"
        )
        if fault <= _TOLERANCE["float32"]:
            ratios.append(ratio)
    ratios.sort()
    parts, most = quantiles(ratios, n=20), [round(ratio, 2) for ratio in ratios[-4:]]
    print(
        f"{len(ratios)} models: median {parts[9]:.2f}, 90th percentile {parts[17]:.2f}, the four "
        f"largest {most}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
