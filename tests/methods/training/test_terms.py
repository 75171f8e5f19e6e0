"""Terms of the loss and how they are weighed: gradients, automatic weights, terms as settings,
stops and starts.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from distilling import REGISTRY, SETTINGS, job, rows_of, stepped, train

from harness.errors import CellFailed, HarnessError
from methods.training.divergences import mixed_kl
from methods.training.loop import fit
from methods.training.losses import forward_kl
from methods.training.settings import Training
from methods.training.stepper import Stepper
from methods.training.taps import InnerStates, TapConfig
from methods.training.teachers import LiveTeacher, TrainedPositionLogits
from methods.training.terms import Objective, Term, hard_labels


@pytest.mark.parametrize("kind", ["feature", "attention", "relations", "mixture"])
def test_no_gradient_depends_on_the_split_into_micro_batches(small, kind):
    student, teachers = (
        small("Llama"),
        [small("Llama", intermediate_size=size) for size in (48, 80)],
    )
    rows, inner_states = rows_of(8), None
    sources = [LiveTeacher(teacher) for teacher in teachers]
    if kind == "mixture":
        term = Term(
            kind,
            1.0,
            lambda positions: mixed_kl(
                positions, torch.tensor([[0.7, 0.3]]).expand(len(positions.labels_N), -1), 2.0
            ),
        )
        objective = Objective(terms=[term], sources=sources)
    else:
        attention_kind = "relations" if kind == "relations" else "auto"
        taps = TapConfig(
            hidden_layers="auto" if kind == "feature" else "",
            attention_layers="" if kind == "feature" else "auto",
            attention_kind=attention_kind,
        )
        inner_states = InnerStates(student, teachers[0].model, taps)
        value = (
            (lambda positions: positions.inner_states.hidden_state_distance(positions))
            if kind == "feature"
            else (lambda positions: positions.inner_states.attention_divergence(positions))
        )
        objective = Objective(terms=[Term(kind, 1.0, value)], sources=sources[:1], taps=taps)
    expected = stepped(student, objective, rows, 8, inner_states)
    assert float(expected.abs().max()) > 3e-5
    for micro in (4, 3, 1):
        assert torch.allclose(
            stepped(student, objective, rows, micro, inner_states), expected, atol=2e-7
        )


def test_a_stopped_run_with_projections_and_auto_weights_goes_on_to_the_same_bytes(small, tmp_path):
    taps = TapConfig(hidden_layers="auto")
    uninterrupted, spent = train(
        small("Llama"), small("Llama", hidden_size=64), tmp_path / "whole", taps=taps
    )
    for stop in (3, 8, None):
        parts, resumed = train(
            small("Llama"),
            small("Llama", hidden_size=64),
            tmp_path / "parts",
            taps=taps,
            stop=stop,
        )
    assert (
        all(torch.equal(parts[name], tensor) for name, tensor in uninterrupted.items())
        and resumed.terms == spent.terms
    )
    assert not any("projection" in name for name in uninterrupted)  # never part of the student


def test_an_auto_term_counts_as_much_as_the_others_together(small, tmp_path):
    train(
        small("Llama"),
        small("Llama", hidden_size=64),
        tmp_path / "a",
        taps=TapConfig(hidden_layers="auto"),
    )
    lines = [
        json.loads(line) for line in (tmp_path / "a" / "training.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if "feature" in line]
    means = None
    for line in steps:
        if means is None:
            means = {name: line[name] for name in ("kl", "ce", "feature")}
        anchor = 0.5 * means["kl"] + 0.5 * means["ce"]
        assert line["weight_feature"] == pytest.approx(
            anchor / max(means["feature"], 1e-8), rel=1e-4
        )
        assert line["feature"] > 1e-3  # the projection was not fitted to one batch by heart
        means = {name: 0.9 * value + 0.1 * line[name] for name, value in means.items()}
    assert {"gradient_norm_feature", "gradient_norm_kl", "gradient_norm_ce"} <= steps[0].keys()


def test_an_auto_term_that_is_nothing_gets_no_boundless_weight(small, tmp_path):
    nothing = Term(
        "nothing", "auto", lambda positions: 1e-12 * positions.student_NV.square().mean(-1)
    )
    train(small("Llama"), None, tmp_path / "a", terms=[hard_labels(), nothing])
    lines = [
        json.loads(line) for line in (tmp_path / "a" / "training.jsonl").read_text().splitlines()
    ]
    assert {line["weight_nothing"] for line in lines if "nothing" in line} == {1e6}


def test_every_step_and_validation_reaches_a_tracker(small, tmp_path, monkeypatch):
    from accelerate.tracking import GeneralTracker

    from methods.training import preparation

    logged = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        def store_init_configuration(self, values):
            logged.append(("config", values))

        def log(self, values, step=None, **options):
            logged.append((step, values))

    plain = preparation.Accelerator
    monkeypatch.setattr(
        preparation,
        "Accelerator",
        lambda **options: plain(**{**options, "log_with": Tracker(_blank=True)}),
    )
    student = small("Llama")
    teacher = LiveTeacher(small("Llama", hidden_size=64))
    kd = Term(
        "kl",
        0.5,
        lambda positions: forward_kl(positions.student_NV, positions.teacher_NV, temperature=2.0),
    )
    spent = fit(
        student,
        rows=rows_of(24),
        validation=rows_of(6, seed=9),
        objective=Objective(terms=[kd, hard_labels(0.5)], sources=[teacher]),
        settings=SETTINGS,
        training=Training(seen_tokens=900, seed=4, workdir=tmp_path, track="kept"),
    )
    assert logged[0][0] == "config" and logged[0][1]["seed"] == 4
    steps = {step: values for step, values in logged[1:] if "kl" in values}
    assert list(steps) == list(range(1, spent.step + 1))
    assert {
        "kl",
        "ce",
        "weight_kl",
        "rate",
        "gradient_norm",
        "gradient_norm_kl",
        "gradient_norm_ce",
    } <= steps[1].keys()
    assert [step for step, values in logged[1:] if "validation_ce" in values][-1] == spent.step


def test_norms_of_terms_are_those_of_their_own_gradients(small):
    student, teacher = small("Llama"), small("Llama", hidden_size=64)
    rows = rows_of(6)
    terms = [
        Term("kl", 0.7, lambda positions: forward_kl(positions.student_NV, positions.teacher_NV)),
        hard_labels(0.3),
    ]
    stepper = Stepper(
        student.model,
        TrainedPositionLogits(student.model),
        Objective(terms=terms, sources=[LiveTeacher(teacher)]),
        6,
        1,
    )

    def norm(weights):
        student.model.zero_grad()
        values = stepper.backward(
            rows, weights=weights, backward=lambda loss: loss.backward(), norms=True
        )
        return values.norms, math.sqrt(
            sum(
                float(p.grad.square().sum())
                for p in student.model.parameters()
                if p.grad is not None
            )
        )

    norms, _ = norm({"kl": 0.7, "ce": 0.3})
    assert norms["kl"] == pytest.approx(norm({"kl": 0.7, "ce": 0.0})[1], rel=1e-4)
    assert norms["ce"] == pytest.approx(norm({"kl": 0.0, "ce": 0.3})[1], rel=1e-4)


def test_norms_of_terms_hold_one_set_of_gradients_at_a_time(small, monkeypatch):
    import weakref

    plain, references = torch.autograd.grad, []

    def watched(*arguments, **options):
        assert not any(reference() is not None for reference in references)
        gradients = plain(*arguments, **options)
        references.extend(weakref.ref(gradient) for gradient in gradients if gradient is not None)
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", watched)
    student = small("Llama")
    stepper = Stepper(
        student.model,
        TrainedPositionLogits(student.model),
        Objective(terms=[hard_labels(0.5), hard_labels(0.5, tag=0)]),
        6,
        1,
    )
    weights = {term.name: term.weight for term in stepper.objective.terms}
    stepper.backward(rows_of(6), weights=weights, backward=lambda loss: loss.backward(), norms=True)
    assert (
        len(weights) == 2
        and len(references) > 20
        and not any(reference() is not None for reference in references)
    )


def test_recomputed_activations_change_no_weight(small, tmp_path):
    plain, _ = train(
        small("Llama"),
        small("Llama", hidden_size=64),
        tmp_path / "a",
        taps=TapConfig(hidden_layers="auto", attention_layers="auto"),
    )
    recomputed, _ = train(
        small("Llama"),
        small("Llama", hidden_size=64),
        tmp_path / "b",
        taps=TapConfig(hidden_layers="auto", attention_layers="auto"),
        settings=replace(SETTINGS, gradient_checkpointing=True),
    )
    assert all(
        torch.allclose(recomputed[name], tensor, atol=1e-6) for name, tensor in plain.items()
    )


def test_patience_ends_a_run_that_gets_no_better(small, tmp_path):
    still = replace(SETTINGS, learning_rate=1e-12, warmup_ratio=0.0)
    _, patient = train(
        small("Llama"),
        None,
        tmp_path / "a",
        terms=[hard_labels()],
        settings=replace(still, learning_rate=0.3),
    )
    _, ended = train(
        small("Llama"),
        None,
        tmp_path / "b",
        terms=[hard_labels()],
        settings=replace(still, learning_rate=0.3, patience=1),
    )
    assert ended.step < patient.step and ended.best == patient.best


def test_controls_start_alike_and_random_selection_has_the_same_terms():
    handed = REGISTRY.build(
        "selective", {"feature_weight": "auto", "top_k": 32, "start": "random"}
    ).control_settings()
    assert handed == {
        "feature_weight": "auto",
        "top_k": 32,
        "start": "random",
        "share": 0.5,
        "unit": "tokens",
    }
    for name in ("cot", "uld", "on-policy", "feature", "multi-teacher"):
        assert REGISTRY.build(name, {"start": "random"}).control_settings() == {"start": "random"}
        assert REGISTRY.build(name, {}).control_settings() == {}
    # its control is response
    assert (
        "feature_weight"
        not in REGISTRY.build("feature", {"feature_weight": 0.3}).control_settings()
    )


# Terms as settings


@pytest.mark.slow
def test_terms_compose_by_weights_and_by_a_list(tiny, tmp_path):
    by_weight = REGISTRY.build("response", {"feature_weight": "auto", "attention_weight": 0.1})
    assert by_weight.weights() == [
        ("forward-kl", 0.5),
        ("ce", 0.5),
        ("feature", "auto"),
        ("attention", 0.1),
    ]
    by_list = REGISTRY.build("response", {"terms": ["jsd=0.7", "ce=0.3", "attention=auto"]})
    assert by_list.weights() == [("jsd", 0.7), ("ce", 0.3), ("attention", "auto")]
    by_list.compress(job([tiny], tmp_path / "x"))
    line = json.loads((tmp_path / "x" / "training.jsonl").read_text().splitlines()[1])
    assert {"jsd", "ce", "attention", "weight_attention", "gradient_norm_attention"} <= line.keys()
    same = REGISTRY.build("feature", {"terms": ["forward-kl=0.5", "ce=0.5"]})
    assert same.weights() == REGISTRY.build("response", {}).weights()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"terms": ["kl=1"]}, "names are forward-kl"),
        ({"terms": ["ce=much"]}, "a number or auto"),
        ({"terms": ["ce=1", "ce=2"]}, "named twice"),
        ({"terms": ["ce=0"]}, "weight 0"),
        ({"teacher_share": 0.5, "feature_weight": -1}, "greater than or equal to 0"),
        ({"temperature": 0}, "greater than 0"),
        ({"temperature": 1e3}, "less than or equal to 100"),
        ({"beta": 1.0}, "less than 1"),
    ],
)
def test_terms_and_temperatures_out_of_range_are_refused(settings, said):
    with pytest.raises(HarnessError, match=said):
        REGISTRY.build("response", settings)


# Form and start


def test_step_by_step_divides_each_half_by_its_own_tokens(small):
    model = small("Llama").model
    rows = [*rows_of(3, seed=1), *(replace(row, tag=1) for row in rows_of(3, seed=2))]

    def gradient(terms, over):
        model.zero_grad()
        stepper = Stepper(model, TrainedPositionLogits(model), Objective(terms=terms), 2, 1)
        stepper.backward(
            over,
            weights={term.name: term.weight for term in terms},
            backward=lambda loss: loss.backward(),
        )
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    together = gradient([hard_labels(0.25, tag=0), hard_labels(0.75, tag=1)], rows)
    apart = 0.25 * gradient([hard_labels()], rows[:3]) + 0.75 * gradient([hard_labels()], rows[3:])
    assert torch.allclose(together, apart, atol=1e-6)


@pytest.mark.slow
def test_step_by_step_trains_bare_answers_and_rationales(tiny, tmp_path):
    REGISTRY.build("cot", {"form": "step-by-step"}).compress(
        job([tiny], tmp_path / "x", tokens=4_000)
    )
    notes = json.loads((tmp_path / "x" / "cost.json").read_text())["notes"]
    assert notes["rows"] == 2 * notes["traces_kept"] and set(notes["terms"]) == {"ce-0", "ce-1"}


@pytest.mark.slow
def test_training_from_random_weights_starts_at_chance(tiny, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "methods.training.base.default_learning_rate",
        lambda size, *, scratch: sizes.append((size, scratch)) or 7e-4,
    )
    REGISTRY.build("sft", {"start": "random", "batch_size": 4}).compress(
        job([tiny], tmp_path / "x")
    )
    start, first = (
        json.loads(line)
        for line in (tmp_path / "x" / "training.jsonl").read_text().splitlines()[:2]
    )
    assert first["ce"] == pytest.approx(math.log(1024), abs=0.3) and start[
        "validation_ce"
    ] == pytest.approx(math.log(1024), abs=0.3)
    notes = json.loads((tmp_path / "x" / "cost.json").read_text())["notes"]
    assert (
        sizes == [(918_656, True)]
        and notes["learning_rate"] == 7e-4
        and notes["start_ce"] == round(start["validation_ce"], 6)
    )


def test_a_run_killed_after_its_last_partial_step_makes_no_other(small, tmp_path):
    """The last step holds the rows that still fit; shorter rows of a next one must not."""
    uninterrupted, spent = train(small("Llama"), None, tmp_path / "whole", terms=[hard_labels()])
    train(small("Llama"), None, tmp_path / "cut", terms=[hard_labels()], stop=spent.step)
    weights, resumed = train(small("Llama"), None, tmp_path / "cut", terms=[hard_labels()])
    assert resumed.step == spent.step and resumed.seen == spent.seen and resumed.over
    assert all(torch.equal(weights[name], tensor) for name, tensor in uninterrupted.items())


def test_a_term_that_counts_nothing_is_refused(small, tmp_path):
    far = Term(
        "attention", "auto", lambda positions: positions.student_NV.sum(-1), counts=lambda row: 0
    )
    with pytest.raises(
        CellFailed, match="the term attention counts no position of any training row"
    ):
        train(small("Llama"), None, tmp_path / "x", terms=[hard_labels(), far])
