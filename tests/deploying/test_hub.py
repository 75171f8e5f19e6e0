"""A folder for the Hub: what the Hub reads of it, and its upload by the real client."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import yaml
from gate_rows import flipped, harness, marks, row, score
from hub_stand_in import running

from harness.analysis.single import score_interval
from harness.deploying import hub as hub_folder
from harness.errors import HarnessError
from harness.records.record import read_record, write_record


@pytest.fixture
def store(made_store, packed_student):
    """Return the made-up store, its int4 student with weights."""
    folder = made_store.student("student-of-int4") / "student"
    shutil.rmtree(folder)
    shutil.copytree(packed_student("int4", group_size=32), folder)
    return made_store


def written(store, tmp_path, *options):
    out = tmp_path / "out"
    done = harness(
        "export", "hub", "int4", store.root, "--to", "ORG/NAME", "--out", out, "--dry-run",
        "--check", "none", *options,
    )  # fmt: skip
    assert done.return_value == 0, done.exception or done.output
    return out, done.output


def test_the_hub_reads_base_scores_and_form_of_the_card(store, tmp_path):
    from huggingface_hub import ModelCard

    form = "compressed-tensors"
    out, output = written(store, tmp_path, "--form", form, "--base", "org/base")
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == ["org/base"]
    assert card.data.base_model_relation == "quantized" and form in card.data.tags
    assert card.data.license is None and "no licence is named" in output
    [result] = card.data.eval_results
    assert (result.dataset_type, result.metric_value) == ("gsm8k-mini", 0.765)
    record = read_record(out / "records" / "int4.json")
    interval = score_interval(record.scores[0])
    shown = f"76.5 % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    assert shown in card.text
    assert "Measured on cpu, float32, made up" in card.text
    assert "vllm serve ORG/NAME --dtype bfloat16" in card.text
    assert read_record(out / "records" / "teacher.json").label == "teacher"
    assert "quantization_config" in json.loads((out / "config.json").read_text())


def test_scores_of_a_data_set_of_the_hub_are_written_in_its_own_form(tmp_path):
    marked = flipped(marks(800), lose=45, win=10)
    record = row("int8", "", scores=(score(marked, task="gsm8k"), score(marked, task="mine")))
    path = tmp_path / "results.yaml"
    hub_folder._write_results(record, path, {"gsm8k": "openai/gsm8k"})
    [entry] = yaml.safe_load(path.read_text())
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"}
    assert entry["value"] == 0.765 and "n = 1000" in entry["notes"]
    from huggingface_hub import parse_eval_result_entries

    assert parse_eval_result_entries([entry])
    path.unlink()
    limited = record.model_copy(update={"limit": 100, "limited": True})
    hub_folder._write_results(limited, path, {"gsm8k": "openai/gsm8k"})
    assert not path.exists()  # a sample is no result of the benchmark


@pytest.mark.slow
def test_the_command_uploads_every_file_by_the_real_client(store, tmp_path):
    out = tmp_path / "out"
    with running() as hub:
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_of_the_test",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [
            *(sys.executable, "-P", "-m", "harness.cli", "export", "hub", "int4", str(store.root)),
            *("--to", "ORG/NAME", "--out", str(out), "--private", "--check", "none"),
        ]
        environment = {**os.environ, **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {hub.url}/ORG/NAME" in done.stdout
    assert hub.tokens == {"Bearer hf_of_the_test", None} or hub.tokens == {"Bearer hf_of_the_test"}
    assert "README.md" in {path for _, path in hub.files}
    assert_uploaded(hub, out)


def assert_uploaded(hub, folder):
    """Compare what the stand-in keeps with a folder, byte for byte."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    kept = {path: data for (_, path), data in hub.files.items()}
    assert kept == {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    assert {name for name, _ in hub.files} == set(hub.repositories) == {"ORG/NAME"}
    assert len(hub.commits) == 1


@pytest.fixture
def client(monkeypatch):
    """Let the real client speak with a stand-in: return a function that takes its address."""
    import huggingface_hub
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def speak_with(hub):
        api = partial(HfApi, endpoint=hub.url, token="hf_of_the_test")
        monkeypatch.setattr(huggingface_hub, "HfApi", api)

    return speak_with


def small_folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "records").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 9)
    (folder / "records" / "int4.json").write_text("{}")
    (folder / "README.md").write_text("---\ntags: [a]\n---\n")
    return folder


def test_weights_go_through_lfs_and_all_else_in_one_commit(client, tmp_path):
    folder = small_folder(tmp_path)
    with running() as hub:
        client(hub)
        options = hub_folder.HubOptions(to="ORG/NAME", private=True)
        assert hub_folder._upload(folder, options).startswith(hub.url)
    assert_uploaded(hub, folder)
    assert list(hub.blobs.values()) == [(folder / "model.safetensors").read_bytes()]
    created = hub.repositories["ORG/NAME"]
    assert created.get("private") is True or created.get("visibility") == "private"


def test_what_the_hub_refuses_is_one_line_with_what_to_type(client, tmp_path):
    with running(refuse=403) as hub:
        client(hub)
        with pytest.raises(HarnessError, match="the Hub did not take ORG/NAME") as caught:
            hub_folder._upload(small_folder(tmp_path), hub_folder.HubOptions(to="ORG/NAME"))
    assert str(caught.value).endswith(f"hf upload ORG/NAME {tmp_path / 'folder'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--to is missing; name a repository"),
        (("--to", "NAME"), "--to NAME: give ORG/NAME"),
        (("--to", "a/b/c"), "--to a/b/c: .*give ORG/NAME"),
        (("--to", "org/na me"), "--to org/na me: .*give ORG/NAME"),
        (("--to", "org/name", "--base", "model"), "--base model: give ORG/NAME"),
    ],
)
def test_a_name_that_is_no_repositorys_is_refused_before_anything_is_written(
    options, message, made_store, tmp_path, monkeypatch
):
    import re

    monkeypatch.chdir(tmp_path)
    done = harness("export", "hub", "int4", made_store.root, *options)
    assert re.search(message, str(done.exception)) and "\n" not in str(done.exception)
    assert not (tmp_path / "results").exists()


def test_an_export_that_fails_its_check_is_not_uploaded(store, tmp_path, monkeypatch):
    from harness.deploying.rescoring import Rescoring
    from harness.deploying.row import find_row
    from harness.deploying.student import Export, ExportOptions

    def failing(row, out, options, *, progress):
        out.mkdir()
        return Export(out, 1, (), None, Rescoring(50, 40, 40, 0.04, "t item 1"))

    monkeypatch.setattr(hub_folder, "export_student", failing)
    monkeypatch.setattr(hub_folder, "_upload", lambda folder, hub: pytest.fail("uploaded"))
    result = hub_folder.export_hub(
        find_row("int4", store.root),
        tmp_path / "out",
        ExportOptions(form="safetensors"),
        hub_folder.HubOptions(to="ORG/NAME"),
    )
    assert "not uploaded: the export did not pass its check" in result.lines()[-1]


def test_a_path_is_no_base_model_and_records_that_name_one_are_said(tmp_path):
    assert hub_folder._hub_id("Qwen/Qwen2.5-0.5B@main") == "Qwen/Qwen2.5-0.5B"
    for name in ("tiny", "/models/a", "./a/b", str(tmp_path)):
        assert hub_folder._hub_id(name) == ""
    record = row("int8", marks(700))
    base = record.conditions.student_base.model_copy(update={"name": "/home/me/model"})
    record = record.model_copy(update={"student_base": base, "starts_from": "student"})
    notes = "\n".join(hub_folder._notes(record, ""))
    assert "name it with --base ORG/NAME" in notes and "as they were typed: /home/me/model" in notes
    write_record(tmp_path / "a.json", record)
