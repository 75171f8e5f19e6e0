"""Starts the command without loading torch each time: it forks a process that has loaded torch.

The forked process has computed nothing.

A command is a process group of its own and its cells are its children, as with `harness run`;
between the two there is no new Python. What a new process would not have (open files, handlers of
signals) is taken away.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _faults

_LOADED = (
    "torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "transformers",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "transformers.quantizers.auto",
    "accelerate",
    "datasets",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "safetensors.torch",
    "harness.api",
    "harness.running.cell",
    "harness.cli",
    "harness.cli.console",
    "harness.scoring.fidelity",
    "harness.scoring.lm_eval_model",
    "harness.measuring.measure",
    "harness.models.language_model",
    "harness.models.packed",
    "harness.reporting.report",
    "harness.reporting.html_page",
    "harness.running.runner",
    "harness.scoring.score",
    "harness.scoring.prefix_sharing",
    "harness.models.vocabulary",
    "methods.cot",
    "methods.int8",
    "methods.response",
    "methods.sft",
    "methods.training.tuning",
    "methods.training.loop",
    "methods.training.teacher_cache",
    "suites",
)
_GENERATED = ("suites.gsm8k_mini", "suites.mmlu_mini")
_FILES = 1024  # numbers of open files that a new process does not inherit


def load() -> None:
    """Load what a cell loads."""
    for name in _LOADED:
        importlib.import_module(name)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # transformers loads them when they are named
    assert AutoConfig and AutoModelForCausalLM and AutoTokenizer
    for name in _GENERATED:
        _remember_items(importlib.import_module(name))


def _remember_items(task: Any) -> None:
    """Generate a task's items once for all processes of cells.

    Each process would generate the same items, which takes longer than all else that it computes.
    """
    draw = task.generate_split
    items_by_split: dict[str, list[dict[str, Any]]] = {}

    def split(name: str, **how: Any) -> Iterator[dict[str, Any]]:
        if name not in items_by_split:
            items_by_split[name] = list(draw(name, **how))
        return (dict(item) for item in items_by_split[name])

    task.generate_split = split
    for name in task.SIZES:
        list(task.generated_items(name))


def start(arguments: Sequence[str], output: Path, environment: Mapping[str, str]) -> int:
    """Start `harness ARGUMENTS` in a process group of its own; return its number."""
    number = _fork()
    if number:
        return number

    def run() -> int:
        os.setsid()
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        _become_new_process(os.open(os.devnull, os.O_RDONLY), target, target, environment)
        sys.argv = ["harness", *arguments]
        _faults.watch_from_environment()
        from harness.cli import app
        from harness.running import runner

        runner.subprocess = SimpleNamespace(  # type: ignore[assignment]
            Popen=Cell, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL
        )
        app.main()
        return 0

    return _run_and_exit(run)


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def _become_new_process(
    stdin: int, stdout: int, stderr: int, environment: Mapping[str, str]
) -> None:
    """Take the standard streams and the environment of a new process.

    All other files and the parent's signal handlers are let go.
    """
    for place, number in enumerate((stdin, stdout, stderr)):
        os.dup2(number, place)
    os.closerange(3, _FILES)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _run_and_exit(run: Callable[[], int]) -> int:
    """Run what a forked process is for, and end it as Python ends a process."""
    code = 1
    try:
        code = run()
    except SystemExit as problem:
        code = problem.code if isinstance(problem.code, int) else 1
    except BaseException:  # noqa: BLE001  Python prints it, too
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Cell:
    """The process of a cell, with the interface of `subprocess.Popen`.

    Its command line ends with the job file and the parent's number.
    """

    def __init__(
        self, command: Sequence[str], *, stderr: Any, env: Mapping[str, str], **_: Any
    ) -> None:
        read_end, write_end = os.pipe()
        self.returncode: int | None = None
        self.pid = _fork()
        if not self.pid:
            _run_and_exit(lambda: self._run(command, write_end, stderr.fileno(), env))
        os.close(write_end)
        self.stdout = os.fdopen(read_end, encoding="utf-8", errors="replace")

    @staticmethod
    def _run(
        command: Sequence[str], stdout: int, stderr: int, environment: Mapping[str, str]
    ) -> int:
        _become_new_process(os.open(os.devnull, os.O_RDONLY), stdout, stderr, environment)
        sys.argv = ["cell.py", *command[-2:]]
        from harness.running import cell

        _faults.watch_from_environment()
        return cell.main(sys.argv)

    def poll(self) -> int | None:
        """Return its exit code, None while it lives."""
        if self.returncode is None:
            number, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if number else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("cell", timeout or 0)
            time.sleep(0.01)
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)
