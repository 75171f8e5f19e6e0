"""Low-rank factors of SmolLM2-135M: whitened beside plain SVD at equal ranks, and full rank.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/lowrank-smollm2.py
"""

from pathlib import Path

from _form import figure, write_figures
from _smollm2 import (
    WINDOWS,
    base_model,
    cost_figures,
    make_student,
    measure_speedups,
    perplexity,
    students_folder,
)

from harness.models.shape import parameters_on_disk

KEEPS = (0.9, 0.8, 0.6)


def full_rank_gap(folder: Path) -> float:
    """Return the largest difference of logits with all block matrices factorised at full rank."""
    import torch
    from transformers import AutoModelForCausalLM

    from methods.lowrank import factorize

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(40, 104)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        for name, layer in model.named_modules():
            if type(layer) is torch.nn.Linear and name != "lm_head":
                x = torch.randn(2 * layer.in_features, layer.in_features)
                up, down = factorize(layer.weight, min(layer.weight.shape), x.T @ x)
                layer.weight.copy_(up @ down)
        return float((model(input_ids=ids).logits - before).abs().max())


def main() -> None:
    """Make students of both kinds at every rank, read them, time one."""
    teacher = base_model()
    count = parameters_on_disk(teacher.path)
    costs, read = {}, {"windows": WINDOWS, "base": perplexity(teacher.path)}
    ratios = []
    with students_folder() as folder:
        for keep in KEEPS:
            for name in ("lowrank", "lowrank-plain"):
                label = f"{name} {keep}"
                costs[label] = make_student(name, {"keep": keep}, folder / f"{name}-{keep}")
                read[label] = perplexity(folder / f"{name}-{keep}" / "student")
            ratios.append(read[f"lowrank {keep}"] / read[f"lowrank-plain {keep}"])
        student = folder / "lowrank-0.8" / "student"
        timed, smaller = measure_speedups(student, teacher), count / parameters_on_disk(student)
    gap = full_rank_gap(teacher.path)
    figures = [
        figure(
            "lowrank-smollm2:whitened",
            [max(ratios)],
            unit="times plain SVD's perplexity, the worst rank",
            better="lower",
            target=1.0,
            peer="lowrank-plain, ours",
            details={"ratios": dict(zip(map(str, KEEPS), ratios, strict=True)), "perplexity": read},
        ),
        figure(
            "lowrank-smollm2:full",
            [gap],
            unit="largest difference of logits at full rank",
            better="lower",
            target=1e-3,
        ),
        figure(
            "lowrank-smollm2:decode",
            timed["decode"],
            unit="times fp32, keep 0.8",
            better="higher",
            target=0.9,
            peer="the fp32 base",
            details={"parameter ratio": smaller, "speed": timed},
        ),
    ]
    write_figures(
        Path(__file__).stem, [*figures, *cost_figures("lowrank-smollm2", costs, 4 * count)]
    )


if __name__ == "__main__":
    main()
