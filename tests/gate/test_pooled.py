"""Decisions pooled over a row's tasks: of claims and of frozen items."""

import subprocess
import sys

import pytest
from claim_rows import BAD, GOOD, NEAR, TWO, choices, layer, pair, row, score
from gate_rows import flipped, frozen, marks
from typer.testing import CliRunner

from harness.cli.app import app
from harness.errors import HarnessError
from harness.gate import output
from harness.gate.check import check
from harness.gate.rules import Rules, Verdict
from harness.records.baseline import write_baseline
from harness.records.record import (
    write_record,
)
from harness.statistics import means, stats


def test_what_two_tasks_cannot_tell_their_items_together_may():
    checked = check([TWO, NEAR], Rules(margin=0.93))
    [pooled] = layer(checked, "pooled")
    assert {finding.verdict for finding in layer(checked, "claim")} == {
        Verdict.cannot_tell
    } and pooled.verdict is Verdict.passed
    assert (
        pooled.numbers["n"] == 600
        and pooled.numbers["tests"] == 3
        and pooled.speaks_for == ("gsm8k-mini", "mmlu-mini")
    )
    assert (
        "gsm8k-mini (300) and mmlu-mini (300), every item alike: retention above chance"
        in pooled.told
    )
    assert checked.verdict is Verdict.cannot_tell and all(
        finding.counts for finding in checked.findings
    )
    settled = check([TWO, NEAR], Rules(margin=0.93, decide="pooled"))
    assert settled.verdict is Verdict.passed and settled.exit_code == 0
    assert [finding.counts for finding in layer(settled, "claim")] == [False, False]
    assert (
        "over its tasks together" in settled.passed_means
        and "over its tasks together" not in checked.passed_means
    )
    assert output.summary(settled) == "passed: 1 passed; 2 undecided findings do not count"
    assert output.terminal_text(settled).count("(information: it does not count)") == 2
    assert [line.split(" ")[0] for line in output.annotations(settled)] == ["::notice", "::notice"]


def test_the_pooled_test_is_that_of_all_items_above_their_chance():
    [pooled] = layer(check([TWO, NEAR], Rules(margin=0.93)), "pooled")
    runs = [
        [
            float(mark) - chance
            for score, chance in zip(record.scores, (0.0, 0.25), strict=True)
            for mark in score.outcomes["m"]
        ]
        for record in (NEAR, TWO)
    ]
    assert (
        pooled.numbers["p_met"]
        == means.retention_test([runs[0]], [runs[1]], 0.93, ((300, 1 / 600), (300, 1 / 600)))[0]
    )
    kept, had = (sum(run) for run in runs)
    assert (
        pooled.numbers["value"] == pytest.approx(kept / had)
        and pooled.numbers["low"] < kept / had < pooled.numbers["high"]
    )


def test_pooled_tests_stand_in_the_family_of_the_single_ones():
    checked = check([TWO, NEAR, pair(7, 3, label="int4")], Rules(margin=0.93))
    tested = [finding for finding in checked.findings if "p_met" in finding.numbers]
    assert len(tested) == 6 == tested[0].numbers["tests"]
    adjusted = stats.holm([finding.numbers["p_met"] for finding in tested])
    assert adjusted == [finding.numbers["p_met_holm"] for finding in tested]


def test_a_pooled_miss_counts_and_a_pooled_doubt_does_not():
    drifting = pair(15, 15)  # each task alone stands near the margin
    checked = check([TWO, drifting], Rules(margin=0.98))
    assert {one.verdict for one in layer(checked, "claim")} == {Verdict.cannot_tell}
    assert (
        layer(checked, "pooled")[0].verdict is Verdict.missed and checked.verdict is Verdict.missed
    )
    doubt = check([TWO, NEAR], Rules(margin=0.95))
    assert (
        layer(doubt, "pooled")[0].verdict is Verdict.cannot_tell
        and not layer(doubt, "pooled")[0].counts
    )
    assert doubt.verdict is Verdict.cannot_tell and all(one.counts for one in layer(doubt, "claim"))
    alone = check(
        [one.model_copy(update={"scores": one.scores[:1]}) for one in (TWO, pair(0, 40))],
        Rules(margin=0.9),
    )
    assert alone.verdict is Verdict.passed and not layer(alone, "pooled")  # one task is no pool


def test_a_task_that_is_missed_counts_whatever_the_pool_says():
    teacher = row("teacher", score(marks(8000, 10_000)), choices(marks(240, 300)))
    student = row("int8", score(marks(7990, 10_000)), choices(flipped(marks(240, 300), lose=60)))
    checked = check([teacher, student], Rules(margin=0.9, decide="pooled"))
    assert (
        layer(checked, "pooled")[0].verdict is Verdict.passed and checked.verdict is Verdict.missed
    )


def test_a_pool_speaks_for_its_tasks_alone():
    """Documents that cannot tell still count.

    Nothing can decide a task on which the teacher is at chance.
    """
    documents = tuple((-300.0 - number % 3, 100.0) for number in range(2))
    text = score(
        "11", "wikitext", kind="perplexity", primary="", outcomes={}, value=20.0, totals=documents
    )
    worse = text.model_copy(
        update={
            "totals": tuple((a - 3 - 8 * number, b) for number, (a, b) in enumerate(documents)),
            "answers_digest": "x",
        }
    )
    guessed = [score(marks(right, 300), "arc", chance=0.25) for right in (70, 75)]

    def with_third(scores):
        added = [
            record.model_copy(update={"scores": (*record.scores, third)})
            for record, third in zip((TWO, pair(4, 4)), scores, strict=True)
        ]
        return check(added, Rules(margin=0.93, decide="pooled"))

    doubtful, at_chance = with_third((text, worse)), with_third(guessed)
    assert (
        layer(doubtful, "pooled")[0].verdict is Verdict.passed
        and doubtful.verdict is Verdict.cannot_tell
    )
    assert "without wikitext" in layer(doubtful, "pooled")[0].told
    assert (
        at_chance.verdict is Verdict.passed and "without arc" in layer(at_chance, "pooled")[0].told
    )


@pytest.mark.parametrize(
    ("weights", "value", "message"),
    [
        ("items", (0.9 * 1000 * 0.8 + 100 * 0.8) / (1100 * 0.8), "every item alike"),
        ("tasks", (0.9 + 1.0) / 2, "every task alike"),
        ((("a", 1.0), ("b", 3.0)), 0.25 * 0.9 + 0.75, "a 25 %, b 75 %"),
    ],
)
def test_tasks_weigh_as_they_are_told(weights, value, message):
    teacher = row("teacher", score(marks(800), "a"), score(marks(80, 100), "b"))
    student = row("int8", score(marks(720), "a"), score(marks(80, 100), "b"))
    [pooled] = layer(check([teacher, student], Rules(margin=0.5, task_weights=weights)), "pooled")
    assert pooled.numbers["value"] == pytest.approx(value) and message in pooled.told
    before = frozen(teacher, row("int8", *teacher.scores))
    [again] = layer(check([teacher, student], Rules(task_weights=weights), before), "pooled frozen")
    assert again.numbers["drop"] == pytest.approx(0.8 * (1 - value)) and message in again.told


def test_seeds_are_pooled_run_by_run():
    records = [TWO, *(pair(lose, lose, seed=seed) for seed, lose in ((1, 5), (2, 6), (3, 7)))]
    [pooled] = layer(check(records, Rules(margin=0.9)), "pooled")
    assert pooled.numbers["seeds"] == 3 and pooled.verdict is Verdict.passed


def test_frozen_items_are_pooled_by_mcnemar():
    before = frozen(TWO, pair(0, 0))
    small = check([TWO, pair(14, 14)], Rules(), before)
    [pooled] = layer(small, "pooled frozen")
    assert (
        pooled.numbers["p_holm"]
        == stats.holm([stats.mcnemar(14, 4)] * 2 + [stats.mcnemar(28, 8)])[2]
    )
    assert {
        finding.numbers["p_holm"] for finding in layer(small, "frozen") if finding.row == "int8"
    } == {2 * stats.mcnemar(14, 4)}
    # neither task alone shows it
    assert pooled.verdict is Verdict.regressed and small.verdict is Verdict.regressed
    assert {finding.verdict for finding in layer(small, "frozen") if finding.row == "int8"} == {
        Verdict.cannot_tell
    }


def test_a_frozen_pool_settles_tasks_that_are_too_small():
    before = frozen(TWO, pair(0, 0))
    after = row(
        "int8",
        *(
            score.model_copy(
                update={
                    "outcomes": {"m": run},
                    "answers_digest": "x",
                    "value": run.count("1") / 300,
                }
            )
            for score, run in (
                (record, flipped(record.outcomes["m"], lose=11, win=11))
                for record in pair(0, 0).scores
            )
        ),
    )
    by_task = check([TWO, after], Rules(), before)
    assert (
        by_task.verdict is Verdict.cannot_tell
        and layer(by_task, "pooled frozen")[0].verdict is Verdict.passed
    )
    assert check([TWO, after], Rules(decide="pooled"), before).verdict is Verdict.passed


def test_an_unchanged_row_adds_no_pooled_test():
    checked = check([TWO, pair(0, 0)], Rules(), frozen(TWO, pair(0, 0)))
    assert checked.verdict is Verdict.passed and not layer(checked, "pooled frozen")
    assert (
        checked.passed_means
        == "passed means: frozen items: not one answer differs from the frozen ones"
    )


def test_a_pool_of_rows_trained_anew_needs_seeds_that_agree():
    def rows(loses, digest):
        return [
            pair(lose, lose, seed=seed, digest=f"{digest}{seed}", label="r")
            for seed, lose in enumerate(loses, 1)
        ]

    before = frozen(TWO, *rows((0, 0, 0), "old"))
    together = layer(check([TWO, *rows((30, 33, 28), "new")], Rules(), before), "pooled frozen")[0]
    assert together.verdict is Verdict.regressed
    apart = layer(check([TWO, *rows((90, 0, 0), "new")], Rules(), before), "pooled frozen")[0]
    assert (
        apart.verdict is Verdict.cannot_tell and "do not agree" in apart.told and not apart.counts
    )
    alone = layer(
        check([TWO, *rows((30,), "new")], Rules(), frozen(TWO, *rows((0,), "old"))), "pooled frozen"
    )[0]
    assert alone.verdict is Verdict.regressed and "freeze three" in alone.told


def test_a_pool_that_is_asked_for_and_cannot_be_is_said():
    for rules in (Rules(margin=0.95, decide="pooled"), Rules(margin=0.95, task_weights="tasks")):
        assert any("nothing was pooled" in note for note in check([GOOD, BAD], rules).notes)
        assert not any("pooled" in note for note in check([TWO, NEAR], rules).notes)
    assert not check([GOOD, BAD], Rules(margin=0.95)).notes


# Rules that no check can follow


@pytest.mark.parametrize(
    "rules",
    [
        Rules(margin=1.2),
        Rules(margin=0.0),
        Rules(margin=-0.5),
        Rules(margin=1.5, points=True),
        Rules(decide="pool"),
        Rules(task_weights="mmlu=2"),
        Rules(task_weights=(("gsm8k-mini", 1.0), ("nothing", 1.0))),
    ],
)
def test_rules_that_ask_what_cannot_be_are_refused_in_one_line(rules):
    with pytest.raises(HarnessError) as refused:
        check([GOOD, BAD], rules, frozen(BAD))
    assert "\n" not in str(refused.value)


# The command and the plug-in of pytest


def test_the_command_decides_by_the_pool_where_it_is_told_to(tmp_path):
    for record in (TWO, NEAR):
        write_record(tmp_path / f"{record.label}.json", record)
    outcome = {}
    for decide in ("tasks", "pooled"):
        done = CliRunner().invoke(
            app,
            ["check", str(tmp_path), "--margin", "0.93", "--decide", decide],
            standalone_mode=False,
        )
        outcome[decide] = done.return_value
    assert outcome == {"tasks": 3, "pooled": 0}


def test_the_plugin_fails_what_was_missed_and_skips_what_does_not_count(tmp_path):
    for record in (TWO, NEAR, pair(100, 100, label="int4")):
        write_record(tmp_path / "records" / f"{record.label}.json", record)
    write_baseline(tmp_path / "b.json", frozen(TWO))
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "pytest.ini").write_text("[pytest]\n")
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--harness-records",
        str(tmp_path / "records"),
        "--harness-margin",
        "0.9",
        "--harness-decide",
        "pooled",
        "-rsf",
    ]
    done = subprocess.run(line, cwd=tmp_path / "users", capture_output=True, text=True, check=False)
    assert (
        done.returncode == 1
        and "3 failed, 2 passed, 1 skipped" in done.stdout
        and "missed: " in done.stdout
    ), done.stdout
    done = subprocess.run(
        [*line[:-2], "both"], cwd=tmp_path / "users", capture_output=True, text=True, check=False
    )
    assert done.returncode == 4 and "--decide both" in done.stderr
