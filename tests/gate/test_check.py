"""The gate: verdicts by hand-counted flips, preconditions named, exit codes, every form of the verdict."""

import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from harness.cli.app import app
from harness.errors import HarnessError
from harness.gate import check as gate_check
from harness.gate import output
from harness.gate.check import check
from harness.gate.rules import Rules, Verdict
from harness.records.baseline import Baseline, Change, freeze, read_baseline, write_baseline
from harness.records.conditions import ModelReference
from harness.records.record import Cost, Environment, Measurement, RunRecord, TaskScore, write
from harness.records.store import read_all
from harness.reporting import report
from harness.statistics import stats

ENVIRONMENT = Environment(device="cpu", dtype="float32", threads=2, machine="made up", platform="Linux x86_64", python="3.11.0",
                          versions={"torch": "2"}, commit="c" * 40, dirty=False)  # fmt: skip
TEACHER = ModelReference(name="tiny", digest="t", weight_bytes=4_000)


def marks(right, n=1000):
    return "1" * right + "0" * (n - right)


def score(run, *, task="gsm8k-mini", **changes):
    fields = {
        "task": task, "version": "1", "kind": "generate", "primary": "strict-match", "chance": 0.0, "n": len(run),
        "value": run.count("1") / max(1, len(run)), "stderr": 0.01,
        "outcomes": {"strict-match": run}, "items_digest": "items",
        "answers_digest": run, "invalid_share": 0.0, "truncated_share": 0.0, "tokens_per_answer": 40.0, "seconds": 1.0,
    }  # fmt: skip
    return TaskScore(**{**fields, **changes})


def row(label, outcomes, *, seed=None, scores=None, **changes):
    fields = {
        "key": f"{label}-{seed}", "status": "success", "label": label, "method": label, "family": "quantization", "is_control": False,
        "trains": seed is not None, "suites": ("math",), "tasks": ("gsm8k-mini@1",), "device": "cpu", "dtype": "float32",
        "teachers": (TEACHER,), "student_recipe": "depth:0.5", "student_base": TEACHER, "seed": seed, "budget_tokens": 1000,
        "student": ModelReference(name=label, digest=f"d{label}{seed or ''}", weight_bytes=4_000 if label == "teacher" else 1_000),
        "budget_rows": 10, "path": "transformers/shared/1", "scores": scores if scores is not None else (score(outcomes),),
        "environment": ENVIRONMENT, "created": "2026-11-24T08:00:00Z", "cost": Cost(),
        "measurements": (Measurement(name="decode_speedup", value=1.9, low=1.8, high=2.0, unit="ratio", higher_is_better=True),),
    }  # fmt: skip
    return RunRecord(**{**fields, **changes})


def turned(outcomes, *, lose=0, win=0):
    """Turn the first right items wrong and the last wrong ones right."""
    found = list(outcomes)
    for at in [at for at, mark in enumerate(outcomes) if mark == "1"][:lose]:
        found[at] = "0"
    for at in [at for at, mark in enumerate(outcomes) if mark == "0"][len(outcomes) - outcomes.count("1") - win :]:
        found[at] = "1"
    return "".join(found)


def frozen(*records, margin=None):
    change = Change(reason="made up", date="2026-11-24", commit=None, rows=tuple(one.label for one in records))
    return Baseline(history=(change,), rows=tuple(freeze(one) for one in records), margin=margin)


TEACHES = row("teacher", marks(800))
SAME = row("int8", turned(marks(800), lose=20, win=20))


def verdict_of(now, *, rules=None, then=SAME):
    found = check([now], rules or Rules(), frozen(then))
    return next(one for one in found.findings if one.layer == "frozen")


# The claim against the teacher


@pytest.mark.parametrize(
    ("lose", "win", "expected"),
    [(10, 8, Verdict.passed), (40, 5, Verdict.cannot_tell), (130, 10, Verdict.missed)],
    ids=["keeps 99.75 %", "at 95.6 %", "keeps 85 %"],
)
def test_a_claim_is_judged_by_non_inferiority(lose, win, expected):
    teacher, student = (row(name, "", limited=True, scores=(score(run, task="gsm8k"),))
                        for name, run in (("teacher", marks(800)), ("int8", turned(marks(800), lose=lose, win=win))))  # fmt: skip
    checked = check([teacher, student], Rules(margin=0.95))
    [one] = checked.findings
    assert one.verdict is expected and checked.exit_code == {"passed": 0, "cannot tell": 3, "missed": 1}[expected.value]
    z = stats.score_z(stats.pairs(TEACHES.scores[0].outcomes["strict-match"], student.scores[0].outcomes["strict-match"]),
                      stats._ratio_weights(0.95, 0.0))  # fmt: skip
    assert (z > 1.645) == (expected is Verdict.passed) and (z < -1.645) == (expected is Verdict.missed)
    if expected is Verdict.cannot_tell:  # a sample of a task that has fewer items than would decide
        assert one.numbers["needed"] is None and "it would take more than gsm8k has (1,319): this task cannot decide it" in one.told


def test_the_number_of_items_that_would_decide_does_decide():
    student = turned(marks(800), lose=35, win=5)
    given = {"task": "mmlu-cloze"}
    pair = [row(label, "", limited=True, scores=(score(run, **given),)) for label, run in (("teacher", marks(800)), ("int8", student))]
    [one] = check(pair, Rules(margin=0.95)).findings
    assert one.numbers["needed"] > 1000 and f"{one.numbers['needed']:,} items would decide" in one.told
    times = -(-one.numbers["needed"] // 1000)
    assert one.verdict is Verdict.cannot_tell
    [more] = check([row("teacher", marks(800) * times), row("int8", student * times)], Rules(margin=0.95)).findings
    assert more.verdict is Verdict.passed


def test_holm_makes_a_claim_harder_among_many_rows():
    """One row passes alone at p .03 and among four of the same kind no longer, since the smallest is then held to .05 / 4."""
    student = next(
        outcomes for lose in range(10, 60)
        if 0.02 < stats.keeps([outcomes := turned(marks(800), lose=lose, win=5)], [marks(800)], 0.95)[0] < 0.04
    )  # fmt: skip
    assert check([TEACHES, row("int8", student)], Rules(margin=0.95)).verdict is Verdict.passed
    many = [row(name, student) for name in ("a", "b", "c", "d")]
    assert check([TEACHES, *many], Rules(margin=0.95)).verdict is Verdict.cannot_tell


def test_points_and_ratios_are_different_margins():
    weak = row("teacher", marks(200))
    student = row("int8", turned(marks(200), lose=15))  # loses 1.5 points: 92.5 % of a weak teacher
    assert check([weak, student], Rules(margin=0.03, points=True)).verdict is Verdict.passed
    assert check([weak, student], Rules(margin=0.98)).verdict is Verdict.missed


def test_controls_are_judged_only_when_they_are_named():
    control = row("untouched", marks(0), is_control=True)
    assert check([TEACHES, SAME, control], Rules(margin=0.9)).verdict is Verdict.passed
    assert check([TEACHES, SAME, control], Rules(margin=0.9, rows=("untouched",))).verdict is Verdict.missed
    [gone] = check([TEACHES, SAME], Rules(margin=0.9, rows=("int9",))).findings
    assert gone.verdict is Verdict.not_comparable and gone.differs == "rows"


def test_a_teacher_without_skill_gives_no_verdict():
    assert check([row("teacher", marks(0)), SAME], Rules(margin=0.95)).verdict is Verdict.cannot_tell


def test_without_a_teacher_there_is_nothing_to_claim():
    [one] = check([SAME], Rules(margin=0.95)).findings
    assert one.verdict is Verdict.not_comparable and one.differs == "teacher"


def test_nothing_checked_is_no_pass():
    assert check([TEACHES], Rules(margin=0.95)).verdict is Verdict.cannot_tell


def test_seeds_are_judged_together():
    records = [TEACHES, *(row("response", turned(marks(800), lose=lose, win=4), seed=seed) for seed, lose in ((1, 12), (2, 14), (3, 16)))]
    [one] = check(records, Rules(margin=0.95)).findings
    assert one.verdict is Verdict.passed and one.numbers["seeds"] == 3


def test_a_perplexity_may_rise_to_one_over_the_margin():
    def text(factor):
        return score("", task="wikitext", kind="perplexity", primary="", outcomes={}, n=50, value=20.0 * factor,
                     totals=tuple((-300.0 * (1 + 0.01 * (at % 3)) * factor, 100.0) for at in range(50)))  # fmt: skip

    teacher = row("teacher", "", scores=(text(1.0),))
    for factor, expected in ((1.001, Verdict.passed), (1.1, Verdict.missed)):
        [one] = check([teacher, row("int8", "", scores=(text(factor),))], Rules(margin=0.95)).findings
        assert one.verdict is expected, one.told


# The frozen items


def test_equal_answers_pass_at_once():
    one = verdict_of(SAME)
    assert one.verdict is Verdict.passed and "not one of 1,000 answers differs" in one.told


@pytest.mark.parametrize(("share", "expected"), [(0.01, Verdict.passed), (0.02, Verdict.passed), (0.05, Verdict.regressed)])
def test_injected_flips_give_the_predicted_verdicts(share, expected):
    """Losing 1 and 2 % of 1,000 items stays within the tolerance of 2 points (2 % is significant: a warning); 5 % is a regression."""
    now = row("int8", turned(SAME.scores[0].outcomes["strict-match"], lose=int(1000 * share)))
    one = verdict_of(now)
    assert one.verdict is expected and one.numbers["lost"] == 1000 * share and one.numbers["won"] == 0
    assert one.numbers["p_holm"] == pytest.approx(0.5 ** (1000 * share))
    assert one.warning == (expected is Verdict.passed)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, Verdict.passed), (0.01, Verdict.passed), (0.02, Verdict.passed), (0.05, Verdict.regressed)]
)
def test_flips_injected_into_real_records_give_the_predicted_verdicts(share, expected):
    """Every seedless row of a committed study against itself with right answers turned wrong; rows near zero have none to lose."""
    records, problems = read_all(Path(__file__).parents[2] / "results" / "compression-tiny")
    then = [one for one in records if one.seed is None and not one.is_control and one.scores[0].value > 0.7]
    assert not problems and len(then) >= 8

    def changed(one):
        if one.method == "teacher" or not share:
            return one
        worse = turned(one.scores[0].outcomes[one.scores[0].primary], lose=round(share * one.scores[0].n))
        value = worse.count("1") / len(worse)
        outcomes = {**one.scores[0].outcomes, one.scores[0].primary: worse}
        first = one.scores[0].model_copy(update={"outcomes": outcomes, "value": value, "answers_digest": "changed"})
        return one.model_copy(update={"scores": (first, *one.scores[1:])})

    checked = check([changed(one) for one in then], Rules(), frozen(*then))
    touched = [one for one in checked.findings if one.layer == "frozen" and one.task == then[0].scores[0].task and one.row != "teacher"]
    assert {one.verdict for one in touched} == {expected} and len(touched) >= 7
    assert checked.verdict is expected


def test_flips_both_ways_alike_are_no_regression():
    now = row("int8", turned(SAME.scores[0].outcomes["strict-match"], lose=50, win=50))
    one = verdict_of(now)
    assert one.verdict is Verdict.passed and not one.warning and one.numbers["p_holm"] > 0.5


@pytest.mark.parametrize("limited", [True, False])
def test_few_items_cannot_tell_and_say_how_many_would_where_the_task_has_them(limited):
    runs = marks(60, 100), turned(marks(60, 100), lose=6, win=6)
    then, now = (row("int8", "", limited=limited, scores=(score(run, task="gsm8k"),)) for run in runs)
    one = verdict_of(now, then=then)
    assert one.verdict is Verdict.cannot_tell
    needed = stats.items_for(0.12, 0.05, alpha=0.01)
    assert (one.numbers["needed"], one.numbers["task_items"]) == ((needed, 1_319) if limited else (None, 100))
    assert (f"about {needed:,} items would decide" if limited else "more than gsm8k has (100)") in one.told


def test_exact_takes_no_flip_on_the_same_machine_only():
    now = row("int8", turned(SAME.scores[0].outcomes["strict-match"], lose=1))
    assert verdict_of(now).verdict is Verdict.passed
    assert verdict_of(now, rules=Rules(exact=True)).verdict is Verdict.regressed
    elsewhere = now.model_copy(update={"environment": ENVIRONMENT.model_copy(update={"machine": "another"})})
    assert verdict_of(elsewhere, rules=Rules(exact=True)).verdict is Verdict.passed


@pytest.mark.parametrize(
    ("differs", "changes"),
    [
        ("dtype", {"dtype": "bfloat16"}),
        ("device", {"device": "cuda"}),
        ("path", {"path": "transformers/plain/1"}),
        ("teacher", {"teachers": (ModelReference(name="other", digest="other"),)}),
        ("student", {"student_recipe": "depth:0.25"}),
        ("limited", {"limited": True}),
        ("prompts", {"chat": True}),
        ("task version", {"scores": (score(marks(800), version="2"),)}),
        ("n", {"scores": (score(marks(790, 990)),)}),
        ("items", {"scores": (score(marks(800), items_digest="others"),)}),
        ("tasks", {"scores": (score(marks(800), task="mmlu-mini"),)}),
        ("extractor", {"scores": (score(marks(800), primary="numeric", outcomes={"numeric": marks(799)}, answers_digest="x"),)}),
        ("invalid share", {"scores": (score(marks(799), invalid_share=0.1),)}),
        ("truncated share", {"scores": (score(marks(799), truncated_share=0.1),)}),
        ("answer length", {"scores": (score(marks(799), tokens_per_answer=50.0),)}),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_named(differs, changes):
    now = row("int8", marks(800)).model_copy(update=changes)
    checked = check([now], Rules(), frozen(row("int8", marks(800))))
    one = next(one for one in checked.findings if one.layer == "frozen")
    assert one.verdict is Verdict.not_comparable and one.differs == differs, one.told
    assert checked.exit_code == 4


def test_a_missing_row_and_a_failed_one_do_not_pass():
    [gone] = check([TEACHES], Rules(), frozen(SAME)).findings
    assert gone.verdict is Verdict.not_comparable and "int8 has no record" in gone.told
    broken = row("int8", "", scores=(), status="failed", reason="out of memory")
    checked = check([TEACHES, broken], Rules(), frozen(SAME))
    assert [one.differs for one in checked.findings] == ["status"] and checked.exit_code == 4


def test_a_skipped_row_is_noted_unless_it_was_frozen():
    skipped = row("int8", "", scores=(), status="skipped", reason="pip install '.[quant]'")
    checked = check([TEACHES, row("int4", marks(799)), skipped], Rules(margin=0.9))
    assert checked.verdict is Verdict.passed and any("skipped" in note for note in checked.notes)
    assert check([TEACHES, skipped], Rules(), frozen(SAME)).verdict is Verdict.not_comparable


def test_a_new_row_is_said_and_judged_by_its_claim_alone():
    checked = check([TEACHES, SAME, row("int4", marks(795))], Rules(margin=0.95), frozen(SAME))
    assert any("int4" in note and "not in the baseline" in note for note in checked.notes) and checked.verdict is Verdict.passed


def test_bytes_are_compared_exactly():
    for size, expected, warned in ((1_000, Verdict.passed, False), (1_001, Verdict.regressed, False), (999, Verdict.passed, True)):
        now = SAME.model_copy(update={"student": ModelReference(name="int8", digest="dint8", weight_bytes=size)})
        one = next(one for one in check([now], Rules(), frozen(SAME)).findings if one.layer == "bytes")
        assert (one.verdict, one.warning) == (expected, warned)


def test_several_seeds_count_an_item_once_by_its_net_loss():
    then = [row("response", marks(800), seed=seed) for seed in (1, 2)]
    now = [row("response", turned(marks(800), lose=30), seed=1), row("response", turned(marks(800), lose=20), seed=2)]
    one = next(one for one in check(now, Rules(), frozen(*then)).findings if one.layer == "frozen")
    assert one.numbers["lost"] == 30 and one.numbers["drop"] == pytest.approx(0.025) and one.verdict is Verdict.regressed


def test_holm_keeps_an_unchanged_run_of_many_rows_from_alarm():
    draw = random.Random(3)

    def noise(outcomes):
        return "".join("01"[mark == "0"] if draw.random() < 0.1 else mark for mark in outcomes)

    base = "".join("1" if draw.random() < 0.5 else "0" for _ in range(1000))
    then = [row(f"m{at}", base) for at in range(40)]
    now = [row(f"m{at}", noise(base)) for at in range(40)]
    assert check(now, Rules(), frozen(*then)).verdict is not Verdict.regressed


# What a reader with fresh eyes found


def test_a_store_is_judged_by_its_newest_run(tmp_path):
    """A store keeps every older success; a newer failure of the same row must not hide behind it."""
    broken = row("int8", "", scores=(), status="failed", reason="out of memory", key="new")
    for one in (TEACHES, SAME, broken):
        write(tmp_path / "cells" / one.key[:24] / "record.json", one)
    (tmp_path / "runs").mkdir()
    for name, keys in (("20260101-000000-1", ["teacher-None", "int8-None"]), ("20260102-000000-1", ["teacher-None", "new"])):
        (tmp_path / "runs" / f"{name}.json").write_text(json.dumps({"kind": "run", "cells": keys}))
    done = harness("check", tmp_path, "--margin", "0.9")
    assert done.return_value == 4 and "out of memory" in done.output
    assert harness("check", tmp_path / "runs" / "20260101-000000-1.json", "--margin", "0.9").return_value == 0


def test_two_records_of_one_row_and_seed_are_refused(place):
    write(place / "again.json", row("int8", marks(100), key="again"))
    done = harness("check", place)
    assert "two records of int8; name one run's file" in str(done.exception)
    with pytest.raises(HarnessError, match="two records of int8"):
        check([SAME, SAME], Rules(margin=0.9))


def test_a_row_that_nothing_judged_is_no_pass():
    bad = row("int3", marks(100))
    checked = check([TEACHES, SAME, bad], Rules(), frozen(TEACHES, SAME))
    assert checked.exit_code == 3 and any(one.row == "int3" and "no --margin" in one.told for one in checked.findings)
    assert check([TEACHES, SAME, bad], Rules(rows=("int3",)), frozen(TEACHES, SAME)).exit_code == 3
    skipped = row("int3", "", scores=(), status="skipped", reason="pip install x")
    assert check([TEACHES, skipped], Rules(rows=("int3",)), frozen(TEACHES)).exit_code == 4
    seeds = [row("response", marks(800), seed=seed) for seed in (1, 2)]
    assert check([TEACHES, *seeds], Rules(), frozen(TEACHES, seeds[0])).exit_code == 3


def text(factor, *, documents=50):
    totals = tuple((-300.0 * (1 + 0.01 * (at % 3)) * factor, 100.0) for at in range(documents))
    return score("", task="wikitext", kind="perplexity", primary="", outcomes={}, n=documents, value=20.0 * factor, totals=totals,
                 answers_digest=str(factor))  # fmt: skip


def test_perplexities_of_all_seeds_are_judged():
    teacher = row("teacher", "", scores=(text(1.0),))
    seeds = [row("response", "", seed=seed, scores=(text(factor),)) for seed, factor in ((1, 1.0001), (2, 1.1), (3, 1.2))]
    assert check([teacher, *seeds], Rules(margin=0.95)).verdict is Verdict.cannot_tell  # three trainings that far apart say little
    agree = [row("response", "", seed=seed, scores=(text(factor),)) for seed, factor in ((1, 1.09), (2, 1.1), (3, 1.11))]
    assert check([teacher, *agree], Rules(margin=0.95)).verdict is Verdict.missed
    then = [row("response", "", seed=seed, scores=(text(1.0),)) for seed in (1, 2, 3)]
    one = next(one for one in check(seeds, Rules(), frozen(*then)).findings if one.layer == "frozen")
    assert one.verdict is Verdict.regressed
    same = next(one for one in check(then, Rules(), frozen(*then)).findings if one.layer == "frozen")
    assert same.verdict is Verdict.passed


def test_a_document_without_a_likelihood_gives_no_verdict_and_valid_json():
    bad = text(1.0)
    bad = bad.model_copy(update={"totals": ((float("-inf"), 100.0), *bad.totals[1:]), "value": float("inf"), "answers_digest": "x"})
    records = [row("teacher", "", scores=(text(1.0),)), row("int8", "", scores=(bad,))]
    checked = check(records, Rules(margin=0.95), frozen(row("int8", "", scores=(text(1.0),))))
    assert checked.verdict is Verdict.cannot_tell
    assert "NaN" not in output.as_json(checked) and "Infinity" not in output.as_json(checked)
    assert "Infinity" not in report.as_json(report.made_of(records))


def test_one_document_and_one_item_break_nothing():
    records = [row("teacher", "", scores=(text(1.0, documents=1),)), row("int8", "", scores=(text(1.1, documents=1),))]
    assert check(records, Rules(margin=0.95)).verdict is Verdict.cannot_tell and "x" in report.markdown(records)
    choices = [row(label, "", scores=(score(run, chance=0.25, kind="choose"),)) for label, run in (("teacher", "1"), ("int8", "0"))]
    assert "int8" in report.markdown(choices)
    for counts in (stats.Pairs(0, 1, 0, 0), stats.Pairs(1, 0, 0, 0), stats.Pairs(0, 3, 0, 0)):
        assert stats.retention_above_chance(counts, 0.25).reason and stats.retention(counts) is not None


def test_net_losses_count_by_their_size():
    """110 items lost by all five seeds, 160 won by one seed each: the score fell by 6.5 points, whatever the signs' numbers are."""
    then = [row("response", marks(900, 1200), seed=seed) for seed in range(1, 6)]
    lost = turned(marks(900, 1200), lose=110)
    gains = [lost[:900] + "".join("1" if 32 * seed <= at < 32 * (seed + 1) else "0" for at in range(300)) for seed in range(5)]
    now = [row("response", run, seed=seed + 1) for seed, run in enumerate(gains)]
    one = next(one for one in check(now, Rules(), frozen(*then)).findings if one.layer == "frozen")
    assert (one.numbers["lost"], one.numbers["won"]) == (110, 160) and one.verdict is Verdict.regressed


def test_seeds_that_were_trained_anew_must_agree():
    def made(loses, digest):
        return [
            row("response", turned(marks(800), lose=lose), seed=seed,
                student=ModelReference(name="r", digest=f"{digest}{seed}", weight_bytes=1))
            for seed, lose in enumerate(loses, 1)
        ]  # fmt: skip

    then = frozen(*made((0, 0, 0), "old"))
    apart = next(one for one in check(made((150, 0, 0), "new"), Rules(), then).findings if one.layer == "frozen")
    assert apart.verdict is Verdict.cannot_tell and "do not agree" in apart.told
    together = next(one for one in check(made((50, 55, 48), "new"), Rules(), then).findings if one.layer == "frozen")
    assert together.verdict is Verdict.regressed


@pytest.mark.parametrize(
    "rules", [{"margin": 1.0}, {"margin": 1.0, "points": True}, {"margin": 1.2}, {"margin": 0.0}, {"alpha": 0.0}, {"alpha": 1.0},
              {"frozen_alpha": 0.0}, {"detect": 0.0}, {"tolerance": -0.1}],
)  # fmt: skip
def test_rules_that_no_items_could_answer_are_one_line(rules):
    """A margin of 1 asks what no number of items shows, unless the student is better."""
    with pytest.raises(HarnessError, match="give"):
        check([TEACHES, row("r", marks(800))], Rules(**rules))


def test_few_seeds_widen_a_claim():
    """Two seeds that are 6 points apart around the margin: the plain bootstrap would call a passing one in nine; here it cannot tell."""
    one, other = turned(marks(800), lose=4), turned(marks(800), lose=40)
    assert check([TEACHES, row("r", one, seed=1), row("r", other, seed=2)], Rules(margin=0.95)).verdict is Verdict.cannot_tell


def test_frozen_controls_are_judged_only_when_they_are_named():
    then = row("untouched", marks(300), is_control=True)
    now = row("untouched", marks(100), is_control=True)
    assert check([TEACHES, SAME, now], Rules(), frozen(TEACHES, SAME, then)).verdict is Verdict.passed
    assert check([TEACHES, SAME], Rules(), frozen(TEACHES, SAME, then)).verdict is Verdict.passed
    assert check([TEACHES, now], Rules(rows=("untouched",)), frozen(TEACHES, SAME, then)).verdict is Verdict.regressed


def test_a_teacher_under_other_conditions_is_named_by_what_differs():
    four = TEACHES.model_copy(update={"environment": ENVIRONMENT.model_copy(update={"threads": 4})})
    [one] = check([four, SAME], Rules(margin=0.95)).findings
    assert one.verdict is Verdict.not_comparable and one.differs == "threads" and "4 of the teacher, 2 of the row" in one.told


def test_exact_takes_a_won_item_for_a_flip_too():
    now = row("int8", turned(SAME.scores[0].outcomes["strict-match"], win=1))
    assert verdict_of(now, rules=Rules(exact=True)).verdict is Verdict.regressed


def test_every_scenario_must_be_fast():
    slow = Measurement(name="decode_speedup", value=0.5, low=0.4, high=0.6, unit="ratio", higher_is_better=True, condition="batch 64")
    both = SAME.model_copy(update={"measurements": (*SAME.measurements, slow)})
    assert check([TEACHES, both], Rules(faster=1.5)).verdict is Verdict.missed
    assert check([TEACHES, SAME], Rules(margin=0.5), measured=[("new", [])]).verdict is Verdict.not_comparable


def test_a_terminals_colours_break_no_xml():
    checked = check([TEACHES, row("int8", "", scores=(), status="failed", reason="\x1b[31mred\x1b[0m | pipe")], Rules(margin=0.9))
    assert ElementTree.fromstring(output.junit(checked).partition("?>")[2]).get("errors") == "1"
    assert r"\| pipe" in output.markdown(checked)


def test_a_defect_of_ours_is_no_regression(place, monkeypatch, capsys):
    from harness.cli import app as cli_app

    monkeypatch.setattr(gate_check, "check", lambda *given, **named: 1 / 0)
    monkeypatch.setattr("sys.argv", ["harness", "check", str(place)])
    with pytest.raises(SystemExit) as ended:
        cli_app.main()
    assert ended.value.code == 2 and "ZeroDivisionError" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file, and a folder is needed" in str(harness("check", place, "--junit", tmp_path / "file" / "j.xml").exception)
    (place / "folder.json").mkdir()
    assert "folder.json: a folder stands where a file should be" in str(harness("check", place).exception)


# Speed


@pytest.mark.parametrize(("least", "expected"), [(1.5, Verdict.passed), (1.9, Verdict.cannot_tell), (2.5, Verdict.missed)])
def test_speed_is_claimed_by_the_interval_of_its_ratio(least, expected):
    checked = check([TEACHES, SAME], Rules(faster=least))
    assert [one.verdict for one in checked.findings] == [expected]


def test_a_row_that_was_not_timed_has_no_speed():
    [one] = check([TEACHES, SAME.model_copy(update={"measurements": ()})], Rules(faster=1.0)).findings
    assert one.verdict is Verdict.not_comparable and one.differs == "timing"


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.97, 1.02, Verdict.passed), (0.90, 1.01, Verdict.cannot_tell), (0.80, 0.90, Verdict.missed)]
)
def test_two_models_timed_by_turns_in_one_job(low, high, expected):
    one = Measurement(name="decode_speedup", value=(low + high) / 2, low=low, high=high, unit="ratio", higher_is_better=True)
    assert check([TEACHES, SAME], Rules(margin=0.9), measured=[("new", [one])]).verdict is expected


# Forms


def three():
    worse = row("int4", turned(marks(800), lose=130))
    unclear = row("nf4", turned(marks(800), lose=40, win=5))
    return check([TEACHES, SAME, worse, unclear], Rules(margin=0.95))


def test_the_gravest_verdict_is_the_verdict():
    assert three().verdict is Verdict.missed and three().exit_code == 1


def test_junit_is_read_by_others():
    tree = ElementTree.fromstring(output.junit(three()).partition("?>")[2])
    assert (tree.get("tests"), tree.get("failures"), tree.get("skipped"), tree.get("errors")) == ("3", "1", "1", "0")
    failed = next(case for case in tree if case.find("failure") is not None)
    assert failed.get("classname") == "harness.int4" and "retention" in failed.find("failure").get("message")


def test_json_holds_everything():
    data = json.loads(output.as_json(three()))
    assert data["verdict"] == "missed" and data["exit_code"] == 1 and {one["row"] for one in data["findings"]} == {"int8", "int4", "nf4"}
    assert all(one["numbers"]["n"] == 1000 for one in data["findings"])


def test_markdown_and_annotations_name_the_row():
    text = output.markdown(three())
    assert re.search(r"\| \*\*MISSED\*\* +\| int4", text) and "alpha 0.05" in text
    lines = output.annotations(three())
    assert len(lines) == 2 and lines[0].startswith("::error title=int4 gsm8k-mini [claim]%3A missed::") and lines[1].startswith("::warning")
    assert output.text(three()).splitlines()[-2] == "missed: 1 missed, 1 cannot tell, 1 passed"


# The command


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "records"
    for one in (TEACHES, SAME):
        write(folder / f"{one.label}.json", one)
    return folder


def harness(*line):
    return CliRunner().invoke(app, [str(part) for part in line], standalone_mode=False)


def test_exit_codes_and_files(place, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    done = harness("check", place, "--junit", tmp_path / "j.xml", "--json", tmp_path / "v.json", "--annotate")
    assert done.return_value == 0 and "passed: 1 passed" in done.output
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("failures") == "0"
    assert json.loads((tmp_path / "v.json").read_text())["rules"]["margin"] == 0.95
    assert "### compression-harness: passed" in (tmp_path / "summary.md").read_text()
    assert harness("check", place, "--margin", "0.999").return_value == 3
    write(place / "int8.json", row("int8", turned(marks(800), lose=200)))
    done = harness("check", place, "--annotate")
    assert done.return_value == 1 and "::error title=int8" in done.output


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--margin", "95"], "--margin 95: give the share"),
        (["--margin", "much"], "--margin much"),
        (["--alpha", "2"], "--alpha 2: give a share"),
        (["--tolerance", "-1"], "--tolerance -1: give points"),
        (["--baseline", "nothing.json"], "no baseline at nothing.json; type: harness baseline update"),
        (["--measured", "nothing.json"], "not a file of harness measure"),
    ],
)
def test_bad_input_is_one_line(place, given, said):
    done = harness("check", place, *given)
    assert said in str(done.exception) and "\n" not in str(done.exception)


def test_an_empty_folder_and_a_torn_record_are_named(tmp_path, place):
    (tmp_path / "empty").mkdir()
    assert "no records in" in str(harness("check", tmp_path / "empty").exception)
    (place / "torn.json").write_text("{")
    assert "torn.json: not a whole JSON file" in str(harness("check", place).exception)


@pytest.mark.parametrize(
    ("text", "found"), [("0.95", (0.95, False)), ("95%", (0.95, False)), ("2points", (0.02, True)), ("1.5 pp", (0.015, True))]
)
def test_margins_are_read(text, found):
    from harness.gate.inputs import parse_margin

    assert parse_margin(text) == pytest.approx(found)


# Baselines


def test_a_baseline_is_frozen_shown_compared_and_moved(place, tmp_path):
    path = tmp_path / "b.json"
    done = harness("baseline", "update", place, "--baseline", path, "--reason", "first", "--margin", "0.9")
    assert done.return_value == 0 and "2 rows frozen" in done.output, done.exception
    before = path.read_bytes()
    assert (
        harness("baseline", "update", place, "--baseline", tmp_path / "again.json", "--reason", "first", "--margin", "0.9").return_value
        == 0
    )
    assert (tmp_path / "again.json").read_bytes() == before  # the same records give the same bytes
    found = read_baseline(path)
    assert found.margin == 0.9 and found.rows[1].scores[0].outcomes == SAME.scores[0].outcomes["strict-match"]
    assert harness("check", place, "--baseline", path).return_value == 0
    shown = harness("baseline", "show", path).output
    assert "int8" in shown and "first" in shown and "90 % must be kept" in shown
    write(place / "int8.json", row("int8", turned(SAME.scores[0].outcomes["strict-match"], lose=60)))
    diff = harness("baseline", "diff", path, place).output
    assert "60/0" in diff and "0.8000 -> 0.7400" in diff
    checked = harness("check", place, "--baseline", path)
    assert checked.return_value == 1 and "60 lost and 0 won" in checked.output
    refused = harness("baseline", "update", place, "--baseline", path, "--reason", "worse")
    assert "does not move" in str(refused.exception) and path.read_bytes() == before
    assert harness("baseline", "update", place, "--baseline", path, "--reason", "worse, and why", "--accept-regression").return_value == 0
    moved = read_baseline(path)
    assert [one.reason for one in moved.history] == ["first", "worse, and why"] and moved.history[1].accepted == (
        "int8 gsm8k-mini [frozen]",
    )
    assert moved.margin == 0.9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limited": True}, "run it again without --limit"),
        ({"environment": ENVIRONMENT.model_copy(update={"dirty": True})}, "working tree with changes"),
        ({"status": "failed", "reason": "nan at step 3", "scores": ()}, "nan at step 3"),
        ({"teachers": (ModelReference(name="o", digest="o"),)}, "2 different teachers"),
    ],
)
def test_no_baseline_is_made_of_what_nobody_should_trust(place, tmp_path, changes, said):
    write(place / "response.json", row("response", marks(700)).model_copy(update=changes))
    done = harness("baseline", "update", place, "--baseline", tmp_path / "b.json", "--reason", "x")
    assert said in str(done.exception) and not (tmp_path / "b.json").exists()


def test_rows_of_another_teacher_never_join_a_baseline(place, tmp_path):
    path = tmp_path / "b.json"
    write(place / "int4.json", row("int4", marks(790)))
    harness("baseline", "update", place, "--baseline", path, "--reason", "first")
    other = ModelReference(name="other", digest="o", weight_bytes=4_000)
    for label in ("teacher", "int8", "int4"):
        write(place / f"{label}.json", row(label, marks(800), teachers=(other,)))
    done = harness("baseline", "update", place, "--baseline", path, "--reason", "x", "--rows", "int4")
    assert "another teacher than these records" in str(done.exception)


def test_frozen_rows_are_dropped_only_when_asked(place, tmp_path):
    path = tmp_path / "b.json"
    write(place / "int4.json", row("int4", marks(790)))
    harness("baseline", "update", place, "--baseline", path, "--reason", "first")
    (place / "int4.json").unlink()
    done = harness("baseline", "update", place, "--baseline", path, "--reason", "fewer")
    assert "holds int4, of which there is no record" in str(done.exception)
    assert harness("baseline", "update", place, "--baseline", path, "--reason", "fewer", "--drop").return_value == 0
    assert {one.label for one in read_baseline(path).rows} == {"teacher", "int8"}


def test_a_reason_is_asked_for(place, tmp_path):
    assert "--reason is empty" in str(harness("baseline", "update", place, "--baseline", tmp_path / "b.json").exception)


def test_an_edited_baseline_is_found(tmp_path):
    path = tmp_path / "b.json"
    write_baseline(path, frozen(SAME, margin=0.95))
    path.write_text(path.read_text().replace('"margin": 0.95', '"margin": 0.5'))
    assert "edited by hand" in str(harness("check", tmp_path, "--baseline", path).exception)


def test_a_baseline_of_one_row_moves_that_row_alone(place, tmp_path):
    path = tmp_path / "b.json"
    write(place / "int4.json", row("int4", marks(790)))
    harness("baseline", "update", place, "--baseline", path, "--reason", "first")
    write(place / "int4.json", row("int4", marks(795)))
    write(place / "int8.json", row("int8", marks(799)))
    assert harness("baseline", "update", place, "--baseline", path, "--reason", "better int4", "--rows", "int4").return_value == 0
    values = {one.label: one.scores[0].value for one in read_baseline(path).rows}
    assert values == {"teacher": 0.8, "int4": 0.795, "int8": 0.8}


def test_ten_methods_fit_into_git(tmp_path):
    draw = random.Random(1)
    rows = [row(f"m{at}", "".join(draw.choice("01") for _ in range(1319))) for at in range(10)]
    write_baseline(tmp_path / "b.json", frozen(TEACHES, *rows))
    assert (tmp_path / "b.json").stat().st_size < 200_000


# pytest's plugin


def test_rows_are_tests(place, tmp_path, pytester_run):
    path = tmp_path / "b.json"
    harness("baseline", "update", place, "--baseline", path, "--reason", "first", "--margin", "0.9")
    done = pytester_run("--harness-baseline", path, "--harness-records", place, "-v")
    assert done.returncode == 0 and "int8 gsm8k-mini [frozen] PASSED" in done.stdout, done.stdout
    write(place / "int8.json", row("int8", turned(SAME.scores[0].outcomes["strict-match"], lose=60)))
    done = pytester_run("--harness-baseline", path, "--harness-records", place)
    assert done.returncode == 1 and "regressed: 80.0 % -> 74.0 %, 60 lost and 0 won" in done.stdout, done.stdout
    done = pytester_run("--harness-records", place, "--harness-margin", "0.925", "--harness-cannot-tell", "skip")
    assert done.returncode == 0 and "skipped" in done.stdout, done.stdout
    assert pytester_run("--harness-records", tmp_path / "none", "--harness-margin", "0.9").returncode == 4
    assert pytester_run("--harness-rows", "int8").returncode == 4  # results/runs is not there
    (place / "int8.json").unlink()
    done = pytester_run("--harness-records", place, "--harness-margin", "0.9")
    assert done.returncode == 1 and "no row was checked" in done.stdout  # a check of nothing is no pass


@pytest.fixture
def pytester_run(tmp_path):
    import subprocess
    import sys

    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "pytest.ini").write_text("[pytest]\n")

    def run(*line):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *map(str, line)]
        return subprocess.run(command, cwd=tmp_path / "users", capture_output=True, text=True, check=False)

    return run


def test_findings_have_names_that_say_what_was_checked():
    assert gate_check.Finding(layer="claim", row="int8", task="t", verdict=Verdict.passed, told="x").name == "int8 t [claim]"
