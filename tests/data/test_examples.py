"""Training rows of real tasks: held out, guarded, rendered, and never of what has no train
split.
"""

import json
from dataclasses import replace

import pytest
from task_data import REAL, gsm8k_rows, refused, write_rows

import suites
from harness.data.examples import examples_of, training_examples
from harness.data.source import LocalOrHubData, NoSplit
from harness.errors import HarnessError


def test_validation_is_held_out_from_the_training_rows(source):
    task = suites.load("gsm8k")
    train, validation = (
        [example.prompt for example in task.examples(split, source)]
        for split in ("train", "validation")
    )
    assert len(train) == 36 and len(validation) == 4 and not set(train) & set(validation)


def test_examples_are_rendered_for_the_model_and_guarded_as_they_are(source, folder):
    tasks = {name: suites.load(name) for name in ("gsm8k", "gsm8k-cot", "wikitext")}
    chat = LocalOrHubData(
        folder=folder,
        render=lambda example: replace(example, prompt=f"<user>{example.prompt}<assistant>"),
    )
    plain, rendered = (training_examples(tasks, example, rows=6) for example in (source, chat))
    assert [f"<user>{example.prompt}<assistant>" for example in plain] == [
        example.prompt for example in rendered
    ]
    # perplexity takes no part
    assert [example.task for example in plain] == ["gsm8k", "gsm8k-cot"] * 3
    assert examples_of(tasks, "train", chat, rows=6) == rendered and chat == source
    write_rows(folder / "gsm8k/test.jsonl", gsm8k_rows("train", 2))
    with pytest.raises(
        HarnessError, match="2 evaluation items of gsm8k stand in the training data"
    ):
        training_examples(tasks, chat, rows=6)


def test_what_has_a_train_split_is_trained_on_and_the_rest_is_named(folder, source):
    from harness.data.examples import untrained_tasks

    tasks = {name: suites.load(name) for name in ("gsm8k", "mmlu", "wikitext")}
    rows = training_examples(tasks, source, rows=6)
    assert [row.task for row in rows] == ["gsm8k"] * 6 and {
        row.task for row in examples_of(tasks, "validation", source, rows=2)
    } == {"gsm8k"}
    assert (
        list(untrained_tasks(tasks, source)) == ["mmlu"]
        and "never trained on" in untrained_tasks(tasks, source)["mmlu"]
    )
    with pytest.raises(NoSplit, match="never trained on"):
        training_examples({"mmlu": tasks["mmlu"]}, source, rows=6)
    assert {
        row.task for row in examples_of({"mmlu": tasks["mmlu"]}, "validation", source, rows=2)
    } == {"mmlu"}


def test_training_on_nothing_is_refused_while_planning(folder, no_network):
    import harness.api
    from harness.planning.config import build_config

    asked = {"suite": ("knowledge",), "teacher": ("tiny",), "data_dir": folder}
    asked["suite"] = (str(folder / "own.toml"),)
    (folder / "own.toml").write_text('name = "own"\ntasks = ["mmlu", "wikitext"]\n')
    refused(
        lambda: harness.api.plan_run(build_config({**asked, "methods": ("response",)})),
        "response has nothing to train on",
        "mmlu: ",
        "--suite math",
    )
    assert harness.api.plan_run(build_config({**asked, "methods": ("int8",)})).hub_data is False
    (folder / "own.toml").write_text('name = "own"\ntasks = ["mmlu", "gsm8k"]\n')
    assert harness.api.plan_run(build_config({**asked, "methods": ("response",)})).cells


OUTSIDE = (
    "task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
    "{folder}/o.jsonl\n{train}test_split: test\n{form}"
)
ASKED = (
    "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\nmetric_list:\n  - "
    "metric: exact_match\n"
    "generation_kwargs:\n  until: ['\\n']\n"
)
READ = (
    "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\nmetric_list:\n  "
    "- metric: word_perplexity\n"
)


@pytest.fixture
def mixed_tasks(folder):
    """Return tasks with a train split, without one, and such as only measure a perplexity."""
    (folder / "o.jsonl").write_text(
        "".join(json.dumps({"q": f"question {n}", "a": f"answer {n}"}) + "\n" for n in range(6))
    )
    (folder / "t.jsonl").write_text(
        "".join(json.dumps({"q": f"trained {n}", "a": f"answer {n}"}) + "\n" for n in range(30))
    )
    train = {
        "taught": f"    train: {folder}/t.jsonl\ntraining_split: train\n",
        "bare": "",
        "read": "",
    }
    for name, lines in train.items():
        text = OUTSIDE.format(
            name=name, folder=folder, train=lines, form=READ if name == "read" else ASKED
        )
        (folder / f"{name}.yaml").write_text(text)
    outside = {name: suites.load(f"lm-eval:{name}", include_path=folder) for name in train}
    return {
        **{name: suites.load(name) for name in REAL},
        **{task.name: task for task in outside.values()},
    }


NEVER = {"mmlu", "mmlu-cloze", "lm-eval:bare"}


def test_tasks_without_a_train_split_are_named_with_the_reason(mixed_tasks, source):
    from harness.data.examples import untrained_tasks

    result = untrained_tasks(mixed_tasks, source)
    assert set(result) == NEVER  # what measures a perplexity was never asked for rows
    assert (
        all("never trained on" in result[name] for name in ("mmlu", "mmlu-cloze"))
        and "bare" in result["lm-eval:bare"]
    )
    for name, task in mixed_tasks.items():
        assert set(untrained_tasks({name: task}, source)) == NEVER & {name}


@pytest.mark.parametrize(
    "asked",
    [
        ("gsm8k", "mmlu"),
        ("mmlu-cloze", "lm-eval:taught"),
        ("lm-eval:bare", "wikitext", "gsm8k-cot"),
        REAL,
    ],
)
def test_training_rows_are_of_none_of_them_and_their_share_goes_to_the_others(
    asked, mixed_tasks, source
):
    tasks = {name: mixed_tasks[name] for name in asked}
    able = [name for name in asked if name not in NEVER | {"wikitext", "lm-eval:read"}]
    rows = training_examples(tasks, source, rows=12)
    counts = {name: sum(row.task == name for row in rows) for name in asked}
    assert counts == {name: 12 // len(able) if name in able else 0 for name in asked}
    held_out = examples_of(tasks, "validation", source, rows=4)
    assert {row.task for row in held_out} == set(able)  # held-out loss is of what is trained on


@pytest.mark.parametrize("name", sorted(NEVER))
def test_what_cannot_be_trained_on_at_all_is_refused_by_its_reason(name, mixed_tasks, source):
    with pytest.raises(NoSplit, match="never trained on" if name.startswith("mmlu") else "bare"):
        training_examples(
            {name: mixed_tasks[name], "wikitext": mixed_tasks["wikitext"]}, source, rows=4
        )
