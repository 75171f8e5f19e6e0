"""Two models held against each other: the tests by hand, the refusals, and what changed."""

import math
import re

import pytest
from gate_rows import flipped, marks, row, score, text
from lm_eval_logs import line, lines_of, write_log

from harness.errors import HarnessError
from harness.files.lines import signed_line
from harness.gate.compare import FigureChoice, changed_text, compare_models
from harness.gate.rules import Rules, Verdict
from harness.records.lm_eval_logs import read_lm_eval_model
from harness.records.own_logs import model_of_items, model_of_records

N = 500
BEFORE = marks(300, N)
AFTER = flipped(BEFORE, lose=40, win=12)


def logged(tmp_path, name, *logs):
    """Return a model of logs that are given as (task, lines)."""
    paths = [write_log(tmp_path / name, lines, task=task) for task, lines in logs]
    return read_lm_eval_model(paths)


def pair(tmp_path, before, after):
    return (
        logged(tmp_path, "base", ("letters", before)),
        logged(tmp_path, "new", ("letters", after)),
    )


def own_items(tmp_path, outcomes):
    """Return our own items of the documents that the made-up logs have."""
    rows = [
        {
            "task": "lm-eval:letters",
            "item": value["doc_id"],
            "correct": {"acc": value["acc"] == 1.0},
            **{name: value[name] for name in ("doc_hash", "target_hash", "prompt_hash")},
        }
        for value in lines_of(outcomes)
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(map(signed_line, rows)), encoding="utf-8")
    return model_of_items(path)


def finding_on(comparison, task):
    [finding] = [finding for finding in comparison.findings if finding.task == task]
    return finding


def mcnemar_by_hand(lost, won):
    """Return P(X >= lost) of lost + won fair coins."""
    flips = lost + won
    return sum(math.comb(flips, k) for k in range(lost, flips + 1)) / 2**flips


def tango_z(lost, won, n, delta):
    """Return Tango's statistic (1998) of "second less first is delta", in his closed form."""
    a, b, c = 2 * n, -lost - won + (2 * n - won + lost) * delta, -lost * delta * (1 - delta)
    p21 = (math.sqrt(b * b - 4 * a * c) - b) / (2 * a)
    return (won - lost - n * delta) / math.sqrt(n * (2 * p21 + delta * (1 - delta)))


@pytest.mark.parametrize(("lost", "won"), [(40, 12), (9, 2), (5, 5), (2, 9)])
def test_one_task_has_mcnemars_p_and_tangos_interval(tmp_path, lost, won):
    after = flipped(BEFORE, lose=lost, win=won)
    comparison = compare_models(*pair(tmp_path, lines_of(BEFORE), lines_of(after)), Rules())
    numbers = finding_on(comparison, "letters").numbers
    assert numbers["p_holm"] == pytest.approx(mcnemar_by_hand(lost, won), rel=1e-9)
    assert numbers["difference"] == pytest.approx((won - lost) / N)
    for end, z in (("difference_low", 1.959964), ("difference_high", -1.959964)):
        assert tango_z(lost, won, N, numbers[end]) == pytest.approx(z, abs=1e-4)


def test_a_loss_is_a_regression_and_says_which_items_changed(tmp_path):
    comparison = compare_models(*pair(tmp_path, lines_of(BEFORE), lines_of(AFTER)), Rules())
    assert (comparison.verdict, comparison.exit_code) == (Verdict.regressed, 1)
    [changed] = comparison.changed
    assert changed.lost == tuple(range(40))
    assert changed.won == tuple(range(N - 12, N))
    assert "lost on letters (acc): 0, 1, 2" in changed_text(comparison)
    assert "and 20 more" in changed_text(comparison)
    assert comparison.as_dict()["changed"][0]["won"] == changed.won


def test_tasks_and_their_pool_are_one_family(tmp_path):
    logs = [("letters", lines_of(BEFORE)), ("words", lines_of(BEFORE))]
    new = [("letters", lines_of(AFTER)), ("words", lines_of(flipped(BEFORE, lose=3, win=3)))]
    comparison = compare_models(
        logged(tmp_path, "base", *logs), logged(tmp_path, "new", *new), Rules()
    )
    assert finding_on(comparison, "").numbers["p_holm"] == pytest.approx(
        max(2 * mcnemar_by_hand(43, 15), 3 * mcnemar_by_hand(40, 12))
    )
    assert finding_on(comparison, "letters").numbers["p_holm"] == pytest.approx(
        3 * mcnemar_by_hand(40, 12)
    )


def test_few_items_cannot_tell_and_say_how_many_would(tmp_path):
    models = pair(tmp_path, lines_of("1101"), lines_of("1100"))
    comparison = compare_models(*models, Rules())
    assert comparison.exit_code == 3
    needed = finding_on(comparison, "letters").numbers["needed"]
    assert needed > 4
    assert f"about {needed:,} items would decide" in finding_on(comparison, "letters").told


def test_equal_logs_pass(tmp_path):
    comparison = compare_models(*pair(tmp_path, lines_of("1101"), lines_of("1101")), Rules())
    assert comparison.exit_code == 0
    assert "not one of 4 answers differs" in finding_on(comparison, "letters").told
    assert changed_text(comparison) == ""


def test_ours_and_lm_evals_are_compared_by_the_same_items(tmp_path):
    comparison = compare_models(
        own_items(tmp_path, BEFORE), logged(tmp_path, "new", ("letters", lines_of(AFTER))), Rules()
    )
    assert comparison.exit_code == 1
    numbers = finding_on(comparison, "letters").numbers
    assert numbers["p_holm"] == pytest.approx(mcnemar_by_hand(40, 12))


def test_records_without_their_items_are_compared_by_digest():
    def model(label, run, **changes):
        return model_of_records([row(label, "", scores=(score(run, **changes),))], {})

    teacher = model("teacher", BEFORE)
    assert compare_models(teacher, model("int8", AFTER), Rules()).exit_code == 1
    other = compare_models(teacher, model("int8", AFTER, items_digest="others"), Rules())
    assert other.exit_code == 4
    assert "kept without its items" in other.findings[0].told


def test_several_trainings_are_compared_by_their_net_changes():
    teacher = model_of_records([row("teacher", BEFORE)], {})
    trained = model_of_records([row("sft", AFTER, seed=seed) for seed in (1, 2)], {})
    comparison = compare_models(teacher, trained, Rules())
    assert comparison.exit_code == 1
    assert comparison.findings[0].numbers["seeds"] == 2
    assert any("checkpoints that they are" in note for note in comparison.notes)
    others = model_of_records([row("cot", AFTER, seed=seed) for seed in (4, 5)], {})
    with pytest.raises(HarnessError, match="seeds 1, 2 and cot with 4, 5"):
        compare_models(trained, others, Rules())


def test_perplexities_are_compared_by_documents():
    def model(label, factor):
        return model_of_records([row(label, "", scores=(text(factor),))], {})

    assert compare_models(model("a", 1.0), model("b", 1.2), Rules()).exit_code == 1
    assert compare_models(model("a", 1.0), model("b", 1.0001), Rules()).exit_code == 0


def test_values_are_compared_by_paired_means(tmp_path):
    values = [0.2 + 0.6 * (number % 5) / 5 for number in range(N)]
    before = [line(number, value, metric="rougeL") for number, value in enumerate(values)]
    after = [
        line(number, value - 0.15 * (number % 2), metric="rougeL")
        for number, value in enumerate(values)
    ]
    comparison = compare_models(*pair(tmp_path, before, after), Rules())
    assert comparison.exit_code == 1
    assert comparison.findings[0].numbers["difference"] == pytest.approx(-0.075)
    assert len(comparison.changed[0].lost) == N // 2


@pytest.mark.parametrize(
    ("after", "differs", "message"),
    [
        ([line(n, 1.0, document=f"another {n}") for n in range(4)], "items", "4 of 4 differ"),
        (lines_of("110"), "items", "1 of 4 differ .* 3 the same"),
        ([*lines_of("110"), line(3, 1.0, document="x")], "items", "1 of 4 differ"),
        (lines_of("1101", target_hash="other"), "items", "4 of 4 differ"),
        (lines_of("1101", prompt="chat: "), "prompts", "4 of 4 .*--other-prompts"),
        (lines_of("1101", metric="acc_norm"), "metric", "acc in the first log, acc_norm in the"),
        ([line(n, 0.0) | {"acc": [0, 1]} for n in range(4)], "metric", "4 of 4 items have no acc"),
    ],
)
def test_unlike_logs_are_not_compared(tmp_path, after, differs, message):
    comparison = compare_models(*pair(tmp_path, lines_of("1101"), after), Rules())
    assert comparison.exit_code == 4
    [finding] = comparison.findings
    assert finding.differs == differs
    assert re.search(message, finding.told)


def test_other_prompts_are_compared_where_asked(tmp_path):
    models = pair(tmp_path, lines_of(BEFORE), lines_of(AFTER, prompt="chat: "))
    assert compare_models(*models, Rules(), other_prompts=True).exit_code == 1


def filtered(strict, flexible):
    return [
        value
        for name, run in (("strict-match", strict), ("flexible-extract", flexible))
        for value in lines_of(run, metric="exact_match", filter_name=name)
    ]


def test_of_several_filters_the_first_counts_unless_another_is_named(tmp_path):
    models = pair(tmp_path, filtered(BEFORE, BEFORE), filtered(BEFORE, AFTER))
    first = compare_models(*models, Rules())
    assert first.exit_code == 0
    assert any("compared by strict-match (both logs also have" in note for note in first.notes)
    assert compare_models(*models, Rules(), FigureChoice(filter="flexible-extract")).exit_code == 1
    with pytest.raises(HarnessError, match="--filter numeric: no task has such a figure"):
        compare_models(*models, Rules(), FigureChoice(filter="numeric"))


def test_tasks_of_one_log_alone_are_said_and_no_common_task_is_refused(tmp_path):
    base = logged(tmp_path, "base", ("letters", lines_of("1")), ("words", lines_of("1")))
    new = logged(tmp_path, "new", ("letters", lines_of("1")))
    assert "only base has words: not compared" in compare_models(base, new, Rules()).notes
    with pytest.raises(HarnessError, match="words"):
        compare_models(base, new, Rules(), tasks=["words"])
    with pytest.raises(HarnessError, match="no task stands in both: base has letters, words"):
        compare_models(base, logged(tmp_path, "x", ("sums", lines_of("1"))), Rules())
