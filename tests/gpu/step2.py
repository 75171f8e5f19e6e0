"""Step 2: the shared path at real shapes: against the own attention, out of memory, sampling."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kit import GIB, Figures, Kit
from step3 import plain_path

ROOM = 12 * GIB  # beside a model's weights: the probe's float32 copy is made where it fits


def run(kit: Kit) -> None:
    """Run the step's parts."""
    for name in ("8B", "7B"):
        kit.part(
            f"{name}: shared against own",
            lambda name=name: shared_against_own(kit, name),
            needs=kit.bytes_of(name) + ROOM,
            seconds=45,
        )
    kit.part(
        "out of memory", lambda: halving(kit), needs=kit.bytes_of("1.5B") + 3 * ROOM, seconds=40
    )
    kit.part("sampling", lambda: sampling(kit), needs=kit.bytes_of("1.5B") + ROOM, seconds=40)


def texts_of(kit: Kit, name: str, count: int, length: int, *, shared: int = 0) -> list[list[int]]:
    """Return random texts as token ids of about one length, after a beginning that all share."""
    draw = random.Random(f"{name}/{count}/{length}")
    vocabulary = kit.shapes[name][5]
    beginning = [draw.randrange(1, vocabulary) for _ in range(shared)]
    return [
        beginning
        + [
            draw.randrange(1, vocabulary)
            for _ in range(draw.randint(max(2, length * 2 // 3), length))
        ]
        for _ in range(count)
    ]


def shared_against_own(kit: Kit, name: str) -> Figures:
    """Score and decode on both paths: trees after a prefix, chains, rows, and slots.

    Answers in short floats may part where two tokens are nearly as likely; gaps may not be wide.
    """
    from harness.scoring.backend import LikelihoodRequest
    from harness.scoring.generation import generate, reason_for_plain_path
    from harness.scoring.likelihood import log_likelihoods

    opened = kit.opened(name)
    sizes = (6, 12, 40) if kit.dry else (24, 60, 700)
    choices = [
        LikelihoodRequest([*text, *ending], len(ending))
        for text in texts_of(kit, name, sizes[0], sizes[1], shared=sizes[2])
        for ending in ((5,), (6, 7), (6, 8, 9))
    ]
    documents = [
        LikelihoodRequest(text, len(text) - 1)
        for text in texts_of(kit, name, 2, 60 if kit.dry else 5_000)
    ]
    prompts = texts_of(kit, name, sizes[0], sizes[1])
    new_tokens = 6 if kit.dry else 24
    reason = reason_for_plain_path(opened)
    values, answers = {}, {}
    for path in ("shared", "own"):
        with plain_path(opened, path == "own"):
            scored = log_likelihoods(opened, [*choices, *documents])
            values[path] = [
                answer.log_probability / request.count
                for answer, request in zip(scored, [*choices, *documents], strict=True)
            ]
            answers[path] = generate(opened, prompts, max_new_tokens=new_tokens)
    gaps = [abs(a - b) for a, b in zip(values["shared"], values["own"], strict=True)]
    figures = {
        "refused": reason,
        "choices: largest gap in nats a token": max(gaps[: len(choices)]),
        "documents: largest gap in nats a token": max(gaps[len(choices) :]),
        "answers": len(prompts),
        "answers that are equal": sum(
            ours.ids == theirs.ids
            for ours, theirs in zip(answers["shared"], answers["own"], strict=True)
        ),
        "first tokens that are equal": sum(
            ours.ids[0] == theirs.ids[0]
            for ours, theirs in zip(answers["shared"], answers["own"], strict=True)
        ),
    }
    tolerance = 0.5 if kit.dtype == "bfloat16" else 2e-3
    if reason or not max(gaps) <= tolerance:
        raise RuntimeError(f"the shared path is refused, or far from the own attention: {figures}")
    return figures


@contextmanager
def scarce(kit: Kit, opened: Any, *, left: int) -> Iterator[None]:
    """Leave so many bytes of the card free.

    The stand-in has no allocator: there forward passes of more than eight rows refuse.
    """
    import torch

    if kit.dry:
        plain = opened.model.forward

        def forward(*arguments: Any, **named: Any) -> Any:
            if len(named["input_ids"]) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory (planted)")
            return plain(*arguments, **named)

        opened.model.forward = forward
        try:
            yield
        finally:
            del opened.model.forward
        return
    ballast = torch.empty(
        max(1, torch.cuda.mem_get_info()[0] - left), dtype=torch.uint8, device=kit.device
    )
    try:
        yield
    finally:
        del ballast
        torch.cuda.empty_cache()


def halving(kit: Kit) -> Figures:
    """Decode more rows than memory holds: half as many at once each time, and every answer."""
    from harness.scoring.generation import generate

    opened = kit.opened("1.5B")
    rows, length = (9, 8) if kit.dry else (256, 2_000)
    prompts = texts_of(kit, "1.5B", rows, length)
    lines: list[str] = []
    with scarce(kit, opened, left=4 * GIB):
        answers = generate(
            opened, prompts, max_new_tokens=4, batch_size=len(prompts), say=lines.append
        )
    undisturbed = generate(opened, prompts, max_new_tokens=4)
    figures = {
        "rows": rows,
        "lines": lines,
        "answers": len(answers),
        "of these, as with all memory": sum(
            ours.ids == theirs.ids for ours, theirs in zip(answers, undisturbed, strict=True)
        ),
    }
    if not any(line.startswith("out of memory: ") for line in lines):
        raise RuntimeError(f"memory never ended, so nothing was shown: {figures}")
    return figures


def sampling(kit: Kit) -> Figures:
    """Sample twice, and a few rows at once: the same again; other sizes may round otherwise."""
    from harness.scoring.backend import Sampling
    from harness.scoring.generation import generate

    opened = kit.opened("1.5B")
    rows, new_tokens = (6, 5) if kit.dry else (32, 32)
    prompts = texts_of(kit, "1.5B", rows, 20 if kit.dry else 120)

    def sampled(size: int, seed: int = 3) -> Sequence[tuple[int, ...]]:
        draws = Sampling(temperature=1.0, seed=seed)
        return [
            answer.ids
            for answer in generate(
                opened, prompts, max_new_tokens=new_tokens, sampling=draws, batch_size=size
            )
        ]

    first, again, few, other = (
        sampled(rows),
        sampled(rows),
        sampled(max(1, rows // 4)),
        sampled(rows, 4),
    )
    figures = {
        "rows": rows,
        "the same again": sum(a == b for a, b in zip(first, again, strict=True)),
        "the same by a quarter of the rows": sum(a == b for a, b in zip(first, few, strict=True)),
        "the same with another seed": sum(a == b for a, b in zip(first, other, strict=True)),
    }
    if figures["the same again"] < rows or figures["the same with another seed"] == rows:
        raise RuntimeError(f"sampling does not follow its seed: {figures}")
    return figures
