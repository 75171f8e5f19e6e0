"""The revision of a data set: the Hub's word, else the local copy's, else nothing."""

import pytest

from harness.data.hub_revisions import dataset_revision


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that answers what is put into the dictionary; a cache folder with nothing in it."""
    import huggingface_hub
    from huggingface_hub import constants

    answers = {}

    class Api:
        def dataset_info(self, name, *, timeout):
            if name not in answers:
                raise ConnectionError("no route to host")
            return type("Info", (), {"sha": answers[name]})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    dataset_revision.cache_clear()
    yield answers
    dataset_revision.cache_clear()


def write_copy(tmp_path, commit):
    reference = tmp_path / "datasets--openai--gsm8k" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(commit)


def test_the_hub_is_asked_first_and_the_copy_is_taken_without_it(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    write_copy(tmp_path, "a" * 40)
    assert dataset_revision("openai/gsm8k") == "a" * 40
    dataset_revision.cache_clear()
    hub["openai/gsm8k"] = "b" * 40
    assert dataset_revision("openai/gsm8k") == "b" * 40
    dataset_revision.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert dataset_revision("openai/gsm8k") == "a" * 40


def test_without_the_hub_and_without_a_copy_there_is_none(hub):
    assert dataset_revision("openai/gsm8k") == ""


def test_another_revision_is_another_key_and_a_local_folder_has_none(hub, tmp_path, monkeypatch):
    from task_data import write_all

    import suites
    from harness.api import _data_digest
    from harness.data.source import LocalOrHubData

    tasks, digests = {"gsm8k": suites.load("gsm8k")}, set()
    for commit in ("b" * 40, "c" * 40, "b" * 40):
        hub["openai/gsm8k"] = commit
        dataset_revision.cache_clear()
        digests.add(_data_digest(tasks, LocalOrHubData()))
    assert len(digests) == 2 and "" not in digests
    write_all(tmp_path / "data")
    monkeypatch.setattr("harness.data.hub_revisions.dataset_revision", lambda name: 1 / 0)
    assert _data_digest(tasks, LocalOrHubData(folder=tmp_path / "data"))


def test_a_pinned_revision_is_taken_as_it_stands(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: 1 / 0)
    assert dataset_revision("someone/science@b2") == "b2"


def test_a_pinned_revision_is_in_the_digest_and_nobody_is_asked(hub, tmp_path, monkeypatch):
    import huggingface_hub
    from hub_tasks import write_tasks

    import suites
    from harness.api import _data_digest
    from harness.data.source import LocalOrHubData

    yaml = write_tasks(tmp_path / "tasks") / "science.yaml"
    plain = yaml.read_text()

    def digest():
        dataset_revision.cache_clear()
        task = suites.load("lm-eval:science", include_path=yaml.parent)
        return _data_digest({"science": task}, LocalOrHubData())

    hub["someone/science"] = "a1"
    digests = [digest()]
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: 1 / 0)
    for revision in ("b2", "c3", "b2"):
        yaml.write_text(f"{plain}dataset_kwargs: {{revision: {revision}}}\n")
        digests.append(digest())
    assert len(set(digests)) == 3 and digests[1] == digests[3] and "" not in digests
