"""Tasks: frozen items, disjoint splits, lm-eval's own prompts, graders."""

import hashlib
import json
from itertools import islice

import pytest

import suites
from harness.data.examples import examples_digest, examples_of, training_examples
from harness.data.source import LocalOrHubData
from harness.errors import HarnessError
from harness.files.digests import digest_of
from suites import gsm8k_mini, mmlu_mini
from suites.loading import numbers

SOURCE = LocalOrHubData()
# the generated ones; tests/suites/test_tasks.py has the others
TASKS = {name: suites.load(name) for name in suites.SUITES["mini"].tasks}
MODULES = {"gsm8k-mini": gsm8k_mini, "mmlu-mini": mmlu_mini}
# Version 1 of each task, frozen: a changed character is a new version, not a new digest here.
FROZEN = {
    "gsm8k-mini": "f126dc6955109324",
    "mmlu-mini": "697ec1cef11acdb2",
}


@pytest.mark.parametrize("name", TASKS)
def test_items_of_version_1_are_frozen(name):
    rows = [
        row
        for split in ("dev", "validation", "test")
        for row in MODULES[name].generated_items(split)
    ] + list(islice(MODULES[name].generated_items("train"), 1000))
    assert (
        hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16] == FROZEN[name]
    )


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_item(name):
    prompts = {
        split: [example.prompt for example in islice(TASKS[name].examples(split, SOURCE), 5000)]
        for split in ("train", "validation", "test", "dev")
    }
    for split, prompts_of_split in prompts.items():
        assert len(set(prompts_of_split)) == len(prompts_of_split)
        for other, others in prompts.items():
            assert split == other or not set(prompts_of_split) & set(others)
    assert len(prompts["test"]) >= 1000


def test_splits_of_mmlu_mini_share_no_question_with_the_same_choices_in_another_order():
    questions = {
        split: {
            (row["question"], tuple(sorted(row["choices"])))
            for row in islice(mmlu_mini.generated_items(split), 5000)
        }
        for split in ("train", "test")
    }
    assert not questions["train"] & questions["test"]


@pytest.mark.parametrize("name", TASKS)
def test_training_prompts_are_the_prompts_that_lm_eval_renders(name, no_network):
    task = TASKS[name]
    built = task.lm_eval_tasks(SOURCE)[name]
    docs = list(built.eval_docs)
    for doc, example in list(zip(docs, task.examples("test", SOURCE), strict=True))[:50]:
        assert built.fewshot_context(doc, num_fewshot=0) == example.prompt
        target = built.doc_to_target(doc)
        gold = doc["choices"][target] if task.kind == "choose" else target.rpartition("#### ")[2]
        assert gold == example.gold
        if task.kind == "choose":
            assert built.doc_to_choice(doc) == doc["choices"]
            assert example.completion == f"{built.config.target_delimiter}{gold}"
    assert not no_network


def test_gsm8k_mini_keeps_lm_evals_filters_and_metric():
    from suites.loading.lm_eval import read_builtin

    upstream, built = (
        read_builtin("gsm8k/gsm8k.yaml"),
        TASKS["gsm8k-mini"].lm_eval_tasks(SOURCE)["gsm8k-mini"],
    )
    assert [filter_["name"] for filter_ in upstream["filter_list"]] == [
        filter_.name for filter_ in built._filters
    ]
    assert built.config.metric_list == upstream["metric_list"]
    assert built.config.generation_kwargs["until"] == upstream["generation_kwargs"]["until"]


@pytest.mark.parametrize("name", TASKS)
def test_gold_grades_right_and_a_corrupted_gold_wrong(name):
    task = TASKS[name]
    for example in islice(task.examples("validation", SOURCE), 200):
        assert all(grade.correct for grade in task.grade(example.gold, example.completion))
        assert all(grade.correct for grade in task.grade(example.gold, example.answer))
        corrupted = example.completion + "1"
        assert not any(grade.correct for grade in task.grade(example.gold, corrupted))
        assert not any(grade.correct for grade in task.grade(example.gold, ""))
        assert task.grade(example.gold, "")[0].extracted is None


@pytest.mark.parametrize("name", TASKS)
def test_no_prompt_holds_its_gold_work(name):
    for example in islice(TASKS[name].examples("test", SOURCE), 200):
        assert example.prompt.endswith("Answer:")
        assert "####" not in example.prompt and "<<" not in example.completion


def test_problems_say_what_their_steps_compute():
    for row in islice(gsm8k_mini.generated_items("test"), 300):
        lines = row["answer"].splitlines()
        assert len(lines) == row["steps"] + 1 and row["steps"] in gsm8k_mini.STEPS
        for line in lines[:-1]:
            expression, result = line.split("<<")[1].split(">>")[0].split("=")
            # an arithmetic check by Python itself
            assert eval(expression.replace("/", "//")) == int(result) <= gsm8k_mini.LARGEST
            assert "/" not in expression or eval(expression) == int(result)
        assert lines[-1] == f"#### {result}"


def test_choices_are_four_and_different_and_the_letters_are_balanced():
    rows = list(mmlu_mini.generated_items("test"))
    assert all(len(set(row["choices"])) == 4 for row in rows)
    shares = [sum(row["answer"] == letter for row in rows) / len(rows) for letter in range(4)]
    assert all(0.2 < share < 0.3 for share in shares)
    assert len({row["subject"] for row in rows}) >= 8


# (answer, strict, flexible, numeric) against gold 18: evaluation.md, pitfall 6, and what a numeric
# extractor must mend.
MATRIX = [
    ("#### 18", True, True, True),
    ("The answer is 18.", False, True, True),
    ("The answer is $18.", False, True, True),
    ("**18**", False, True, True),
    ("$18.00", False, False, True),
    ("18...", False, False, True),
    ("#### 18 .. verified in 2 ways", True, False, True),
    (r"\boxed{18}", False, True, True),
    ("17.5 which rounds to 18", False, True, True),
    ("#### 1,800", False, False, False),
    ("", False, False, False),
]


@pytest.mark.parametrize(("text", "strict", "flexible", "numeric"), MATRIX)
def test_extraction_matrix(text, strict, flexible, numeric):
    assert [grade.correct for grade in numbers.grade_number("18", text)] == [
        strict,
        flexible,
        numeric,
    ]


def test_training_rows_are_shared_between_tasks_and_fixed():
    examples = examples_of(TASKS, "train", SOURCE, rows=11)
    assert [example.task for example in examples] == ["gsm8k-mini", "mmlu-mini"] * 5 + [
        "gsm8k-mini"
    ]
    assert examples_digest(examples) == examples_digest(
        examples_of(TASKS, "train", SOURCE, rows=11)
    )


def test_an_evaluation_item_among_the_training_rows_is_refused(monkeypatch):
    task = TASKS["gsm8k-mini"]
    leaked = next(task.examples("test", SOURCE))

    class Leaky(type(task)):
        def examples(self, split_name, source):
            if split_name == "train":
                yield leaked
            yield from super().examples(split_name, source)

    with pytest.raises(HarnessError, match="1 evaluation items of gsm8k-mini"):
        training_examples({"gsm8k-mini": Leaky()}, SOURCE, rows=5)


def test_every_file_is_a_task_and_every_task_a_file():
    from pathlib import Path

    files = {
        path.stem
        for path in Path(suites.__file__).parent.glob("*.py")
        if not path.stem.startswith("_")
    }
    assert files == {
        path.partition(":")[0].removeprefix("suites.") for path in suites.TASKS.values()
    }


def test_suites_resolve_by_the_teacher():
    assert suites.resolve(["math"], embedded=True)["math"].tasks == ("gsm8k-mini",)
    assert suites.resolve(["mini"], embedded=False)["mini"].tasks == ("gsm8k-mini", "mmlu-mini")
    assert suites.resolve(["math"], embedded=False)["math"].tasks == ("gsm8k",)
    assert suites.resolve(["full"], embedded=True)["full"].tasks == ("gsm8k-mini", "mmlu-mini")
    assert suites.resolve(["full"], embedded=False)["full"].tasks == (
        "gsm8k",
        "gsm8k-cot",
        "mmlu",
        "mmlu-cloze",
        "wikitext",
    )
    assert list(suites.resolve(["full", "mini", "math"], embedded=False)) == [
        "math",
        "mini",
        "full",
    ]
    with pytest.raises(HarnessError, match="did you mean 'math'"):
        suites.resolve(["maths"], embedded=True)


def test_digest_ignores_key_order():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 2, "b": 1})
