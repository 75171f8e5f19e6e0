"""Multi-teacher distillation: one student, several teachers, of which one is in memory at a time.

Target: `p = sum_k w_k p_k`, a mean of probabilities (in a mean of logits one teacher could veto a
token); loss as in `response`. Weights are equal, or those of `--teacher a=0.7,b=0.3`, or each
teacher's confidence at each token (`softmax_k(-entropy_k)`), or by domain: the rows of a task learn
from the teacher with the lowest loss on the task's validation rows.

Cost: one forward of each teacher per distinct row, cached. Needs teachers with one vocabulary.
Fails when the second teacher is worse everywhere: then the best single teacher, its control, is
better.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Family, Job
from methods.base import settings
from methods.training.base import SHARED_WITH_CONTROLS, Trained
from methods.training.cache_dtype import CacheDtype
from methods.training.distilled import Distilled
from methods.training.sources import Teachers, shared_vocabulary


@settings
class MultiTeacher(Trained):
    """Match a weighted mean of several teachers' distributions."""

    controls: ClassVar[tuple[str, ...]] = ("best-single-teacher", "sft", "untouched")
    needs_same_vocabulary: ClassVar[bool] = True
    needs_several_teachers: ClassVar[bool] = True

    # auto: fixed where weights were given, else mean
    weighting: Literal["auto", "mean", "fixed", "confidence", "domain"] = "auto"
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    # weight of the teachers' term against the labels'
    teacher_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    # on: each teacher is read once, alone in memory; off: all run beside the student
    cache: Literal["on", "off"] = "on"
    top_k: Annotated[int, Field(ge=1, le=4096)] = 64
    # how the cache keeps log-probabilities: float32 exactly, int8 in 256 steps (its KL is noted)
    cache_dtype: CacheDtype = "float16"

    @property
    def reads_teacher_live(self) -> bool:
        """Tell whether the teachers run beside the student."""
        return self.cache == "off"

    def control_settings(self) -> dict[str, object]:
        """Return what controls take over: the same start and, for one teacher, the same loss."""
        loss = ("temperature", "teacher_share", "top_k", "cache_dtype")
        return self.changed(*SHARED_WITH_CONTROLS, *loss)

    def compress(self, job: Job) -> Checkpoint:
        """Read every teacher in turn, then train against their mixture."""
        from harness.data.examples import training_examples
        from harness.errors import CellFailed
        from methods.training.divergences import mixed_kl
        from methods.training.positions import Positions
        from methods.training.terms import Term, hard_labels

        if len(job.teachers) < 2:
            raise CellFailed(
                "multi-teacher needs two teachers or more; type for example --teacher "
                "tiny,tiny-math"
            )
        weighting: str = self.weighting
        if weighting == "auto":
            weighting = "fixed" if job.teacher_weights else "mean"
        if weighting == "fixed" and not job.teacher_weights:
            raise CellFailed(
                "weighting=fixed needs weights; type for example --teacher tiny=0.7,tiny-math=0.3"
            )
        task_names = list(job.tasks)
        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
        pairs = [
            (example.prompt, example.completion, task_names.index(example.task))
            for example in examples
        ]
        notes: dict[str, Any] = {"weighting": weighting}
        task_weights: list[list[float]] = []  # of the teachers, for each task
        shared: list[dict[str, Any]] = []
        if weighting == "domain":
            self.refuse_recipe(job)
            losses, cost = validation_losses(job, job.teachers, rows=self.validation_rows)
            notes["teachers_loss"] = losses
            shared = [cost]
            # A task without training rows (perplexity) has no loss, and no row that needs a weight.
            task_weights = [
                _weight_lowest([losses[teacher.name].get(task, 0.0) for teacher in job.teachers])
                for task in task_names
            ]

        def value(positions: Positions) -> Any:
            weights = _teacher_weights(weighting, positions, job.teacher_weights, task_weights)
            return mixed_kl(positions, weights, self.temperature)

        teachers = Teachers(
            models=job.teachers,
            vocabulary=shared_vocabulary(job, job.teachers),
            k=self.top_k,
            cache=self.cache,
            cache_dtype=self.cache_dtype,
            temperature=self.temperature,
        )
        terms = [Term("forward-kl", self.teacher_share, value)]
        terms += [hard_labels(1 - self.teacher_share)] if self.teacher_share < 1 else []
        return self.train(job, pairs, terms=terms, teachers=teachers, notes=notes, shared=shared)


def _teacher_weights(
    weighting: str,
    positions: Any,
    fixed: Sequence[float],
    task_weights: Sequence[Sequence[float]],
) -> Any:
    """Return the weights of the M teachers at each of N positions, (N, M)."""
    import torch

    from methods.training.divergences import distribution_entropy
    from methods.training.transfers import to_device

    labels = positions.labels_N
    if weighting == "confidence":
        entropies = [distribution_entropy(teacher) for teacher in positions.teachers]
        return torch.softmax(-torch.stack(entropies, dim=-1), dim=-1)
    if weighting == "domain":
        table = to_device(torch.tensor(task_weights, dtype=torch.float32), labels.device)
        return table[positions.tags_N]
    weights = list(fixed) if weighting == "fixed" else [1.0] * len(positions.teachers)
    row = to_device(torch.tensor(weights, dtype=torch.float32), labels.device)
    return row.expand(len(labels), -1)


def _weight_lowest(losses: Sequence[float]) -> list[float]:
    """Return weight 1 for the lowest loss, and 0 for the others."""
    best = min(range(len(losses)), key=losses.__getitem__)
    return [1.0 if index == best else 0.0 for index in range(len(losses))]


def validation_losses(
    job: Job, teachers: Sequence[Checkpoint], *, rows: int
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Return each teacher's loss on each task's validation rows, and what reading them cost.

    The loss is the mean cross-entropy in nats per token. One teacher is in memory at a time. Every
    cell reads them itself, so the key of the cost is the cell's own: nothing is shared.
    """
    import time

    from harness.data.examples import examples_of
    from harness.files.digests import digest_of
    from harness.machine.memory import release_memory
    from harness.models.language_model import open_model
    from harness.models.shape import forward_flops_per_token
    from methods.training.base import full_solution_pairs
    from methods.training.rows import encode
    from methods.training.stepper import mean_cross_entropy
    from methods.training.teachers import TrainedPositionLogits

    start_time = time.monotonic()
    cost: dict[str, Any] = {
        "key": digest_of("validation losses", str(job.workdir)),
        "tokens": 0,
        "seconds": 0.0,
        "flops": 0.0,
    }
    losses: dict[str, dict[str, float]] = {}  # by teacher and task
    for teacher in teachers:
        opened = open_model(teacher, device=job.device, dtype=job.dtype)
        head = TrainedPositionLogits(opened.model)
        losses[teacher.name] = {}
        for name, task in job.tasks.items():
            if task.kind == "perplexity":
                continue
            texts = full_solution_pairs(
                examples_of({name: task}, "validation", job.source, rows=rows)
            )
            encoded = encode(opened.tokenizer, texts, longest=opened.context)[0]
            tokens = sum(len(row.ids) for row in encoded)
            cost["tokens"] += tokens
            cost["flops"] += forward_flops_per_token(opened.model, tokens / len(encoded)) * tokens
            loss = mean_cross_entropy(
                encoded, head=head, pad_id=opened.pad_id, micro_batch_size=16, device=job.device
            )
            losses[teacher.name][name] = round(loss, 5)
        del opened, head
        release_memory(job.device)
    cost["seconds"] = round(time.monotonic() - start_time, 3)
    return losses, cost


@settings
class BestSingleTeacher(Distilled):
    """Distil from the one teacher with the lowest validation loss (control of `multi-teacher`)."""

    family: ClassVar[Family] = "control"
    controls: ClassVar[tuple[str, ...]] = ("untouched",)
    is_control: ClassVar[bool] = True

    def compress(self, job: Job) -> Checkpoint:
        """Choose the teacher with the lowest mean loss over tasks; distil as `response` does."""
        from dataclasses import replace

        self.refuse_recipe(job)
        losses, cost = validation_losses(job, job.teachers, rows=self.validation_rows)
        best = min(job.teachers, key=lambda teacher: sum(losses[teacher.name].values()))
        return replace(self, teacher=best.name).distil(
            job,
            self._examples(job),
            notes={"teacher": best.name, "teachers_loss": losses},
            shared=[cost],
        )
