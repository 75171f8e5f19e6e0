"""What single kinds of distillation promise: inner states, chosen tokens, several teachers, other tokenizers, the student's own answers."""

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

import suites
from harness.contract import Budget, Job
from harness.data.examples import training_examples
from harness.data.source import DataSource
from harness.errors import CellFailed, HarnessError
from harness.models.language_model import open_model
from harness.models.resolve import resolve
from harness.registry import Registry
from methods import METHODS
from methods.training.base import worked
from methods.training.divergences import label_loss, mixed_kl
from methods.training.loop import fit
from methods.training.losses import forward_kl
from methods.training.positions import Distribution, Positions, TopK
from methods.training.rollout import Rollout
from methods.training.rows import Row, batch_of, encode
from methods.training.selection import Selection
from methods.training.settings import LoopSettings, Training
from methods.training.stepper import Stepper
from methods.training.taps import Inside, Inwards, parse_pairs
from methods.training.teachers import Head, Live
from methods.training.terms import Objective, Term, hard_labels
from methods.uld import aligned_rows

REGISTRY = Registry("method", METHODS)
TASKS = {name: suites.load(name) for name in ("gsm8k-mini", "mmlu-mini")}
SETTINGS = LoopSettings(learning_rate=1e-2, batch_size=4, micro_batch_size=2, warmup_ratio=0.1, weight_decay=0.01, max_grad_norm=1.0,
                        validation_rows=4)  # fmt: skip


def rows_of(count, seed=0, shortest=5, longest=19):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest, (1,), generator=draw))
        ids = torch.randint(3, 500, (length,), generator=draw).tolist()
        made.append(Row(tuple(ids), int(torch.randint(1, length - 1, (1,), generator=draw))))
    return made


def job(teachers, folder, *, tokens=3_000, rows=40, **more):
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "teachers": tuple(teachers), "student": "depth:0.5", "student_base": teachers[0], "tasks": TASKS, "source": DataSource(),
        "budget": Budget(seen_tokens=tokens, rows=rows), "seed": 1, "workdir": folder, "cache": folder.parent / "cache",
    }  # fmt: skip
    return Job(**{**given, **more})


@pytest.fixture(scope="module")
def tiny():
    return resolve("tiny", cache=Path("unused"))


@pytest.fixture(scope="module")
def specialist():
    return resolve("tiny-math", cache=Path("unused"))


def seen_inside(student, teacher, inwards, rows=None):
    """Run both models with taps; return the inside and the positions."""
    inside = Inside(student, teacher.model, inwards)
    batch = batch_of(rows or rows_of(4), 1)
    logits = Head(student.model)(batch)
    with torch.no_grad():
        Head(teacher.model)(batch)
    return inside, Positions(logits, batch.ids[:, 1:][batch.mask], (), batch, inside)


# Hidden states


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "GPTNeoX"])
def test_equal_models_have_no_feature_or_attention_loss_and_different_ones_have(small, kind):
    student, other = small(kind), small(kind)
    inwards = Inwards(hidden="auto", attention="auto")
    inside, at = seen_inside(student, other, inwards)
    assert inside.features(at).abs().max() < 1e-6 and inside.attentions(at).abs().max() < 1e-6
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    inside.close()
    inside, at = seen_inside(student, other, inwards)
    for found in (inside.features(at), inside.attentions(at)):
        assert found.shape == at.labels_N.shape and found.sum() > 1e-3
        gradients = torch.autograd.grad(found.sum(), list(student.model.parameters()), allow_unused=True, retain_graph=True)
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    inside.close()


def test_a_tap_sees_the_block_and_not_what_stands_behind_the_final_norm(small):
    opened = small("Llama")
    rows = rows_of(3)
    inside, at = seen_inside(opened, opened, Inwards(hidden="1-1,2-2"), rows)
    with torch.no_grad():
        states = opened.model(input_ids=at.batch.ids, attention_mask=at.batch.attention, output_hidden_states=True).hidden_states
        last = opened.model.model.norm(inside.hidden[1][0].value)
    assert torch.allclose(inside.hidden[0][0].value, states[1], atol=1e-6)
    assert torch.allclose(last, states[-1], atol=1e-5) and not torch.allclose(inside.hidden[1][0].value, states[-1], atol=1e-3)


def test_attention_scores_give_the_maps_of_the_models_own_eager_attention(small):
    opened = small("Llama")
    inside, at = seen_inside(opened, small("Llama"), Inwards(attention="2-2"))
    query, key, _, scale = inside.attention[0][0].value
    from methods.training.taps import _attention_scores

    scores = _attention_scores(query, key, None, scale)
    length = scores.shape[-1]
    allowed = torch.tril(torch.ones(length, length, dtype=torch.bool)) & at.batch.attention.bool()[:, None, None, :]
    maps = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1)
    inside.close()
    opened.model.set_attn_implementation("eager")
    theirs = opened.model(input_ids=at.batch.ids, attention_mask=at.batch.attention, output_attentions=True).attentions[1]
    real = at.batch.attention.bool()[:, None, :, None].expand_as(maps)
    assert torch.allclose(maps[real], theirs[real], atol=1e-6)


def test_taps_change_no_logits_and_leave_the_model_as_it_was(small):
    opened = small("Llama")
    batch = batch_of(rows_of(3), 1)
    before = opened.model(input_ids=batch.ids, attention_mask=batch.attention).logits
    configs = [module.config for module in opened.model.modules() if hasattr(module, "config")]
    inside = Inside(opened, small("Llama").model, Inwards(hidden="auto", attention="auto"))
    assert torch.allclose(opened.model(input_ids=batch.ids, attention_mask=batch.attention).logits, before, atol=1e-6)
    inside.close()
    assert [module.config for module in opened.model.modules() if hasattr(module, "config")] == configs
    assert not any(module._forward_hooks for module in opened.model.modules())


def test_relations_compare_models_of_unequal_heads_and_are_zero_for_equal_ones(small):
    student, teacher = small("Llama"), small("Llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8, hidden_size=64)
    inside, at = seen_inside(student, teacher, Inwards(attention="auto"))
    found = inside.attentions(at)
    assert found.shape == at.labels_N.shape and bool(torch.isfinite(found).all()) and found.sum() > 0
    inside.close()
    inside, at = seen_inside(student, small("Llama"), Inwards(attention="auto", maps="relations"))
    assert inside.attentions(at).abs().max() < 1e-6
    inside.close()
    inside, at = seen_inside(student, teacher, Inwards(attention="auto", relation_heads=3))
    with pytest.raises(CellFailed, match="relation_heads=3 does not divide all widths"):
        inside.attentions(at)
    inside.close()


def test_relations_of_grouped_heads_agree_with_loops(small):
    student, teacher = small("Llama"), small("Llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8, hidden_size=64)
    rows, count = rows_of(3), 2
    inside, at = seen_inside(student, teacher, Inwards(attention="2-2", maps="relations", relation_heads=count), rows)
    found = inside.attentions(at)
    expected = []
    for number, row in enumerate(rows):
        for place in range(row.trained_from - 1, len(row.ids) - 1):
            total = 0.0
            for part in range(3):  # queries, keys, values
                for relation in range(count):
                    logs = []
                    for tap in inside.attention[0]:
                        vectors = torch.cat(list(tap.value[part][number].detach()), dim=-1)  # (T, heads * d), head by head
                        size = vectors.shape[1] // count
                        own = vectors[:, relation * size : (relation + 1) * size].double()
                        logs.append(torch.log_softmax(torch.stack([own[place] @ own[key] for key in range(place + 1)]) / size**0.5, -1))
                    total += float((logs[1].exp() * (logs[1] - logs[0])).sum())
            expected.append(total / (3 * count))
    inside.close()
    assert found.tolist() == pytest.approx(expected, abs=1e-5) and max(expected) > 1e-4


def stepped(student, objective, rows, micro, inside=None):
    student.model.zero_grad()
    stepper = Stepper(student.model, Head(student.model), objective, micro, 1, inside=inside)
    stepper.backward(rows, weights=dict.fromkeys((term.name for term in objective.terms), 1.0), backward=lambda loss: loss.backward())
    stepper.head.close()
    return torch.cat([one.grad.flatten() for one in student.model.parameters() if one.grad is not None])


@pytest.mark.parametrize("kind", ["feature", "attention", "relations", "mixture"])
def test_no_gradient_depends_on_the_split_into_micro_batches(small, kind):
    student, teachers = small("Llama"), [small("Llama", intermediate_size=size) for size in (48, 80)]
    rows, inside = rows_of(8), None
    sources = [Live(one) for one in teachers]
    if kind == "mixture":
        term = Term(kind, 1.0, lambda at: mixed_kl(at, torch.tensor([[0.7, 0.3]]).expand(len(at.labels_N), -1), 2.0))
        objective = Objective(terms=[term], sources=sources)
    else:
        maps = "relations" if kind == "relations" else "auto"
        inwards = Inwards(hidden="auto" if kind == "feature" else "", attention="" if kind == "feature" else "auto", maps=maps)
        inside = Inside(student, teachers[0].model, inwards)
        value = (lambda at: at.inside.features(at)) if kind == "feature" else (lambda at: at.inside.attentions(at))
        objective = Objective(terms=[Term(kind, 1.0, value)], sources=sources[:1], inwards=inwards)
    whole = stepped(student, objective, rows, 8, inside)
    assert float(whole.abs().max()) > 3e-5
    for micro in (4, 3, 1):
        assert torch.allclose(stepped(student, objective, rows, micro, inside), whole, atol=2e-7)


def test_a_projection_starts_as_the_least_squares_map(small):
    student, teacher = small("Llama"), small("Llama", hidden_size=64)
    rows = rows_of(30, longest=40)
    inside, at = seen_inside(student, teacher, Inwards(hidden="2-2", distance="plain-mse"), rows)
    random = float(inside.features(at).sum())
    inside.start_projections([at.batch])
    weight = inside.projections[0].weight
    real = at.batch.attention.bool()
    real[:, 0] = False  # a row's first position takes no part
    x, y = (tap.value[real].detach() for tap in inside.hidden[0])
    best = torch.linalg.lstsq(x.double(), y.double()).solution.T
    assert torch.allclose(weight.double(), best, atol=1e-2) and float(inside.features(at).sum()) < random
    inside.close()


def test_pairs_are_spread_evenly_or_read_and_a_missing_block_is_named():
    assert parse_pairs("auto", 4, 8, most=4, setting="x") == ((1, 2), (2, 4), (3, 6), (4, 8))
    assert parse_pairs("auto", 12, 28, most=4, setting="x") == ((3, 7), (6, 14), (9, 21), (12, 28))
    assert parse_pairs("auto", 4, 8, most=1, setting="x") == ((4, 8),)
    assert parse_pairs("1-8, 4-2", 4, 8, most=4, setting="x") == ((1, 8), (4, 2))
    with pytest.raises(CellFailed, match=r"feature_layers='5-8': the student has no block 5; its blocks are 1 to 4"):
        parse_pairs("5-8", 4, 8, most=4, setting="feature_layers")
    with pytest.raises(CellFailed, match=r"'2' is not STUDENT-TEACHER"):
        parse_pairs("2", 4, 8, most=4, setting="feature_layers")


def test_a_model_without_the_attention_interface_is_said_so(small):
    opened = small("Llama")
    inside, at = seen_inside(opened, small("Llama"), Inwards(attention="auto"))
    inside.attention[0][0].value = None  # what a model with kernels of its own leaves
    with pytest.raises(CellFailed, match=r"the student's attention yields no queries and keys.*--methods feature"):
        inside.attentions(at)
    inside.close()


def test_positions_zero_and_padding_take_no_part_in_features(small):
    student, teacher = small("Llama"), small("Llama")
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    rows = [Row((5, 6, 7, 8), 1), Row((5, 6, 7, 8, 9, 10, 11, 12), 3)]
    inside, at = seen_inside(student, teacher, Inwards(hidden="auto"), rows)
    found = inside.features(at)
    assert float(found[0]) == 0 and (found[1:] > 0).all()
    inside.close()
    inside, alone = seen_inside(student, teacher, Inwards(hidden="auto"), rows[:1])
    assert torch.allclose(inside.features(alone), found[:3], atol=1e-5)


def train(student, teacher, folder, *, inwards=None, stop=None, settings=SETTINGS, terms=None, **aim):
    folder.mkdir(exist_ok=True)
    kd = Term("kl", 0.5, lambda at: forward_kl(at.student_NV, at.teacher_NV, temperature=2.0))
    feature = Term("feature", "auto", lambda at: at.inside.features(at))
    objective = Objective(
        terms=terms or [kd, hard_labels(0.5), *([feature] if inwards else [])],
        sources=[Live(teacher)] if teacher else (),
        inwards=inwards,
        **aim,
    )
    spent = fit(
        student, rows=rows_of(24), validation=rows_of(6, seed=9), objective=objective, settings=settings,
        training=Training(seen_tokens=900, seed=4, workdir=folder, stop_after_steps=stop),
    )  # fmt: skip
    return {name: tensor.clone() for name, tensor in student.model.state_dict().items()}, spent


def test_a_stopped_run_with_projections_and_auto_weights_goes_on_to_the_same_bytes(small, tmp_path):
    inwards = Inwards(hidden="auto")
    whole, spent = train(small("Llama"), small("Llama", hidden_size=64), tmp_path / "whole", inwards=inwards)
    for stop in (3, 8, None):
        parts, resumed = train(small("Llama"), small("Llama", hidden_size=64), tmp_path / "parts", inwards=inwards, stop=stop)
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items()) and resumed.terms == spent.terms
    assert not any("projection" in name for name in whole)  # never part of the student


def test_an_auto_term_counts_as_much_as_the_others_together(small, tmp_path):
    train(small("Llama"), small("Llama", hidden_size=64), tmp_path / "a", inwards=Inwards(hidden="auto"))
    lines = [json.loads(line) for line in (tmp_path / "a" / "training.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "feature" in line]
    means = None
    for line in steps:
        if means is None:
            means = {name: line[name] for name in ("kl", "ce", "feature")}
        anchor = 0.5 * means["kl"] + 0.5 * means["ce"]
        assert line["weight_feature"] == pytest.approx(anchor / max(means["feature"], 1e-8), rel=1e-4)
        assert line["feature"] > 1e-3  # the projection was not fitted to one batch by heart
        means = {name: 0.9 * value + 0.1 * line[name] for name, value in means.items()}
    assert {"gradient_norm_feature", "gradient_norm_kl", "gradient_norm_ce"} <= steps[0].keys()


def test_an_auto_term_that_is_nothing_gets_no_boundless_weight(small, tmp_path):
    nothing = Term("nothing", "auto", lambda at: 1e-12 * at.student_NV.square().mean(-1))
    train(small("Llama"), None, tmp_path / "a", terms=[hard_labels(), nothing])
    lines = [json.loads(line) for line in (tmp_path / "a" / "training.jsonl").read_text().splitlines()]
    assert {line["weight_nothing"] for line in lines if "nothing" in line} == {1e6}


def test_every_step_and_validation_reaches_a_tracker(small, tmp_path, monkeypatch):
    from accelerate.tracking import GeneralTracker

    from methods.training import preparation

    told = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        def store_init_configuration(self, values):
            told.append(("config", values))

        def log(self, values, step=None, **more):
            told.append((step, values))

    plain = preparation.Accelerator
    monkeypatch.setattr(preparation, "Accelerator", lambda **given: plain(**{**given, "log_with": Tracker(_blank=True)}))
    student = small("Llama")
    teacher = Live(small("Llama", hidden_size=64))
    kd = Term("kl", 0.5, lambda at: forward_kl(at.student_NV, at.teacher_NV, temperature=2.0))
    spent = fit(
        student, rows=rows_of(24), validation=rows_of(6, seed=9), objective=Objective(terms=[kd, hard_labels(0.5)], sources=[teacher]),
        settings=SETTINGS, training=Training(seen_tokens=900, seed=4, workdir=tmp_path, track="kept"),
    )  # fmt: skip
    assert told[0][0] == "config" and told[0][1]["seed"] == 4
    steps = {step: values for step, values in told[1:] if "kl" in values}
    assert list(steps) == list(range(1, spent.step + 1))
    assert {"kl", "ce", "weight_kl", "rate", "gradient_norm", "gradient_norm_kl", "gradient_norm_ce"} <= steps[1].keys()
    assert [step for step, values in told[1:] if "validation_ce" in values][-1] == spent.step


def test_norms_of_terms_are_those_of_their_own_gradients(small):
    student, teacher = small("Llama"), small("Llama", hidden_size=64)
    rows = rows_of(6)
    terms = [Term("kl", 0.7, lambda at: forward_kl(at.student_NV, at.teacher_NV)), hard_labels(0.3)]
    stepper = Stepper(student.model, Head(student.model), Objective(terms=terms, sources=[Live(teacher)]), 6, 1)

    def norm(weights):
        student.model.zero_grad()
        found = stepper.backward(rows, weights=weights, backward=lambda loss: loss.backward(), norms=True)
        return found.norms, math.sqrt(sum(float(p.grad.square().sum()) for p in student.model.parameters() if p.grad is not None))

    norms, _ = norm({"kl": 0.7, "ce": 0.3})
    assert norms["kl"] == pytest.approx(norm({"kl": 0.7, "ce": 0.0})[1], rel=1e-4)
    assert norms["ce"] == pytest.approx(norm({"kl": 0.0, "ce": 0.3})[1], rel=1e-4)


def test_norms_of_terms_hold_one_set_of_gradients_at_a_time(small, monkeypatch):
    import weakref

    plain, held = torch.autograd.grad, []

    def watched(*arguments, **options):
        assert not any(one() is not None for one in held)
        found = plain(*arguments, **options)
        held.extend(weakref.ref(one) for one in found if one is not None)
        return found

    monkeypatch.setattr(torch.autograd, "grad", watched)
    student = small("Llama")
    stepper = Stepper(student.model, Head(student.model), Objective(terms=[hard_labels(0.5), hard_labels(0.5, tag=0)]), 6, 1)
    weights = {term.name: term.weight for term in stepper.objective.terms}
    stepper.backward(rows_of(6), weights=weights, backward=lambda loss: loss.backward(), norms=True)
    assert len(weights) == 2 and len(held) > 20 and not any(one() is not None for one in held)


def test_recomputed_activations_change_no_weight(small, tmp_path):
    plain, _ = train(small("Llama"), small("Llama", hidden_size=64), tmp_path / "a", inwards=Inwards(hidden="auto", attention="auto"))
    again, _ = train(
        small("Llama"), small("Llama", hidden_size=64), tmp_path / "b", inwards=Inwards(hidden="auto", attention="auto"),
        settings=replace(SETTINGS, gradient_checkpointing=True),
    )  # fmt: skip
    assert all(torch.allclose(again[name], tensor, atol=1e-6) for name, tensor in plain.items())


def test_patience_ends_a_run_that_gets_no_better(small, tmp_path):
    still = replace(SETTINGS, learning_rate=1e-12, warmup_ratio=0.0)
    _, whole = train(small("Llama"), None, tmp_path / "a", terms=[hard_labels()], settings=replace(still, learning_rate=0.3))
    _, ended = train(small("Llama"), None, tmp_path / "b", terms=[hard_labels()], settings=replace(still, learning_rate=0.3, patience=1))
    assert ended.step < whole.step and ended.best == whole.best


# Chosen tokens


def gradient_of(model, rows, micro_batch_size, **aim):
    model.zero_grad()
    objective = Objective(terms=[hard_labels()], **aim)
    stepper = Stepper(model, Head(model), objective, micro_batch_size, 1)
    values = stepper.backward(rows, weights={"ce": 1.0}, backward=lambda loss: loss.backward(), number=3).means
    return values["ce"], torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("score", ["kl", "entropy", "excess", "random"])
def test_all_tokens_chosen_is_no_choice_and_the_split_changes_nothing(small, score):
    model, source = small("Llama").model, [Live(small("Llama", hidden_size=64))]
    rows = rows_of(8)
    plain, expected = gradient_of(model, rows, 8)
    whole, found = gradient_of(model, rows, 8, sources=source, selection=Selection(1.0, score, 1))
    assert whole == pytest.approx(plain, rel=1e-6) and torch.allclose(found, expected, atol=1e-6)
    half = Selection(0.5, score, 1)
    value, whole = gradient_of(model, rows, 8, sources=source, selection=half)
    again, split = gradient_of(model, rows, 3, sources=source, selection=half)
    assert again == pytest.approx(value, rel=1e-6) and torch.allclose(split, whole, atol=1e-6)


@pytest.mark.parametrize("score", ["kl", "entropy", "excess", "random"])
def test_exactly_the_counted_tokens_of_each_row_are_chosen_and_they_score_highest(small, score):
    opened, teacher = small("Llama"), Live(small("Llama", hidden_size=64))
    rows = rows_of(5)
    batch = batch_of(rows, 1)
    at = Positions(Head(opened.model)(batch), batch.ids[:, 1:][batch.mask], (teacher.read(batch, None),), batch)
    selection = Selection(0.4, score, 7)
    chosen, scores = selection.chosen(at, 2), selection._scores(at, 2)
    start = 0
    for row in rows:
        mine, points = chosen[start : start + row.trained], scores[start : start + row.trained]
        assert int(mine.sum()) == selection.counts(row) == max(1, int(0.4 * row.trained + 0.5))
        assert row.trained == int(mine.sum()) or points[mine].min() >= points[~mine].max()
        start += row.trained
    if score == "random":
        assert torch.equal(chosen, selection.chosen(at, 2)) and not torch.equal(chosen, selection.chosen(at, 3))


def test_rows_are_ranked_by_what_the_setting_says(tiny, tmp_path):
    given = job([tiny], tmp_path / "x")
    examples = training_examples(TASKS, given.source, rows=12)
    short, *_ = REGISTRY.build("selective", {"by": "short"})._ranked(given, examples)
    lengths = [row.trained for row in encode(open_model(tiny).tokenizer, worked(short), longest=512)[0]]
    assert lengths == sorted(lengths)
    sure, rows, *_ = REGISTRY.build("selective", {"by": "confidence"})._ranked(given, examples)
    opened = open_model(tiny)

    def loss(example):
        batch = batch_of(encode(opened.tokenizer, worked([example]), longest=512)[0], 1)
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(Head(opened.model)(batch), batch.ids[:, 1:][batch.mask]))

    losses = [loss(one) for one in sure]
    assert losses == pytest.approx(sorted(losses), abs=2e-3) and len(rows) == 12
    right, _, told, shared = REGISTRY.build("selective", {"by": "correct"})._ranked(given, examples)
    assert 6 < told["teacher_solves"] <= 12 and {one.prompt for one in right} == {one.prompt for one in examples}
    assert shared[0]["tokens"] > 100  # what the teacher wrote for the choice is a cost of the row


@pytest.mark.parametrize(("method", "settings"), [("selective", {"by": "long"}), ("selective-random", {"unit": "rows"})])
def test_chosen_rows_are_the_same_share_of_each_task(method, settings, tiny, tmp_path):
    made = REGISTRY.build(method, {**settings, "share": 0.25, "batch_size": 4})
    kept = []
    object.__setattr__(made, "distil", lambda given, examples, **_: kept.extend(examples))
    made.compress(job([tiny], tmp_path / "x", rows=24))
    assert [sum(one.task == task for one in kept) for task in TASKS] == [3, 3]


def test_a_label_outside_the_kept_tokens_shares_what_they_leave():
    log_p = torch.log(torch.tensor([[0.6, 0.2]]))
    kept = Distribution(None, TopK(torch.tensor([[4, 7]]), log_p))
    assert float(label_loss(kept, torch.tensor([7]))) == pytest.approx(-math.log(0.2), abs=1e-5)
    assert float(label_loss(kept, torch.tensor([1]))) == pytest.approx(-math.log(0.1), abs=1e-4)


# Several teachers


def test_one_teacher_is_response_and_two_equal_ones_are_one(small):
    batch = batch_of(rows_of(3), 1)
    student, teacher = small("Llama"), Live(small("Llama", hidden_size=64))
    read, logits = teacher.read(batch, None), Head(student.model)(batch)
    at = Positions(logits, batch.ids[:, 1:][batch.mask], (read,), batch)
    plain = forward_kl(logits, read.logits_NV, temperature=2.0)
    assert torch.allclose(mixed_kl(at, torch.ones(len(plain), 1), 2.0), plain, atol=1e-5)
    both = replace(at, teachers=(read, read))
    assert torch.allclose(mixed_kl(both, torch.tensor([0.3, 0.7]).expand(len(plain), -1), 2.0), plain, atol=1e-5)


def test_kept_tokens_of_two_teachers_give_the_gradient_of_their_mixture():
    torch.manual_seed(0)
    logits = [torch.randn(4, 9) for _ in range(2)]
    student = torch.randn(4, 9, requires_grad=True)
    weights = torch.tensor([[0.2, 0.8]]).expand(4, -1)
    whole = Positions(student, torch.zeros(4, dtype=torch.long), tuple(Distribution(one) for one in logits))
    kept = []
    for one in logits:
        top = torch.log_softmax(one, -1).topk(8)
        kept.append(Distribution(None, TopK(top.indices, top.values)))
    [exact] = torch.autograd.grad(mixed_kl(whole, weights, 1.0).sum(), student)
    [cut] = torch.autograd.grad(mixed_kl(replace(whole, teachers=tuple(kept)), weights, 1.0).sum(), student)
    assert torch.allclose(cut, exact, atol=1e-5)


@pytest.mark.parametrize("weighting", ["mean", "fixed", "confidence", "domain"])
def test_every_weighting_trains_from_caches_with_no_teacher_beside(weighting, tiny, specialist, tmp_path):
    given = job([tiny, specialist], tmp_path / "x", teacher_weights=(0.7, 0.3))
    REGISTRY.build("multi-teacher", {"weighting": weighting}).compress(given)
    cost = json.loads((tmp_path / "x" / "cost.json").read_text())
    assert len(cost["shared"]) == (3 if weighting == "domain" else 2) and not cost.get("teacher_tokens")
    assert len(cost["notes"]["teacher_cache"]) == 2
    if weighting == "domain":
        assert cost["shared"][0]["tokens"] > 0 and cost["shared"][0]["flops"] > 0  # reading the validation rows
        losses = cost["notes"]["teachers_loss"]
        assert losses["tiny"]["mmlu-mini"] < 1 < losses["tiny-math"]["mmlu-mini"]


def test_domain_weights_stand_beside_a_task_that_has_no_rows(tiny, specialist, tmp_path):
    class Text:
        kind = "perplexity"

    given = job([tiny, specialist], tmp_path / "x", tasks={"text": Text(), **TASKS})
    REGISTRY.build("multi-teacher", {"weighting": "domain"}).compress(given)
    assert set(json.loads((tmp_path / "x" / "cost.json").read_text())["notes"]["teachers_loss"]["tiny"]) == set(TASKS)


def test_two_live_teachers_and_one_with_other_tokens_are_counted_in_full(tiny, specialist, foreign, tmp_path):
    REGISTRY.build("multi-teacher", {"cache": "off"}).compress(job([tiny, specialist], tmp_path / "x"))
    cost = json.loads((tmp_path / "x" / "cost.json").read_text())
    assert cost["teacher_tokens"] == 2 * cost["seen_tokens"]
    given = job([tiny], tmp_path / "y", student=str(foreign.path), student_base=foreign, tokens=6_000)
    REGISTRY.build("uld", {"batch_size": 4}).compress(given)
    cost = json.loads((tmp_path / "y" / "cost.json").read_text())
    assert 0 < cost["teacher_tokens"] != cost["seen_tokens"]  # the same text is fewer tokens to one of the two


def test_domain_weights_route_each_row_to_the_teacher_of_its_task():
    from methods.multi_teacher import _one_hot, _weights

    by_task = [_one_hot([0.5, 0.1]), _one_hot([0.2, 3.0])]
    batch = batch_of([Row((1, 2, 3), 1, 0), Row((1, 2, 3, 4), 2, 1)], 0)
    at = Positions(torch.zeros(4, 3), batch.ids[:, 1:][batch.mask], (), batch)
    assert _weights("domain", at, (), by_task).tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]
    assert _weights("fixed", at, (0.7, 0.3), ())[0].tolist() == pytest.approx([0.7, 0.3])


def test_the_best_single_teacher_is_found_on_validation_rows_and_named(tiny, specialist, tmp_path):
    REGISTRY.build("best-single-teacher", {}).compress(job([specialist, tiny], tmp_path / "x", student_base=tiny))
    assert json.loads((tmp_path / "x" / "cost.json").read_text())["notes"]["teacher"] == "tiny"


def test_a_named_teacher_is_used_and_an_unknown_one_refused(tiny, specialist, tmp_path):
    REGISTRY.build("response", {"teacher": "tiny-math", "batch_size": 4}).compress(job([tiny, specialist], tmp_path / "x", tokens=5_000))
    meta = next((tmp_path / "cache" / "teachers").glob("*/meta.json"))
    assert json.loads(meta.read_text())["name"] == "tiny-math"
    with pytest.raises(CellFailed, match="the run's teachers are tiny, tiny-math"):
        REGISTRY.build("response", {"teacher": "huge"}).compress(job([tiny, specialist], tmp_path / "y"))


def test_answers_that_choose_rows_are_written_by_the_named_teacher(tiny, specialist, tmp_path, monkeypatch):
    from methods.training import traces

    asked, plain = [], traces.teacher_traces
    monkeypatch.setattr(traces, "teacher_traces", lambda *a, **given: asked.append(given["teacher"].name) or plain(*a, **given))
    given = job([tiny, specialist], tmp_path / "x")
    examples = training_examples(TASKS, given.source, rows=8)
    *_, shared = REGISTRY.build("selective", {"by": "correct", "teacher": "tiny-math"})._ranked(given, examples)
    assert asked == ["tiny-math"]
    *_, others = REGISTRY.build("selective", {"by": "correct"})._ranked(given, examples)
    assert others[0]["key"] != shared[0]["key"]


def test_controls_start_alike_and_random_selection_has_the_same_terms():
    handed = REGISTRY.build("selective", {"feature_weight": "auto", "top_k": 32, "start": "random"}).control_settings()
    assert handed == {"feature_weight": "auto", "top_k": 32, "start": "random", "share": 0.5, "unit": "tokens"}
    for name in ("cot", "uld", "on-policy", "feature", "multi-teacher"):
        assert REGISTRY.build(name, {"start": "random"}).control_settings() == {"start": "random"}
        assert REGISTRY.build(name, {}).control_settings() == {}
    assert "feature_weight" not in REGISTRY.build("feature", {"feature_weight": 0.3}).control_settings()  # its control is response


@pytest.fixture(scope="module")
def short_sighted(tiny, tmp_path_factory):
    """The embedded teacher with a context of 70 tokens."""
    import shutil

    from harness.models.checkpoint import describe

    folder = tmp_path_factory.mktemp("short") / "short"
    shutil.copytree(tiny.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 70}))
    return describe(folder, name="short")


def test_no_teacher_is_shown_more_than_its_context(tiny, short_sighted, tmp_path, monkeypatch):
    from methods.training.traces import teacher_traces

    given = job([short_sighted], tmp_path / "x", student_base=tiny)
    examples = training_examples({"gsm8k-mini": TASKS["gsm8k-mini"]}, given.source, rows=40)
    lengths = [len(row.ids) for row in encode(open_model(tiny).tokenizer, worked(examples), longest=2**31)[0]]
    assert min(lengths) <= 70 < max(lengths)
    REGISTRY.build("response", {"batch_size": 4}).compress(replace(given, tasks={"gsm8k-mini": TASKS["gsm8k-mini"]}))
    notes = json.loads((tmp_path / "x" / "cost.json").read_text())["notes"]
    assert notes["rows_too_long"] == sum(length > 70 for length in lengths)
    ranked, rows, *_ = REGISTRY.build("selective", {"by": "confidence"})._ranked(given, examples)
    assert len(ranked) == len(rows) == sum(length <= 70 for length in lengths)
    pairs = worked(examples)
    own = open_model(tiny).tokenizer
    assert aligned_rows(own, own, pairs, longest=2**31, their_longest=70)[1] == notes["rows_too_long"]
    prompts = [len(open_model(tiny).encode(example.prompt)) for example in examples]
    written = teacher_traces(given, examples, samples=2, temperature=1.0, longest=30)
    unasked = [group for group, length in zip(written.texts, prompts, strict=True) if length + 30 > 70]
    assert unasked and all(one.stop == "length" and not one.text for group in unasked for one in group)
    assert all(one.tokens for group, length in zip(written.texts, prompts, strict=True) if length + 30 <= 70 for one in group)
    with pytest.raises(CellFailed, match="no prompt leaves room for 69 new tokens in the 70 that short can read"):
        teacher_traces(given, examples, samples=1, temperature=0.0, longest=69)
    from methods.training import rollout

    told, plain = [], rollout.Rollout.__call__

    def watched(self, student, rows, number):
        made = plain(self, student, rows, number)
        told.append(max(len(row.ids) for row in made))
        return made

    monkeypatch.setattr(rollout.Rollout, "__call__", watched)
    again = job([short_sighted], tmp_path / "y", student_base=tiny, tasks={"gsm8k-mini": TASKS["gsm8k-mini"]})
    REGISTRY.build("on-policy", {"batch_size": 4, "on_policy_share": 1.0, "sampling_temperature": 5.0}).compress(again)
    assert max(told) == 70


def test_a_killed_writer_of_traces_goes_on_and_draws_the_same(tiny, tmp_path, monkeypatch):
    from methods.training import traces

    whole, given = job([tiny], tmp_path / "a" / "x"), job([tiny], tmp_path / "b" / "x")
    examples = training_examples(TASKS, whole.source, rows=30)
    asked = {"samples": 2, "temperature": 1.0, "longest": 60}
    expected = traces.teacher_traces(whole, examples, **asked)
    plain, prompts = traces.Writer.generate, []

    def killed(writer, rows, *, finished, **more):
        def until_the_kill(row, one):
            if len(answered) == 25:
                raise KeyboardInterrupt
            answered.append(row)
            finished(row, one)

        answered = []
        return plain(writer, rows, finished=until_the_kill, **more)

    monkeypatch.setattr(traces.Writer, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        traces.teacher_traces(given, examples, **asked)
    [part] = (given.cache / "traces").glob("*.part")
    part.write_text(part.read_text()[:-9])  # and the last line torn
    monkeypatch.setattr(traces.Writer, "generate", lambda writer, rows, **more: prompts.extend(rows) or plain(writer, rows, **more))
    assert traces.teacher_traces(given, examples, **asked).texts == expected.texts
    assert len(prompts) == 60 - 24 and not list((given.cache / "traces").glob("*.part"))


# The student's own answers


def test_rollouts_are_plain_samples_kept_as_drawn_and_repeat_with_seed_and_step(tiny):
    student = open_model(tiny)
    student.model.generation_config.top_k, student.model.generation_config.top_p = 1, 0.01  # must not leak in
    rows = encode(student.tokenizer, worked(islice(TASKS["gsm8k-mini"].examples("train", DataSource()), 4)), longest=512)[0]
    always = Rollout(1.0, 3.0, 24, 1)
    first, second = always(student, rows, 1), always(student, rows, 1)
    assert first == second != always(student, rows, 2)
    for made, row in zip(first, rows, strict=True):
        assert made.ids[: made.trained_from] == row.ids[: row.trained_from] and 1 <= made.trained <= 24
    greedy = Rollout(1.0, 1e-4, 24, 1)(student, rows, 1)
    assert first != greedy  # at temperature 3 a greedy or top-1 answer would be the same for all draws
    assert Rollout(0.0, 1.0, 24, 1)(student, rows, 1) == rows and always.written > 0
    mixed = [Rollout(0.5, 1.0, 4, 1)(student, rows[:1], number) == rows[:1] for number in range(40)]
    assert 8 < sum(mixed) < 32


def test_on_policy_counts_what_the_student_wrote(tiny, tmp_path):
    REGISTRY.build("on-policy", {"on_policy_share": 1.0, "batch_size": 4, "longest": 20}).compress(job([tiny], tmp_path / "x"))
    cost = json.loads((tmp_path / "x" / "cost.json").read_text())
    wrote = cost["notes"]["student_wrote_tokens"]
    assert wrote - 4 * 20 <= cost["trained_tokens"] <= wrote and cost["teacher_tokens"] == cost["seen_tokens"]


# Another tokenizer


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    """Return a byte-level tokenizer of another vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    texts = [one.completion for one in islice(TASKS["gsm8k-mini"].examples("train", DataSource()), 50)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", clean_up_tokenization_spaces=False)


def test_equal_tokenizers_align_every_position(tiny):
    tokenizer = open_model(tiny).tokenizer
    pairs = worked(islice(TASKS["gsm8k-mini"].examples("train", DataSource()), 5))
    rows, _ = aligned_rows(tokenizer, tokenizer, pairs, longest=512)
    assert all(row.other.pairs == tuple((at, at) for at in range(row.trained)) for row in rows)


def test_aligned_positions_stand_behind_the_same_text_in_both_tokenizers(tiny, other_tokenizer):
    ours = open_model(tiny).tokenizer
    text = " Mia hat 3 Äpfel – und 12 €.\n#### 12"
    [row], _ = aligned_rows(ours, other_tokenizer, [("Frage:", text)], longest=512)
    assert len(row.other.pairs) > 5
    for mine, theirs in row.other.pairs:
        read = [
            tokenizer.decode(list(ids[start : start + count]), clean_up_tokenization_spaces=False)
            for tokenizer, ids, start, count in (
                (ours, row.ids, row.trained_from, mine), (other_tokenizer, row.other.ids, row.other.trained_from, theirs),
            )
        ]  # fmt: skip
        assert read[0] == read[1] and text.startswith(read[0])
    assert row.other.pairs[0] == (0, 0) and row.other.pairs[-1] == (row.trained - 1, len(row.other.ids) - row.other.trained_from - 1)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, other_tokenizer):
    """Return a saved model of another vocabulary."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from harness.models.checkpoint import describe

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("foreign") / "other"
    config = LlamaConfig(
        vocab_size=len(other_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    other_tokenizer.save_pretrained(folder)
    return describe(folder, name="other")


@pytest.mark.parametrize("method", ["uld", "cot"])
def test_a_student_of_another_tokenizer_is_trained_by_both_ways_out(method, tiny, foreign, tmp_path):
    given = job([tiny], tmp_path / "x", student=str(foreign.path), student_base=foreign, tokens=6_000)
    made = REGISTRY.build(method, {"batch_size": 4, "learning_rate": 1e-2}).compress(given)
    cost = json.loads((tmp_path / "x" / "cost.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "x" / "training.jsonl").read_text().splitlines()]
    held = [line["validation_ce"] for line in lines if "validation_ce" in line]
    assert held[-1] < math.log(300) - 0.5 and made.digest != foreign.digest
    if method == "uld":
        again = job([tiny], tmp_path / "y", student=str(foreign.path), student_base=foreign, tokens=6_000)
        REGISTRY.build(method, {"batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2}).compress(again)
        split = json.loads((tmp_path / "y" / "cost.json").read_text())["notes"]["terms"]
        assert split["uld"]["last"] == pytest.approx(cost["notes"]["terms"]["uld"]["last"], rel=1e-3)
        notes = cost["notes"]
        assert 0.1 * notes["positions"] < notes["aligned"] < notes["positions"] and notes["terms"]["uld"]["last"] > 0


def test_other_methods_refuse_another_tokenizer_and_name_the_two_ways_out(tiny, foreign, tmp_path):
    for method in ("response", "feature", "attention", "selective", "on-policy"):
        with pytest.raises(HarnessError, match=r"different vocabularies.*--methods cot .*--methods uld"):
            REGISTRY.build(method, {}).compress(job([tiny], tmp_path / method, student=str(foreign.path), student_base=foreign))


# Terms as settings


def test_terms_compose_by_weights_and_by_a_list(tiny, tmp_path):
    by_weight = REGISTRY.build("response", {"feature_weight": "auto", "attention_weight": 0.1})
    assert by_weight.weights() == [("forward-kl", 0.5), ("ce", 0.5), ("feature", "auto"), ("attention", 0.1)]
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
        ({"terms": ["kl=1"]}, "names are forward-kl"), ({"terms": ["ce=much"]}, "a number or auto"),
        ({"terms": ["ce=1", "ce=2"]}, "named twice"),
        ({"terms": ["ce=0"]}, "weight 0"), ({"teacher_share": 0.5, "feature_weight": -1}, "greater than or equal to 0"),
        ({"temperature": 0}, "greater than 0"), ({"temperature": 1e3}, "less than or equal to 100"),
        ({"beta": 1.0}, "less than 1"),
    ],
)  # fmt: skip
def test_terms_and_temperatures_out_of_range_are_refused(settings, said):
    with pytest.raises(HarnessError, match=said):
        REGISTRY.build("response", settings)


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(HarnessError, match="share"):
        REGISTRY.build("selective", {"share": share})


# Form, start, rate


def test_step_by_step_divides_each_half_by_its_own_tokens(small):
    model = small("Llama").model
    rows = [*rows_of(3, seed=1), *(replace(row, tag=1) for row in rows_of(3, seed=2))]

    def gradient(terms, over):
        model.zero_grad()
        stepper = Stepper(model, Head(model), Objective(terms=terms), 2, 1)
        stepper.backward(over, weights={term.name: term.weight for term in terms}, backward=lambda loss: loss.backward())
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    both = gradient([hard_labels(0.25, tag=0), hard_labels(0.75, tag=1)], rows)
    apart = 0.25 * gradient([hard_labels()], rows[:3]) + 0.75 * gradient([hard_labels()], rows[3:])
    assert torch.allclose(both, apart, atol=1e-6)


def test_step_by_step_trains_bare_answers_and_rationales(tiny, tmp_path):
    REGISTRY.build("cot", {"form": "step-by-step"}).compress(job([tiny], tmp_path / "x", tokens=4_000))
    notes = json.loads((tmp_path / "x" / "cost.json").read_text())["notes"]
    assert notes["rows"] == 2 * notes["traces_kept"] and set(notes["terms"]) == {"ce-0", "ce-1"}


def test_training_from_random_weights_starts_at_chance(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("methods.training.base.rate_for", lambda size, *, scratch: asked.append((size, scratch)) or 7e-4)
    REGISTRY.build("sft", {"start": "random", "batch_size": 4}).compress(job([tiny], tmp_path / "x"))
    start, first = (json.loads(line) for line in (tmp_path / "x" / "training.jsonl").read_text().splitlines()[:2])
    assert first["ce"] == pytest.approx(math.log(1024), abs=0.3) and start["validation_ce"] == pytest.approx(math.log(1024), abs=0.3)
    notes = json.loads((tmp_path / "x" / "cost.json").read_text())["notes"]
    assert asked == [(918_656, True)] and notes["learning_rate"] == 7e-4 and notes["start_ce"] == round(start["validation_ce"], 6)


def test_a_run_killed_after_its_last_partial_step_makes_no_other(small, tmp_path):
    """The last step holds the rows that still fit; shorter rows of a next one must not."""
    whole, spent = train(small("Llama"), None, tmp_path / "whole", terms=[hard_labels()])
    train(small("Llama"), None, tmp_path / "cut", terms=[hard_labels()], stop=spent.step)
    again, resumed = train(small("Llama"), None, tmp_path / "cut", terms=[hard_labels()])
    assert resumed.step == spent.step and resumed.seen == spent.seen and resumed.over
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_attention_counts_only_the_positions_that_it_compares(small):
    inwards = Inwards(attention="auto", longest=6)
    assert [inwards.attended(row) for row in (Row(tuple(range(10)), 3), Row(tuple(range(10)), 8), Row((1, 2, 3), 1))] == [4, 0, 2]
    inside, at = seen_inside(small("Llama"), small("Llama", hidden_size=64), inwards, [Row(tuple(range(3, 13)), 3)])
    found = inside.attentions(at)
    assert (found[:4] > 0).all() and (found[4:] == 0).all()
    inside.close()


def test_a_term_that_counts_nothing_is_refused(small, tmp_path):
    far = Term("attention", "auto", lambda at: at.student_NV.sum(-1), counts=lambda row: 0)
    with pytest.raises(CellFailed, match="the term attention counts no position of any training row"):
        train(small("Llama"), None, tmp_path / "x", terms=[hard_labels(), far])


def test_a_chat_template_adds_one_bos_and_each_model_is_shown_its_own(tiny, tmp_path):
    from harness.contract import Example
    from harness.models.encoding import encoded
    from methods.training.rows import encode as rows_from

    class Begins:
        bos_token, eos_token_id = "<s>", 9

        def __call__(self, text, add_special_tokens=True):
            body = [7 if part == "<s>" else 5 for part in text.replace("<s>", "<s> ").split()]
            return {"input_ids": ([7] if add_special_tokens else []) + body}

    assert encoded(Begins(), "<s>hello") == [7, 5] and encoded(Begins(), "hello") == [7, 5]
    [row], _ = rows_from(Begins(), [("<s>hello", " there")], longest=9)
    assert row.ids == (7, 5, 5, 9) and row.trained_from == 2
    shown = []
    source = DataSource(show=lambda tokenizer, prompt: shown.append((type(tokenizer).__name__, prompt)) or prompt)
    from methods.training.traces import teacher_traces

    example = Example(task="gsm8k-mini", prompt="[student's] Question: 1?", completion="", answer="", gold="1", plain="Question: 1?")
    teacher_traces(replace(job([tiny], tmp_path / "x"), source=source), [example], samples=1, temperature=0.0, longest=4)
    assert [prompt for _, prompt in shown] == ["Question: 1?"]


def test_the_rate_is_chosen_on_held_out_training_rows_once_for_all_seeds(tiny, tmp_path, monkeypatch):
    from methods.training import tuning

    given = job([tiny], tmp_path / "one", tune=True, rows=60)
    REGISTRY.build("sft", {"batch_size": 4}).compress(given)
    notes = json.loads((tmp_path / "one" / "cost.json").read_text())["notes"]
    tried = {float(rate): loss for rate, loss in notes["rates_tried"].items()}
    assert {1e-3, 5e-4, 2e-3} <= tried.keys() and notes["learning_rate"] == min(tried, key=tried.get)
    steps = [json.loads(line) for line in (tmp_path / "one" / "training.jsonl").read_text().splitlines()]
    assert max(line.get("rate", 0) for line in steps) <= notes["learning_rate"]
    monkeypatch.setattr(tuning, "_search", lambda *a, **k: pytest.fail("searched again"))
    REGISTRY.build("sft", {"batch_size": 4}).compress(replace(given, seed=2, workdir=_made(tmp_path / "two")))
    cost = json.loads((tmp_path / "two" / "cost.json").read_text())
    assert cost["notes"]["rates_tried"] == notes["rates_tried"] and cost["shared"][0]["tokens"] > 0
    with pytest.raises(pytest.fail.Exception, match="searched again"):
        REGISTRY.build("sft", {"batch_size": 8}).compress(replace(given, workdir=_made(tmp_path / "three")))


@pytest.mark.parametrize(
    ("better", "farthest"), [(lambda rate: 1 / rate, 64), (lambda rate: rate, 1 / 64), (lambda rate: abs(rate - 0.02), 4)]
)
def test_the_search_walks_on_while_the_best_stands_at_an_edge(better, farthest, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from methods.training import tuning

    def spent(*_, settings, **__):
        return SimpleNamespace(best=better(settings.learning_rate), seen=0, written=0)

    monkeypatch.setattr(tuning, "fit", spent)
    monkeypatch.setattr(tuning, "forward_flops_per_token", lambda *_: 0.0)
    found = tuning._search(
        SimpleNamespace(workdir=tmp_path, device="cpu"), rows_of(8), SETTINGS, key="",
        training=Training(seen_tokens=900, seed=4, workdir=tmp_path), student=lambda _: SimpleNamespace(model=None),
        objective=lambda: SimpleNamespace(live=()),
    )  # fmt: skip
    tried = [float(rate) for rate in found["losses"]]
    assert (max(tried) if farthest > 1 else min(tried)) == pytest.approx(farthest * SETTINGS.learning_rate)


def _made(folder):
    folder.mkdir()
    return folder


def test_shuffled_teacher_rows_train_clearly_worse(tiny, tmp_path, monkeypatch):
    """The control of the cache: the right distributions at the wrong rows must show."""
    from methods.training import teacher_cache as caching

    def last(folder, shuffled):
        plain = caching.CachedTeacher._slice
        if shuffled:

            def wrong(self, parts, row):
                names = sorted(self.index, key=lambda name: self.index[name][2])
                twins = [name for name in names if self.index[name][2] == row.trained and name != caching.key_of(row)]
                shard, start, count = self.index[twins[0] if twins else caching.key_of(row)]
                return parts[shard][start : start + count]

            monkeypatch.setattr(caching.CachedTeacher, "_slice", wrong)
        given = job([tiny], folder, tokens=12_000, cache=tmp_path / "shared")
        REGISTRY.build("response", {"teacher_share": 1.0, "batch_size": 4}).compress(given)
        monkeypatch.setattr(caching.CachedTeacher, "_slice", plain)
        lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
        return min(line["validation_ce"] for line in lines if "validation_ce" in line and line["step"])

    right = last(tmp_path / "right", False)  # makes the cache, which the other reads: wrong rows do not pass the check at building
    assert last(tmp_path / "wrong", True) > 1.5 * right
