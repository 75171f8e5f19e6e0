"""What the steps share: device, sizes, running and keeping of parts, random models."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "stand_in"
GIB = 2**30
Figures = dict[str, Any]

# Public configurations: hidden, layers, heads, key heads, feed-forward, vocabulary, tied head.
SHAPES: Mapping[str, tuple[int, int, int, int, int, int, bool]] = {
    "8B": (4096, 32, 32, 8, 14336, 128256, False),  # Llama-3.1-8B
    "7B": (3584, 28, 28, 4, 18944, 152064, False),  # Qwen2.5-7B
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),  # Qwen2.5-1.5B
}
TOY = {
    "8B": (64, 2, 4, 2, 128, 2048, False),
    "7B": (64, 2, 4, 2, 128, 2048, False),
    "1.5B": (32, 2, 4, 2, 64, 2048, True),
}


class Skip(Exception):
    """A part that this machine cannot run; the message gives the numbers."""


@dataclass
class Kit:
    """One call: its device, its sizes, its folder, and the parts that are finished."""

    out: Path
    dry: bool
    conditions: dict[str, Any]
    site: Path | None = None  # the packed folder with what a bare machine lacks
    force: bool = False
    deadline: float = float("inf")  # on the steady clock: no part begins that would not end before
    # stores, caches and folders of models: never among the figures, which are few and flat
    work: Path = ROOT / "build" / "gpu-work"
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    device = "cuda"
    # a kernel failed in this process: everything after it on the card would, with a message that
    # misleads
    lost = False

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int, int, int, int, bool]]:
        """The shapes of this call: real ones on a card, toys in a dry run."""
        return TOY if self.dry else SHAPES

    @property
    def dtype(self) -> str:
        """The type that models compute in: bfloat16 where the card has it."""
        from harness.machine.gpu import default_dtype

        return default_dtype(self.device)

    def open_step(self, step: int) -> None:
        """Read the parts of a step that an earlier call under the same conditions finished."""
        self.step = step
        self.file = self.out / f"step-{step}.json"
        self.parts = {}
        if self.file.exists() and not self.force:
            earlier = json.loads(self.file.read_text(encoding="utf-8"))
            if earlier.get("conditions") == self.conditions:
                self.parts = {
                    name: part
                    for name, part in earlier["parts"].items()
                    if part["status"] == "done"
                }

    def part(
        self, name: str, work: Callable[[], Figures], *, needs: float = 0.0, seconds: float = 30
    ) -> None:
        """Run a part unless it is finished; keep its figures, or why it was skipped or failed.

        The result is written before the next part begins.

        `needs` is device memory in bytes, `seconds` what the part takes on a card; with less left
        of either it is skipped and says both.
        """
        if name in self.parts:
            print(f"step {self.step} {name}: finished before", flush=True)
            return
        began = time.monotonic()
        try:
            self._require(needs, seconds)
            result: dict[str, Any] = {"status": "done", "figures": work()}
        except Skip as reason:
            result = {"status": "skipped", "reason": str(reason)}
        except Exception as problem:  # noqa: BLE001  the next part must have its turn
            result = {
                "status": "failed",
                "reason": f"{type(problem).__name__}: {problem}"[:2000],
                "trace": traceback.format_exc()[-4000:],
            }
        result["seconds"] = round(time.monotonic() - began, 2)
        self.parts[name] = result
        body = {"step": self.step, "conditions": self.conditions, "parts": self.parts}
        self.file.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        self.lost = self.lost or (result["status"] == "failed" and not _usable())
        text = json.dumps(result.get("figures", result.get("reason")))
        print(
            f"step {self.step} {name}: {result['status']} in {result['seconds']} s: {text[:600]}",
            flush=True,
        )
        if not self.lost:
            release()

    def _require(self, needs: float, seconds: float) -> None:
        import torch

        if self.lost:
            raise Skip(
                "the part before left the card's context unusable; type the same command again"
            )
        seconds_left = self.deadline - time.monotonic()
        if seconds_left < seconds:
            raise Skip(
                f"this part needs about {seconds:.0f} s and {max(0, seconds_left):.0f} s of "
                "--minutes are left; type the same command again"
            )
        free = torch.cuda.mem_get_info()[0]
        if not self.dry and needs > 0.95 * free:
            raise Skip(
                f"about {needs / GIB:.1f} GiB would be needed and {free / GIB:.1f} GiB are free"
            )

    def python(
        self, *arguments: str, timeout: float = 400, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with packed folder and tree first on the path; return its text output."""
        command, variables = [sys.executable, *arguments], self.environment(**environment)
        timeout = max(1.0, min(timeout, self.deadline - time.monotonic()))
        try:
            return subprocess.run(
                command,
                cwd=ROOT,
                env=variables,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as problem:  # its output is the only witness
            output = [
                part.decode("utf-8", "replace") if isinstance(part, bytes) else part or ""
                for part in (problem.stdout, problem.stderr)
            ]
            raise RuntimeError(
                f"not over after {timeout:.0f} s: {' '.join(arguments)[:200]}: "
                f"{''.join(output)[-1500:]}"
            ) from None

    def environment(self, **more: str) -> dict[str, str]:
        """Return a child's environment: packed folder, stand-in card (in a dry run), tree."""
        paths = [
            str(path)
            for path in (self.site, STAND_IN if self.dry else None, ROOT, Path(__file__).parent)
            if path is not None
        ]
        inherited = [
            path
            for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
            if path and path not in paths
        ]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*paths, *inherited]),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            **more,
        }

    def harness(
        self, *arguments: str, timeout: float = 400, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line of this tree."""
        return self.python("-P", "-m", "harness.cli", *arguments, timeout=timeout, **environment)

    def model(self, name: str) -> Any:
        """Build a model of a named shape on the card, its weights random."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(
                configuration(name, self.shapes), dtype=getattr(torch, self.dtype)
            ).eval()

    def opened(self, name: str) -> Any:
        """Build the same as the scorer holds it, with the embedded tokenizer."""
        from transformers import AutoTokenizer

        from harness.contract import Checkpoint
        from harness.models.language_model import LanguageModel
        from harness.models.resolve import EMBEDDED

        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny")
        checkpoint = Checkpoint(path=EMBEDDED / "tiny", name=name, digest=f"random {name}")
        return LanguageModel(self.model(name), tokenizer, self.device, checkpoint)

    def bytes_of(self, *names: str) -> float:
        """Return the bytes of models of these shapes at the type of this call."""
        item = 2 if self.dtype == "bfloat16" else 4
        return float(sum(item * parameters_of(name, self.shapes) for name in names))


def configuration(
    name: str, shapes: Mapping[str, tuple[int, int, int, int, int, int, bool]]
) -> Any:
    """Return transformers' configuration of a shape (Qwen2; Llama for the 8B)."""
    from transformers import AutoConfig

    hidden, layers, heads, key_heads, intermediate, vocabulary, tied = shapes[name]
    return AutoConfig.for_model(
        "llama" if name == "8B" else "qwen2",
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def parameters_of(
    name: str, shapes: Mapping[str, tuple[int, int, int, int, int, int, bool]]
) -> int:
    """Return the parameters of a shape: attention, feed-forward, table and head."""
    hidden, layers, heads, key_heads, intermediate, vocabulary, tied = shapes[name]
    attention = 2 * hidden * hidden + 2 * hidden * hidden * key_heads // heads
    return (
        layers * (attention + 3 * hidden * intermediate) + (1 if tied else 2) * vocabulary * hidden
    )


def _usable() -> bool:
    """Tell whether this process can still compute on the card."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def release() -> None:
    """Give back what a part has left on the card."""
    from harness.machine.memory import release_memory

    release_memory("cuda")


def seconds_of(work: Callable[[], object], *, runs: int = 3) -> list[float]:
    """Time some work on the card, `runs` times after one that is not counted."""
    import torch

    work()
    seconds = []
    for _ in range(runs):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def last_lines(done: subprocess.CompletedProcess[str], count: int = 12) -> str:
    """Return the end of what a process printed."""
    return "\n".join((done.stdout + done.stderr).strip().splitlines()[-count:])
