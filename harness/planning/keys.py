"""Keys of students and cells, by content: everything that can change a number, each part under its
name. No torch.

A key is a digest of its parts. They are kept beside what was made, so that a later run can say
which of them is another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from harness.contract import Task
from harness.files.closure import OURS, Memo, code_digests, own_code_digest
from harness.files.digests import digest_of

MODEL_MODULES = (
    "harness.models.language_model",
    "harness.models.resolve",
    "harness.models.shaping",
    "harness.data.source",
    "harness.data.examples",
    "harness.models.rendering",
)  # opens, cuts and saves models; finds training rows and shows them
SCORING_MODULES = (
    "harness.scoring.score",
    "harness.scoring.lm_eval_model",
    "harness.scoring.fidelity",
    "harness.models.rendering",
)
TIMING_MODULES = ("harness.measuring.measure", "harness.measuring.worker")
CELL_MODULES = tuple(
    f"harness.running.{name}" for name in ("cell", "job", "loaded", "student", "evaluation")
)  # how the others are called: each its own file, without what it imports beside them


@dataclass(frozen=True)
class CodeDigests:
    """The code behind a run's students and scores, as digests by file."""

    tasks: Mapping[str, Task]
    _students: dict[tuple[type[Any], bool], dict[str, str]] = field(default_factory=dict)
    _memo: Memo = field(default_factory=dict)

    def for_scores(self, *, backend: str, measured: bool) -> dict[str, str]:
        """Return what asks a model, grades, compares with the teacher and, where it is, times."""
        modules = [
            *SCORING_MODULES,
            *(TIMING_MODULES if measured else ()),
            *(("harness.scoring.vllm_backend",) if backend == "vllm" else ()),
        ]
        own = {
            name: digest
            for module in CELL_MODULES
            for name, digest in own_code_digest(module).items()
        }
        return code_digests(*modules, *map(type, self.tasks.values()), memo=self._memo) | own

    def for_student(self, method: Any) -> dict[str, str]:
        """Return what makes a student: its method, what opens and saves models and, where it reads
        items, the tasks'.

        A grader counts only for methods that it chooses training text for, or of which nothing is
        known.
        """
        kind, grades = type(method), method.writes_traces or not _is_ours(method)
        if (kind, grades) not in self._students:
            files = code_digests(kind, *MODEL_MODULES, memo=self._memo)
            if reads_items(method):
                files |= code_digests(
                    *map(type, self.tasks.values()),
                    without=() if grades else ("grade",),
                    memo=self._memo,
                )
            self._students[kind, grades] = files
        return self._students[kind, grades]


def _is_ours(method: Any) -> bool:
    return type(method).__module__.partition(".")[0] in OURS


def reads_items(method: Any) -> bool:
    """Tell whether a method's student may depend on the tasks' items: it trains, calibrates, or
    comes from elsewhere.
    """
    return bool(method.trains or method.calibrates or not _is_ours(method))


def lm_eval_parts(tasks: Mapping[str, Task]) -> dict[str, object]:
    """Return what makes the items of lm-eval's own tasks: its version, and the files that define
    them with the number of shots.
    """
    definitions = {
        name: digest
        for name, task in tasks.items()
        if (digest := str(getattr(task, "definition", "")))
    }
    return {"lm-eval": lm_eval_version(), "definitions": definitions} if definitions else {}


def lm_eval_version() -> str:
    """Return the version of lm-eval that builds the prompts, "" where it is not installed."""
    try:
        return metadata.version("lm-eval")
    except metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class KeyBuilder:
    """Makes keys, and keeps what each was made of."""

    # what the user asked for, by name: cells that differ in it are other cells, not old ones
    request: Mapping[str, object]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def make_key(
        self,
        kind: str,
        label: str,
        seed: int | None,
        held: Mapping[str, object],
        *,
        students: tuple[str, ...] = (),
    ) -> str:
        """Return the key of everything in `held`; `students` are those that a cell scores, stage by
        stage.
        """
        key = digest_of(kind, *students[-1:], held)
        identity = digest_of(kind, label, seed, self.request)[:24]
        self.parts[key] = {
            "identity": identity,
            "kind": kind,
            "label": label,
            "seed": seed,
            "students": list(students),
            "held": dict(held),
        }
        return key
