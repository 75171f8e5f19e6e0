"""Answers that a teacher writes: written once, and cached by content.

A cache file is one JSON document with a digest of its payload; a damaged one is reported and
written again. No answer is cut: `trace_filter` drops one that did not end by itself.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from harness.contract import Checkpoint, Example, Job, Progress
from harness.data.examples import examples_digest
from harness.errors import CellFailed
from harness.files.closure import code_digest
from harness.files.digests import digest_of
from harness.files.lines import read_signed_lines, signed_line
from harness.files.untrusted import parse_json, read_object
from harness.files.writing import write_atomically
from harness.machine.energy import EnergyMeter
from harness.machine.gpu import device_label
from harness.models.encoding import decode_continuation
from harness.models.language_model import LanguageModel, open_model
from harness.models.rendering import prompt_for
from harness.models.shape import forward_flops_per_token
from harness.scoring.backend import CanGenerate, Generation, Sampling
from harness.scoring.generation import Writer

_ROWS_AT_ONCE = 128  # that are written together


@dataclass(frozen=True)
class Traces:
    """What a teacher wrote: `texts[problem][sample]`, and what writing it cost."""

    key: str  # of the cached file: rows with the same one share its cost
    texts: list[list[Generation]]
    tokens: int  # written by the teacher
    seconds: float
    flops: float
    joules: float | None = None  # of the whole package or GPU; None where no counter can be read

    def cost(self) -> dict[str, Any]:
        """Return what every row that uses these traces records."""
        return {
            "key": self.key,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "flops": self.flops,
        }


@dataclass(frozen=True)
class _TraceSettings:
    """How many answers a teacher writes to each prompt, and how."""

    samples: int
    temperature: float  # 0: greedy
    longest: int  # new tokens
    teacher: Checkpoint

    def cache_key(self, job: Job, examples: Sequence[Example]) -> str:
        """Return a digest of all that the answers depend on."""
        return digest_of(
            "traces",
            code_digest(__name__),
            self.teacher.digest,
            job.dtype,
            examples_digest(examples),
            self.samples,
            self.temperature,
            self.longest,
            job.seed if self.temperature else 0,
            # a GPU rounds differently and takes other seconds
            *([device_label(job.device)] if job.device != "cpu" else []),
        )


def teacher_traces(
    job: Job,
    examples: Sequence[Example],
    *,
    samples: int,
    temperature: float,
    longest: int,
    teacher: Checkpoint | None = None,
) -> Traces:
    """Return `samples` answers to every example's prompt, from the cache where it has them.

    The first teacher of the job writes them unless another one is given. A prompt that leaves no
    room for `longest` new tokens in the teacher's context gets no answer, which counts as
    unfinished.
    """
    settings = _TraceSettings(samples, temperature, longest, teacher or job.teacher)
    path = job.cache / "traces" / f"{settings.cache_key(job, examples)[:32]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # two runs that share a cache write it once
        cached = _load(path, job)
        if cached is None:
            cached = _write_traces(path, job, examples, settings)
        # lines of a killed run remain where it was killed after the cache was written
        path.with_suffix(".part").unlink(missing_ok=True)
    return cached


def _write_traces(
    path: Path, job: Job, examples: Sequence[Example], settings: _TraceSettings
) -> Traces:
    """Let the teacher write its answers, and cache them."""
    samples, longest = settings.samples, settings.longest
    opened = open_model(settings.teacher, device=job.device, dtype=job.dtype)
    problems = [  # in the teacher's own template
        opened.encode(prompt_for(job.source, opened.tokenizer, example)) or [_first_token(opened)]
        for example in examples
    ]
    fits = [len(prompt) + longest <= opened.context for prompt in problems]
    prompts = [
        prompt for prompt, fit in zip(problems, fits, strict=True) if fit for _ in range(samples)
    ]
    if not prompts:
        raise CellFailed(
            f"no prompt leaves room for {longest} new tokens in the {opened.context} that "
            f"{settings.teacher.name} can read; give a smaller longest"
        )
    sampling = None
    if settings.temperature:
        sampling = Sampling(temperature=settings.temperature, seed=job.seed)
    request = _TraceRequest(opened, Writer(opened, _ROWS_AT_ONCE), prompts, longest, sampling)
    answers, seconds, joules = _generate_resumably(job, request, path.with_suffix(".part"))
    written = sum(answer.tokens for answer in answers)
    tokens = sum(map(len, prompts)) + written
    groups = iter(answers[start : start + samples] for start in range(0, len(answers), samples))
    unanswered = [Generation("", 0, "length")] * samples
    traces = Traces(
        key=path.stem,
        texts=[next(groups) if fit else unanswered for fit in fits],
        tokens=written,
        seconds=seconds,
        flops=forward_flops_per_token(opened.model, tokens / len(prompts)) * tokens,
        joules=joules,
    )
    _save(path, traces)
    return traces


def _first_token(opened: LanguageModel) -> int:
    """Return the token behind which a model writes where it is asked nothing.

    BOS, or EOS: models without a BOS have learnt that a text ends there and another one begins.
    """
    tokenizer = opened.tokenizer
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise CellFailed(
            f"the tokenizer of {opened.checkpoint.name} has neither BOS nor EOS, so nothing can "
            "stand before a text that is written from nothing; give prompts"
        )
    return int(token)


@dataclass(frozen=True)
class _TraceRequest:
    """The prompts of all answers, and what writes the answers."""

    opened: LanguageModel
    backend: CanGenerate
    prompts: Sequence[Sequence[int]]
    longest: int  # new tokens
    sampling: Sampling | None

    def with_trained_text(self, number: int, answer: Generation) -> Generation:
        """Return an answer with the text that is trained after its prompt: with its first space."""
        ids = answer.ids[:-1] if answer.stop == "eos" else answer.ids
        text = decode_continuation(self.opened.tokenizer, self.prompts[number], ids)
        return replace(answer, text=text)


class _Written(NamedTuple):
    answers: list[Generation]
    seconds: float
    joules: float | None


class _Meter:
    """Seconds and joules of this process and of those before it that were killed."""

    def __init__(self, seconds: float, joules: float | None, device: str) -> None:
        self.seconds_before, self.joules_before = seconds, joules
        self.began = time.monotonic()
        self.energy = EnergyMeter(device)

    @property
    def seconds(self) -> float:
        """All seconds so far."""
        return self.seconds_before + time.monotonic() - self.began

    def joules(self) -> float | None:
        """Return all joules so far; None where a counter could not be read."""
        joules, before = self.energy.joules(), self.joules_before
        self.joules_before = None if joules is None or before is None else before + joules
        return self.joules_before


def _generate_resumably(job: Job, request: _TraceRequest, part: Path) -> _Written:
    """Write an answer to every prompt; those that a killed run wrote are read from its lines."""
    total = len(request.prompts)
    earlier = _read_part(part, total)
    answers = earlier.answers
    missing = [number for number in range(total) if number not in answers]
    detail = f"written by {request.opened.checkpoint.name}"
    meter = _Meter(earlier.seconds, earlier.joules, job.device)
    with part.open("a", encoding="utf-8") as stream:

        def save_answer(index: int, answer: Generation) -> None:
            number = missing[index]
            trained = answers[number] = request.with_trained_text(number, answer)
            line = {
                "row": number,
                "text": trained.text,
                "tokens": trained.tokens,
                "stop": trained.stop,
                "seconds": round(meter.seconds, 3),
                "joules": meter.joules(),
            }
            stream.write(signed_line(line))
            stream.flush()
            done = len(answers)
            job.progress(
                Progress(stage="traces", done=done, total=total, unit="answers", detail=detail)
            )

        # Each answer is sampled from the random stream of its own number, whatever else is in the
        # batch: a resumed run samples the same.
        sampling = replace(request.sampling, numbers=missing) if request.sampling else None
        prompts = [request.prompts[number] for number in missing]
        request.backend.generate(
            prompts, max_new_tokens=request.longest, sampling=sampling, finished=save_answer
        )
    return _Written([answers[number] for number in range(total)], meter.seconds, meter.joules())


class _Part(NamedTuple):
    """What a killed run wrote."""

    answers: dict[int, Generation]  # by number
    seconds: float
    joules: float | None


def _read_part(part: Path, count: int) -> _Part:
    """Read the lines of a killed run, and drop every damaged line from the file."""
    answers: dict[int, Generation] = {}
    total_seconds = 0.0
    total_joules: float | None = 0.0
    valid_lines = []
    for line in read_signed_lines(part)[0]:
        try:
            number, seconds, joules = int(line["row"]), float(line["seconds"]), line["joules"]
            total_joules = None if joules is None else float(joules)
            answer = Generation(str(line["text"]), int(line["tokens"]), line["stop"])
        except (ValueError, LookupError, TypeError):
            continue
        if 0 <= number < count:
            total_seconds = max(total_seconds, seconds)
            answers[number] = answer
            valid_lines.append(signed_line(line))
    valid_text = "".join(valid_lines)
    if part.exists() and part.read_bytes() != valid_text.encode():
        write_atomically(part, valid_text)
    return _Part(answers, total_seconds, total_joules)


def _save(path: Path, traces: Traces) -> None:
    document = asdict(traces)
    for answers in document["texts"]:
        for answer in answers:
            del answer["ids"]
    payload = json.dumps(document, ensure_ascii=False)
    digest = hashlib.sha256(payload.encode()).hexdigest()
    write_atomically(path, json.dumps({"sha256": digest, "payload": payload}))


def _load(path: Path, job: Job) -> Traces | None:
    """Return cached traces; None where there are none or they are damaged, which is reported."""
    if not path.exists():
        return None
    try:
        document = read_object(path)
        payload: str = document["payload"]
        if hashlib.sha256(payload.encode()).hexdigest() != document["sha256"]:
            raise ValueError("its digest does not match")
        data: dict[str, Any] = parse_json(payload, path.name)
        texts = [[Generation(**answer) for answer in answers] for answers in data["texts"]]
        return Traces(
            path.stem, texts, data["tokens"], data["seconds"], data["flops"], data["joules"]
        )
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        detail = f"the cached traces {path.name} are damaged ({problem}); they are written again"
        job.progress(Progress(stage="traces", done=0, total=1, detail=detail))
        return None
