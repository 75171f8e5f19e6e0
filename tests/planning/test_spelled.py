"""A configuration written as a command is read again as the same configuration."""

import shlex

import pytest

from harness.planning.config import build_config
from harness.planning.spelled import typed_command


def read_again(command):
    """Return the configuration of `harness run ...`, by the command line's own reading."""
    from harness.cli.options import ConfigCommand

    words = shlex.split(command)
    assert words[:2] == ["harness", "run"]
    reader = ConfigCommand("run", params=[], callback=lambda: None)
    return build_config(reader.make_context("run", words[2:]).obj)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("HARNESS_DATA_DIR", raising=False)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"methods": ("int4[group_size=32,symmetric=false]", "cot"), "seeds": 3, "controls": False},
        {"limit": {"gsm8k": 20, "mmlu": 100}, "wait": False, "force": True, "tune": True},
        {"set": {"response": {"temperature": 4, "terms": ["a", "b c"], "start": "4"}}},
        {"checkpoint": ("q8=./a folder, with a comma", "x=ORG/NAME@main")},
        {"teacher": ("tiny=0.7", "tiny-math=0.3"), "system": "Be brief.", "cell_timeout": 90.0},
        {
            "out": "some where/runs",
            "subset": "quick:300",
            "grid": "none",
            "rounds": "auto:0.02:4-12",
        },
    ],
)
def test_the_command_gives_the_configuration_again(values):
    config = build_config(values)
    command = typed_command(config.model_dump(mode="json"))
    assert read_again(command) == config
    assert command == "harness run" or len(shlex.split(command)) > 2


def test_models_that_were_scored_without_a_teacher_are_written_as_that_command():
    config = build_config(
        {"methods": (), "noise": 0, "teacher": ("a",), "checkpoint": ("b=./b",), "limit": 5}
    )
    assert typed_command(config.model_dump(mode="json")) == "harness score a ./b --limit 5"


def test_what_another_version_knew_is_left_out():
    assert typed_command({"seeds": 2, "of_yesterday": 1}) == "harness run --seeds 2"
