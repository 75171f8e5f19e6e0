"""`--num-fewshot`: lm-eval's own shots, another version, and never a scored item."""

import pytest
from hub_tasks import write_hub, write_tasks
from task_data import refused

import suites
from harness.data.source import LocalOrHubData

ALL = ("train", "validation", "test")


@pytest.fixture
def tasks(tmp_path):
    return write_tasks(tmp_path / "tasks")


def load(name, tasks, data, shots):
    return suites.load(f"lm-eval:{name}", include_path=tasks, data_folder=data, num_fewshot=shots)


def prompts_of(result):
    return [sample["arguments"][0][0] for sample in result["samples"]["science"]]


def test_prompts_are_those_of_lm_evals_own_command(tasks, tmp_path, embedded, no_network):
    """`simple_evaluate(num_fewshot=2)` on the same rows, at its own seeds."""
    from lm_eval.evaluator import simple_evaluate

    from harness.scoring.lm_eval_model import HarnessLM
    from harness.scoring.score import score_task

    data = write_hub(tmp_path / "data", splits=ALL)
    task = load("science", tasks, data, 2)
    _, rows = score_task(embedded, task, LocalOrHubData(), progress=lambda _: None)
    [plain] = load("science", tasks, data, None).lm_eval_tasks(LocalOrHubData()).values()
    theirs = simple_evaluate(
        HarnessLM(embedded), tasks=[plain], num_fewshot=2, bootstrap_iters=0, log_samples=True
    )
    hashes = [sample["prompt_hash"] for sample in theirs["samples"]["science"][:: len("A")]]
    assert [row.prompt_hash for row in rows] == hashes
    assert all(prompt.count("Which train thing") == 2 for prompt in prompts_of(theirs))
    assert not no_network


def test_another_number_is_another_version(tasks, tmp_path):
    data = write_hub(tmp_path / "data", splits=ALL)
    versions = [load("science", tasks, data, shots).version for shots in (None, 1, 5)]
    assert len(set(versions)) == 3 and "+5shot" in versions[2]
    definitions = [load("science", tasks, data, shots).definition for shots in (None, 5)]
    assert definitions[0] != definitions[1]


def test_a_definition_that_states_none_keeps_them_and_says_so(tasks, tmp_path):
    yaml = tasks / "science.yaml"
    yaml.write_text(yaml.read_text() + "num_fewshot: 0\n")
    task = load("science", tasks, write_hub(tmp_path / "data", splits=ALL), 3)
    [built] = task.lm_eval_tasks(LocalOrHubData()).values()
    assert built.config.num_fewshot == 0
    assert any("its definition states 0" in note for note in task.notes)


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("endings", ""),
        ("science", "fewshot_split: test"),
        ("science", "fewshot_config: {split: test}"),
        ("science", "fewshot_split: test\nfewshot_config: {samples: [{}]}"),
    ],
)
@pytest.mark.parametrize("copied", [True, False])
def test_scored_items_are_never_shown_as_examples(name, stated, copied, tasks, tmp_path):
    yaml = tasks / f"{name}.yaml"
    yaml.write_text(f"{yaml.read_text()}{stated}\n")
    data = write_hub(tmp_path / "data", splits=ALL) if copied else None
    refused(lambda: load(name, tasks, data, 2), "--num-fewshot 2", "that one is scored")


def test_a_number_of_shots_needs_the_split_that_lm_eval_takes_them_from(tasks, tmp_path):
    data = write_hub(tmp_path / "data", splits=("validation", "test"))
    refused(lambda: load("science", tasks, data, 2), "takes its 2 examples from the split train")
    assert load("science", tasks, data, None).count() == 12


def test_tasks_with_fixed_examples_refuse_a_number(tasks):
    refused(
        lambda: suites.load("gsm8k", num_fewshot=3), "--num-fewshot 3: gsm8k has fixed examples"
    )
