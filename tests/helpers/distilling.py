"""Rows, jobs and trainings of tiny models, for tests of distillation."""

import torch

import suites
from harness.contract import Budget, Job
from harness.data.source import LocalOrHubData
from harness.registry import Registry
from methods import METHODS
from methods.training.loop import fit
from methods.training.losses import forward_kl
from methods.training.positions import Positions
from methods.training.rows import TokenRow, batch_of
from methods.training.settings import LoopSettings, Training
from methods.training.stepper import Stepper
from methods.training.taps import InnerStates
from methods.training.teachers import LiveTeacher, TrainedPositionLogits
from methods.training.terms import Objective, Term, hard_labels

# held out: the default of 200 takes far longer to score than these trainings to train
FEW = {"validation_rows": 16}


class Quick(Registry):
    """The registry of methods; by default a method that trains scores few held-out rows."""

    def build(self, name, settings):
        """Build a method with its settings."""
        return super().build(name, {**(FEW if self.load(name).trains else {}), **settings})


REGISTRY = Quick("method", METHODS)
TASKS = {name: suites.load(name) for name in ("gsm8k-mini", "mmlu-mini")}
SETTINGS = LoopSettings(
    learning_rate=1e-2,
    batch_size=4,
    micro_batch_size=2,
    warmup_ratio=0.1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    validation_rows=4,
)


def rows_of(count, seed=0, shortest=5, longest=19):
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest, (1,), generator=draw))
        ids = torch.randint(3, 500, (length,), generator=draw).tolist()
        rows.append(TokenRow(tuple(ids), int(torch.randint(1, length - 1, (1,), generator=draw))))
    return rows


def job(teachers, folder, *, tokens=3_000, rows=40, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "teachers": tuple(teachers),
        "student": "depth:0.5",
        "student_base": teachers[0],
        "tasks": TASKS,
        "source": LocalOrHubData(),
        "budget": Budget(seen_tokens=tokens, rows=rows),
        "seed": 1,
        "workdir": folder,
        "cache": folder.parent / "cache",
    }
    return Job(**{**settings, **changes})


def seen_inside(student, teacher, taps, rows=None):
    """Run both models with taps; return the inside and the positions."""
    inside = InnerStates(student, teacher.model, taps)
    batch = batch_of(rows or rows_of(4), 1)
    logits = TrainedPositionLogits(student.model)(batch)
    with torch.no_grad():
        TrainedPositionLogits(teacher.model)(batch)
    return inside, Positions(logits, batch.labels_N, (), batch, inside)


def stepped(student, objective, rows, micro, inside=None):
    student.model.zero_grad()
    stepper = Stepper(
        student.model,
        TrainedPositionLogits(student.model),
        objective,
        micro,
        1,
        inner_states=inside,
    )
    stepper.backward(
        rows,
        weights=dict.fromkeys((term.name for term in objective.terms), 1.0),
        backward=lambda loss: loss.backward(),
    )
    stepper.head.close()
    return torch.cat(
        [
            parameter.grad.flatten()
            for parameter in student.model.parameters()
            if parameter.grad is not None
        ]
    )


def train(student, teacher, folder, *, taps=None, stop=None, settings=SETTINGS, terms=None, **aim):
    folder.mkdir(exist_ok=True)
    kd = Term(
        "kl",
        0.5,
        lambda positions: forward_kl(positions.student_NV, positions.teacher_NV, temperature=2.0),
    )
    feature = Term(
        "feature", "auto", lambda positions: positions.inner_states.hidden_state_distance(positions)
    )
    objective = Objective(
        terms=terms or [kd, hard_labels(0.5), *([feature] if taps else [])],
        sources=[LiveTeacher(teacher)] if teacher else (),
        taps=taps,
        **aim,
    )
    spent = fit(
        student,
        rows=rows_of(24),
        validation=rows_of(6, seed=9),
        objective=objective,
        settings=settings,
        training=Training(seen_tokens=900, seed=4, workdir=folder, stop_after_steps=stop),
    )
    return {name: tensor.clone() for name, tensor in student.model.state_dict().items()}, spent


def gradient_of(model, rows, micro_batch_size, **aim):
    model.zero_grad()
    objective = Objective(terms=[hard_labels()], **aim)
    stepper = Stepper(model, TrainedPositionLogits(model), objective, micro_batch_size, 1)
    values = stepper.backward(
        rows, weights={"ce": 1.0}, backward=lambda loss: loss.backward(), step=3
    ).means
    return values["ce"], torch.cat([p.grad.flatten() for p in model.parameters()])
