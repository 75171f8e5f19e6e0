"""Step 3: scoring at real shapes: MMLU-shaped packs, decoding, a teacher read at 152k ids.

Packs run as the product runs them (few widths, no cuDNN), with cuDNN's attention, and with it at
every width as it comes.
"""

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kit import GIB, Figures, Kit, seconds_of

ROOM = 12 * GIB  # beside a model's weights: keys and values, activations, logits


def run(kit: Kit) -> None:
    """Run the step's parts."""
    kit.part("MMLU-shaped packs", lambda: packs(kit), needs=kit.bytes_of("7B") + ROOM, seconds=90)
    kit.part("decoding", lambda: decoding(kit), needs=kit.bytes_of("7B") + 2 * ROOM, seconds=90)
    kit.part("teacher reading", lambda: reading(kit), needs=kit.bytes_of("7B") + ROOM, seconds=60)


def _subject(kit: Kit, questions: int, vocabulary: int) -> list[list[int]]:
    """Return a subject's prompts as token ids: five shots and a question, as long as MMLU's."""
    draw = random.Random(0)
    shots, length = (40, 12) if kit.dry else (450, 105)
    before = [draw.randrange(vocabulary) for _ in range(shots)]
    return [
        before
        + [draw.randrange(vocabulary) for _ in range(draw.randint(length // 2, 3 * length // 2))]
        for _ in range(questions)
    ]


@contextmanager
def plain_path(opened: Any, is_wanted: bool = True) -> Iterator[None]:
    """Let the scorer take the model's own attention in padded batches, for comparison."""
    from harness.scoring import generation

    before = generation.reason_for_plain_path(opened)
    generation._REFUSALS[opened.model] = "for comparison" if is_wanted else before
    try:
        yield
    finally:
        generation._REFUSALS[opened.model] = before


def packs(kit: Kit) -> Figures:
    """Score four letters a question: the shared path by widths and kernels, and padded batches."""
    from harness.scoring import shapes
    from harness.scoring.backend import LikelihoodRequest
    from harness.scoring.generation import reason_for_plain_path
    from harness.scoring.likelihood import log_likelihoods

    opened = kit.opened("7B")
    prompts = _subject(kit, 6 if kit.dry else 100, kit.shapes["7B"][5])
    rows = [
        LikelihoodRequest([*prompt, letter], 1) for prompt in prompts for letter in (5, 6, 7, 8)
    ]
    tokens = sum(len(prompt) for prompt in prompts)
    figures: Figures = {
        "questions": len(prompts),
        "tokens without sharing": tokens,
        "refused": reason_for_plain_path(opened),
    }
    values: dict[str, list[float]] = {}

    def score(name: str) -> None:
        values[name] = [value for value, _ in log_likelihoods(opened, rows)]

    before, devices = shapes.MAY_PLAN, shapes.ROUNDED_DEVICES
    forms = {
        "cuDNN off": (False, devices),
        "cuDNN on": (True, devices),
        "cuDNN on, exact widths": (True, ()),
    }
    try:
        for name, (shapes.MAY_PLAN, shapes.ROUNDED_DEVICES) in forms.items():
            began = time.perf_counter()
            score(name)
            # with every shape met for the first time
            figures[f"{name}: first pass, seconds"] = round(time.perf_counter() - began, 3)
            figures[f"{name}: tokens/s"] = round(
                tokens / statistics.median(seconds_of(lambda name=name: score(name), runs=2))
            )
    finally:
        shapes.MAY_PLAN, shapes.ROUNDED_DEVICES = before, devices
    with plain_path(opened):
        figures["padded batches: tokens/s"] = round(
            tokens / statistics.median(seconds_of(lambda: score("padded"), runs=1))
        )
    figures["largest gap of the two paths in nats"] = max(
        abs(a - b) for a, b in zip(values["cuDNN off"], values["padded"], strict=True)
    )
    figures["slower than its peer"] = (
        figures["cuDNN off: tokens/s"] < figures["padded batches: tokens/s"]
    )
    if figures["refused"] or figures["largest gap of the two paths in nats"] > 0.5:
        raise RuntimeError(
            f"the shared path is refused, or far from the model's own attention: {figures}"
        )
    return figures


def decoding(kit: Kit) -> Figures:
    """Decode 512 answers of 128 tokens at once, beside transformers' `generate`."""
    import torch

    from harness.scoring.generation import generate

    opened = kit.opened("7B")
    rows, new, length = (6, 6, 10) if kit.dry else (512, 128, 96)
    draw = random.Random(1)
    prompts = [[draw.randrange(1, kit.shapes["7B"][5]) for _ in range(length)] for _ in range(rows)]
    answers: list[Any] = []

    def ours() -> None:
        answers[:] = generate(opened, prompts, max_new_tokens=new)

    def theirs() -> None:
        ids = torch.tensor(prompts, device=kit.device)
        with torch.inference_mode():
            opened.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )

    our_seconds = statistics.median(seconds_of(ours, runs=1))
    peer_seconds = statistics.median(seconds_of(theirs, runs=1))
    figures = {
        "rows": rows,
        "ours: tokens/s": round(sum(answer.tokens for answer in answers) / our_seconds),
        "generate: tokens/s": round(rows * new / peer_seconds),
        "free after": torch.cuda.mem_get_info()[0],
    }
    alone = generate(opened, prompts[:4], max_new_tokens=new, batch_size=1)
    figures["slower than its peer"] = figures["ours: tokens/s"] < figures["generate: tokens/s"]
    figures["of 4 rows, equal alone"] = sum(
        a.ids == b.ids for a, b in zip(alone, answers, strict=False)
    )
    return figures


def _training_rows(kit: Kit, count: int, vocabulary: int) -> Sequence[Any]:
    from methods.training.rows import TokenRow

    draw = random.Random(2)
    shortest, longest = (20, 40) if kit.dry else (120, 400)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [
        TokenRow(tuple(draw.randrange(1, vocabulary) for _ in range(length)), length // 3)
        for length in lengths
    ]


def reading(kit: Kit) -> Figures:
    """Read a teacher's 64 likeliest tokens over training rows, beside a bare forward pass."""
    import torch

    from harness.scoring.plain import left_padded
    from methods.training.teacher_cache import likelihood_request, teacher_reader

    opened = kit.opened("7B")
    width = kit.shapes["7B"][5]
    rows = sorted(
        _training_rows(kit, 8 if kit.dry else 128, width),
        key=lambda row: len(row.ids),
        reverse=True,
    )
    tokens, teacher, requests = (
        sum(len(row.ids) for row in rows),
        teacher_reader(opened),
        [likelihood_request(row) for row in rows],
    )
    sizes = [len(batch) for batch in teacher.batches(requests, width)]

    def read() -> None:
        for top in teacher.top_k(requests, k=min(64, width), width=width):
            top.log_p_NK.to(torch.float16).cpu()
            top.ids_NK.to(torch.int32).cpu()

    def forward() -> None:
        for start in range(0, len(rows), 16):
            ids, mask, positions = left_padded(
                [row.ids for row in rows[start : start + 16]], 0, kit.device
            )
            with torch.inference_mode():
                opened.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=1,
                )

    read_seconds, bare_seconds = (
        statistics.median(seconds_of(work, runs=1)) for work in (read, forward)
    )
    return {
        "rows": len(rows),
        "rows of a batch": statistics.mean(sizes),
        "read: tokens/s": round(tokens / read_seconds),
        "bare forward: tokens/s": round(tokens / bare_seconds),
        "share of the bare forward": round(bare_seconds / read_seconds, 3),
    }
