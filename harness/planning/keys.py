"""Keys of students and cells: a digest of everything that can change a number. No torch.

The parts of a key are stored beside the cell or student, each under its name, so that a later run
can say which of them changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from harness.contract import Task
from harness.files.closure import OURS, Memo, code_digests, own_code_digest
from harness.files.digests import digest_of

# open, cut and save models; find training rows and render them
MODEL_MODULES = (
    "harness.models.language_model",
    "harness.models.resolve",
    "harness.models.shaping",
    "harness.data.source",
    "harness.data.examples",
    "harness.models.rendering",
)
SCORING_MODULES = (
    "harness.scoring.score",
    "harness.scoring.lm_eval_model",
    "harness.scoring.fidelity",
    "harness.models.rendering",
)
TIMING_MODULES = ("harness.measuring.measure", "harness.measuring.worker")
# they call the other modules: only their own files count, without their imports
CELL_MODULES = tuple(
    f"harness.running.{name}" for name in ("cell", "job", "loaded", "student", "evaluation")
)


@dataclass(frozen=True)
class CodeDigests:
    """The code behind a run's students and scores, as file -> digest."""

    tasks: Mapping[str, Task]
    _students: dict[tuple[type[Any], bool], dict[str, str]] = field(default_factory=dict)
    _memo: Memo = field(default_factory=dict)

    def for_scores(self, *, backend: str, measured: bool) -> dict[str, str]:
        """Return the code that scores, grades, compares with the teacher and, if asked, times."""
        modules = [
            *SCORING_MODULES,
            *(TIMING_MODULES if measured else ()),
            *(("harness.scoring.vllm_backend",) if backend == "vllm" else ()),
        ]
        cell_code = {
            file: digest
            for module in CELL_MODULES
            for file, digest in own_code_digest(module).items()
        }
        return code_digests(*modules, *map(type, self.tasks.values()), memo=self._memo) | cell_code

    def for_student(self, method: Any) -> dict[str, str]:
        """Return the code that makes a student: of the method, and of opening and saving models.

        The code of the tasks is included for methods that read items. Their graders are included
        only for methods that choose training text by grades, and for methods of plug-ins.
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
    """Tell whether a student may depend on the tasks' items.

    It may if its method trains, calibrates, or comes from a plug-in.
    """
    return bool(method.trains or method.calibrates or not _is_ours(method))


def lm_eval_parts(tasks: Mapping[str, Task]) -> dict[str, object]:
    """Return what decides the items of lm-eval's tasks: its version, and digests of their files.

    An empty dict if no task is one of lm-eval's.
    """
    definitions = {
        name: digest
        for name, task in tasks.items()
        if (digest := str(getattr(task, "definition", "")))
    }
    return {"lm-eval": lm_eval_version(), "definitions": definitions} if definitions else {}


def lm_eval_version() -> str:
    """Return the version of lm-eval that builds the prompts; "" if it is not installed."""
    try:
        return metadata.version("lm-eval")
    except metadata.PackageNotFoundError:
        return ""


def identity_of(kind: str, label: str, seed: object, request: Mapping[str, object]) -> str:
    """Return the digest of what a user asked for: it stays when code or versions change."""
    return digest_of(kind, label, seed, request)[:24]


@dataclass(frozen=True)
class KeyBuilder:
    """Builds keys, and keeps the parts of each key."""

    # what the user asked for, by name: cells that differ here are different cells, not old ones
    request: Mapping[str, object]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def make_key(
        self,
        kind: str,
        label: str,
        seed: int | None,
        contents: Mapping[str, object],
        *,
        students: tuple[str, ...] = (),
    ) -> str:
        """Return the key of `contents`, and keep its parts.

        `students` are the keys of the students of a cell's stages, in order.
        """
        key = digest_of(kind, *students[-1:], contents)
        self.parts[key] = {
            "identity": identity_of(kind, label, seed, self.request),
            "kind": kind,
            "label": label,
            "seed": seed,
            "students": list(students),
            "held": dict(contents),
        }
        return key
