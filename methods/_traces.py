"""Teacher-written answers: made once, cached by content, filtered by their own extracted answer.

A cache file is one JSON document with a digest of its own payload; a torn or foreign one is said so and made
again. Nothing is cut: an answer that did not end by itself is dropped.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.arithmetic import forward_flops_per_token
from harness.checkpoint import digest_of, write_whole
from harness.contract import Example, Job, Progress, Task
from harness.data import examples_digest
from harness.errors import CellFailed
from harness.generate import Generation, Sampling, generate
from harness.model import open_model

VERSION = 1


@dataclass(frozen=True)
class Traces:
    """What a teacher wrote: `texts[problem][sample]`, and what that cost when it was made."""

    key: str  # of the cached file: rows with the same one share what it took
    texts: list[list[Generation]]
    tokens: int  # written by the teacher
    seconds: float
    flops: float

    def cost(self) -> dict[str, Any]:
        """Return what every row that uses these traces records."""
        return {"key": self.key, "tokens": self.tokens, "seconds": self.seconds, "flops": self.flops}


def teacher_traces(job: Job, examples: Sequence[Example], *, samples: int, temperature: float, longest: int) -> Traces:
    """Return `samples` answers to every example's prompt, from the cache where it holds them."""
    key = digest_of(
        "traces",
        VERSION,
        job.teacher.digest,
        job.dtype,
        examples_digest(examples),
        samples,
        temperature,
        longest,
        job.seed if temperature else 0,
    )
    path = job.cache / "traces" / f"{key[:32]}.json"
    held = _read(path, job)
    if held is not None:
        return held
    teacher = open_model(job.teacher, device=job.device, dtype=job.dtype)
    prompts = [teacher.tokenizer(example.prompt)["input_ids"] for example in examples for _ in range(samples)]
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        job.progress(Progress(stage="traces", done=done, total=len(prompts), unit="answers", detail=f"written by {job.teacher.name}"))

    began = time.monotonic()
    written = generate(
        teacher,
        prompts,
        max_new_tokens=longest,
        batch_size=128,
        sampling=Sampling(temperature=temperature, seed=job.seed) if temperature else None,
        progress=report,
    )
    seconds = time.monotonic() - began
    tokens = sum(one.tokens for one in written)
    read = sum(map(len, prompts))
    flops = forward_flops_per_token(teacher.model, (read + tokens) / len(prompts)) * (read + tokens)
    made = Traces(path.stem, [written[at : at + samples] for at in range(0, len(written), samples)], tokens, seconds, flops)
    _write(path, made)
    return made


def _write(path: Path, made: Traces) -> None:
    payload = json.dumps(asdict(made), ensure_ascii=False)
    write_whole(path, json.dumps({"sha256": hashlib.sha256(payload.encode()).hexdigest(), "payload": payload}))


def _read(path: Path, job: Job) -> Traces | None:
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        payload: str = document["payload"]
        if hashlib.sha256(payload.encode()).hexdigest() != document["sha256"]:
            raise ValueError("its digest does not match")
        data: dict[str, Any] = json.loads(payload)
    except (ValueError, KeyError, TypeError) as problem:
        job.progress(Progress(stage="traces", done=0, total=1, detail=f"the cached traces {path.name} are damaged ({problem}); made again"))
        return None
    texts = [[Generation(**one) for one in group] for group in data["texts"]]
    return Traces(path.stem, texts, data["tokens"], data["seconds"], data["flops"])


def surviving(
    examples: Sequence[Example], texts: Sequence[Sequence[Generation]], tasks: Mapping[str, Task]
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Keep the distinct answers that ended and are right; return their pairs and the counts of what was dropped.

    Right means: the task's primary extractor finds the gold answer. Raises `CellFailed` when none is.
    """
    pairs: list[tuple[str, str]] = []
    counts = {
        "traces_written": 0,
        "traces_kept": 0,
        "dropped_wrong": 0,
        "dropped_unfinished": 0,
        "dropped_repeats": 0,
        "problems_without_trace": 0,
    }
    for example, group in zip(examples, texts, strict=True):
        kept: set[str] = set()
        for one in group:
            counts["traces_written"] += 1
            if one.stop != "eos":
                counts["dropped_unfinished"] += 1
            elif not tasks[example.task].grade(example.gold, one.text)[0].correct:
                counts["dropped_wrong"] += 1
            elif one.text in kept:
                counts["dropped_repeats"] += 1
            else:
                kept.add(one.text)
                pairs.append((example.prompt, one.text))
        counts["problems_without_trace"] += not kept
    counts["traces_kept"] = len(pairs)
    if not pairs:
        raise CellFailed(
            f"no trace survived: of {counts['traces_written']} answers by the teacher {counts['dropped_wrong']} were wrong and "
            f"{counts['dropped_unfinished']} did not end; use a teacher that solves this task, or --methods sft"
        )
    return pairs, {**counts, "keep_rate": round(len(pairs) / counts["traces_written"], 4)}
