"""Lets a teacher write training data (`--train-data teacher`), or reads what it wrote.

What a teacher writes is cached as traces are: by teacher, prompts, sampling and seed; a killed run
goes on where it was. No torch at import.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from harness import catalog
from harness.contract import Example, Job
from harness.data.examples import plain_examples
from harness.data.teacher_sets import TeacherSet, WrittenText
from harness.errors import CellFailed
from harness.machine.memory import release_memory

if TYPE_CHECKING:
    from harness.scoring.backend import Generation

_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f][\"')\]\u201d\u2019]*(?=\s)|\n")
_QUESTION = "QUESTION"  # in its place a teacher begins to write


class _Answered(NamedTuple):
    """What a teacher wrote after one prompt."""

    prompt: str
    text: "Generation"


def write_training_data(
    job: Job, data: TeacherSet, *, chat: bool, system: str | None
) -> WrittenText:
    """Return the examples of a set, written now or earlier by the job's first teacher.

    `chat` tells that teachers are shown their chat template, with this system message. Raises
    `CellFailed` where no text is left.
    """
    writer = _TeacherWriter(replace(job, seed=data.recipe.seed), data)
    if not data.recipe.free:
        writer.answer(plain_examples(job.tasks, "train", job.source, rows=writer.prompts))
    elif chat:
        writer.answer(writer.questions(system))
    else:
        writer.write_from_nothing()
    release_memory(job.device)
    if not writer.examples:
        raise CellFailed(
            f"{data.name}: no text of {writer.counts['written']:,} is left to train on: "
            f"{writer.counts['unfinished']:,} did not end within {data.recipe.longest} tokens, "
            f"{writer.counts['empty']:,} are empty; give a larger longest: "
            f"{'teacher:free' if data.recipe.free else 'teacher'}"
            f"[longest={2 * data.recipe.longest}]"
        )
    return WrittenText(tuple(writer.examples), writer.counts, tuple(writer.costs))


class _TeacherWriter:
    """Collects what a teacher writes for one set, and counts what is left out."""

    def __init__(self, job: Job, data: TeacherSet) -> None:
        self.job, self.data = job, data
        self.examples: list[Example] = []
        self.costs: list[dict[str, Any]] = []
        self.counts: dict[str, Any] = dict.fromkeys(
            ("written", "unfinished", "cut", "empty", "repeats", "tokens"), 0
        )
        self.counts |= {"seconds": 0.0, "joules": 0.0}
        self._kept: set[tuple[str, str]] = set()  # prompts and texts

    @property
    def prompts(self) -> int:
        """How many prompts are answered."""
        return math.ceil(self.data.asked / self.data.recipe.samples)

    def answer(self, prompts: Sequence[Example]) -> None:
        """Let the teacher answer prompts; answers that did not end by themselves are left out."""
        for answered in self._written(prompts, self.data.recipe.samples):
            self._keep(answered, is_cut=False)

    def questions(self, system: str | None) -> list[Example]:
        """Let the teacher write turns of a user; return the distinct ones that ended."""
        source = replace(self.job.source, show=_OpenTurn(system))  # type: ignore[type-var]
        asking = replace(self.job, source=source)
        opened = self._example(f"an open turn of a user, system message {system!r}", "")
        questions = dict.fromkeys(
            answered.text.text.strip()
            for answered in self._written([opened], self.data.asked, job=asking)
            if answered.text.stop == "eos"
        )
        return [self._example(question, "") for question in questions if question]

    def write_from_nothing(self) -> None:
        """Let the teacher write from its first token; what did not end is cut at a sentence."""
        for answered in self._written([self._example("", "")], self.data.asked):
            self._keep(answered, is_cut=answered.text.stop != "eos")

    def _written(
        self, prompts: Sequence[Example], samples: int, *, job: Job | None = None
    ) -> list[_Answered]:
        recipe = self.data.recipe
        if not prompts:
            return []
        traces = catalog.write_traces(
            job or self.job,
            prompts,
            samples=samples,
            temperature=recipe.temperature,
            longest=recipe.longest,
        )
        self.costs.append(traces.cost())
        self.counts["tokens"] += traces.tokens
        self.counts["seconds"] = round(self.counts["seconds"] + traces.seconds, 3)
        joules = self.counts["joules"]
        known = joules is not None and traces.joules is not None
        self.counts["joules"] = round(joules + traces.joules, 3) if known else None
        return [
            _Answered(prompt.prompt, text)
            for prompt, texts in zip(prompts, traces.texts, strict=True)
            for text in texts
        ]

    def _keep(self, answered: _Answered, *, is_cut: bool) -> None:
        """Keep a text unless it is unfinished, empty, or written before."""
        self.counts["written"] += 1
        text = whole_sentences(answered.text.text) if is_cut else answered.text.text
        if not is_cut and answered.text.stop != "eos":
            self.counts["unfinished"] += 1
        elif not text.strip():
            self.counts["unfinished" if is_cut else "empty"] += 1
        elif (answered.prompt, text) in self._kept:
            self.counts["repeats"] += 1
        else:
            self.counts["cut"] += is_cut
            self._kept.add((answered.prompt, text))
            self.examples.append(self._example(answered.prompt, text))

    def _example(self, prompt: str, completion: str) -> Example:
        return Example(
            task=self.data.name, prompt=prompt, completion=completion, answer="", gold=""
        )


class _OpenTurn:
    """Shows a model the beginning of a user's turn, in whose place it writes a question."""

    def __init__(self, system: str | None) -> None:
        self.system = [{"role": "system", "content": system}] if system else []

    def __call__(self, tokenizer: Any, prompt: str) -> str:
        """Return the template's text up to where a user's words would begin."""
        from harness.models.language_model import render_chat

        text = render_chat(tokenizer, [*self.system, {"role": "user", "content": _QUESTION}])
        beginning, question, _ = text.partition(_QUESTION)
        if not question:
            raise CellFailed(
                "teacher:free: the chat template does not show a user's words as they are, so "
                "nobody knows where they begin; type --chat-template off"
            )
        return beginning


def whole_sentences(text: str) -> str:
    """Return a text up to the end of its last whole sentence or line; "" where none ends."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else ""
