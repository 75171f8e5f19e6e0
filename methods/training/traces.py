"""Teacher-written answers: made once, cached by content, filtered by their own extracted answer.

A cache file is one JSON document with a digest of its own payload; a torn or foreign one is said so
and made again. Nothing is cut: an answer that did not end by itself is dropped.
"""

import hashlib
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.contract import Checkpoint, Example, Job, Progress, Task
from harness.data.contamination import overlapping_prompts
from harness.data.examples import examples_digest
from harness.errors import CellFailed
from harness.files.closure import code_digest
from harness.files.digests import digest_of
from harness.files.lines import read_signed_lines, signed_line
from harness.files.untrusted import parse_json, read_object
from harness.files.writing import write_atomically
from harness.machine.gpu import device_label
from harness.models.encoding import decode_continuation
from harness.models.language_model import LanguageModel, open_model
from harness.models.shape import forward_flops_per_token
from harness.scoring.backend import CanGenerate, Generation, Sampling
from harness.scoring.generation import Writer

_COUNTS = (
    "traces_written",
    "traces_kept",
    "kept_in_another_form",
    "dropped_wrong",
    "dropped_unreadable",
    "dropped_in_another_form",
    "dropped_unfinished",
    "dropped_short",
    "dropped_repeats",
    "dropped_contaminated",
    "problems_without_trace",
)
_ROWS_AT_ONCE = 128  # written at once
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's marks, which a teacher imitates from its shots


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
        return {
            "key": self.key,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "flops": self.flops,
        }


def teacher_traces(
    job: Job,
    examples: Sequence[Example],
    *,
    samples: int,
    temperature: float,
    longest: int,
    teacher: Checkpoint | None = None,
) -> Traces:
    """Return `samples` answers to every example's prompt, from the cache where it holds them; the
    first teacher's unless one is named.

    A prompt that leaves no room for `longest` new tokens in the teacher's context is not asked; its
    answers count as unfinished.
    """
    writer = teacher or job.teacher
    key = digest_of(
        "traces",
        code_digest(__name__),
        writer.digest,
        job.dtype,
        examples_digest(examples),
        samples,
        temperature,
        longest,
        job.seed if temperature else 0,
        # a GPU rounds otherwise and takes other seconds
        *([device_label(job.device)] if job.device != "cpu" else []),
    )
    path = job.cache / "traces" / f"{key[:32]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # two runs that share a cache write it once
        held = _load(path, job)
        if held is None:
            return _write_traces(
                path,
                job,
                examples,
                writer,
                samples=samples,
                temperature=temperature,
                longest=longest,
            )
        # of a run that was killed between the two
        path.with_suffix(".part").unlink(missing_ok=True)
        return held


def _write_traces(
    path: Path,
    job: Job,
    examples: Sequence[Example],
    writer: Checkpoint,
    *,
    samples: int,
    temperature: float,
    longest: int,
) -> Traces:
    """Let the teacher write, and keep it."""
    opened = open_model(writer, device=job.device, dtype=job.dtype)
    # in its own template
    shown = [
        opened.encode(job.source.show(opened.tokenizer, example.asked)) for example in examples
    ]
    fits = [len(prompt) + longest <= opened.context for prompt in shown]
    prompts = [
        prompt for prompt, room in zip(shown, fits, strict=True) if room for _ in range(samples)
    ]
    if not prompts:
        raise CellFailed(
            f"no prompt leaves room for {longest} new tokens in the {opened.context} that "
            f"{writer.name} can read; give a smaller longest"
        )
    sampling = Sampling(temperature=temperature, seed=job.seed) if temperature else None
    asking = _TraceRequest(opened, Writer(opened, _ROWS_AT_ONCE), prompts, longest, sampling)
    written, seconds = _generate_resumably(job, asking, path.with_suffix(".part"))
    tokens = sum(one.tokens for one in written)
    read = sum(map(len, prompts))
    flops = forward_flops_per_token(opened.model, (read + tokens) / len(prompts)) * (read + tokens)
    groups = iter([written[at : at + samples] for at in range(0, len(written), samples)])
    unasked = [Generation("", 0, "length")] * samples
    made = Traces(
        path.stem, [next(groups) if room else unasked for room in fits], tokens, seconds, flops
    )
    _save(path, made)
    path.with_suffix(".part").unlink(missing_ok=True)
    return made


@dataclass(frozen=True)
class _TraceRequest:
    """What a teacher is asked to write, and what writes it."""

    opened: LanguageModel
    backend: CanGenerate
    prompts: Sequence[Sequence[int]]
    longest: int  # new tokens
    sampling: Sampling | None

    def shown(self, row: int, answer: Generation) -> Generation:
        """Return an answer with its text as it is trained behind its prompt: with its first
        space.
        """
        ids = answer.ids[:-1] if answer.stop == "eos" else answer.ids
        return replace(
            answer, text=decode_continuation(self.opened.tokenizer, self.prompts[row], ids)
        )


def _generate_resumably(
    job: Job, asking: _TraceRequest, part: Path
) -> tuple[list[Generation], float]:
    """Return an answer to every prompt and the seconds that took; what a killed run wrote is read
    from its lines, not asked again.
    """
    total = len(asking.prompts)
    answers, before = _lines(part, total)
    missing = [row for row in range(total) if row not in answers]
    detail = f"written by {asking.opened.checkpoint.name}"
    began = time.monotonic()
    with part.open("a", encoding="utf-8") as stream:

        def finished(place: int, answer: Generation) -> None:
            row = missing[place]
            kept = answers[row] = asking.shown(row, answer)
            seconds = round(before + time.monotonic() - began, 3)
            stream.write(
                signed_line(
                    {
                        "row": row,
                        "text": kept.text,
                        "tokens": kept.tokens,
                        "stop": kept.stop,
                        "seconds": seconds,
                    }
                )
            )
            stream.flush()
            job.progress(
                Progress(
                    stage="traces", done=len(answers), total=total, unit="answers", detail=detail
                )
            )

        # An answer draws from the stream of its own number, whatever is written beside it: a
        # resumed run draws the same.
        sampling = replace(asking.sampling, numbers=missing) if asking.sampling else None
        wanted = [asking.prompts[row] for row in missing]
        asking.backend.generate(
            wanted, max_new_tokens=asking.longest, sampling=sampling, finished=finished
        )
    return [answers[row] for row in range(total)], before + time.monotonic() - began


def _lines(part: Path, count: int) -> tuple[dict[int, Generation], float]:
    """Read the whole lines of a killed run: answers by row, and the seconds they took. Drops every
    line that is not as it was written.
    """
    answers: dict[int, Generation] = {}
    seconds = 0.0
    whole = []
    for told in read_signed_lines(part)[0]:
        try:
            row, one = (
                int(told["row"]),
                Generation(str(told["text"]), int(told["tokens"]), told["stop"]),
            )
            taken = float(told["seconds"])
        except (ValueError, LookupError, TypeError):
            continue
        if 0 <= row < count:
            seconds = max(seconds, taken)
            answers[row] = one
            whole.append(signed_line(told))
    if part.exists() and part.read_bytes() != (kept := "".join(whole)).encode():
        write_atomically(part, kept)
    return answers, seconds


def _save(path: Path, made: Traces) -> None:
    kept = asdict(made)
    for group in kept["texts"]:
        for one in group:
            del one["ids"]
    payload = json.dumps(kept, ensure_ascii=False)
    write_atomically(
        path,
        json.dumps({"sha256": hashlib.sha256(payload.encode()).hexdigest(), "payload": payload}),
    )


def _load(path: Path, job: Job) -> Traces | None:
    if not path.exists():
        return None
    try:
        document = read_object(path)
        payload: str = document["payload"]
        if hashlib.sha256(payload.encode()).hexdigest() != document["sha256"]:
            raise ValueError("its digest does not match")
        data: dict[str, Any] = parse_json(payload, path.name)
        texts = [[Generation(**one) for one in group] for group in data["texts"]]
        return Traces(path.stem, texts, data["tokens"], data["seconds"], data["flops"])
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        job.progress(
            Progress(
                stage="traces",
                done=0,
                total=1,
                detail=f"the cached traces {path.name} are damaged ({problem}); made again",
            )
        )
        return None


def _graded(task: Task, example: Example, text: str) -> tuple[str, str]:
    """Return what an answer counts as, and the answer as it is trained.

    Where the task's primary extractor finds nothing, its most lenient one decides, and a right
    answer is closed as the task closes its own.
    """
    grades = task.grade(example.gold, text)
    if grades[0].correct:
        return "traces_kept", text
    if grades[0].extracted is None and grades[-1].correct:
        return (
            ("kept_in_another_form", _with_task_ending(text, example))
            if example.ending
            else ("dropped_in_another_form", text)
        )
    return (
        "dropped_unreadable"
        if all(grade.extracted is None for grade in grades)
        else "dropped_wrong"
    ), text


def _with_task_ending(text: str, example: Example) -> str:
    """End an answer as the task's own end, unless it does; one that says nothing else becomes the
    task's own bare answer.
    """
    if re.sub(r"\W", "", text) == re.sub(r"\W", "", example.ending):
        return example.answer
    ends = f" {' '.join(text.split())}".endswith(f" {example.ending}")
    return text if ends else f"{text.rstrip()}\n{example.ending}"


def _explain_losses(counts: Mapping[str, int], longest: int) -> str:
    """Say what became of answers of which none is trained, and what to do; the longest one has
    `longest` tokens.
    """
    cut = 2 * counts["dropped_unfinished"] > counts["traces_written"]
    remedy = (
        f"most did not end: --set cot.longest={2 * longest}"
        if cut
        else "use a teacher that solves this task, or --methods sft"
    )
    return (
        f"of {counts['traces_written']} answers by the teacher {counts['dropped_wrong']} were "
        f"wrong, {counts['dropped_unreadable']} had no "
        f"readable answer, {counts['dropped_in_another_form']} were right in another form, "
        f"{counts['dropped_unfinished']} did not end, "
        f"{counts['dropped_short']} were too short and {counts['dropped_contaminated']} belong to "
        f"evaluation items; {remedy}"
    )


def filter_traces(
    examples: Sequence[Example],
    texts: Sequence[Sequence[Generation]],
    job: Job,
    *,
    shortest: int = 0,
    rejects: bool = True,
) -> tuple[list[tuple[Example, str]], dict[str, Any]]:
    """Keep the distinct answers that ended and are right; return them with their problems, and the
    counts of what was dropped.

    Right means: the task's primary extractor finds the gold answer, or finds none where the most
    lenient one does (see `_judged`). Problems that also stand in an evaluation split are dropped
    whole. Without `rejects` wrong answers stay, and as many are drawn from all as the filter would
    have kept. A task without any trace is named in the counts; raises `CellFailed` when none is
    left at all.
    """
    by_task = {example.task: dict.fromkeys(_COUNTS, 0) for example in examples}
    held_out = overlapping_prompts(examples, job.tasks, job.source)
    right: list[tuple[Example, str]] = []
    ended: list[tuple[Example, str]] = []
    for example, group in zip(examples, texts, strict=True):
        counts = by_task[example.task]
        kept: set[str] = set()
        solved = False
        for one in group:
            counts["traces_written"] += 1
            found, text = _graded(job.tasks[example.task], example, _CALCULATOR.sub("", one.text))
            if example.prompt in held_out:
                counts["dropped_contaminated"] += 1
            elif one.stop != "eos":
                counts["dropped_unfinished"] += 1
            elif one.tokens < shortest:
                counts["dropped_short"] += 1
            elif text in kept:
                counts["dropped_repeats"] += 1
            else:
                kept.add(text)
                counts[found] += 1
                ended.append((example, text))
                if not found.startswith("dropped"):
                    right.append((example, text))
                    solved = True
        counts["problems_without_trace"] += not solved
    total = {name: sum(counts[name] for counts in by_task.values()) for name in _COUNTS}
    longest = max(one.tokens for group in texts for one in group)
    if not right:
        raise CellFailed(f"no trace survived: {_explain_losses(total, longest)}")
    chosen = right if rejects else random.Random(job.seed).sample(ended, len(right))
    told: dict[str, Any] = {
        **total,
        "traces_kept": len(chosen),
        "keep_rate": round(len(right) / total["traces_written"], 4),
    }
    without = {
        name: _explain_losses(by_task[name], longest)
        for name in by_task
        if all(example.task != name for example, _ in chosen)
    }
    for name, why in without.items():
        job.progress(
            Progress(
                stage="traces",
                done=1,
                total=1,
                detail=f"no trace of {name} survived, and it is not trained: {why}",
            )
        )
    if without:
        told["tasks_without_trace"] = without
    return chosen, told if rejects else {
        **told,
        "wrong_among_kept": sum(one not in right for one in chosen),
    }
