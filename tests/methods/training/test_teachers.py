"""Several teachers, live and from caches: mixed, weighed, named, and none shown more than its
context.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from distilling import REGISTRY, TASKS, job, rows_of

from harness.data.examples import training_examples
from harness.errors import CellFailed
from harness.models.language_model import open_model
from methods.training.base import full_solution_pairs
from methods.training.divergences import label_loss, mixed_kl
from methods.training.losses import forward_kl
from methods.training.positions import Distribution, Positions, TopK
from methods.training.rows import TokenRow, batch_of, encode
from methods.training.teachers import LiveTeacher, TrainedPositionLogits
from methods.uld import aligned_rows


def test_a_label_outside_the_kept_tokens_shares_what_they_leave():
    log_p = torch.log(torch.tensor([[0.6, 0.2]]))
    teacher = Distribution(None, TopK(torch.tensor([[4, 7]]), log_p))
    assert float(label_loss(teacher, torch.tensor([7]))) == pytest.approx(-math.log(0.2), abs=1e-5)
    assert float(label_loss(teacher, torch.tensor([1]))) == pytest.approx(-math.log(0.1), abs=1e-4)


def test_one_teacher_is_response_and_two_equal_ones_are_one(small):
    batch = batch_of(rows_of(3), 1)
    student, teacher = small("Llama"), LiveTeacher(small("Llama", hidden_size=64))
    distribution, logits = teacher.read(batch, None), TrainedPositionLogits(student.model)(batch)
    positions = Positions(logits, batch.labels_N, (distribution,), batch)
    plain = forward_kl(logits, distribution.logits_NV, temperature=2.0)
    assert torch.allclose(mixed_kl(positions, torch.ones(len(plain), 1), 2.0), plain, atol=1e-5)
    two_teachers = replace(positions, teachers=(distribution, distribution))
    assert torch.allclose(
        mixed_kl(two_teachers, torch.tensor([0.3, 0.7]).expand(len(plain), -1), 2.0),
        plain,
        atol=1e-5,
    )


def test_kept_tokens_of_two_teachers_give_the_gradient_of_their_mixture():
    torch.manual_seed(0)
    logits = [torch.randn(4, 9) for _ in range(2)]
    student = torch.randn(4, 9, requires_grad=True)
    weights = torch.tensor([[0.2, 0.8]]).expand(4, -1)
    positions = Positions(
        student,
        torch.zeros(4, dtype=torch.long),
        tuple(Distribution(teacher_logits) for teacher_logits in logits),
    )
    top_teachers = []
    for teacher_logits in logits:
        top = torch.log_softmax(teacher_logits, -1).topk(8)
        top_teachers.append(Distribution(None, TopK(top.indices, top.values)))
    [exact] = torch.autograd.grad(mixed_kl(positions, weights, 1.0).sum(), student)
    [cut] = torch.autograd.grad(
        mixed_kl(replace(positions, teachers=tuple(top_teachers)), weights, 1.0).sum(), student
    )
    assert torch.allclose(cut, exact, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["mean", "fixed", "confidence", "domain"])
def test_every_weighting_trains_from_caches_with_no_teacher_beside(
    weighting, tiny, specialist, tmp_path
):
    task_job = job([tiny, specialist], tmp_path / "x", teacher_weights=(0.7, 0.3))
    REGISTRY.build("multi-teacher", {"weighting": weighting}).compress(task_job)
    cost = json.loads((tmp_path / "x" / "cost.json").read_text())
    assert len(cost["shared"]) == (3 if weighting == "domain" else 2) and not cost.get(
        "teacher_tokens"
    )
    assert len(cost["notes"]["teacher_cache"]) == 2
    if weighting == "domain":
        # reading the validation rows
        assert cost["shared"][0]["tokens"] > 0 and cost["shared"][0]["flops"] > 0
        losses = cost["notes"]["teachers_loss"]
        assert losses["tiny"]["mmlu-mini"] < 1 < losses["tiny-math"]["mmlu-mini"]


@pytest.mark.slow
def test_domain_weights_stand_beside_a_task_that_has_no_rows(tiny, specialist, tmp_path):
    class Text:
        kind = "perplexity"

    task_job = job([tiny, specialist], tmp_path / "x", tasks={"text": Text(), **TASKS})
    REGISTRY.build("multi-teacher", {"weighting": "domain"}).compress(task_job)
    assert set(
        json.loads((tmp_path / "x" / "cost.json").read_text())["notes"]["teachers_loss"]["tiny"]
    ) == set(TASKS)


@pytest.mark.slow
def test_two_live_teachers_and_one_with_other_tokens_are_counted_in_full(
    tiny, specialist, foreign, tmp_path
):
    REGISTRY.build("multi-teacher", {"cache": "off"}).compress(
        job([tiny, specialist], tmp_path / "x")
    )
    cost = json.loads((tmp_path / "x" / "cost.json").read_text())
    assert cost["teacher_tokens"] == 2 * cost["seen_tokens"]
    uld_job = job(
        [tiny], tmp_path / "y", student=str(foreign.path), student_base=foreign, tokens=6_000
    )
    REGISTRY.build("uld", {"batch_size": 4}).compress(uld_job)
    cost = json.loads((tmp_path / "y" / "cost.json").read_text())
    # the same text is fewer tokens to one of the two
    assert 0 < cost["teacher_tokens"] != cost["seen_tokens"]


def test_domain_weights_route_each_row_to_the_teacher_of_its_task():
    from methods.multi_teacher import _teacher_weights, _weight_lowest

    by_task = [_weight_lowest([0.5, 0.1]), _weight_lowest([0.2, 3.0])]
    batch = batch_of([TokenRow((1, 2, 3), 1, 0), TokenRow((1, 2, 3, 4), 2, 1)], 0)
    positions = Positions(torch.zeros(4, 3), batch.labels_N, (), batch)
    assert _teacher_weights("domain", positions, (), by_task).tolist() == [
        [0, 1],
        [0, 1],
        [1, 0],
        [1, 0],
    ]
    assert _teacher_weights("fixed", positions, (0.7, 0.3), ())[0].tolist() == pytest.approx(
        [0.7, 0.3]
    )


@pytest.mark.slow
def test_the_best_single_teacher_is_found_on_validation_rows_and_named(tiny, specialist, tmp_path):
    REGISTRY.build("best-single-teacher", {}).compress(
        job([specialist, tiny], tmp_path / "x", student_base=tiny)
    )
    assert json.loads((tmp_path / "x" / "cost.json").read_text())["notes"]["teacher"] == "tiny"


@pytest.mark.slow
def test_a_named_teacher_is_used_and_an_unknown_one_refused(tiny, specialist, tmp_path):
    REGISTRY.build("response", {"teacher": "tiny-math", "batch_size": 4}).compress(
        job([tiny, specialist], tmp_path / "x", tokens=5_000)
    )
    meta = next((tmp_path / "cache" / "teachers").glob("*/meta.json"))
    assert json.loads(meta.read_text())["name"] == "tiny-math"
    with pytest.raises(CellFailed, match="the run's teachers are tiny, tiny-math"):
        REGISTRY.build("response", {"teacher": "huge"}).compress(
            job([tiny, specialist], tmp_path / "y")
        )


@pytest.mark.slow
def test_no_teacher_is_shown_more_than_its_context(tiny, short_sighted, tmp_path, monkeypatch):
    from methods.training.traces import teacher_traces

    task_job = job([short_sighted], tmp_path / "x", student_base=tiny)
    examples = training_examples({"gsm8k-mini": TASKS["gsm8k-mini"]}, task_job.source, rows=40)
    lengths = [
        len(row.ids)
        for row in encode(open_model(tiny).tokenizer, full_solution_pairs(examples), longest=2**31)[
            0
        ]
    ]
    assert min(lengths) <= 70 < max(lengths)
    REGISTRY.build("response", {"batch_size": 4}).compress(
        replace(task_job, tasks={"gsm8k-mini": TASKS["gsm8k-mini"]})
    )
    notes = json.loads((tmp_path / "x" / "cost.json").read_text())["notes"]
    assert notes["rows_too_long"] == sum(length > 70 for length in lengths)
    ranked, rows, *_ = REGISTRY.build("selective", {"by": "confidence"})._rank(task_job, examples)
    assert len(ranked) == len(rows) == sum(length <= 70 for length in lengths)
    pairs = full_solution_pairs(examples)
    tokenizer = open_model(tiny).tokenizer
    assert (
        aligned_rows(tokenizer, tokenizer, pairs, longest=2**31, teacher_longest=70)[1]
        == notes["rows_too_long"]
    )
    prompts = [len(open_model(tiny).encode(example.prompt)) for example in examples]
    written = teacher_traces(task_job, examples, samples=2, temperature=1.0, longest=30)
    unasked = [
        answers for answers, length in zip(written.texts, prompts, strict=True) if length + 30 > 70
    ]
    assert unasked and all(
        answer.stop == "length" and not answer.text for answers in unasked for answer in answers
    )
    assert all(
        answer.tokens
        for answers, length in zip(written.texts, prompts, strict=True)
        if length + 30 <= 70
        for answer in answers
    )
    with pytest.raises(
        CellFailed, match="no prompt leaves room for 69 new tokens in the 70 that short can read"
    ):
        teacher_traces(task_job, examples, samples=1, temperature=0.0, longest=69)
    from methods.training import rollout

    longest_rows, plain = [], rollout.Rollout.__call__

    def watched(self, student, rows, number):
        written_rows = plain(self, student, rows, number)
        longest_rows.append(max(len(row.ids) for row in written_rows))
        return written_rows

    monkeypatch.setattr(rollout.Rollout, "__call__", watched)
    on_policy_job = job(
        [short_sighted],
        tmp_path / "y",
        student_base=tiny,
        tasks={"gsm8k-mini": TASKS["gsm8k-mini"]},
    )
    REGISTRY.build(
        "on-policy", {"batch_size": 4, "on_policy_share": 1.0, "sampling_temperature": 5.0}
    ).compress(on_policy_job)
    assert max(longest_rows) == 70


@pytest.mark.slow
def test_shuffled_teacher_rows_train_clearly_worse(tiny, tmp_path, monkeypatch):
    """The control of the cache: the right distributions at the wrong rows must show."""
    from methods.training import teacher_cache as caching

    def last(folder, shuffled):
        plain = caching.CachedTeacher._slice
        if shuffled:

            def wrong(self, parts, row):
                names = sorted(self.index, key=lambda name: self.index[name][2])
                twins = [
                    name
                    for name in names
                    if self.index[name][2] == row.trained_tokens and name != caching.row_key(row)
                ]
                shard, start, count = self.index[twins[0] if twins else caching.row_key(row)]
                return parts[shard][start : start + count]

            monkeypatch.setattr(caching.CachedTeacher, "_slice", wrong)
        task_job = job([tiny], folder, tokens=12_000, cache=tmp_path / "shared")
        REGISTRY.build("response", {"teacher_share": 1.0, "batch_size": 4}).compress(task_job)
        monkeypatch.setattr(caching.CachedTeacher, "_slice", plain)
        lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
        return min(
            line["validation_ce"] for line in lines if "validation_ce" in line and line["step"]
        )

    # makes the cache, which the other reads: wrong rows do not pass the check at building
    right_loss = last(tmp_path / "right", False)
    assert last(tmp_path / "wrong", True) > 1.5 * right_loss
