"""Laws of the training loop: masks, normaliser, budget, resume."""

import copy
import json
import math
from dataclasses import replace
from itertools import chain, pairwise, repeat, takewhile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.contract import Progress
from harness.errors import CellFailed
from harness.files.digests import file_digest
from harness.files.writing import read_signed, write_signed
from harness.models.language_model import open_model
from methods.training import batch_loss, meter, preparation
from methods.training import state as states
from methods.training.chunked_logits import parts
from methods.training.loop import fit
from methods.training.losses import forward_kl, jensen_shannon
from methods.training.optimizer import learning_rate_at
from methods.training.positions import Positions
from methods.training.rows import TokenRow, batch_of, collate, rows_within_budget, shuffled_steps
from methods.training.selection import Selection
from methods.training.settings import LoopSettings, Training
from methods.training.state import LoopState, SavedStates
from methods.training.stepper import Stepper, mean_cross_entropy
from methods.training.teachers import LiveTeacher, TrainedPositionLogits
from methods.training.terms import Objective, Term, hard_labels

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


def step(
    model,
    rows,
    *,
    micro_batch_size,
    terms=None,
    sources=(),
    ranks=1,
    rank=0,
    pad=1,
    norms=False,
    number=1,
    inside=None,
    **aim,
):
    """Run one step's backward pass; return what it says and the gradient."""
    model.zero_grad()
    objective = Objective(terms=terms or [hard_labels()], sources=sources, **aim)
    stepper = Stepper(
        model,
        TrainedPositionLogits(model),
        objective,
        micro_batch_size,
        pad,
        inner_states=inside,
        world_size=ranks,
        rank=rank,
    )
    weights = {term.name: term.weight for term in objective.terms}
    values = stepper.backward(
        rows, weights=weights, backward=lambda loss: loss.backward(), norms=norms, step=number
    )
    stepper.head.close()
    return values, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradient(model, rows, **options):
    return step(model, rows, **options)[1]


KD = [
    Term("kl", 0.5, lambda at: forward_kl(at.student_NV, at.teacher_NV, temperature=2.0)),
    hard_labels(0.5),
]


def louder(random_model, factor=1.3):
    """Return a teacher that differs from the student: its weights times a factor."""
    opened = open_model(random_model)
    with torch.no_grad():
        for parameter in opened.model.parameters():
            parameter.mul_(factor)
    return opened


def test_gradient_does_not_depend_on_the_split_into_micro_batches(random_model):
    model, rows = open_model(random_model).model, rows_of(8)
    options = {"terms": KD, "sources": [LiveTeacher(louder(random_model))]}
    expected = gradient(model, rows, micro_batch_size=8, **options)
    for micro in (4, 1):
        assert torch.allclose(
            gradient(model, rows, micro_batch_size=micro, **options), expected, atol=1e-6
        )


def test_gradient_does_not_depend_on_the_number_of_ranks(random_model):
    model, rows = open_model(random_model).model, rows_of(8)
    expected = gradient(model, rows, micro_batch_size=8)
    # what DDP does
    averaged = (
        sum(gradient(model, rows, micro_batch_size=2, ranks=2, rank=rank) for rank in (0, 1)) / 2
    )
    assert torch.allclose(averaged, expected, atol=1e-6)


def test_loss_does_not_depend_on_padding(random_model):
    model = open_model(random_model).model
    short, long = (
        rows_of(1, seed=1, shortest=6, longest=8),
        rows_of(1, seed=2, shortest=17, longest=19),
    )
    alone, beside = (
        gradient(model, short, micro_batch_size=1),
        gradient(model, [*short, *long], micro_batch_size=2),
    )
    padded = gradient(model, [*short, *long], micro_batch_size=1)
    assert torch.allclose(beside, padded, atol=1e-6)
    assert not torch.allclose(alone, beside, atol=1e-6)


def wider(opened, extra=128):
    """Give a model rows of the vocabulary that no token has, with loud logits."""
    width = opened.model.config.vocab_size
    opened.model.resize_token_embeddings(width + extra, mean_resizing=False)
    with torch.no_grad():
        opened.model.get_input_embeddings().weight[width:] = 5.0
        opened.model.get_output_embeddings().weight[width:] = 5.0
    assert opened.model(input_ids=torch.tensor([[5, 6]])).logits.shape[-1] == width + extra
    return opened


def test_extra_columns_of_a_live_teacher_change_nothing(random_model):
    model, rows = open_model(random_model).model, rows_of(4)
    options = {"micro_batch_size": 4, "terms": KD, "vocabulary": model.config.vocab_size}
    plain = gradient(model, rows, sources=[LiveTeacher(louder(random_model))], **options)
    padded = gradient(model, rows, sources=[LiveTeacher(wider(louder(random_model)))], **options)
    assert torch.allclose(plain, padded, atol=1e-7) and float(plain.abs().max()) > 1e-3


def test_extra_columns_of_the_student_get_no_gradient_and_change_no_loss(random_model):
    rows, width = rows_of(4), open_model(random_model).model.config.vocab_size
    options = {
        "micro_batch_size": 4,
        "terms": KD,
        "sources": [LiveTeacher(louder(random_model))],
        "vocabulary": width,
    }
    plain, _ = step(open_model(random_model).model, rows, **options)
    student = wider(open_model(random_model)).model
    padded, _ = step(student, rows, **options)
    assert padded.means == pytest.approx(plain.means, rel=1e-5)
    assert float(student.get_output_embeddings().weight.grad[width:].abs().max()) == 0


class Fixed:
    """A model whose logits are given: it has no head that could be handed fewer positions."""

    def __init__(self, logits):
        self.logits = logits

    def get_output_embeddings(self):
        return None

    def __call__(self, **_):
        return type("Out", (), {"logits": self.logits})


def positions_of(logits, rows, pad_id=0):
    batch = batch_of(rows, pad_id)
    return Positions(TrainedPositionLogits(Fixed(logits))(batch), batch.labels_N, batch=batch)


def test_last_eos_is_trained_where_pad_is_eos():
    eos = 0
    rows = [TokenRow((7, 8, 9, eos), 2), TokenRow((7, 8, 9, 10, 11, 12, eos), 3)]
    _, attention, trained = collate(rows, pad_id=eos)
    assert trained[0].tolist() == [False, False, True, True, False, False, False]
    assert attention[0].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert positions_of(torch.zeros(2, 7, 5), rows, pad_id=eos).labels_N.tolist() == [
        9,
        eos,
        10,
        11,
        12,
        eos,
    ]


def test_only_completion_labels_matter(random_model):
    # the same input whatever the labels
    logits = open_model(random_model).model(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]])).logits

    def loss(row):
        return float(hard_labels().value(positions_of(logits, [row])).sum().detach())

    base = loss(TokenRow((3, 4, 5, 6, 7, 8), 3))
    assert loss(TokenRow((99, 98, 97, 6, 7, 8), 3)) == base
    assert loss(TokenRow((3, 4, 5, 6, 99, 8), 3)) != base


def test_logits_stand_against_the_next_token():
    logits = torch.full((1, 3, 4), -50.0)
    # a model that is right about token 1 from position 0, token 2 from 1
    logits[0, 0, 3] = logits[0, 1, 1] = 50.0
    assert hard_labels().value(
        positions_of(logits, [TokenRow((2, 3, 1), 1)])
    ).tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX", "Qwen3"])
def test_the_head_is_handed_trained_positions_only_and_says_the_same(small, kind):
    opened = small(kind)
    batch = batch_of(rows_of(5), 1)
    expected = opened.model(input_ids=batch.ids, attention_mask=batch.attention).logits[:, :-1][
        batch.mask
    ]
    head, widths = TrainedPositionLogits(opened.model), []
    watch = opened.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, out: widths.append(out.shape[:2])
    )
    assert torch.allclose(head(batch), expected, atol=1e-6) and widths == [
        (1, int(batch.mask.sum()))
    ]
    head.close()
    watch.remove()
    assert opened.model(input_ids=batch.ids).logits.shape[:2] == batch.ids.shape


@pytest.mark.parametrize("budget", [37, 1000, 4321])
def test_budget_of_seen_tokens_is_kept_to_one_row(budget):
    rows = rows_of(30)
    seen = 0
    for _, step_rows in shuffled_steps(rows, batch_size=4, seed=3):
        fitting_rows = rows_within_budget(step_rows, budget - seen)
        seen += sum(len(row.ids) for row in fitting_rows)
        if len(fitting_rows) < len(step_rows):
            break
    assert budget - max(len(row.ids) for row in rows) < seen <= budget


def test_every_row_is_seen_once_an_epoch():
    rows = rows_of(30)
    steps = [
        step
        for epoch, step in takewhile(
            lambda pair: pair[0] < 3, shuffled_steps(rows, batch_size=4, seed=3)
        )
        if epoch == 2
    ]
    assert sorted(row.ids for step in steps for row in step) == sorted(row.ids for row in rows)


def test_rate_warms_up_then_falls_to_zero():
    rates = [learning_rate_at(percent / 100, SETTINGS) for percent in range(101)]
    assert (
        rates[0] == 0
        and rates[10] == pytest.approx(1e-2)
        and rates[100] == pytest.approx(0, abs=1e-12)
    )
    assert all(a > b for a, b in pairwise(rates[10:]))


def run(random_model, workdir, *, terms=None, sources=(), aim=None, **changes):
    student = open_model(random_model)
    workdir.mkdir(exist_ok=True)
    arguments = {
        "rows": rows_of(24),
        "validation": rows_of(6, seed=9),
        "objective": Objective(terms=terms or [hard_labels()], sources=sources, **(aim or {})),
        "settings": SETTINGS,
    }
    training_options = {name: changes.pop(name) for name in list(changes) if name not in arguments}
    training = Training(**{"seen_tokens": 900, "seed": 4, "workdir": workdir, **training_options})
    spent = fit(student, training=training, **{**arguments, **changes})
    return student.model, spent


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_a_stopped_run_goes_on_to_the_same_bytes(random_model, tmp_path, stop):
    model, spent = run(random_model, tmp_path / "whole")
    run(random_model, tmp_path / "parts", stop_after_steps=stop)
    reports = []
    again, resumed = run(random_model, tmp_path / "parts", progress=reports.append)
    assert len(reports) == spent.step - stop  # it went on, and did not begin again
    assert all(
        torch.equal(again.state_dict()[name], tensor) for name, tensor in weights(model).items()
    )
    for name in ("step", "seen", "trained", "best", "kept_step"):
        assert getattr(spent, name) == getattr(resumed, name)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "training.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_a_state_torn_by_a_kill_is_passed_over(random_model, tmp_path):
    uninterrupted, _ = run(random_model, tmp_path / "whole")
    run(random_model, tmp_path / "torn", stop_after_steps=5)
    (tmp_path / "torn" / "state" / "step-9.part").mkdir()
    restarted, _ = run(random_model, tmp_path / "torn")
    assert all(
        torch.equal(restarted.state_dict()[name], tensor)
        for name, tensor in weights(uninterrupted).items()
    )


@pytest.mark.parametrize("name", ["loop.json", "model", "optimizer", "random_states", "best.pt"])
def test_a_torn_state_is_said_and_training_begins_anew(random_model, tmp_path, name, capsys):
    uninterrupted, _ = run(random_model, tmp_path / "whole")
    run(random_model, tmp_path / "torn", stop_after_steps=12)
    files = [
        path
        for path in (tmp_path / "torn").rglob("*")
        if path.is_file() and path.name.startswith(name)
    ]
    assert (
        files and json.loads(next((tmp_path / "torn").rglob("loop.json")).read_text())["kept_step"]
    )
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    restarted, _ = run(random_model, tmp_path / "torn")
    assert "training starts from the beginning" in capsys.readouterr().err
    assert all(
        torch.equal(restarted.state_dict()[name], tensor)
        for name, tensor in weights(uninterrupted).items()
    )


@pytest.mark.parametrize("name", ["model", "optimizer", "random_states"])
def test_a_state_that_was_written_in_part_is_said_and_training_begins_anew(
    random_model, tmp_path, name, capsys
):
    uninterrupted, _ = run(random_model, tmp_path / "whole")
    run(random_model, tmp_path / "torn", stop_after_steps=7)
    [loop] = (tmp_path / "torn").rglob("loop.json")
    saved = read_signed(loop)
    [path] = [path for path in loop.parent.iterdir() if path.name.startswith(name)]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    files = {**saved["files"], path.name: file_digest(path)}  # as if that had been written
    write_signed(loop, {**saved, "files": files})
    restarted, _ = run(random_model, tmp_path / "torn")
    assert "training starts from the beginning" in capsys.readouterr().err
    assert all(
        torch.equal(restarted.state_dict()[name], tensor)
        for name, tensor in weights(uninterrupted).items()
    )


# What `loop.json` holds beside the files' digests, as states on disk have had it since before it
# was a type.
SAVED = (
    "step",
    "epoch",
    "seen",
    "trained",
    "start_ce",
    "best",
    "kept_step",
    "seconds",
    "teacher_seconds",
    "teacher_tokens",
    "energy_joules",
    "since_best",
    "means",
    "terms",
    "written",
    "writing_seconds",
    "over",
)
TERM = {"first": 1.0, "gradient_norm": None, "weight": 1.0, "last": 1.0}


def test_a_state_on_disk_has_the_fields_that_it_always_had(random_model, tmp_path):
    run(
        random_model,
        tmp_path / "a",
        terms=KD,
        sources=[LiveTeacher(open_model(random_model))],
        stop_after_steps=7,
    )
    [file] = (tmp_path / "a").rglob("loop.json")
    saved = json.loads(file.read_text())
    assert tuple(saved) == (*SAVED, "files", "sha256")
    assert set(saved["terms"]) == {"kl", "ce"} == set(saved["means"])
    assert list(saved["terms"]["ce"]) == list(TERM)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"momentum": 1}, "it has unknown fields (momentum)"),
        ({"seen": None}, "its field seen is unreadable"),
        ({"terms": {"ce": {"first": 1.0}}}, "its field terms.ce."),
        ({"terms": {"ce": {**TERM, "odd": 1}}}, "its field terms.ce.odd is unreadable"),
        ("kept_step", "lacks the fields kept_step"),
        ("means", "lacks the fields means"),
    ],
)
def test_a_state_of_another_version_is_said_and_training_begins_anew(
    random_model, tmp_path, change, complaint, capsys
):
    uninterrupted, _ = run(random_model, tmp_path / "whole")
    run(random_model, tmp_path / "other", stop_after_steps=7)
    [file] = (tmp_path / "other").rglob("loop.json")
    saved = read_signed(file)
    if isinstance(change, str):
        del saved[change]
    write_signed(file, saved if isinstance(change, str) else {**saved, **change})
    restarted, _ = run(random_model, tmp_path / "other")
    [message] = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "training starts from the beginning" in line
    ]
    assert complaint in message
    assert all(
        torch.equal(restarted.state_dict()[name], tensor)
        for name, tensor in weights(uninterrupted).items()
    )


def test_a_run_killed_before_its_first_state_scores_its_start_once(random_model, tmp_path):
    run(random_model, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "training.jsonl").write_text(
        '{"step": 0, "epoch": 0, "seen": 0, "validation_ce": 9.9}\n'
    )
    run(random_model, tmp_path / "killed")
    logs = [(tmp_path / name / "training.jsonl").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1] and json.loads(logs[0].splitlines()[0]).keys() == {
        "step",
        "epoch",
        "seen",
        "validation_ce",
    }


def test_a_run_killed_after_its_last_step_ends_the_same(random_model, tmp_path):
    """The state stands until the student is saved, so the end can be done again."""
    first, _ = run(random_model, tmp_path / "a")
    resumed, _ = run(random_model, tmp_path / "a")
    assert all(
        torch.equal(resumed.state_dict()[name], tensor) for name, tensor in weights(first).items()
    )


@pytest.fixture
def clock(monkeypatch):
    """Return a clock of one number; each save of a state or of the best weights takes 100 seconds,
    nothing else takes any.
    """
    seconds = [0.0]
    save = torch.save

    def slow(*arguments, **options):
        seconds[0] += 100
        save(*arguments, **options)

    monkeypatch.setattr(torch, "save", slow)
    for counting in (states, meter):
        monkeypatch.setattr(counting, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def test_seconds_and_joules_of_training_hold_no_save_whether_or_not_it_was_stopped(
    random_model, tmp_path, clock, monkeypatch
):
    monkeypatch.setattr(states, "SECONDS_BETWEEN_STATES", 0.0)
    monkeypatch.setattr("harness.machine.energy.rapl_joules", lambda: 7 * clock[0])

    def a_second_a_step(_):
        clock[0] += 1

    _, uninterrupted = run(random_model, tmp_path / "whole", progress=a_second_a_step)
    run(random_model, tmp_path / "parts", progress=a_second_a_step, stop_after_steps=5)
    _, parts = run(random_model, tmp_path / "parts", progress=a_second_a_step)
    for spent in (uninterrupted, parts):
        assert (spent.seconds, spent.device_seconds, spent.energy_joules) == (
            spent.step,
            spent.step,
            7 * spent.step,
        )


@pytest.mark.parametrize(
    ("between", "takes", "written"),
    [(20, 1, [20, 41, 62]), (20, 3, [20, 83]), (0, 3, [0, 4, 8, 12, 16])],
)
def test_a_state_that_takes_long_is_saved_less_often(
    tmp_path, monkeypatch, between, takes, written
):
    seconds, saved = [0.0], []

    def save(folder):
        Path(folder).mkdir(parents=True)
        saved.append(seconds[0])
        seconds[0] += takes

    monkeypatch.setattr(states, "SECONDS_BETWEEN_STATES", between)
    monkeypatch.setattr(states, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    states_on_disk = SavedStates(tmp_path, SimpleNamespace(save_state=save))
    for step in range(100 if between else 5):
        states_on_disk.save(LoopState(step=step))
        seconds[0] += 1
    assert saved[: len(written)] == written


def test_a_live_teachers_seconds_are_its_own(random_model, monkeypatch):
    """What the device was asked before is waited for first, and the teacher's own work before the
    clock is read again.
    """
    seconds, queued = [0.0], [5.0]  # the student's kernels

    def wait(device):
        seconds[0] += sum(queued)
        queued.clear()

    monkeypatch.setattr(
        "methods.training.teachers.time", SimpleNamespace(perf_counter=lambda: seconds[0])
    )
    monkeypatch.setattr("methods.training.teachers.synchronise", wait)
    teacher = LiveTeacher(open_model(random_model))
    teacher.model.register_forward_hook(lambda *_: queued.append(2.0))
    for _ in range(3):
        teacher.read(batch_of(rows_of(2), 1), None)
        queued.append(5.0)
    assert teacher.seconds == 6.0


def test_a_budget_that_moves_no_weight_is_an_error(random_model, tmp_path):
    with pytest.raises(CellFailed, match="--budget"):
        run(random_model, tmp_path / "a", seen_tokens=20)


def test_same_seed_same_weights_and_another_seed_others(random_model, tmp_path):
    first, _ = run(random_model, tmp_path / "a")
    second, _ = run(random_model, tmp_path / "b")
    other, _ = run(random_model, tmp_path / "c", seed=5)
    assert all(
        torch.equal(second.state_dict()[name], tensor) for name, tensor in weights(first).items()
    )
    assert any(
        not torch.equal(other.state_dict()[name], tensor) for name, tensor in weights(first).items()
    )


def test_best_weights_are_kept_not_the_last(random_model, tmp_path):
    rough = LoopSettings(**{**SETTINGS.__dict__, "learning_rate": 0.5, "warmup_ratio": 0.0})
    model, spent = run(random_model, tmp_path / "a", settings=rough)
    lines = [
        json.loads(line) for line in (tmp_path / "a" / "training.jsonl").read_text().splitlines()
    ]
    held_out = {line["step"]: line["validation_ce"] for line in lines if "validation_ce" in line}
    assert len(held_out) >= 4
    # the untouched start is compared with, and never kept
    assert held_out.pop(0) == spent.start_ce < spent.best
    assert spent.best == min(held_out.values()) == held_out[spent.kept_step]
    loss = mean_cross_entropy(
        rows_of(6, seed=9),
        head=TrainedPositionLogits(model.eval()),
        pad_id=1,
        micro_batch_size=2,
        device="cpu",
    )
    assert loss == pytest.approx(spent.best, rel=1e-5)


def test_every_term_is_logged_with_its_weight(random_model, tmp_path):
    reports = []
    _, spent = run(
        random_model,
        tmp_path / "a",
        terms=KD,
        sources=[LiveTeacher(open_model(random_model))],
        progress=reports.append,
    )
    first = json.loads((tmp_path / "a" / "training.jsonl").read_text().splitlines()[1])
    assert {
        "kl",
        "ce",
        "weight_kl",
        "weight_ce",
        "gradient_norm",
        "gradient_norm_kl",
        "gradient_norm_ce",
        "seen",
    } <= set(first)
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # the student starts as the teacher
    assert (
        first["gradient_norm_kl"] == pytest.approx(0, abs=1e-5) and first["gradient_norm_ce"] > 0.01
    )
    assert (
        set(spent.terms) == {"kl", "ce"}
        and spent.terms["ce"].weight == 0.5
        and spent.terms["ce"].gradient_norm > 0.01
    )
    assert "ce " in reports[0].detail and "x0.5 |g|" in reports[0].detail


def test_a_loss_that_is_no_number_fails_with_a_way_out(random_model, tmp_path):
    broken = Term("odd", 1.0, lambda positions: positions.student_NV.float().sum(-1) * math.nan)
    with pytest.raises(CellFailed, match=r"the term odd became nan at step 1 .*learning_rate"):
        run(random_model, tmp_path / "a", terms=[hard_labels(), broken])
    bursting = chain([1.0, 1.0], repeat(1e9))
    with pytest.raises(CellFailed, match=r"the term odd became .* at step 2 .*learning_rate"):
        run(
            random_model,
            tmp_path / "b",
            terms=[
                Term(
                    "odd",
                    1.0,
                    lambda positions: (
                        positions.student_NV.float().square().sum(-1) * next(bursting)
                    ),
                )
            ],
        )


def test_a_gradient_and_a_validation_loss_that_are_no_numbers_fail_too(
    random_model, tmp_path, monkeypatch
):
    class Bursting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    burst = Term("odd", 1.0, lambda positions: Bursting.apply(positions.student_NV).float().sum(-1))
    with pytest.raises(
        CellFailed, match=r"the gradient's norm became (inf|nan) at step 1 .*learning_rate"
    ):
        run(random_model, tmp_path / "a", terms=[burst])
    monkeypatch.setattr("methods.training.validation.mean_cross_entropy", lambda *_, **__: math.nan)
    with pytest.raises(
        CellFailed, match=r"the validation loss became nan at step \d+; try a lower learning_rate"
    ):
        run(random_model, tmp_path / "b")


def test_no_rows_left_is_an_error(random_model, tmp_path):
    with pytest.raises(CellFailed, match="no training row"):
        run(random_model, tmp_path / "a", rows=[])


def test_progress_reaches_the_budget(random_model, tmp_path):
    reports = []
    run(random_model, tmp_path / "a", progress=reports.append)
    assert isinstance(reports[-1], Progress) and reports[-1].total == 900
    assert [report.done for report in reports] == sorted(report.done for report in reports)


def test_teacher_is_untouched(random_model, tmp_path):
    teacher = open_model(random_model)
    before = copy.deepcopy(weights(teacher.model))
    run(random_model, tmp_path / "a", terms=KD, sources=[LiveTeacher(teacher)])
    assert all(
        torch.equal(teacher.model.state_dict()[name], tensor) for name, tensor in before.items()
    )


# logits in parts

JSD = [
    Term("jsd", 0.7, lambda at: jensen_shannon(at.student_NV, at.teacher_NV, beta=0.3)),
    hard_labels("auto"),
]
TAGGED = [hard_labels(0.4, tag=0), hard_labels(0.6, tag=1)]


@pytest.mark.parametrize("objective", ["labels", "kl", "jsd", "tags", "narrow"])
def test_a_training_whose_logits_are_never_all_held_is_the_same(
    random_model, tmp_path, monkeypatch, objective
):
    """Weights, losses, norms and validation, over two epochs, with two micro-batches a step."""
    rows = [replace(row, tag=index % 2) for index, row in enumerate(rows_of(24))]

    def trained(name):
        options = {
            "labels": {},
            "kl": {"terms": KD, "sources": [LiveTeacher(louder(random_model))]},
            "jsd": {"terms": JSD, "sources": [LiveTeacher(louder(random_model))]},
            "tags": {"terms": TAGGED},
            "narrow": {
                "terms": KD,
                "sources": [LiveTeacher(wider(louder(random_model)))],
                "aim": {"vocabulary": 700},
            },
        }[objective]
        return run(random_model, tmp_path / name, rows=rows, **options)

    whole_model, whole = trained("whole")
    sizes = []

    def small_parts(vocabulary):
        sizes.append(vocabulary)
        return 5

    monkeypatch.setattr(preparation, "positions_of_a_part", small_parts)
    parts_model, parts = trained("parts")
    assert sizes, "it was held whole"
    # a weight of `auto` is a ratio of norms, and Adam divides a gradient by its own size
    tolerance = 2e-5 if objective == "jsd" else 2e-6
    start = weights(open_model(random_model).model)
    for name, tensor in weights(whole_model).items():
        difference, update = parts_model.state_dict()[name] - tensor, tensor - start[name]
        assert difference.norm() <= 2e-5 * update.norm(), name
        assert difference.abs().max() <= tolerance, name
    assert parts.best == pytest.approx(whole.best, rel=1e-6)
    assert parts.start_ce == pytest.approx(whole.start_ce, rel=1e-6)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "training.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for one_line, other_line in zip(*logs, strict=True):
        assert one_line.keys() == other_line.keys()
        assert list(other_line.values()) == pytest.approx(list(one_line.values()), rel=2e-4)


def test_parts_are_not_used_where_a_batch_is_small_or_tokens_are_selected(
    random_model, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(batch_loss, "LossInParts", lambda *arguments: calls.append(arguments))
    run(random_model, tmp_path / "small", stop_after_steps=2)
    monkeypatch.setattr(preparation, "positions_of_a_part", lambda vocabulary: 5)
    aim = {"selection": Selection(0.5, "entropy", 1)}
    sources = [LiveTeacher(louder(random_model))]
    run(random_model, tmp_path / "some", terms=KD, sources=sources, aim=aim, stop_after_steps=2)
    assert not calls


def test_a_teachers_logits_are_made_part_by_part(random_model):
    teacher = LiveTeacher(open_model(random_model))
    batch = batch_of(rows_of(6), 0)
    whole = teacher.read(batch, 900).logits_NV
    tokens = teacher.tokens
    distribution = teacher.read_parts(batch, 900)
    assert distribution.logits_NV is None and teacher.tokens == 2 * tokens
    for part in parts(len(whole), 4):
        assert torch.allclose(distribution.part(part).logits_NV, whole[part], atol=1e-5)
