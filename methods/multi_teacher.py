"""Multi-teacher distillation: one student, several teachers, each read once and in memory alone.

Target: `p = sum_k w_k p_k`, a mean of probabilities (a mean of logits would let one teacher's veto
decide); loss as in `response`. Weights: equal, the ones given with `--teacher a=0.7,b=0.3`, by each
teacher's confidence at each token (`softmax_k(-entropy_k)`), or by domain: each task's rows learn
from the teacher with the lowest loss on that task's validation rows.

Cost: one forward of each teacher per distinct row, kept. Needs one token map. Fails when the second
teacher is worse everywhere: then the best single teacher, its control, is better.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Family, Job
from methods.base import settings
from methods.training.base import Trained
from methods.training.distilled import Distilled
from methods.training.sources import Teachers, shared_vocabulary


@settings
class MultiTeacher(Trained):
    """Match a mixture of several teachers' distributions (mean, fixed, confidence or domain
    weights).
    """

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

    @property
    def reads_teacher_live(self) -> bool:
        """Tell whether the teachers run beside the student."""
        return self.cache == "off"

    def control_settings(self) -> dict[str, object]:
        """Its controls start alike, and the best single teacher is matched by the same loss."""
        return self.changed("start", "temperature", "teacher_share", "top_k")

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
        weighting = (
            self.weighting
            if self.weighting != "auto"
            else "fixed"
            if job.teacher_weights
            else "mean"
        )
        if weighting == "fixed" and not job.teacher_weights:
            raise CellFailed(
                "weighting=fixed needs weights; type for example --teacher tiny=0.7,tiny-math=0.3"
            )
        names = list(job.tasks)
        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
        pairs = [(one.prompt, one.completion, names.index(one.task)) for one in examples]
        notes: dict[str, Any] = {"weighting": weighting}
        by_task: list[list[float]] = []
        shared: list[dict[str, Any]] = []
        if weighting == "domain":
            losses, spent = validation_losses(job, job.teachers, rows=self.validation_rows)
            notes["teachers_loss"] = losses
            shared = [spent]
            # A task that has no training rows (perplexity) has no loss and no row to weigh.
            by_task = [
                _one_hot([losses[teacher.name].get(task, 0.0) for teacher in job.teachers])
                for task in names
            ]

        def value(at: Positions) -> Any:
            return mixed_kl(
                at, _teacher_weights(weighting, at, job.teacher_weights, by_task), self.temperature
            )

        vocabulary = shared_vocabulary(job, job.teachers)
        teachers = Teachers(
            models=job.teachers,
            vocabulary=vocabulary,
            k=self.top_k,
            cache=self.cache,
            temperature=self.temperature,
        )
        terms = [Term("forward-kl", self.teacher_share, value)]
        terms += [hard_labels(1 - self.teacher_share)] if self.teacher_share < 1 else []
        return self.train(job, pairs, terms=terms, teachers=teachers, notes=notes, shared=shared)


def _teacher_weights(
    weighting: str, at: Any, given: Sequence[float], by_task: Sequence[Sequence[float]]
) -> Any:
    """Return the weights of the teachers at each position, (N, M)."""
    import torch

    from methods.training.divergences import distribution_entropy

    like = {"device": at.labels_N.device, "dtype": torch.float32}
    if weighting == "confidence":
        return torch.softmax(
            -torch.stack([distribution_entropy(one) for one in at.teachers], dim=-1), dim=-1
        )
    if weighting == "domain":
        return torch.tensor(by_task, **like)[at.tags_N]
    chosen = list(given) if weighting == "fixed" else [1.0] * len(at.teachers)
    return torch.tensor(chosen, **like).expand(len(at.labels_N), -1)


def _one_hot(losses: Sequence[float]) -> list[float]:
    best = min(range(len(losses)), key=losses.__getitem__)
    return [1.0 if index == best else 0.0 for index in range(len(losses))]


def validation_losses(
    job: Job, teachers: Sequence[Checkpoint], *, rows: int
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Return each teacher's mean cross-entropy on each task's validation rows (nats a token), and
    what that cost; one in memory at a time.

    Every cell reads them anew, so the cost carries the cell's own name: nothing is shared.
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

    began = time.monotonic()
    cost: dict[str, Any] = {
        "key": digest_of("validation losses", str(job.workdir)),
        "tokens": 0,
        "seconds": 0.0,
        "flops": 0.0,
    }
    found: dict[str, dict[str, float]] = {}
    for teacher in teachers:
        opened = open_model(teacher, device=job.device, dtype=job.dtype)
        head = TrainedPositionLogits(opened.model)
        found[teacher.name] = {}
        for name, task in job.tasks.items():
            if task.kind == "perplexity":
                continue
            texts = full_solution_pairs(
                examples_of({name: task}, "validation", job.source, rows=rows)
            )
            held = encode(opened.tokenizer, texts, longest=opened.context)[0]
            read = sum(len(row.ids) for row in held)
            cost["tokens"] += read
            cost["flops"] += forward_flops_per_token(opened.model, read / len(held)) * read
            loss = mean_cross_entropy(
                held, head=head, pad_id=opened.pad_id, micro_batch_size=16, device=job.device
            )
            found[teacher.name][name] = round(loss, 5)
        del opened, head
        release_memory(job.device)
    cost["seconds"] = round(time.monotonic() - began, 3)
    return found, cost


@settings
class BestSingleTeacher(Distilled):
    """Distil from the one teacher with the lowest validation loss (control of `multi-teacher`)."""

    family: ClassVar[Family] = "control"
    controls: ClassVar[tuple[str, ...]] = ("untouched",)
    is_control: ClassVar[bool] = True

    def compress(self, job: Job) -> Checkpoint:
        """Choose by the mean over tasks of the loss on validation rows, then distil as `response`
        does.
        """
        from dataclasses import replace

        losses, spent = validation_losses(job, job.teachers, rows=self.validation_rows)
        best = min(job.teachers, key=lambda one: sum(losses[one.name].values()))
        chosen = replace(self, teacher=best.name)
        return chosen.distil(
            job,
            self._examples(job),
            notes={"teacher": best.name, "teachers_loss": losses},
            shared=[spent],
        )
