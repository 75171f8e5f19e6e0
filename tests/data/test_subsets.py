"""Frozen subsets: drawn in proportion and by seed, listed by digest, refused for other data."""

import json
from collections import Counter

import pytest

from harness import catalog
from harness.api import frozen_subset
from harness.data.seeding import prepare_tasks, seeded_as_lm_eval
from harness.data.source import LocalOrHubData
from harness.data.subsets import (
    Subset,
    parse_subset,
    proportional_sample,
    read_subset,
    require_items,
    write_subset,
)
from harness.errors import HarnessError
from harness.scoring.sampling import ItemChoice, select_items, subset_items

GROUPS = ["a"] * 60 + ["b"] * 30 + ["c"] * 7 + ["d"] * 3


def test_every_group_has_its_share_and_remainders_go_to_the_largest():
    numbers = proportional_sample(GROUPS, 10, seed="s")
    # 6, 3, 0.7 and 0.3 items of 10: the tenth item goes to c
    assert Counter(GROUPS[number] for number in numbers) == {"a": 6, "b": 3, "c": 1}
    assert numbers == sorted(set(numbers)) and len(numbers) == 10
    numbers = proportional_sample(GROUPS, 50, seed="s")
    counts = Counter(GROUPS[number] for number in numbers)
    assert counts["a"] == 30 and counts["b"] == 15 and counts["c"] + counts["d"] == 5


def test_a_draw_is_that_of_its_seed_and_every_item_may_come():
    assert proportional_sample(GROUPS, 40, seed="1") == proportional_sample(GROUPS, 40, seed="1")
    assert proportional_sample(GROUPS, 40, seed="1") != proportional_sample(GROUPS, 40, seed="2")
    drawn = Counter(
        number for seed in range(400) for number in proportional_sample(GROUPS, 50, seed=f"{seed}")
    )
    # each item is drawn in half of the draws: 5 standard deviations of 400 draws are 50
    assert len(drawn) == 100 and all(abs(count - 200) < 55 for count in drawn.values())
    assert proportional_sample(GROUPS, 1_000, seed="1") == [*range(100)]


def test_what_is_typed_is_read():
    assert parse_subset("quick:300") == Subset(name="quick", count=300, seed=1)
    assert parse_subset("quick:300:7").label == "quick:300:7"
    assert parse_subset("a:20").size_of("gsm8k", 1_319) == 20
    assert parse_subset("a:2000").size_of("gsm8k", 1_319) == 1_319


@pytest.mark.parametrize(
    "text", ["quick", "quick:", "quick:0", "quick:-3", "300", ":300", "quick:3:x", "no/such.json"]
)
def test_what_is_neither_is_refused_with_an_example(text):
    with pytest.raises(HarnessError, match="type for example quick:300"):
        parse_subset(text)


def test_a_file_keeps_its_items_and_its_label_is_that_of_them(tmp_path):
    path = tmp_path / "quick.json"
    subset = Subset(name="quick", items={"gsm8k": ("a" * 64, "b" * 64)})
    write_subset(path, subset)
    assert read_subset(path) == parse_subset(str(path)) == subset
    other = Subset(name="quick", items={"gsm8k": ("a" * 64,)})
    assert subset.label.startswith("quick (") and subset.label != other.label
    assert subset.size_of("gsm8k", 1_319) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"made by: harness data subset"),
        ('{"kind": "run", "name": "x"}', r"made by: harness data subset"),
        ('{"name": "quick"}', r"lists no item"),
        ('{"name": "two words", "items": {"gsm8k": ["a"]}}', r"is no name"),
        ('{"name": "quick", "items": {"gsm8k": [1]}}', r"made by: harness data subset"),
    ],
)
def test_a_file_that_is_no_subset_is_one_line(content, message, tmp_path):
    path = tmp_path / "quick.json"
    path.write_text(content)
    with pytest.raises(HarnessError, match=message) as refusal:
        read_subset(path)
    assert "\n" not in str(refusal.value)


def test_a_task_that_the_file_does_not_have_is_named():
    subset = Subset(name="quick", items={"gsm8k": ("a",)})
    task = catalog.load_task("mmlu-mini")
    with pytest.raises(HarnessError, match=r"no item of mmlu-mini, only of gsm8k; drop that task"):
        require_items(subset, [task])


def selected(name, subset, limit=None):
    task = catalog.load_task(name)
    with seeded_as_lm_eval():
        built = task.lm_eval_tasks(LocalOrHubData())
        prepare_tasks(built.values())
        return select_items(built, ItemChoice(limit, subset), name=name)


def test_named_and_listed_subsets_have_the_same_items_and_prompts(tmp_path):
    named = parse_subset("quick:24:3")
    listed, sizes = frozen_subset("quick:24:3", ["mini"])
    write_subset(tmp_path / "quick.json", listed)
    from_file = read_subset(tmp_path / "quick.json")
    for name in ("gsm8k-mini", "mmlu-mini"):
        first, second = selected(name, named), selected(name, from_file)
        assert first.numbers == second.numbers and first.count == 24
        assert sizes[name][0] == 24 < sizes[name][1]
        [task], [same] = first.tasks.values(), second.tasks.values()
        assert [*task.eval_docs] == [*same.eval_docs]


def test_a_sample_of_a_subset_is_a_part_of_it():
    whole = selected("gsm8k-mini", parse_subset("quick:24"))
    part = selected("gsm8k-mini", parse_subset("quick:24"), limit=10)
    assert part.count == 10
    assert set(*part.numbers.values()) < set(*whole.numbers.values())


def test_a_file_of_other_data_is_refused(tmp_path):
    listed, _ = frozen_subset("quick:24", ["mini"])
    path = tmp_path / "quick.json"
    write_subset(path, listed)
    content = json.loads(path.read_text())
    content["items"]["gsm8k-mini"][5] = "0" * 64
    path.write_text(json.dumps(content))
    task = catalog.load_task("gsm8k-mini")
    with pytest.raises(HarnessError, match=r"1 items of gsm8k-mini that its data does not hold"):
        subset_items(read_subset(path), task, LocalOrHubData())
    [digest, *_] = listed.items["gsm8k-mini"]
    twice = Subset(name="quick", items={"gsm8k-mini": (digest, digest)})
    with pytest.raises(HarnessError, match="data does not hold"):
        twice.numbers("gsm8k-mini", ["", ""], [digest, "f" * 64])
    assert twice.numbers("gsm8k-mini", ["", "", ""], [digest, "f" * 64, digest]) == [0, 2]
