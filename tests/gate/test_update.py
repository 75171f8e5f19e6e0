"""How baselines move: first accepted values, own margins, what n can show, old and edited files."""

import base64
import json
import zlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness import catalog
from harness.cli.app import app
from harness.errors import HarnessError
from harness.gate.baseline_tables import (
    baseline_lines,
    change_lines,
    detectable_drops,
    holm_family_size,
    power_of_task,
    power_text,
    smallest_drop,
)
from harness.gate.check import check
from harness.gate.frozen_items import rules_for_row
from harness.gate.rules import Rules
from harness.gate.update import update_baseline
from harness.records.baseline import Baseline, Origin, _digest, freeze_record, read_baseline
from harness.records.conditions import ModelReference
from harness.records.record import (
    Environment,
    Measurement,
    RunRecord,
    TaskScore,
    read_record,
    write_record,
)
from harness.statistics import stats

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Environment(
    device="cpu",
    dtype="float32",
    threads=2,
    machine="made up",
    platform="Linux x86_64",
    python="3.11.0",
    versions={"lm-eval": "0.4.13"},
    commit="c" * 40,
    dirty=False,
)
TEACHER = ModelReference(name="tiny", digest="t", weight_bytes=4_000)
MARKS = "1" * 800 + "0" * 200


def score(marks, *, task="gsm8k-mini", **changes):
    fields = {
        "task": task,
        "version": "1",
        "kind": "generate",
        "primary": "strict-match",
        "chance": 0.0,
        "n": len(marks),
        "value": marks.count("1") / len(marks),
        "stderr": 0.01,
        "outcomes": {"strict-match": marks},
        "items_digest": "items",
        "answers_digest": marks,
        "invalid_share": 0.0,
        "truncated_share": 0.0,
        "tokens_per_answer": 40.0,
        "seconds": 1.0,
    }
    return TaskScore(**{**fields, **changes})


def numbers(factor):
    values = tuple(0.1 * (number % 10) * factor for number in range(1000))
    return score(
        "1",
        n=1000,
        value=sum(values) / 1000,
        outcomes={},
        values={"strict-match": values},
        metric="f1",
        answers_digest=f"{factor}",
    )


def documents(factor):
    totals = tuple((-(30.0 + number % 7) * factor, 10.0) for number in range(200))
    value = 2.718281828459045 ** (-sum(total for total, _ in totals) / 2000)
    return score(
        "1",
        kind="perplexity",
        primary="",
        n=200,
        value=value,
        outcomes={},
        totals=totals,
        metric="word_perplexity",
        answers_digest=f"{factor}",
        truncated_share=None,
        tokens_per_answer=None,
    )


def row(label, *scores, seed=None, created="2026-11-24T08:00:00Z", **changes):
    fields = {
        "key": f"{label}-{seed}",
        "status": "success",
        "label": label,
        "method": label,
        "family": "x",
        "is_control": False,
        "trains": seed is not None,
        "suites": ("math",),
        "tasks": tuple(f"{score.task}@{score.version}" for score in scores),
        "device": "cpu",
        "dtype": "float32",
        "teachers": (TEACHER,),
        "student_recipe": "depth:0.5",
        "student_base": TEACHER,
        "seed": seed,
        "student": ModelReference(name=label, digest=label, weight_bytes=1_000),
        "budget_tokens": 1000,
        "budget_rows": 10,
        "path": "p",
        "scores": scores,
        "environment": ENVIRONMENT,
        "created": created,
    }
    return RunRecord(**{**fields, **changes})


def lost(count, marks=MARKS):
    """Turn the last right items wrong: each loss of more contains those of fewer."""
    right = marks.count("1")
    return "1" * (right - count) + "0" * (len(marks) - right + count)


class Desk:
    """A folder with records and a baseline."""

    def __init__(self, folder):
        self.place, self.path = folder / "records", folder / "b.json"

    def put(self, *records):
        for record in records:
            write_record(self.place / f"{record.label}-{record.seed}.json", record)

    def update(self, *words, reason="r", path=None):
        line = [
            "baseline",
            "update",
            self.place,
            "--baseline",
            path or self.path,
            "--reason",
            reason,
            *words,
        ]
        return CliRunner().invoke(app, list(map(str, line)), standalone_mode=False)

    def run(self, *words):
        return CliRunner().invoke(app, list(map(str, words)), standalone_mode=False)

    @property
    def frozen(self):
        return read_baseline(self.path)

    @property
    def records(self):
        return [read_record(path) for path in sorted(self.place.glob("*.json"))]

    def score(self, label="int8"):
        return next(row.scores[0] for row in self.frozen.rows if row.label == label)

    def edit(self, change, *, sign=True):
        data = json.loads(self.path.read_text())
        change(data)
        self.path.write_text(json.dumps({**data, "digest": _digest(data)} if sign else data))


@pytest.fixture
def desk(tmp_path):
    new_desk = Desk(tmp_path)
    new_desk.put(row("teacher", score(MARKS)), row("int8", score(MARKS)))
    assert new_desk.update(reason="first").return_value == 0
    return new_desk


# No ratchet


@pytest.mark.parametrize("seeds", [(None,), (1, 2)])
def test_three_small_steps_down_do_not_go_in_unasked(tmp_path, seeds):
    desk = Desk(tmp_path)
    for step in range(3):
        records = [
            row("int8", score(lost(20 * step)), seed=seed, created=f"2026-11-2{step}T08:00:00Z")
            for seed in seeds
        ]
        desk.put(row("teacher", score(MARKS), created="2026-11-20T08:00:00Z"), *records)
        done = desk.update(reason=f"step {step}")
        if step < 2:
            assert done.return_value == 0, done.exception
        else:
            assert (
                "int8 gsm8k-mini [frozen] regressed against its first accepted value of "
                "2026-11-20, 'step 0'" in str(done.exception)
            )
            assert "\n" not in str(done.exception)
    assert (
        desk.score().value == 0.78
        and desk.score().first.value == 0.8
        and desk.score().first.outcomes == MARKS
    )


@pytest.mark.parametrize("make", [numbers, documents], ids=["numbers", "documents"])
def test_small_steps_are_seen_whatever_items_carry(tmp_path, make):
    desk = Desk(tmp_path)
    down = (1.0, 0.97, 0.94) if make is numbers else (1.0, 1.005, 1.01)
    for step, factor in enumerate(down):
        desk.put(row("teacher", make(1.0)), row("int8", make(factor)))
        done = desk.update(reason=f"step {step}")
        assert (done.return_value == 0) == (step < 2), (step, done.exception)
    assert "against its first accepted value" in str(done.exception)
    first = desk.score().first
    assert (first.values, first.totals) == (
        freeze_record(row("x", make(1.0))).scores[0].values,
        freeze_record(row("x", make(1.0))).scores[0].totals,
    )


def test_steps_that_return_are_no_fall(desk):
    for loss in (20, 0, 20, 10, 0):
        desk.put(row("int8", score(lost(loss))))
        assert desk.update().return_value == 0
    # its items are the frozen ones again
    assert desk.score().first.value == 0.8 and desk.score().origin.packed == ""


def test_a_better_row_is_not_held_to_its_best(desk):
    """Up by 5 points and down by 2 is within the tolerance of frozen and first accepted values."""
    desk.put(row("int8", score("1" * 850 + "0" * 150)))
    assert desk.update().return_value == 0
    desk.put(row("int8", score("1" * 830 + "0" * 170)))
    assert desk.update().return_value == 0 and desk.score().first.value == 0.8


def test_an_accepted_regression_is_a_new_first_value_and_is_written_down(desk):
    for loss, more in ((20, ()), (40, ("--accept-regression",)), (60, ())):
        desk.put(row("int8", score(lost(loss)), created="2026-11-26T00:00:00Z"))
        assert desk.update(*more, reason=f"lost {loss}").return_value == 0
    origin = desk.score().origin
    assert (origin.value, origin.reason, origin.date) == (0.76, "lost 40", "2026-11-26T00:00:00Z")
    assert [change.accepted for change in desk.frozen.history] == [
        (),
        (),
        ("int8 gsm8k-mini [frozen]",),
        (),
    ]
    desk.put(row("int8", score(lost(80))))
    assert "first accepted value of 2026-11-26, 'lost 40'" in str(desk.update().exception)


def test_an_accepted_task_leaves_the_others_first_values(tmp_path):
    desk = Desk(tmp_path)
    both = [(0, 0), (100, 20)]
    for (first, second), more in zip(both, ((), ("--accept-regression",)), strict=True):
        desk.put(
            row("teacher", score(MARKS), score(MARKS, task="arc")),
            row("int8", score(lost(first)), score(lost(second), task="arc")),
        )
        assert desk.update(*more).return_value == 0
    scores = {frozen_score.task: frozen_score for frozen_score in desk.frozen.rows[1].scores}
    assert (
        scores["gsm8k-mini"].origin.value == 0.7
        and scores["arc"].origin.value == 0.8
        and scores["arc"].value == 0.78
    )


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"items_digest": "others"}, {}, "other items, prompts or targets"),
        ({"version": "2"}, {}, "gsm8k-mini@1 in the baseline, @2 now"),
        (
            {"answers_digest": MARKS},
            {},
            "the scoring changed: the same answers, 40 outcomes differ",
        ),
        ({}, {"dtype": "bfloat16"}, "dtype differs: float32 in the baseline, bfloat16 now"),
        (
            {},
            {"environment": ENVIRONMENT.model_copy(update={"versions": {"lm-eval": "0.5"}})},
            "lm-eval differs: 0.4.13",
        ),
        (
            {},
            {"teachers": (TEACHER.model_copy(update={"digest": "u"}),)},
            "teacher differs: t in the baseline, u now",
        ),
    ],
)
def test_what_cannot_be_compared_starts_anew_and_the_update_says_so(desk, fields, changes, message):
    desk.put(
        row("teacher", score(MARKS), **changes), row("int8", score(lost(40), **fields), **changes)
    )
    done = desk.update(reason="anew")
    assert done.return_value == 0, done.exception
    assert f"note: the first accepted value starts anew: int8 gsm8k-mini ({message}" in done.output
    assert (desk.score().origin.value, desk.score().origin.reason) == (
        0.76,
        "anew",
    ) and desk.score().first == desk.score()
    assert any(message in line for line in desk.frozen.history[-1].anew)
    assert "started anew: " in desk.run("baseline", "show", desk.path).output


def test_show_and_diff_name_the_first_accepted_value_where_it_is_another_one(desk):
    assert {line["first accepted"] for line in baseline_lines(desk.frozen)} == {"-"}
    desk.put(row("int8", score(lost(20))))
    desk.update()
    assert "80.0 % (2026-11-24: first)" in desk.run("baseline", "show", desk.path).output
    desk.put(row("int8", score(lost(30))))
    output = desk.run("baseline", "diff", desk.path, desk.place).output
    assert (
        "80.0 % (2026-11-24: first)" in output and "0.7800 -> 0.7700" in output and "10/0" in output
    )
    desk.put(row("int8", score(lost(30), answers_digest=lost(20))))
    assert " scoring " in desk.run("baseline", "diff", desk.path, desk.place).output


# Older files


def old_form(data):
    """Make a file as schema 1 had it: no first accepted values, no margins of rows, no lm-eval."""
    data["schema"] = 1
    for change in data["history"]:
        del change["anew"]
    for old_row in data["rows"]:
        del old_row["margin"], old_row["points"], old_row["conditions"]["lm-eval"]
        for score in old_row["scores"]:
            del score["origin"], score["likelihoods_digest"]


def test_a_baseline_of_schema_1_holds_rows_to_what_it_holds(desk):
    desk.edit(old_form)
    baseline = desk.frozen
    assert baseline.schema_number == 3 and baseline.rows[1].scores[0].origin == Origin(
        value=0.8, date="2026-11-24T08:00:00Z", reason="first"
    )
    done = desk.run("check", desk.place, "--baseline", desk.path)
    assert (
        done.return_value == 0 and "does not say which lm-eval scored teacher, int8" in done.output
    )
    desk.put(row("int8", score(lost(20))))
    assert desk.update().return_value == 0 and json.loads(desk.path.read_text())["schema"] == 3
    desk.put(row("int8", score(lost(40))))
    assert "against its first accepted value" in str(desk.update().exception)


def test_the_committed_baseline_is_read():
    path = ROOT / "results" / "baselines" / "embedded.json"
    baseline = read_baseline(path)
    assert json.loads(path.read_text())["schema"] == baseline.schema_number  # written as it is now
    assert len(baseline.rows) == 4 and all(
        frozen_score.first == frozen_score and frozen_score.origin.value == frozen_score.value
        for frozen_row in baseline.rows
        for frozen_score in frozen_row.scores
    )


@pytest.mark.parametrize("schema", [0, 4, None, "1", 1.5])
def test_other_schemas_are_named(desk, schema):
    desk.edit(lambda data: data.update(schema=schema))
    with pytest.raises(HarnessError, match="this version reads up to 3"):
        read_baseline(desk.path)


# Edits


def packed(marks):
    return base64.b64encode(
        zlib.compress(int(marks, 2).to_bytes(-(-len(marks) // 8), "big"), 9)
    ).decode()


EDITS = {
    "the first accepted value": lambda data: data["rows"][1]["scores"][0]["origin"].update(
        value=0.5
    ),
    "its reason": lambda data: data["rows"][1]["scores"][0]["origin"].update(reason="better"),
    "a margin": lambda data: data.update(margin=0.5),
    "a row's margin": lambda data: data["rows"][1].update(margin=0.5),
    "outcomes": lambda data: data["rows"][1]["scores"][0].update(packed=packed(lost(20))),
    "a row": lambda data: data["rows"].pop(),
    "the history": lambda data: data["history"][0].update(accepted=["int8 gsm8k-mini [frozen]"]),
    "a condition": lambda data: data["rows"][1]["conditions"].update(dtype="bfloat16"),
}


@pytest.mark.parametrize(
    ("schema", "name"), [*((3, name) for name in EDITS), *((1, name) for name in list(EDITS)[2:])]
)
def test_an_edited_baseline_is_refused(desk, schema, name):
    if schema == 1:  # which has no first accepted values
        desk.edit(old_form)
    desk.edit(EDITS[name], sign=False)
    for line in (["check", desk.place, "--baseline", desk.path], ["baseline", "show", desk.path]):
        assert "edited by hand (its digest differs); take it back from git" in str(
            desk.run(*line).exception
        )
    assert "edited by hand" in str(desk.update().exception)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            ("rows", 1, "scores", 0, "value"),
            0.97,
            "field rows.1.scores.0.value: 0.97, and its 1,000 items make 0.8",
        ),
        (
            ("rows", 1, "scores", 0, "packed"),
            packed(lost(20)),
            "rows.1.scores.0.value: 0.8, and its 1,000 items make 0.78",
        ),
        (
            ("rows", 1, "scores", 0, "packed"),
            packed("1" * 80),
            "rows.1.scores.0.packed: 10 bytes of outcomes for 1,000 items",
        ),
        (("rows", 1, "scores", 0, "packed"), "no outcomes", "rows.1.scores.0.packed: no outcomes"),
        (
            ("rows", 1, "scores", 0, "packed"),
            base64.b64encode(b"abc").decode(),
            "rows.1.scores.0.packed: no outcomes",
        ),
        (
            ("rows", 1, "scores", 0, "packed"),
            "",
            "rows.1.scores.0.value: 0.8, and no item of strict-match says so",
        ),
        (
            ("rows", 1, "scores", 0, "n"),
            100,
            "rows.1.scores.0.packed: 125 bytes of outcomes for 100 items",
        ),
        (
            ("rows", 1, "scores", 0, "origin", "value"),
            0.9,
            "rows.1.scores.0.origin: 0.9, and its 1,000 items make 0.8",
        ),
        (
            ("rows", 1, "scores", 0, "origin", "packed"),
            packed(lost(20)),
            "rows.1.scores.0.origin: 0.8, and its 1,000 items make 0.78",
        ),
        (
            ("rows", 1, "scores", 0, "parts"),
            [[10, 0.1]],
            "rows.1.scores.0.parts: 10 items in parts of 1,000",
        ),
        (("rows", 1, "weight_bytes"), -1, "rows.1.weight_bytes: -1"),
        (("rows", 1, "margin"), 1.7, "rows.1.margin: 1.7 is no share that could be kept or lost"),
        (("margin",), 0, "field margin: 0 is no share that could be kept or lost"),
        (("rows", 1, "label"), "teacher", "field rows: teacher stands there twice"),
    ],
)
def test_a_baseline_that_contradicts_itself_is_refused_though_its_digest_is_right(
    desk, place, value, message
):
    def change(data):
        for step in place[:-1]:
            data = data[step]
        data[place[-1]] = value

    desk.edit(change)
    with pytest.raises(HarnessError) as caught:
        read_baseline(desk.path)
    assert (
        message in str(caught.value)
        and str(desk.path) in str(caught.value)
        and "\n" not in str(caught.value)
    )


# Margins


@pytest.fixture
def weak(tmp_path):
    """Three rows; one keeps a quarter of the teacher's score."""
    new_desk = Desk(tmp_path)
    new_desk.put(
        row("teacher", score(MARKS)), row("int8", score(lost(5))), row("prune", score(lost(600)))
    )
    return new_desk


def test_a_row_that_never_kept_the_margin_is_refused_with_two_ways_out(weak):
    done = weak.update("--margin", "0.95")
    message = str(done.exception)
    assert (
        "prune gsm8k-mini does not keep the margin of 0.95 (retention 25.0 % [" in message
        and "\n" not in message
    )
    assert (
        "leave it out (--rows int8), or freeze it with what it keeps (--own-margin)" in message
        and not weak.path.exists()
    )
    assert weak.update("--margin", "0.95", "--rows", "int8").return_value == 0
    assert {frozen_row.label for frozen_row in weak.frozen.rows} == {"teacher", "int8"}


def test_a_margin_of_its_own_is_the_lower_end_in_whole_per_cents(weak):
    done = weak.update("--margin", "0.95", "--own-margin")
    assert done.return_value == 0, done.exception
    margins = {frozen_row.label: frozen_row.margin for frozen_row in weak.frozen.rows}
    low = stats.retention_interval(stats.count_pairs(lost(600), MARKS)).low
    assert (
        margins == {"teacher": None, "int8": None, "prune": int(100 * low) / 100}
        and 0.15 < margins["prune"] < 0.25
    )
    shown = weak.run("baseline", "show", weak.path).output
    assert (
        f"{100 * margins['prune']:g} % must be kept" in shown
        and "margin: 95 % must be kept" in shown
    )
    assert rules_for_row(weak.frozen, "prune", Rules(margin=0.95)).margin == margins["prune"]
    records = [row("teacher", score(MARKS)), row("prune", score(lost(600)))]
    assert check(records, rules_for_row(weak.frozen, "prune", Rules(margin=0.95))).exit_code == 0


def test_a_check_holds_a_row_to_its_own_margin_by_task_and_pooled(tmp_path):
    """Day one is green, and falling below the own margin is red.

    Rows without a margin of their own are held to the common one.
    """
    desk = Desk(tmp_path)

    def put(prune, int8=5):
        for label, loss in (("teacher", 0), ("int8", int8), ("prune", prune)):
            desk.put(row(label, score(lost(loss)), score(lost(loss), task="arc")))

    put(600)
    assert desk.update("--margin", "0.95", "--own-margin").return_value == 0
    margin = next(one.margin for one in desk.frozen.rows if one.label == "prune")
    done = desk.run("check", desk.place, "--baseline", desk.path)
    assert (
        done.return_value == 0
        and f"must show that it keeps {100 * margin:g} %" in done.output
        and "keeps 95 %" in done.output
    ), done.output
    put(790)
    done = desk.run("check", desk.place, "--baseline", desk.path)
    assert done.return_value == 1 and "REGRESSED" in done.output
    put(600, int8=300)
    claims = [
        one
        for one in check(desk.records, Rules(margin=0.95), desk.frozen).findings
        if one.layer in ("claim", "pooled")
    ]
    assert {one.row: one.verdict.value for one in claims} == {
        "int8": "regressed",
        "prune": "passed",
    }


def test_points_have_margins_of_their_own_too(weak):
    assert weak.update("--margin", "2points", "--own-margin").return_value == 0
    [prune] = [frozen_row for frozen_row in weak.frozen.rows if frozen_row.label == "prune"]
    low = stats.difference_interval(stats.count_pairs(lost(600), MARKS)).low
    assert (
        prune.points
        and prune.margin == pytest.approx(-int(100 * low - 1) / 100)
        and 0.6 < prune.margin < 0.65
    )
    assert "% must be kept" not in weak.run("baseline", "show", weak.path).output


def test_perplexities_have_margins_of_their_own_too(tmp_path):
    desk = Desk(tmp_path)
    desk.put(
        row("teacher", documents(1.0)), row("int8", documents(1.001)), row("prune", documents(1.5))
    )
    assert "prune gsm8k-mini does not keep the margin of 0.9" in str(
        desk.update("--margin", "0.9").exception
    )
    assert desk.update("--margin", "0.9", "--own-margin").return_value == 0
    [prune] = [frozen_row for frozen_row in desk.frozen.rows if frozen_row.label == "prune"]
    ratio = documents(1.0).value / documents(1.5).value
    assert ratio - 0.02 < prune.margin <= ratio


def test_an_own_margin_stays_until_the_row_keeps_what_all_keep_and_does_not_fall_by_itself(weak):
    weak.update("--margin", "0.95", "--own-margin")
    before = weak.frozen.rows[2].margin
    weak.put(row("prune", score(lost(605))))
    # asked again, kept as it is
    assert weak.update().return_value == 0 and weak.frozen.rows[2].margin == before
    weak.put(row("prune", score(lost(700))))
    assert f"does not keep the margin of 0.95, nor its own of {before:g}" in str(
        weak.update("--accept-regression").exception
    )
    assert (
        weak.update("--accept-regression", "--own-margin").return_value == 0
        and weak.frozen.rows[2].margin < before
    )
    lower = weak.frozen.rows[2].margin
    weak.put(row("prune", score(lost(40))))
    # whether it keeps 95 % is not known
    assert weak.update().return_value == 0 and weak.frozen.rows[2].margin == lower
    weak.put(row("prune", score(lost(2))))
    assert weak.update().return_value == 0 and weak.frozen.rows[2].margin is None


def test_a_row_that_keeps_nothing_has_no_margin(weak):
    weak.put(row("prune", score("0" * 1000)))
    message = str(weak.update("--margin", "0.95", "--own-margin").exception)
    assert "prune is shown to keep no margin at all" in message and "--rows" in message


def test_a_row_of_which_items_cannot_tell_is_frozen_with_a_note(weak):
    weak.put(row("prune", score(lost(40))))
    done = weak.update("--margin", "0.95")
    assert (
        done.return_value == 0
        and "note: prune gsm8k-mini: whether it keeps 95 % is not known (retention 95.0 %"
        in done.output
    )
    assert weak.frozen.rows[2].margin is None


@pytest.mark.parametrize("marks", ["0" * 1000, "1" * 8], ids=["a teacher at 0", "eight items"])
def test_claims_that_cannot_be_judged_are_noted(tmp_path, marks):
    desk = Desk(tmp_path)
    desk.put(row("teacher", score(marks)), row("int8", score(marks)))
    done = desk.update("--margin", "0.99")
    assert (
        done.return_value == 0
        and "note: int8 gsm8k-mini: whether it keeps 99 % is not known" in done.output
    )


# What n can show


def test_below_the_least_number_of_items_only_equal_answers_pass(desk):
    rules = Rules()
    [line] = [one for one in detectable_drops(desk.frozen, None, [], rules) if one.row == "int8"]
    # two tests: the teacher's row and int8's
    assert line.fewest_items == stats.items_to_detect(0.0, 0.05, alpha=0.005)
    assert stats.items_to_detect(0.0, 0.05, alpha=0.01) == 199
    least = line.fewest_items
    for n, expected in ((least, 0), (least - 1, 3)):
        before = [
            row(label, score("1" * (n // 2) + "0" * (n - n // 2))) for label in ("teacher", "int8")
        ]
        after = [
            one.model_copy(
                update={"scores": (one.scores[0].model_copy(update={"answers_digest": "x"}),)}
            )
            for one in before
        ]
        place = Desk(desk.place.parent / f"n{n}")
        place.put(*before)
        assert place.update().return_value == 0
        assert check(after, rules, place.frozen).exit_code == expected, n


def test_the_smallest_drop_is_the_one_that_so_many_items_show():
    for n, flips in ((250, 0.05), (1000, 0.02), (14_042, 0.12)):
        drop = smallest_drop(n, flips, 0.01)
        assert (
            stats.items_to_detect(flips, drop, alpha=0.01)
            <= n
            < stats.items_to_detect(flips, 0.99 * drop, alpha=0.01)
        )
    assert smallest_drop(3, 0.05, 0.01) is None


def test_an_update_says_what_its_items_can_show(desk, tmp_path):
    desk.put(row("int8", score(lost(20))))
    done = desk.update()
    assert (
        "alpha 0.01, Holm over 2 tests" in done.output
        and "2.0 % (since the last move)" in done.output
    )
    least = stats.items_to_detect(0.0, 0.05, alpha=0.005)
    assert "5.0 % (not known)" in done.output and f"below {least} items" in done.output, done.output
    noise = Measurement(
        name="noise_flips:gsm8k-mini", value=0.012, unit="fraction", higher_is_better=False
    )
    small = Desk(tmp_path / "small")
    small.put(
        row("teacher", score("1" * 60 + "0" * 40), measurements=(noise,)),
        row("int8", score("1" * 60 + "0" * 40)),
    )
    output = small.update().output
    assert "1.2 % (the teacher's, by rounding)" in output and "items (here)" in output
    none = Desk(tmp_path / "documents")
    none.put(row("teacher", documents(1.0)), row("int8", documents(1.0)))
    assert none.update().return_value == 0 and "What a check can see" not in none.update().output


def test_pools_stand_in_the_family_of_tests(tmp_path):
    desk = Desk(tmp_path)
    for label in ("teacher", "int8"):
        desk.put(
            row(
                label,
                score(MARKS),
                score(MARKS, task="arc"),
                documents(1.0).model_copy(update={"task": "wikitext"}),
            )
        )
    # two rows of three tasks, and a pool of two of them each
    assert "Holm over 8 tests" in desk.update().output
    assert holm_family_size(desk.frozen) == 8
    for label in ("teacher", "int8"):
        changed = [score(lost(1), task=task) for task in ("gsm8k-mini", "arc")]
        desk.put(row(label, *changed, documents(1.0001).model_copy(update={"task": "wikitext"})))
    findings = [
        finding
        for finding in check(desk.records, Rules(), desk.frozen).findings
        if finding.layer == "frozen" and "flips" in finding.numbers
    ]
    least = {line.fewest_items for line in detectable_drops(desk.frozen, None, [], Rules())}
    assert (
        {finding.numbers["needed"] for finding in findings}
        == least
        == {stats.items_to_detect(0.0, 0.05, alpha=0.01 / 8)}
    )


def test_difference_names_rows_that_are_new_and_gone(desk):
    lines = change_lines(desk.frozen, desk.frozen.model_copy(update={"rows": desk.frozen.rows[:1]}))
    assert [line["change"] for line in lines] == ["none", "gone"]


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_day_one_is_green_however_many_rows_have_a_margin_of_their_own(tmp_path, rows):
    """The lower end of one interval is too much to ask where many rows share one error rate."""
    weak = [
        row(f"weak{number}", score("1" * (600 - 7 * number) + "0" * (400 + 7 * number)))
        for number in range(rows)
    ]
    near = row("near", score("1" * 770 + "0" * 230))  # 96 %: these items cannot tell
    records = [row("teacher", score(MARKS)).model_copy(update={"method": "teacher"}), *weak, near]
    update_baseline(
        tmp_path / "b.json", records, reason="first", rules=Rules(margin=0.95), own_margin=True
    )
    baseline = read_baseline(tmp_path / "b.json")
    assert check(records, Rules(margin=baseline.margin), baseline).exit_code == 0
    margins = {one.label: one.margin for one in baseline.rows}
    assert all(0.5 < margins[one.label] < one.scores[0].value / 0.8 for one in weak)


@pytest.mark.parametrize(
    "make",
    [
        lambda share: score("1" * share + "0" * (1_000 - share)),
        lambda share: numbers(share / 1_000),
    ],
)
def test_other_seeds_do_not_take_the_place_of_better_ones_unasked(tmp_path, make):
    path = tmp_path / "b.json"
    teacher = row("teacher", make(900)).model_copy(update={"method": "teacher"})
    trained = [row("kd", make(750 + seed), seed=seed) for seed in range(2)]
    update_baseline(path, [teacher, *trained], reason="first", rules=Rules())
    worse = [row("kd", make(650 + seed), seed=10 + seed) for seed in range(2)]
    with pytest.raises(
        HarnessError, match=r"kd gsm8k-mini, other seeds than frozen, went from .* to "
    ):
        update_baseline(path, [teacher, *worse], reason="other seeds", rules=Rules(), drop=True)
    moved = update_baseline(
        path, [teacher, *worse], reason="other seeds", rules=Rules(), drop=True, accept=True
    )
    alike = [row("kd", make(645 + seed), seed=20 + seed) for seed in range(2)]
    moved = update_baseline(
        path, [teacher, *alike], reason="again others", rules=Rules(), drop=True
    )
    assert any("kd seed 20 (the row was frozen with other seeds)" in note for note in moved.notes)


def test_sizes_that_are_not_known_are_shown_as_such():
    before = row("int8", score(MARKS))
    after = before.model_copy(
        update={"student": before.student.model_copy(update={"weight_bytes": None})}
    )
    old, new = (Baseline(history=(), rows=(freeze_record(record),)) for record in (before, after))
    assert change_lines(old, new)[0]["bytes"] == "1,000 -> -"


@pytest.mark.parametrize("change", [{"history": []}, {"margin": 1.2}, {"margin": 1.0}])
def test_a_signed_baseline_that_no_update_writes_is_refused(tmp_path, change):
    path = tmp_path / "b.json"
    update_baseline(
        path,
        [
            row("teacher", score(MARKS)).model_copy(update={"method": "teacher"}),
            row("int8", score(MARKS)),
        ],
        reason="x",
        rules=Rules(),
    )
    data = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({**data, "digest": _digest(data)}))
    with pytest.raises(HarnessError, match=next(iter(change))):
        read_baseline(path)


def test_rows_of_a_frozen_subset_become_a_baseline_of_their_own(tmp_path):
    part = score("1" * 240 + "0" * 60, task="gsm8k")
    rows = [row(name, part, subset="quick:300:1") for name in ("teacher", "int8")]
    path = tmp_path / "baseline.json"
    update_baseline(path, rows, reason="a gate of minutes", rules=Rules())
    baseline = read_baseline(path)
    assert baseline.rows[0].conditions["subset"] == "quick:300:1"
    passed = check(rows, Rules(), baseline)
    assert passed.exit_code == 0
    assert "these rows were scored on the frozen subset quick:300:1" in passed.notes
    assert not any("trial" in note for note in passed.notes)
    of_all_items = [row(name, part) for name in ("teacher", "int8")]
    other = check(of_all_items, Rules(), baseline)
    assert other.exit_code == 4
    assert any("subset differs: quick:300:1" in finding.told for finding in other.findings)


def test_the_power_of_so_many_items_is_said_beforehand():
    # two levels of the same formula: what 300 items show at 5 % flips, beyond the tolerance
    text = power_text(300, Rules(tolerance=0))
    shown = smallest_drop(300, 0.05, Rules().frozen_alpha)
    assert f"{100 * shown:.1f} points where 5 % of the items flip" in text
    assert stats.items_to_detect(0.05, shown, alpha=Rules().frozen_alpha) <= 300
    assert power_text(3, Rules()) == "too few items to show any drop"
    assert power_text(30, Rules()).endswith("points where 2 % or 5 % or 10 % of the items flip")


@pytest.mark.parametrize(
    ("name", "has_points"),
    [
        ("wikitext", False),
        ("gsm8k-mini", True),
        ("mmlu-mini", True),
        ("lm-eval:lambada_openai", True),
        ("lm-eval:lambada_openai:perplexity", False),
    ],
)
def test_a_perplexity_has_no_points_to_lose(name, has_points):
    text = power_of_task(catalog.load_task(name), 300, Rules())
    assert ("points" in text) == has_points
    assert has_points or "items for 1/2/5 %" in text
