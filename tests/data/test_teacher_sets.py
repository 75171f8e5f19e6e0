"""Data that a teacher writes: how it is typed, how much is asked for, and what names it."""

from dataclasses import replace

import pytest

import suites
from harness.data.examples import examples_of, training_examples
from harness.data.source import LocalOrHubData
from harness.data.teacher_sets import WrittenText, parse_teacher_set, texts_for
from harness.data.training_sets import examples_of_row
from harness.data.typed_sets import parse_training_sets
from harness.errors import HarnessError

SOURCE = LocalOrHubData()


def typed(text):
    return parse_teacher_set(text).data


def written(texts):
    """Return a function that writes these texts, and counts its calls."""
    calls = []

    def write(data):
        calls.append(data)
        rows = [{"text": text} if isinstance(text, str) else text for text in texts]
        examples = [example for row in rows for example in examples_of_row(row, data.name, "x")]
        return WrittenText(tuple(examples), {"written": len(rows)}, ())

    return write, calls


def test_what_is_typed_becomes_a_recipe():
    plain, free = typed("teacher"), typed("teacher:free[longest=64,seed=3]")
    assert plain.name == "teacher" and not plain.recipe.free
    assert plain.recipe.temperature == 0 and plain.recipe.samples == 1
    assert free.name == "teacher:free[longest=64,seed=3]" and free.recipe.free
    assert (free.recipe.temperature, free.recipe.longest, free.recipe.seed) == (1.0, 64, 3)
    weights = parse_training_sets(["teacher[samples=2,temperature=1]=3", "teacher:free=0.5"])
    assert [data.weight for data in weights] == [3, 0.5]
    assert parse_teacher_set("teachers.jsonl") is None
    assert parse_teacher_set("org/teacher") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacher=much", "'much' is no weight"),
        ("teacher=0", "'0' is no weight"),
        ("teacher[colour=1]", "'colour'; the settings are temperature, longest, samples, seed"),
        ("teacher[longest=0]", "longest: .*greater than or equal to 1"),
        ("teacher[samples=2]", "greedy texts are all the same"),
        ("teacher:free[temperature=0]", "greedy texts are all the same"),
        ("teacher:free[samples=2]", "teacher:free has none"),
        ("teacher[free=1]", "there is no setting 'free'"),
        ("teacher[longest=many]", "longest: "),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(text, message):
    with pytest.raises(HarnessError, match=message) as refusal:
        parse_training_sets([text])
    assert "\n" not in str(refusal.value)


def test_a_calibration_is_a_file():
    with pytest.raises(HarnessError, match="there is no such file"):
        parse_training_sets(["teacher"], option="--calibration")
    with pytest.raises(HarnessError, match=r"twice"):
        parse_training_sets(["teacher", "teacher=2"])


@pytest.mark.parametrize("rows", [1, 2, 18, 19, 20, 100, 2_000, 30_000])
def test_enough_texts_are_asked_for_that_the_rows_remain(rows):
    write, _ = written([f"Text {number}." for number in range(texts_for(rows))])
    data = replace(typed("teacher:free").planned(rows, "x"), write=write)
    trained = len(list(data.examples("train", SOURCE)))
    assert trained == rows and len(data) == texts_for(rows) <= rows + min(500, rows // 19 + 1)


def test_nothing_is_written_before_somebody_reads():
    write, calls = written(["One.", "Two.", "Three."])
    data = replace(typed("teacher:free").planned(2, "x"), write=write)
    assert data.digest and data.name and len(data) == 3 and data.location == "teacher:free"
    assert not calls
    assert list(data.examples("train", SOURCE)) and list(data.examples("validation", SOURCE))
    assert data.counts(SOURCE)["train"] == 2 and len(calls) == 1


def test_a_recipe_is_named_by_all_that_its_texts_depend_on():
    base = typed("teacher:free").planned(20, "code", "teacher").digest
    others = {
        typed("teacher:free[seed=1]").planned(20, "code", "teacher").digest,
        typed("teacher:free[longest=9]").planned(20, "code", "teacher").digest,
        typed("teacher").planned(20, "code", "teacher").digest,
        typed("teacher:free").planned(21, "code", "teacher").digest,
        typed("teacher:free").planned(20, "other code", "teacher").digest,
        typed("teacher:free").planned(20, "code", "another teacher").digest,
    }
    assert len(others | {base}) == 7
    assert typed("teacher:free=7").planned(20, "code", "teacher").digest == base


def test_the_digest_of_what_was_written_is_another_thing():
    first, second = (
        replace(typed("teacher:free").planned(2, "x"), write=written(texts)[0])
        for texts in (["One.", "Two."], ["One.", "Three."])
    )
    assert first.digest == second.digest and first.content_digest != second.content_digest


def test_text_with_evaluation_items_is_dropped_or_refused_as_a_file_is():
    task = suites.load("gsm8k-mini")
    scored = next(iter(task.examples("test", SOURCE)))
    rows = [
        {"prompt": scored.prompt, "completion": " 1"},
        *({"prompt": f"Q{number}", "completion": " 2"} for number in range(40)),
    ]
    write, _ = written(rows)
    data = replace(typed("teacher").planned(38, "x"), write=write, evaluated={task.name: task})
    assert data.counts(SOURCE)["dropped_for_evaluation_text"] == 1
    prompts = {example.prompt for example in data.all_examples(SOURCE)}
    assert scored.prompt not in prompts and len(prompts) == 40
    with pytest.raises(HarnessError, match="1 of 41 examples of teacher hold evaluation items"):
        replace(data, overlap="refuse").counts(SOURCE)


def test_files_and_a_teacher_share_the_rows(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f'{{"text": "Line {number}."}}\n' for number in range(80)))
    file, teacher = parse_training_sets([f"{path}=3", "teacher:free"])
    write, _ = written([f"Text {number}." for number in range(40)])
    sets = {data.name: data for data in (file, replace(teacher, write=write))}
    names = [example.task for example in examples_of(sets, "train", SOURCE, rows=40)]
    assert names.count("own:mine.jsonl") == 30 and names.count("teacher:free") == 10
    assert len(training_examples(sets, SOURCE, rows=40)) == 40
