"""Gathers into one folder what a machine with only torch and transformers lacks.

Type: `python tests/gpu/pack.py [--out build/gpu-pack] [--also torchao]`.

The folder goes with the tree and in front of the import path; nothing is installed there. Wheels
come from the package index for that machine's Python, at the versions of this environment but for
three that an older pyarrow takes. `--installed` copies this environment's own files (same Python
only). lm-eval is trimmed to the tasks that are used: whole, it holds some 15,000 files.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What scoring, training, timing and reporting import and the image of a GPU machine does not have.
PACKAGES = (
    "lm-eval",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "datasets",
    "multiprocess",
    "dill",
    "platformdirs",
    "gguf",
    "typing-extensions",
)
# datasets 5 asks for pyarrow 24, which an image need not have; 4.5 asks for 21, and for these two.
PINNED = {"datasets": "4.5.0", "dill": "0.4.0", "multiprocess": "0.70.18"}
TASKS = ("gsm8k", "mmlu", "wikitext")  # of lm-eval
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)), "manylinux2014_x86_64")
MOST_BYTES = 48 * 2**20  # of what travels in one call (64 MiB) beside this tree


def main() -> int:
    """Make the folder and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "gpu-pack",
        help="emptied first; build/ is ignored by git",
    )
    parser.add_argument(
        "--python", default="3.12", help="version of that machine's Python [default: 3.12]"
    )
    parser.add_argument(
        "--installed",
        action="store_true",
        help="copy this environment's files instead of downloading wheels",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="another installed package, repeatable: torchao, which recipe=bf16 trains with",
    )
    options = parser.parse_args()
    names = (*PACKAGES, *options.also)
    if not re.fullmatch(r"3\.\d+", options.python):
        parser.error(f"--python {options.python!r} is not a version such as 3.12")
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    if options.installed:
        for name in names:
            _copy(name, options.out)
    elif _unpack_wheels(names, options.python, options.out):
        return 2
    trim_lm_eval(options.out)
    files = [path for path in options.out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    packed = sorted(
        f"{package.metadata['Name']} {package.version}"
        for package in metadata.distributions(path=[str(options.out)])
    )
    print(f"{options.out}: {len(files)} files, {size / 2**20:.1f} MiB: {', '.join(packed)}")
    if size > MOST_BYTES:
        print(
            f"that is more than the {MOST_BYTES / 2**20:.0f} MiB that travel beside the tree in "
            "one call",
            file=sys.stderr,
        )
        return 1
    return 0


def _copy(name: str, out: Path) -> None:
    """Copy an installed package, its metadata beside it."""
    for file in _files_of(name):
        target = out / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.locate(), target)


def _files_of(name: str) -> Iterator[metadata.PackagePath]:
    """Yield a package's own files: no scripts, no byte code, and lm-eval's tasks in use."""
    for file in metadata.files(name) or ():
        outside = ".." in file.parts or file.suffix == ".pyc"
        unused = (
            file.parts[:2] == ("lm_eval", "tasks")
            and len(file.parts) > 3
            and file.parts[2] not in TASKS
        )
        if not outside and not unused:
            yield file


def _unpack_wheels(names: Sequence[str], python: str, out: Path) -> int:
    """Download wheels for another Python and unpack them; the exit code of pip."""
    requirements = [f"{name}=={PINNED.get(name) or metadata.version(name)}" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--implementation",
            "cp",
            "--python-version",
            python,
            *platforms,
            "--dest",
            folder,
            *requirements,
        ]
        done = subprocess.run(command, check=False)
        if done.returncode:
            print(
                f"pip found no wheel of one of these for Python {python}: {' '.join(requirements)}",
                file=sys.stderr,
            )
            return done.returncode
        for wheel in sorted(Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(out)
    return 0


def trim_lm_eval(out: Path) -> None:
    """Take away the tasks that nothing here uses; the code beside them stays."""
    tasks = out / "lm_eval" / "tasks"
    for path in tasks.iterdir() if tasks.is_dir() else ():
        if path.is_dir() and path.name not in TASKS:
            shutil.rmtree(path)


if __name__ == "__main__":
    sys.exit(main())
