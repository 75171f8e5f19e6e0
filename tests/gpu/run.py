"""The verification program for a GPU: `python tests/gpu/run.py STEP... [--dry]`.

README.md beside this file says what each step shows.

Each step writes `step-N.json` into the folder of `--out`, part by part; the same command goes on
where it was stopped. Exits 0 when every part is done or was skipped with its numbers, 1 when one
failed, 2 for a mistake in what was typed or a machine without a GPU.
"""

import argparse
import importlib
import os
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = {number: f"step{number}" for number in range(8)}
# What must import before anything is tried, the packed ones first: a broken wheel is named, not met
# in the middle of a step.
NEEDED = (
    "pydantic",
    "platformdirs",
    "dill",
    "multiprocess",
    "datasets",
    "lm_eval",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "torch",
    "transformers",
    "accelerate",
    "pandas",
    "tabulate",
    "typer",
    "rich",
    "scipy",
    "matplotlib",
    "safetensors",
    "huggingface_hub",
    "filelock",
    "pytest",
    "harness.cli",
    "harness.running.cell",
    "harness.measuring.worker",
    "methods",
    "suites",
)


def main() -> int:
    """Run the steps of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "steps",
        nargs="+",
        type=int,
        choices=sorted(STEPS),
        metavar="STEP",
        help=f"of {', '.join(map(str, STEPS))}",
    )
    parser.add_argument(
        "--dry",
        action="store_true",
        help="toy sizes on the CPU, which plays the card: shows that every line runs",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"),
        help="where the figures go",
    )
    parser.add_argument(
        "--pack",
        type=Path,
        help="the folder that pack.py made, on a machine that lacks what is in it",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.5,
        help="no part begins that would not end by then [default: 9.5]",
    )
    parser.add_argument("--force", action="store_true", help="run finished parts again")
    options = parser.parse_args()
    if options.pack is not None and not options.pack.is_dir():
        parser.error(
            f"no folder at {options.pack}; "
            f"make it with: python tests/gpu/pack.py --out {options.pack}"
        )
    _prepare(options.pack)
    broken = _broken_imports()
    if broken:
        print("\n".join(broken), file=sys.stderr)
        return 2
    if options.dry:
        os.environ["HARNESS_STAND_IN_CARD"] = "1"
        importlib.import_module("stand_in.card")
    reason = _no_card()
    if reason:
        print(
            f"no GPU can be used here: {reason}; add --dry to see every step run on the CPU",
            file=sys.stderr,
        )
        return 2
    return _run(options)


def _prepare(pack: Path | None) -> None:
    """Put the packed folder and this tree first on the import path; keep everything offline."""
    sys.path[:0] = [str(path) for path in (pack, ROOT, Path(__file__).parent) if path is not None]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def _broken_imports() -> list[str]:
    lines = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as problem:  # noqa: BLE001  a wheel built for another machine may raise anything
            lines.append(
                f"{name} does not import: {type(problem).__name__}: {problem}; pack it again for "
                "this Python: tests/gpu/pack.py"
            )
    return lines


def _no_card() -> str:
    from harness.machine.gpu import gpu_problem, signs_of_gpu

    return gpu_problem(signs_of_gpu())


def _say_what_is_odd() -> None:
    """Say beforehand what makes figures of this card doubtful: others on it, no bf16."""
    import torch

    from harness.machine.gpu import default_dtype

    default_dtype("cuda", say=print)
    free, total = torch.cuda.mem_get_info()
    if free < 0.9 * total:
        print(
            f"the card is busy: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; timings "
            "are doubtful",
            flush=True,
        )


def _code() -> str:
    """Return the digest of the code under test: a tree copied to the machine has no commit."""
    from harness.files.digests import digest_of, file_digest

    files = [
        path
        for folder in ("harness", "methods", "suites", "tests/gpu")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    return digest_of([(str(path.relative_to(ROOT)), file_digest(path)) for path in files])[:16]


def _work(options: argparse.Namespace) -> Path:
    """Return the folder of stores and models beside the figures, where a stopped run continues."""
    folder: Path = options.out.resolve().with_name(f"{options.out.resolve().name}-work")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(options: argparse.Namespace) -> int:
    from kit import Kit

    from harness.machine.gpu import gpu_of
    from harness.records.environment import current_environment

    options.out.mkdir(parents=True, exist_ok=True)
    _say_what_is_odd()
    environment = current_environment(device="cuda", dtype="", threads=0)
    versions = {
        **environment.versions,
        **{name: metadata.version(name) for name in ("pyarrow", "huggingface_hub")},
    }
    conditions = {
        "gpu": str(gpu_of("cuda")),
        "dry": options.dry,
        "commit": environment.commit,
        "code": _code(),
        "versions": versions,
    }
    deadline = time.monotonic() + (60 * options.minutes if not options.dry else float("inf"))
    kit = Kit(
        out=options.out.resolve(),
        dry=options.dry,
        conditions=conditions,
        site=options.pack and options.pack.resolve(),
        force=options.force,
        deadline=deadline,
        work=_work(options),
    )
    failed = []
    for number in dict.fromkeys(options.steps):
        kit.open_step(number)
        importlib.import_module(STEPS[number]).run(kit)
        failed += [
            f"step {number} {name}: {part['reason']}"
            for name, part in kit.parts.items()
            if part["status"] == "failed"
        ]
    print("\n".join(failed) or "every part is done, or was skipped with its numbers")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
