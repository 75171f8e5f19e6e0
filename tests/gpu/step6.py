"""Step 6: the stopwatch on the card: A/A, 7B against 1.5B, a planted wait and buffer, a graph.

The first two go through the product's own capture of decoding steps; the last is a graph of its
own.

The measured processes open a folder as they always do. It holds the configuration and one small
tensor's worth of model; what is put around it (`step6:large`) builds the large model of random
weights on the card, so that no 16 GB lie on a disk for half a minute of timing.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit import GIB, SHAPES, TOY, Figures, Kit, configuration, seconds_of

ROOM = 6 * GIB
BUFFER = 64 * 2**20
SLOWER = 0.10
# by which an interval of a model against itself may miss 1 before the stopwatch counts as broken
AA_ROOM = 0.03


def run(kit: Kit) -> None:
    """Run the step's parts."""
    kit.part(
        "A/A", lambda: ratio(kit, "8B", "8B"), needs=2 * kit.bytes_of("8B") + ROOM, seconds=150
    )
    kit.part(
        "7B against 1.5B",
        lambda: ratio(kit, "1.5B", "7B"),
        needs=kit.bytes_of("7B", "1.5B") + ROOM,
        seconds=120,
    )
    kit.part(
        "planted wait", lambda: planted_wait(kit), needs=2 * kit.bytes_of("1.5B") + ROOM, seconds=90
    )
    kit.part(
        "planted buffer", lambda: planted_buffer(kit), needs=kit.bytes_of("1.5B") + ROOM, seconds=50
    )
    kit.part("captured step", lambda: captured(kit), needs=kit.bytes_of("7B") + ROOM, seconds=40)


def large(model: Any) -> Any:
    """Return the large model that a folder stands for; called in the measured process."""
    import torch
    from transformers import AutoModelForCausalLM

    name, shapes = json.loads(
        (Path(model.config._name_or_path) / "stands-for.json").read_text(encoding="utf-8")
    )
    torch.manual_seed(0)
    with torch.device(model.device):
        return AutoModelForCausalLM.from_config(
            configuration(name, TOY if shapes == "toy" else SHAPES), dtype=model.dtype
        ).eval()


def slower(model: Any) -> Any:
    """Return the large model with each forward pass a tenth longer.

    The host waits after the card is done.
    """
    import torch

    model = large(model)
    plain = model.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        out = plain(*arguments, **named)
        torch.cuda.synchronize()
        until = time.perf_counter() + SLOWER * (time.perf_counter() - began)
        while time.perf_counter() < until:
            pass
        return out

    model.forward = forward
    return model


def heavier(model: Any) -> Any:
    """Return the large model with 64 MiB more, written to."""
    import torch

    model = large(model)
    model.register_buffer(
        "needless", torch.ones(BUFFER, dtype=torch.uint8, device=model.device), persistent=False
    )
    return model


def _folder(kit: Kit, name: str) -> Any:
    """Return a folder that stands for a large model: a real configuration with toy weights.

    Context and vocabulary are those of the real model.
    """
    from transformers import AutoModelForCausalLM

    from harness.models.checkpoint import describe

    folder = kit.work / f"stands-for-{name}"
    if not (folder / "stands-for.json").exists():
        AutoModelForCausalLM.from_config(configuration(name, TOY)).save_pretrained(folder)
        (folder / "stands-for.json").write_text(
            json.dumps([name, "toy" if kit.dry else "real"]), encoding="utf-8"
        )
    return describe(folder, name=name)


def _measured(
    kit: Kit, student: str, base: str | None, *, wrap: str = "large", grid: str = ""
) -> dict[str, Any]:
    from harness.measuring.measure import TimedModel, TimingSettings, measure
    from harness.measuring.scenario import VISIT_SECONDS, parse_grid

    # the measured processes find this file there
    os.environ["PYTHONPATH"] = kit.environment()["PYTHONPATH"]
    settings = TimingSettings(
        grid=parse_grid(grid or ("8x1x4" if kit.dry else "512x1,32x64")),
        rounds=3 if kit.dry else "auto",
        visit_seconds=0.02 if kit.dry else VISIT_SECONDS,
        device=kit.device,
        dtype=kit.dtype,
        threads=1,
    )
    subjects = (
        TimedModel(_folder(kit, student), f"step6:{wrap}"),
        TimedModel(_folder(kit, base), "step6:large") if base else None,
    )
    done = measure(*subjects, settings, folder=kit.work / f"timed-{student}-{base}-{wrap}")
    return {
        "done": done,
        "by": {
            (measurement.name, measurement.condition): measurement
            for measurement in done.measurements
        },
    }


def _speedups(timings: dict[str, Any]) -> Figures:
    return (
        {
            f"{name}, {condition}": [
                measurement.low,
                measurement.value,
                measurement.high,
                measurement.remark,
            ]
            for (name, condition), measurement in timings["by"].items()
            if name.endswith("_speedup")
        }
        | {
            f"{name}, {condition}": measurement.value
            for (name, condition), measurement in timings["by"].items()
            if name in ("tpot_seconds", "eager_tpot_seconds", "ttft_seconds")
            or name.endswith("_busy_share")
        }
        | {
            f"{name}, {condition}": measurement.remark
            for (name, condition), measurement in timings["by"].items()
            if name.startswith("skipped_")
        }
        | {"skipped": list(timings["done"].skipped)}
    )


def ratio(kit: Kit, student: str, base: str) -> Figures:
    """Time one shape against another by turns; against itself the interval must hold 1."""
    timings = _measured(kit, student, base)
    figures = _speedups(timings)
    if student == base:
        ratios = {
            key: interval
            for key, interval in figures.items()
            if "speedup" in key and interval[0] is not None
        }
        figures["intervals that miss 1"] = [
            key for key, interval in ratios.items() if not interval[0] <= 1 <= interval[2]
        ]
        far = [
            key
            for key, interval in ratios.items()
            if interval[0] > 1 + AA_ROOM or interval[2] < 1 - AA_ROOM
        ]
        if far and not kit.dry:
            raise RuntimeError(f"a model is not as fast as itself: {far}: {ratios}")
    figures |= _target(figures)
    eager = [remark for key, remark in figures.items() if key.startswith("skipped_decode_capture")]
    if eager and not kit.dry:
        raise RuntimeError(f"decoding steps were not captured: {eager}: {figures}")
    return figures


def _target(figures: Figures) -> Figures:
    """Return whether the captured ratio of 7B and 1.5B at batch 1 reaches three, by condition."""
    return {
        f"target of 3 met, {key.partition(', ')[2]}": interval[1] >= 3
        for key, interval in figures.items()
        if key.startswith("decode_speedup") and key.endswith("batch 1")
    }


def planted_wait(kit: Kit) -> Figures:
    """Time a model that waits a tenth longer a step: its decode interval must lie below 1."""
    timings = _measured(kit, "1.5B", "1.5B", wrap="slower", grid="8x1x4" if kit.dry else "128x1x64")
    [decode] = [
        measurement for (name, _), measurement in timings["by"].items() if name == "decode_speedup"
    ]
    figures = {
        "decode": [decode.low, decode.value, decode.high],
        "found": decode.high < 1,
        "remark": decode.remark,
    }
    if not figures["found"] and not kit.dry:
        raise RuntimeError(f"a tenth of waiting was not found: {figures}")
    return figures


def planted_buffer(kit: Kit) -> Figures:
    """Weigh a model that holds 64 MiB more: it must weigh 64 MiB more."""
    weights = {}
    for wrap in ("large", "heavier"):
        timings = _measured(kit, "1.5B", None, wrap=wrap, grid="8x1x2")
        weights[wrap] = next(
            measurement.value
            for (name, _), measurement in timings["by"].items()
            if name == "weight_bytes_resident"
        )
    more = weights["heavier"] - weights["large"]
    if abs(more - BUFFER) > 2**16:
        raise RuntimeError(f"{BUFFER} bytes were planted and {more} were counted")
    return {"planted": BUFFER, "counted": more}


def captured(kit: Kit) -> Figures:
    """Time a decoding step over a static cache, by kernel launches and as a captured graph.

    The difference is what launches cost at batch 1.
    """
    figures: Figures = {}
    seconds: dict[tuple[str, str], float] = {}
    for name in ("7B", "1.5B"):
        model = kit.model(name)
        step = _step(kit, model)
        seconds["eager", name] = statistics.median(seconds_of(step, runs=5 if kit.dry else 50))
        if not kit.dry:
            seconds["captured", name] = statistics.median(seconds_of(_graph(step), runs=50))
        del model, step
        from kit import release

        release()
    for how in ("eager",) if kit.dry else ("eager", "captured"):
        figures[how] = {
            **{f"{name}: ms a step": round(1e3 * seconds[how, name], 4) for name in ("7B", "1.5B")},
            "7B over 1.5B": round(seconds[how, "7B"] / seconds[how, "1.5B"], 3),
        }
    if not kit.dry:
        figures["bytes of weights, 7B over 1.5B"] = round(
            kit.bytes_of("7B") / kit.bytes_of("1.5B"), 3
        )
        figures["captured: GB/s"] = {
            name: round(kit.bytes_of(name) / seconds["captured", name] / 1e9)
            for name in ("7B", "1.5B")
        }
        figures["target of 3 met"] = figures["captured"]["7B over 1.5B"] >= 3
        if any(seconds["captured", name] >= seconds["eager", name] for name in ("7B", "1.5B")):
            raise RuntimeError(
                f"a captured step is no faster than its launches one by one: {figures}"
            )
    return figures


def _step(kit: Kit, model: Any) -> Callable[[], None]:
    """Return a function that decodes one token behind a cache of 128 tokens.

    Each call adds one token; the cache has room for 400.
    """
    import torch
    from transformers import StaticCache

    prompt_tokens = 8 if kit.dry else 128
    cache = StaticCache(config=model.config, max_cache_len=prompt_tokens + 400)
    ids = torch.full((1, prompt_tokens), 5, device=kit.device)
    with torch.inference_mode():
        model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            position_ids=torch.arange(prompt_tokens, device=kit.device)[None],
        )
    token, place = ids[:, :1].clone(), torch.full((1, 1), prompt_tokens, device=kit.device)

    def step() -> None:
        with torch.inference_mode():
            model(
                input_ids=token,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                position_ids=place,
            )

    return step


def _graph(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step as a CUDA graph and return its replay."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
