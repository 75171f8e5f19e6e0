"""The guides for authors as they stand: a page's files become a package that is run and tested.

The package lies outside the repository.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
FILE = re.compile(r'^```(?:\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = ["--budget", "1500", "--rows", "12", "--limit", "8", "--noise", "0", "--grid", "none"]
PRIVATE = re.compile(r"^\s*(?:from|import) .*(?<![A-Za-z0-9])_[a-z]\w*", re.MULTILINE)


class Package:
    """What a page makes: a folder with its files, installed by its own pyproject.toml."""

    def __init__(self, page, folder):
        self.text = (DOCS / page).read_text(encoding="utf-8")
        self.folder = folder
        self.files = dict(FILE.findall(self.text))
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        self._install(tomllib.loads(self.files["pyproject.toml"])["project"])

    def _install(self, project):
        """Write what `pip install --editable .` writes: the entry points, on Python's path."""
        info = self.folder / f"{project['name']}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = [
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in project["entry-points"].items()
        ]
        (info / "entry_points.txt").write_text("\n".join(groups))

    @property
    def commands(self):
        """The lines of the page's bash blocks, but for the installation."""
        lines = "".join(COMMANDS.findall(self.text)).splitlines()
        return [shlex.split(line) for line in lines if not line.startswith("pip install")]

    def run(self, words):
        """Type a command in the folder; a run is made small."""
        program = {"harness": ["-m", "harness.cli"], "pytest": ["-m", "pytest", "-q"]}[words[0]]
        if words[:2] == ["harness", "run"]:
            cache = ["--out", str(self.folder / "runs"), "--cache", str(self.folder / "cache")]
            words = [*words[:2], *_without(words[2:], {name for name in SMALL if "--" in name})]
            words += [*SMALL, *cache]
        environment = {**os.environ, "PYTHONPATH": _path(self.folder)}
        return subprocess.run(
            [sys.executable, "-P", *program, *words[1:]],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=environment,
        )


def _path(folder):
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))


def _without(words, names):
    """Leave out options, each with its value."""
    remaining, drop = [], False
    for word in words:
        if not drop and word not in names:
            remaining.append(word)
        drop = word in names
    return remaining


@pytest.fixture(scope="module", params=["add-a-method.md", "add-a-task.md"])
def package(request, tmp_path_factory):
    return Package(request.param, tmp_path_factory.mktemp(request.param.partition(".")[0]))


def test_a_guide_imports_nothing_private(package):
    for name, content in package.files.items():
        if name.endswith(".py"):
            assert not PRIVATE.findall(content), name


def test_a_guide_is_formatted_as_the_project_is(package):
    ruff = pytest.importorskip("ruff")
    assert ruff
    files = [name for name in package.files if name.endswith(".py")]
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "100", *files],
        capture_output=True,
        text=True,
        cwd=package.folder,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_every_command_of_a_guide_works_as_it_stands(package):
    assert len(package.commands) >= 3
    for words in package.commands:
        result = package.run(words)
        output = f"{shlex.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        assert result.returncode == 0, output
        if words[:2] == ["harness", "list"]:
            [points] = tomllib.loads(package.files["pyproject.toml"])["project"][
                "entry-points"
            ].values()
            assert all(f"{name} " in result.stdout for name in points), output
        if words[:2] == ["harness", "run"]:
            assert "failed" not in result.stdout and "skipped" not in result.stdout, output
