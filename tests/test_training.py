"""Laws of the training loop: masks, normaliser, budget, resume."""

import copy
import json
import math
from itertools import pairwise

import pytest
import torch

from harness.contract import Progress
from harness.errors import CellFailed
from harness.model import open_model
from methods._losses import forward_kl
from methods._training import LoopSettings, Row, Term, backward_step, collate, fit, hard_labels, positions, rate_at, steps_of

SETTINGS = LoopSettings(learning_rate=1e-2, batch_rows=4, micro_rows=2, warmup=0.1, weight_decay=0.01, clip=1.0, validation_rows=4)


def rows_of(count, seed=0, shortest=5, longest=19):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest, (1,), generator=draw))
        ids = torch.randint(3, 500, (length,), generator=draw).tolist()
        made.append(Row(tuple(ids), int(torch.randint(1, length - 1, (1,), generator=draw))))
    return made


def gradient(model, rows, *, micro_rows, terms=None, teacher=None, vocabulary=None, ranks=1, rank=0, pad=1):
    model.zero_grad()
    backward_step(
        rows, student=model, teacher=teacher, terms=terms or [hard_labels()], vocabulary=vocabulary, micro_rows=micro_rows, pad=pad,
        backward=lambda loss: loss.backward(), ranks=ranks, rank=rank,
    )  # fmt: skip
    return torch.cat([p.grad.flatten() for p in model.parameters()])


KD = [Term("kl", 0.5, lambda at: forward_kl(at.student_NV, at.teacher_NV, temperature=2.0), needs_teacher=True), hard_labels(0.5)]


def test_gradient_does_not_depend_on_the_split_into_micro_batches(random_model):
    model, teacher = open_model(random_model).model, open_model(random_model).model
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.3)
    rows = rows_of(8)
    whole = gradient(model, rows, micro_rows=8, terms=KD, teacher=teacher)
    for micro in (4, 1):
        assert torch.allclose(gradient(model, rows, micro_rows=micro, terms=KD, teacher=teacher), whole, atol=1e-6)


def test_gradient_does_not_depend_on_the_number_of_ranks(random_model):
    model, rows = open_model(random_model).model, rows_of(8)
    whole = gradient(model, rows, micro_rows=8)
    averaged = sum(gradient(model, rows, micro_rows=2, ranks=2, rank=rank) for rank in (0, 1)) / 2  # what DDP does
    assert torch.allclose(averaged, whole, atol=1e-6)


def test_loss_does_not_depend_on_padding(random_model):
    model = open_model(random_model).model
    short, long = rows_of(1, seed=1, shortest=6, longest=8), rows_of(1, seed=2, shortest=17, longest=19)
    alone, beside = gradient(model, short, micro_rows=1), gradient(model, [*short, *long], micro_rows=2)
    padded = gradient(model, [*short, *long], micro_rows=1)
    assert torch.allclose(beside, padded, atol=1e-6)
    assert not torch.allclose(alone, beside, atol=1e-6)


def test_extra_teacher_columns_change_nothing(random_model):
    model = open_model(random_model).model
    rows, width = rows_of(4), model.config.vocab_size
    teacher_logits = {}

    class Teacher:
        def __init__(self, extra):
            self.extra = extra

        def __call__(self, input_ids, **_):
            key = tuple(input_ids.flatten().tolist())
            if key not in teacher_logits:
                teacher_logits[key] = torch.randn(*input_ids.shape, width, generator=torch.Generator().manual_seed(5))
            noise = torch.randn(*input_ids.shape, self.extra) * 50
            return type("Out", (), {"logits": torch.cat([teacher_logits[key], noise], dim=-1)})

    plain = gradient(model, rows, micro_rows=4, terms=KD, teacher=Teacher(0), vocabulary=width)
    padded = gradient(model, rows, micro_rows=4, terms=KD, teacher=Teacher(128), vocabulary=width)
    assert torch.equal(plain, padded)


def test_last_eos_is_trained_where_pad_is_eos(random_model):
    eos = 0
    rows = [Row((7, 8, 9, eos), 2), Row((7, 8, 9, 10, 11, 12, eos), 3)]
    ids, attention, trained = collate(rows, pad=eos)
    assert trained[0].tolist() == [False, False, True, True, False, False, False]
    assert attention[0].tolist() == [1, 1, 1, 1, 0, 0, 0]
    logits = torch.zeros(2, 7, 5)
    assert positions(logits, None, ids, trained, None).labels_N.tolist() == [9, eos, 10, 11, 12, eos]


def test_only_completion_labels_matter(random_model):
    model = open_model(random_model).model

    def labels_of(row):
        ids, _, trained = collate([row], pad=1)
        logits = model(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]])).logits  # the same input whatever the labels
        at = positions(logits, None, ids, trained, None)
        return float(hard_labels().value(at).detach())

    base = labels_of(Row((3, 4, 5, 6, 7, 8), 3))
    assert labels_of(Row((99, 98, 97, 6, 7, 8), 3)) == base
    assert labels_of(Row((3, 4, 5, 6, 99, 8), 3)) != base


def test_logits_stand_against_the_next_token():
    ids, _, trained = collate([Row((2, 3, 1), 1)], pad=0)
    logits = torch.full((1, 3, 4), -50.0)
    logits[0, 0, 3] = logits[0, 1, 1] = 50.0  # a model that is right about token 1 from position 0, token 2 from 1
    assert float(hard_labels().value(positions(logits, None, ids, trained, None))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("budget", [37, 1000, 4321])
def test_budget_of_seen_tokens_is_kept_to_one_row(budget):
    rows = rows_of(30)
    seen = sum(len(row.ids) for _, step in steps_of(rows, seen_tokens=budget, batch_rows=4, seed=3) for row in step)
    assert budget - max(len(row.ids) for row in rows) < seen <= budget


def test_every_row_is_seen_once_an_epoch():
    rows = rows_of(30)
    steps = [step for epoch, step in steps_of(rows, seen_tokens=10**6, batch_rows=4, seed=3) if epoch == 2]
    assert sorted(row.ids for step in steps for row in step) == sorted(row.ids for row in rows)


def test_rate_warms_up_then_falls_to_zero():
    rates = [rate_at(at / 100, SETTINGS) for at in range(101)]
    assert rates[0] == 0 and rates[10] == pytest.approx(1e-2) and rates[100] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in pairwise(rates[10:]))


def run(random_model, workdir, **changes):
    student = open_model(random_model)
    workdir.mkdir(exist_ok=True)
    given = {
        "rows": rows_of(24),
        "validation": rows_of(6, seed=9),
        "terms": [hard_labels()],
        "settings": SETTINGS,
        "seen_tokens": 900,
        "seed": 4,
    }
    spent = fit(student, workdir=workdir, **{**given, **changes})
    return student.model, spent


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_a_stopped_run_goes_on_to_the_same_bytes(random_model, tmp_path, stop):
    model, spent = run(random_model, tmp_path / "whole")
    run(random_model, tmp_path / "parts", stop_after_steps=stop)
    again, resumed = run(random_model, tmp_path / "parts")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in weights(model).items())
    assert {key: spent[key] for key in ("step", "seen", "trained", "best", "kept_step")} == {
        key: resumed[key] for key in ("step", "seen", "trained", "best", "kept_step")
    }
    logs = [[json.loads(line) for line in (tmp_path / name / "training.jsonl").read_text().splitlines()] for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_a_state_torn_by_a_kill_is_passed_over(random_model, tmp_path):
    whole, _ = run(random_model, tmp_path / "whole")
    run(random_model, tmp_path / "torn", stop_after_steps=5)
    (tmp_path / "torn" / "state" / "step-9.part").mkdir()
    again, _ = run(random_model, tmp_path / "torn")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in weights(whole).items())


def test_a_run_killed_after_its_last_step_ends_the_same(random_model, tmp_path):
    """The state stands until the student is saved, so the end can be done again."""
    first, _ = run(random_model, tmp_path / "a")
    again, _ = run(random_model, tmp_path / "a")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in weights(first).items())


def test_a_budget_that_moves_no_weight_is_an_error(random_model, tmp_path):
    with pytest.raises(CellFailed, match="--budget"):
        run(random_model, tmp_path / "a", seen_tokens=20)


def test_same_seed_same_weights_and_another_seed_others(random_model, tmp_path):
    first, _ = run(random_model, tmp_path / "a")
    second, _ = run(random_model, tmp_path / "b")
    other, _ = run(random_model, tmp_path / "c", seed=5)
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in weights(first).items())
    assert any(not torch.equal(other.state_dict()[name], tensor) for name, tensor in weights(first).items())


def test_best_weights_are_kept_not_the_last(random_model, tmp_path):
    rough = LoopSettings(**{**SETTINGS.__dict__, "learning_rate": 0.5, "warmup": 0.0})
    model, spent = run(random_model, tmp_path / "a", settings=rough)
    lines = [json.loads(line) for line in (tmp_path / "a" / "training.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["validation_ce"] for line in lines if "validation_ce" in line}
    assert len(held_out) >= 3
    assert spent["best"] == min(held_out.values()) == held_out[spent["kept_step"]]
    from methods._training import validate

    now = validate(rows_of(6, seed=9), student=model.eval(), pad=1, micro_rows=2, device="cpu")
    assert now == pytest.approx(spent["best"], rel=1e-5)


def test_every_term_is_logged_with_its_weight(random_model, tmp_path):
    teacher = open_model(random_model)
    run(random_model, tmp_path / "a", terms=KD, teacher=teacher)
    first = json.loads((tmp_path / "a" / "training.jsonl").read_text().splitlines()[0])
    assert {"kl", "ce", "weight_kl", "weight_ce", "gradient_norm", "seen"} <= set(first)
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # the student starts as the teacher


def test_a_loss_that_is_no_number_fails_with_a_way_out(random_model, tmp_path):
    broken = Term("ce", 1.0, lambda at: at.student_NV.float().sum() * math.nan)
    with pytest.raises(CellFailed, match="learning_rate"):
        run(random_model, tmp_path / "a", terms=[broken])


def test_no_rows_left_is_an_error(random_model, tmp_path):
    with pytest.raises(CellFailed, match="no training row"):
        run(random_model, tmp_path / "a", rows=[])


def test_progress_reaches_the_budget(random_model, tmp_path):
    told = []
    run(random_model, tmp_path / "a", progress=told.append)
    assert isinstance(told[-1], Progress) and told[-1].total == 900
    assert [one.done for one in told] == sorted(one.done for one in told)


def test_teacher_is_untouched(random_model, tmp_path):
    teacher = open_model(random_model)
    before = copy.deepcopy(weights(teacher.model))
    run(random_model, tmp_path / "a", terms=KD, teacher=teacher)
    assert all(torch.equal(teacher.model.state_dict()[name], tensor) for name, tensor in before.items())
