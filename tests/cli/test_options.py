"""A setting is one field of the configuration: every door has it by that, with one help, one
default, one refusal.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

import harness
from harness.cli import app
from harness.cli.ending import exit_code_of
from harness.planning import config
from harness.planning.fields import Spelling, settings_by_name


class Wider(config.RunConfig):
    """A configuration with a field of each kind more."""

    shots: Annotated[int, Field(ge=0, le=25)] = Field(3, description="Examples before each item.")
    ratio: Annotated[float, Field(gt=0)] | None = Field(None, description="A share.")
    order: Literal["given", "length", "random"] = Field(
        "given", description="How items are sorted: {choices}."
    )
    packed: bool = Field(True, description="Join short rows.")
    dry: bool = Field(False, description="Take no rows.")
    notes: Annotated[str | None, Spelling(default="none", may_be_empty=True)] = Field(
        None, description="Kept in the run file."
    )
    folder: Annotated[
        Path | None, Spelling(environment="HARNESS_TEST_FOLDER", default="$HARNESS_TEST_FOLDER")
    ] = Field(None, description="A place.")
    tags: config.Names = Field(("a",), description="Words, separated by commas.")


@pytest.fixture
def door(monkeypatch, tmp_path, capsys):
    """Type a `run` command; returns its exit code, what it printed, and the configuration that it
    came to.
    """
    seen = []
    monkeypatch.setattr(config, "RunConfig", Wider)
    monkeypatch.setattr("harness.api.check_places", lambda given, **_: seen.append(given))
    monkeypatch.setattr("harness.api.plan_run", _planned)
    monkeypatch.chdir(tmp_path)

    def typed(*arguments):
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["harness", "run", *map(str, arguments)])
        code = exit_code_of(app._command)
        said = capsys.readouterr()
        return code, said.out + said.err, seen[0] if seen else None

    typed.seen = seen
    return typed


def _planned(*_, **__):
    raise harness.HarnessError("planned")


GIVEN = [
    (["--shots", "7"], "shots = 7", {"shots": 7}),
    (["--ratio", "0.5"], "ratio = 0.5", {"ratio": 0.5}),
    (["--order", "length"], "order = 'length'", {"order": "length"}),
    (["--no-packed"], "packed = false", {"packed": False}),
    (["--dry"], "dry = true", {"dry": True}),
    (["--notes", ""], "notes = ''", {"notes": ""}),
    (["--folder", "x"], "folder = 'x'", {"folder": Path("x")}),
    (["--tags", "b,c", "--tags", "d"], "tags = 'b,c,d'", {"tags": ("b", "c", "d")}),
]


@pytest.mark.parametrize(("typed", "line", "value"), GIVEN)
def test_a_new_field_is_an_option_a_key_and_an_argument(typed, line, value, door, tmp_path):
    [(name, expected)] = value.items()
    assert getattr(door(*typed)[2], name) == expected
    (tmp_path / "run.toml").write_text(line)
    assert getattr(door("run.toml")[2], name) == expected
    door.seen.clear()
    with pytest.raises(harness.HarnessError, match="planned"):
        harness.run("cot", **value)
    assert getattr(door.seen[0], name) == expected
    assert getattr(door()[2], name) == Wider.model_fields[name].default, (
        "nothing typed: the field's default"
    )


def test_help_shows_a_new_fields_words_default_choices_and_bounds(door):
    text = " ".join(door("--help")[1].split())
    for words in (
        "--shots <int> Examples before each item. [default: 3; 0 to 25]",
        "--ratio <float> A share. [above 0]",
        "--order <str> How items are sorted: given, length or random. [default: given]",
        "--packed / --no-packed Join short rows. [default: packed]",
        "--dry Take no rows.",
        "--notes <str> Kept in the run file. [default: none]",
        "--folder <path> A place. [default: $HARNESS_TEST_FOLDER]",
        "--tags <list[str]> Words, separated by commas. [default: a]",
    ):
        assert words in text, words
    assert text.index("--wait") < text.index("--shots") < text.index("--dry-run"), (
        "in the order of the fields"
    )


@pytest.mark.parametrize(
    ("typed", "line", "name", "value"),
    [
        (["--shots", "26"], "shots = 26", "shots", 26),
        (["--ratio", "0"], "ratio = 0.0", "ratio", 0.0),
        (["--order", "best"], "order = 'best'", "order", "best"),
        (["--seeds", "0"], "seeds = 0", "seeds", 0),
        (["--device", "gpu"], "device = 'gpu'", "device", "gpu"),
    ],
)
def test_every_door_refuses_in_the_same_words(typed, line, name, value, door, tmp_path):
    code, said, _ = door(*typed)
    assert (
        code == 2
        and len(said.strip().splitlines()) == 1
        and f"--{name} {value!r}: input should be" in said
    )
    (tmp_path / "run.toml").write_text(line)
    assert door("run.toml")[:2] == (2, said.replace("harness: ", "harness: run.toml: "))
    with pytest.raises(harness.HarnessError) as refused:
        harness.run("cot", **{name: value})
    assert f"harness: {refused.value}" == said.strip()


def test_an_unknown_key_is_answered_with_the_nearest_field(door, tmp_path):
    (tmp_path / "run.toml").write_text("shotts = 2")
    assert "did you mean 'shots'" in door("run.toml")[1]
    with pytest.raises(harness.HarnessError, match="did you mean 'shots'"):
        harness.run("cot", shotts=2)
    assert "--shotts" in door("--shotts", "2")[1]


def test_the_environment_stands_in_at_every_door_and_what_is_typed_wins(
    door, tmp_path, monkeypatch
):
    monkeypatch.setenv("HARNESS_TEST_FOLDER", "of-the-environment")
    assert door()[2].folder == Path("of-the-environment")
    assert door("--folder", "typed")[2].folder == Path("typed")
    (tmp_path / "run.toml").write_text("folder = 'of-the-file'")
    assert door("run.toml")[2].folder == Path("of-the-file")
    door.seen.clear()
    with pytest.raises(harness.HarnessError, match="planned"):
        harness.run("cot", folder=None)
    assert door.seen[0].folder == Path("of-the-environment")
    monkeypatch.setenv("HARNESS_TEST_FOLDER", "")
    assert door()[2].folder is None


def test_options_typed_win_over_the_file_and_methods_settings_come_together(door, tmp_path):
    (tmp_path / "run.toml").write_text(
        "seeds = 2\nrows = 7\n[set.response]\ntemperature = 1\ntop_k = 5\n[set.sft]\nlr = 1"
    )
    values = door(
        "run.toml", "--rows", "9", "--set", "response.temperature=4", "--set", "cot.samples=2"
    )[2]
    assert (values.seeds, values.rows) == (2, 9)
    assert values.set == {
        "response": {"temperature": 4, "top_k": 5},
        "sft": {"lr": 1},
        "cot": {"samples": 2},
    }


def test_every_setting_says_what_it_is_and_names_each_of_its_choices():
    for name, setting in settings_by_name(config.RunConfig).items():
        assert setting.field.description and setting.help[0] != "[", name
        for choice in setting.choices:
            assert choice in setting.help, (name, choice)


def test_the_help_of_all_commands_does_not_read_the_configuration():
    import subprocess

    line = (
        "import sys; sys.argv = ['harness', '--help']; from harness.cli.app import _command; "
        "_command(); print('pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False"), done.stdout[-300:] + done.stderr[-300:]
