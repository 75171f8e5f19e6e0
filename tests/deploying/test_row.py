"""A row is found by its label, in the newest run first; what is not there is one line."""

import pytest
from gate_rows import marks, row

from harness.deploying.row import find_row
from harness.errors import HarnessError
from harness.records.record import write_record


def test_a_row_and_the_files_beside_it_are_found_also_where_the_store_was_moved(made_store):
    found = find_row("int4", made_store.root)
    assert found.record.label == "int4" and found.made_here
    assert found.model == made_store.student("student-of-int4") / "student"
    assert found.file("log.txt").read_text() == "a line of the log\n"
    other = find_row(" int4[group_size=32]", made_store.root)
    assert (other.made_here, other.model, other.file("log.txt")) == (False, None, None)


def test_a_row_by_its_old_name_is_found(made_store):
    with pytest.warns(match="group"):
        assert find_row("int4[group=32]", made_store.root).record.key == "small"


def test_a_row_of_an_earlier_run_is_found_in_the_store_the_newest_of_them(made_store):
    for number in (1, 2):
        record = row("int8", marks(700), key=f"old{number}", created=f"2025-01-0{number}T00:00:00Z")
        write_record(made_store.record_path(f"old{number}"), record)
    found = find_row("int8", made_store.root)
    assert found.record.key == "old2" and [other.key for other in found.others] == ["old1"]


def test_the_lowest_seed_counts_or_the_one_that_is_named(tmp_path):
    for seed in (3, 1):
        write_record(tmp_path / f"{seed}.json", row("response", marks(700), seed=seed))
    assert find_row("response", tmp_path).record.seed == 1
    assert find_row("response", tmp_path, seed=3).record.seed == 3
    with pytest.raises(HarnessError, match=r"--seed 2: response has no record .* it has 1, 3"):
        find_row("response", tmp_path, seed=2)


def test_a_record_that_cannot_be_read_is_named_where_its_row_is_missing(made_store):
    path = made_store.record_path("small")
    path.write_text(path.read_text().replace("success", "succes"))
    with pytest.raises(HarnessError, match=r"small/record\.json: edited after it was written"):
        find_row("int4[group_size=32]", made_store.root)


@pytest.mark.parametrize(
    ("label", "place", "message"),
    [
        ("int4[group_size=23]", "", r"unknown row .*did you mean 'int4\[group_size=32\]'"),
        ("quantum", "", "unknown row 'quantum'; known: int4, int4"),
        ("int4", "nowhere", "no records at .*nowhere; name the run file"),
    ],
)
def test_what_is_not_there_is_one_line(made_store, label, place, message):
    with pytest.raises(HarnessError, match=message) as caught:
        find_row(label, made_store.root / place)
    assert "\n" not in str(caught.value)
