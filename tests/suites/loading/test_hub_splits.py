"""Splits of a data set of the Hub, written where a task then finds them."""

import json

import pytest
from hub_tasks import ending_rows, science_rows, write_tasks
from task_data import refused

import suites
from harness.data.source import LocalOrHubData

SPLITS = {
    "someone/science": {"test": science_rows("test", 5), "train": science_rows("train", 7)},
    "someone/endings": {"test": ending_rows(4)},
}


@pytest.fixture
def hub(monkeypatch):
    """A Hub with two data sets; science lacks the validation split that its task names."""
    import datasets
    import huggingface_hub

    def load_dataset(path, name=None, *, split, **_):
        return datasets.Dataset.from_list(SPLITS[path][split])

    class Api:
        def dataset_info(self, name):
            return type("Info", (), {"sha": f"commit of {name}"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, *_, **__: SPLITS[path])
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)


def test_what_is_fetched_is_scored_without_a_network(hub, tmp_path, no_network):
    tasks, data, lines = write_tasks(tmp_path / "tasks"), tmp_path / "data", []
    for name in ("science", "endings"):
        suites.fetch(f"lm-eval:{name}", data, include_path=tasks, say=lines.append)
    assert lines == [
        "hub/someone/science/Easy/train.jsonl.gz: 7 rows of someone/science Easy train",
        "hub/someone/science/Easy/test.jsonl.gz: 5 rows of someone/science Easy test",
        "hub/someone/endings/default/test.jsonl.gz: 4 rows of someone/endings default test",
    ]
    science = suites.load("lm-eval:science", include_path=tasks, data_folder=data)
    [built] = science.lm_eval_tasks(LocalOrHubData()).values()
    assert list(built.eval_docs) == science_rows("test", 5) and science.count() == 5
    endings = suites.load("lm-eval:endings", include_path=tasks, data_folder=data)
    assert endings.count() == 4 and not no_network
    revision = json.loads((data / "hub/someone/science/Easy/revision.json").read_text())
    assert revision == {"dataset": "someone/science", "revision": "commit of someone/science"}


def test_a_scored_split_that_the_hub_lacks_is_one_line(hub, tmp_path, monkeypatch):
    import datasets

    def load_dataset(path, name=None, *, split, **_):
        raise ValueError(f'Unknown split "{split}"')

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    tasks = write_tasks(tmp_path / "tasks")
    refused(
        lambda: suites.fetch(
            "lm-eval:endings", tmp_path / "data", include_path=tasks, say=lambda _: None
        ),
        'Unknown split "test"',
    )


def test_a_task_over_local_files_has_nothing_to_fetch(tmp_path):
    from task_data import LOCAL

    refused(
        lambda: suites.fetch("lm-eval:arc_style", tmp_path, include_path=LOCAL, say=lambda _: None),
        "reads nothing from the Hub",
    )
