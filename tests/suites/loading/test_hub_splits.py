"""Splits of a data set of the Hub, written where a task then finds them."""

import json

import pytest
from hub_tasks import ending_rows, science_rows, write_tasks
from task_data import refused

import suites
from harness.data.source import LocalOrHubData
from suites.loading.hub_splits import _newest_commit

SPLITS = {
    "someone/science": {"test": science_rows("test", 5), "train": science_rows("train", 7)},
    "someone/endings": {"test": ending_rows(4)},
}


@pytest.fixture
def hub(monkeypatch):
    """A Hub with two data sets; science lacks the validation split that its task names.

    Returns the options of every loading.
    """
    import datasets
    import huggingface_hub

    asked = []

    def load_dataset(path, name=None, *, split, **options):
        asked.append(options)
        return datasets.Dataset.from_list(SPLITS[path][split])

    class Api:
        def dataset_info(self, name):
            return type("Info", (), {"sha": f"commit of {name}"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, *_, **__: SPLITS[path])
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    _newest_commit.cache_clear()
    yield asked
    _newest_commit.cache_clear()


def fetch_science(tasks, data, stated):
    """Fetch science with `stated` in its definition; return the folder of its files."""
    yaml = write_tasks(tasks) / "science.yaml"
    yaml.write_text(f"{yaml.read_text()}{stated}\n")
    suites.fetch("lm-eval:science", data, include_path=tasks, say=lambda _: None)
    task = suites.load("lm-eval:science", include_path=tasks, data_folder=data)
    assert task.count() == 5 and not task.needs_hub
    return (data / task.files[-1]).parent


@pytest.mark.parametrize(
    ("stated", "revision"),
    [
        ("", "commit of someone/science"),
        ("dataset_kwargs: {revision: b2}", "b2"),
        ("dataset_kwargs: {revision: c3, data_dir: easy}", "c3"),
        ("dataset_kwargs: {data_dir: easy}", "commit of someone/science"),
    ],
)
def test_what_is_loaded_is_of_the_revision_that_is_reported(stated, revision, hub, tmp_path):
    folder = fetch_science(tmp_path / "tasks", tmp_path / "data", stated)
    assert json.loads((folder / "revision.json").read_text())["revision"] == revision
    assert [options["revision"] for options in hub] == [revision] * 2  # train and test


def test_certain_files_of_a_data_set_are_fetched_to_where_their_task_reads_them(hub, tmp_path):
    options = ("", "data_dir: easy", "data_files: {test: a.json}", "data_files: {test: b.json}")
    stated = [f"dataset_kwargs: {{{option}}}" for option in options]
    folders = [fetch_science(tmp_path / "tasks", tmp_path / "data", text) for text in stated]
    assert len(set(folders)) == 4 and folders[0].name == "Easy"


@pytest.mark.parametrize("key", ["fewshot_split: dev", "fewshot_config: {split: dev}"])
def test_the_split_that_shots_come_from_is_fetched(key, hub, tmp_path, monkeypatch):
    splits = SPLITS["someone/science"] | {"dev": science_rows("dev", 6)}
    monkeypatch.setitem(SPLITS, "someone/science", splits)
    folder = fetch_science(tmp_path / "tasks", tmp_path / "data", f"num_fewshot: 2\n{key}")
    assert (folder / "dev.jsonl.gz").is_file()


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
