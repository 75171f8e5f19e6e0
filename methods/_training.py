"""The one training loop of every method that trains: rows, loss terms, budget, validation, resume.

Methods differ by their rows (what text is trained) and by their terms (what loss); everything else is the same
for all of them, so that a table compares methods and not loops. The rules:

- The mask is made from lengths (prompt, completion), never from token ids: a real EOS is trained where pad = EOS.
- The normaliser is the number of trained tokens of the whole optimiser step, known before its first backward.
- The budget counts *seen* tokens (prompt and completion, no padding) and is spent to the last row that fits.
- The validation split is scored each epoch; the best weights are what is saved.
- State is written every few seconds; a run that was killed goes on from it and ends in the same bytes.
"""

import json
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from harness.contract import Progress
from harness.errors import CellFailed
from harness.model import LanguageModel
from harness.stopwatch import process_bytes
from harness.watch import EnergyMeter
from methods._losses import cross_entropy

if TYPE_CHECKING:
    from methods._teacher_cache import CachedTeacher

SECONDS_BETWEEN_STATES = float(os.environ.get("HARNESS_STATE_SECONDS", "20"))  # what a killed run loses at most


@dataclass(frozen=True)
class Row:
    """One tokenised training item; tokens from `trained_from` on are trained."""

    ids: tuple[int, ...]
    trained_from: int


@dataclass(frozen=True)
class TopK:
    """A teacher's likeliest tokens at trained positions: ids and log-probabilities at temperature 1, (N, k) each."""

    ids_NK: Tensor
    log_p_NK: Tensor


@dataclass(frozen=True)
class Positions:
    """What a loss term may look at: the trained positions of a micro-batch, already shifted and selected."""

    student_NV: Tensor
    teacher_NV: Tensor | None  # logits, live or kept whole
    labels_N: Tensor
    top: TopK | None = None  # what a cache kept of them


@dataclass(frozen=True)
class Term:
    """One summand of the loss. `value` returns a sum over positions; the loop weighs and normalises it."""

    name: str
    weight: float
    value: Callable[[Positions], Tensor]
    needs_teacher: bool = False


def hard_labels(weight: float = 1.0) -> Term:
    """Return the cross-entropy term against the text itself."""
    return Term("ce", weight, lambda at: cross_entropy(at.student_NV, at.labels_N))


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Hyperparameters that every trained method shares; equal across the rows of a table unless set."""

    learning_rate: float
    batch_rows: int
    micro_rows: int
    warmup: float
    weight_decay: float
    clip: float
    validation_rows: int
    optimizer: Literal["adamw", "muon"] = "adamw"


def encode(tokenizer: Any, pairs: Iterable[tuple[str, str]], *, longest: int) -> tuple[list[Row], int]:
    """Tokenise (prompt, completion) pairs, EOS appended; return rows and the number left out as too long.

    Prompt and completion are encoded apart, as at scoring time, where the model continues the encoded prompt.
    """
    rows: list[Row] = []
    too_long = 0
    for prompt, completion in pairs:
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(before) + len(after) > longest:
            too_long += 1
            continue
        rows.append(Row((*before, *after), len(before)))
    return rows, too_long


def collate(rows: Sequence[Row], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right; return ids, attention mask and trained-token mask, all (B, T)."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    attention = torch.zeros((len(rows), width), dtype=torch.long)
    trained = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        attention[index, : len(row.ids)] = 1
        trained[index, row.trained_from : len(row.ids)] = True
    return ids, attention, trained


def steps_of(rows: Sequence[Row], *, seen_tokens: int, batch_rows: int, seed: int) -> Iterator[tuple[int, list[Row]]]:
    """Yield (epoch, rows of one optimiser step) until the budget of seen tokens is spent.

    Rows are shuffled each epoch and sorted by length inside windows of 16 steps, which halves the padding. The last step is cut
    to the rows that still fit, so all methods with one budget see the same number of tokens to within one row.
    """
    left = seen_tokens
    epoch = 0
    while True:
        order = random.Random(f"{seed}/{epoch}")
        shuffled = list(rows)
        order.shuffle(shuffled)
        steps: list[list[Row]] = []
        window = batch_rows * 16
        for start in range(0, len(shuffled), window):
            part = sorted(shuffled[start : start + window], key=lambda row: len(row.ids))
            steps += [part[at : at + batch_rows] for at in range(0, len(part), batch_rows)]
        order.shuffle(steps)
        for step in steps:
            fitting: list[Row] = []
            for row in step:
                if left < len(row.ids):
                    break
                left -= len(row.ids)
                fitting.append(row)
            if fitting:
                yield epoch, fitting
            if len(fitting) < len(step):
                return
        epoch += 1


def rate_at(progress: float, settings: LoopSettings) -> float:
    """Return the learning rate at a share of the budget: linear warm-up, then cosine to zero."""
    if progress < settings.warmup:
        return settings.learning_rate * progress / settings.warmup
    after = (progress - settings.warmup) / (1 - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))


def make_optimizers(model: Any, settings: LoopSettings) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return (optimizer, share of the learning rate) pairs: AdamW, or Muon for the hidden matrices and AdamW beside it.

    Muon (Jordan et al., 2024) is for training from random weights: the embedded teachers need half the tokens with it.
    """
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim < 2]
    decayed, plain = {"weight_decay": settings.weight_decay}, {"weight_decay": 0.0}
    adam: dict[str, Any] = {"lr": settings.learning_rate, "betas": (0.9, 0.95), "fused": True}
    if settings.optimizer == "muon":
        return [
            (torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay), 1.0),
            (torch.optim.AdamW([{"params": [embedding, *others], **plain}], **adam), 0.15),
        ]
    return [(torch.optim.AdamW([{"params": [embedding, *matrices], **decayed}, {"params": others, **plain}], **adam), 1.0)]


def positions(student_BTV: Tensor, teacher_BTV: Tensor | None, ids_BT: Tensor, trained_BT: Tensor, vocabulary: int | None) -> Positions:
    """Apply the causal shift and the mask: logits at t - 1 stand against token t, trained tokens only."""
    mask = trained_BT[:, 1:]
    student_NV = student_BTV[:, :-1][mask]
    teacher_NV = None
    if teacher_BTV is not None:
        teacher_NV = teacher_BTV[:, :-1][mask][:, :vocabulary]
        student_NV = student_NV[:, :vocabulary]
    return Positions(student_NV, teacher_NV, ids_BT[:, 1:][mask])


def backward_step(
    rows: Sequence[Row],
    *,
    student: Any,
    teacher: Any | None,
    terms: Sequence[Term],
    vocabulary: int | None,
    micro_rows: int,
    pad: int,
    cached: "CachedTeacher | None" = None,
    backward: Callable[[Tensor], None],
    device: Any = "cpu",
    ranks: int = 1,
    rank: int = 0,
) -> dict[str, float]:
    """Accumulate one optimiser step's gradient; return each term's mean per trained token (unweighted).

    N counts the trained tokens of the *whole* step over all ranks before the first backward; DDP averages
    gradients, so every rank divides by N / ranks.
    """
    count = sum(len(row.ids) - row.trained_from for row in rows)
    mine = rows[rank::ranks]
    values = dict.fromkeys((term.name for term in terms), 0.0)
    for start in range(0, len(mine), micro_rows):
        batch = mine[start : start + micro_rows]
        ids, attention, trained = (part.to(device) for part in collate(batch, pad))
        teacher_logits = None
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = teacher(input_ids=ids, attention_mask=attention, use_cache=False).logits
        student_logits = student(input_ids=ids, attention_mask=attention, use_cache=False).logits
        at = positions(student_logits, teacher_logits, ids, trained, vocabulary)
        if cached is not None:
            at = _from_cache(at, cached, batch, vocabulary, device)
        total = student_logits.new_zeros((), dtype=torch.float32)
        for term in terms:
            value = term.value(at)
            values[term.name] += float(value.detach()) / count
            total = total + term.weight * value
        backward(total * ranks / count)
    return values


def _from_cache(at: Positions, cached: "CachedTeacher", rows: Sequence[Row], vocabulary: int | None, device: Any) -> Positions:
    """Put what the cache holds of these rows beside the student's positions: both run row by row, in the rows' order."""
    student_NV = at.student_NV[:, :vocabulary]
    if cached.dense:
        return Positions(student_NV, cached.logits(rows, device), at.labels_N)
    return Positions(student_NV, None, at.labels_N, cached.top(rows, device))


class _Timed:
    """A teacher that counts the seconds spent in it."""

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False).eval()
        self.seconds = 0.0

    def __call__(self, **inputs: Any) -> Any:
        began = time.perf_counter()
        out = self.model(**inputs)
        self.seconds += time.perf_counter() - began
        return out


@torch.no_grad()
def validate(rows: Sequence[Row], *, student: Any, pad: int, micro_rows: int, device: Any) -> float:
    """Return the mean cross-entropy per trained token on held-out rows (nats)."""
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), micro_rows):
        ids, attention, trained = (part.to(device) for part in collate(ordered[start : start + micro_rows], pad))
        at = positions(student(input_ids=ids, attention_mask=attention, use_cache=False).logits, None, ids, trained, None)
        total += float(cross_entropy(at.student_NV, at.labels_N))
        count += int(trained[:, 1:].sum())
    return total / count


class _Log:
    """`training.jsonl`: one line a step or validation. On resume it is cut back to the state's step."""

    def __init__(self, path: Path, keep_until: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and self._stands(json.loads(line), keep_until)]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._stream = path.open("a", encoding="utf-8")

    @staticmethod
    def _stands(line: dict[str, Any], keep_until: int) -> bool:
        """A state is saved after its step's line and before the validation of that step, which will come again."""
        return bool(line["step"] < keep_until or (line["step"] == keep_until > 0 and "validation_ce" not in line))

    def write(self, **fields: object) -> None:
        self._stream.write(json.dumps(fields) + "\n")
        self._stream.flush()


class _States:
    """Resumable state below `workdir/state`: always one whole copy on disk, whatever moment the process dies at."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.saved_at = time.monotonic()

    def restore(self) -> dict[str, Any] | None:
        for torn in self.folder.glob("*.part"):
            shutil.rmtree(torn, ignore_errors=True)
        done = sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
        if not done:
            return None
        self.accelerator.load_state(str(done[-1]))
        state: dict[str, Any] = json.loads((done[-1] / "loop.json").read_text())
        return state

    def save(self, loop: dict[str, Any], *, force: bool = False) -> None:
        if not force and time.monotonic() - self.saved_at < SECONDS_BETWEEN_STATES:
            return
        target = self.folder / f"step-{loop['step']}"
        fresh = target.with_suffix(".part")
        self.accelerator.save_state(str(fresh))
        (fresh / "loop.json").write_text(json.dumps(loop))
        if target.exists():
            shutil.rmtree(target)
        fresh.replace(target)
        for old in self.folder.glob("step-*"):
            if old != target and old.suffix != ".part":
                _remove(old)
        self.saved_at = time.monotonic()


def fit(
    student: LanguageModel,
    *,
    rows: Sequence[Row],
    validation: Sequence[Row],
    terms: Sequence[Term],
    settings: LoopSettings,
    seen_tokens: int,
    seed: int,
    workdir: Path,
    teacher: LanguageModel | None = None,
    cached: "CachedTeacher | None" = None,
    vocabulary: int | None = None,
    mixed_precision: str = "no",
    progress: Callable[[Progress], None] = lambda _: None,
    stop_after_steps: int | None = None,
) -> dict[str, Any]:
    """Train `student.model` in place and leave its best weights in it; return what was spent.

    Resumes from `workdir/state` when it is there. `stop_after_steps` ends the process's work early, state saved
    (the tests use it; a user presses Ctrl-C, which costs at most the seconds since the last state).
    """
    if not rows:
        raise CellFailed("no training row is left (all were too long or filtered out)")
    torch.manual_seed(seed)
    run = _Run(student, teacher, cached, terms, settings, validation, workdir, vocabulary, mixed_precision)
    plan = steps_of(rows, seen_tokens=seen_tokens, batch_rows=settings.batch_rows, seed=seed)
    for number, (epoch, step_rows) in enumerate(plan, 1):
        if number <= run.loop["step"]:
            continue
        if epoch != run.loop["epoch"]:
            run.hold_out()
            run.loop["epoch"] = epoch
        values = run.step(number, step_rows, rate=rate_at(run.loop["seen"] / seen_tokens, settings))
        progress(
            Progress(stage="train", done=run.loop["seen"], total=seen_tokens, unit="tokens", detail=f"loss {sum(values.values()):.3f}")
        )
        run.states.save(run.loop, force=number == stop_after_steps)
        if number == stop_after_steps:
            return run.loop
    if not run.trained:
        raise CellFailed(
            f"a budget of {seen_tokens} tokens ends within the first optimiser step, before any weight moves; "
            "give a larger --budget, or fewer rows a step with --set METHOD.batch_rows=4"
        )
    run.hold_out()
    run.finish()
    return run.loop


class _Run:
    """One training run: the prepared model, its optimizers, its state on disk, its log and its counts."""

    def __init__(
        self,
        student: LanguageModel,
        teacher: LanguageModel | None,
        cached: "CachedTeacher | None",
        terms: Sequence[Term],
        settings: LoopSettings,
        validation: Sequence[Row],
        workdir: Path,
        vocabulary: int | None,
        mixed_precision: str,
    ) -> None:
        logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns about tied weights at every saved state
        self.accelerator = Accelerator(cpu=student.device == "cpu", mixed_precision=mixed_precision)
        self.terms, self.settings, self.validation, self.vocabulary = terms, settings, validation, vocabulary
        self.pad, self.device = student.pad_id, student.device
        self.energy = EnergyMeter(student.device)
        self.teacher = _Timed(teacher.model) if teacher is not None else None
        self.cached = cached
        _silence_dropout(student.model)
        student.model.train()
        optimizers = make_optimizers(student.model, settings)
        self.scales = [scale for _, scale in optimizers]
        self.model, *self.optimizers = self.accelerator.prepare(student.model, *(optimizer for optimizer, _ in optimizers))
        self.best_file = workdir / "best.pt"
        self.states = _States(workdir / "state", self.accelerator)
        fresh = {"step": 0, "epoch": 0, "seen": 0, "trained": 0, "best": math.inf, "kept_step": 0, "seconds": 0.0, "teacher_seconds": 0.0,
                 "energy_joules": 0.0}  # fmt: skip
        self.loop: dict[str, Any] = self.states.restore() or fresh
        self.log = _Log(workdir / "training.jsonl", self.loop["step"])
        self.before, self.began = dict(self.loop), time.monotonic()
        self.trained = self.loop["step"] > 1  # the first step of a warm-up has rate 0

    def step(self, number: int, rows: Sequence[Row], *, rate: float) -> dict[str, float]:
        """Make one optimiser step; return each term's mean per trained token."""
        for optimizer, scale in zip(self.optimizers, self.scales, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        values = backward_step(
            rows,
            student=self.model,
            teacher=self.teacher,
            cached=self.cached,
            terms=self.terms,
            vocabulary=self.vocabulary,
            micro_rows=self.settings.micro_rows,
            pad=self.pad,
            backward=self.accelerator.backward,
            device=self.accelerator.device,
            ranks=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
        )
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip))
        if not math.isfinite(norm) or not all(math.isfinite(value) for value in values.values()):
            raise CellFailed(f"the loss became {values} (gradient norm {norm}) at step {number}; try a lower learning_rate")
        self.trained |= rate > 0
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.loop["step"] = number
        self.loop["seen"] += sum(len(row.ids) for row in rows)
        self.loop["trained"] += sum(len(row.ids) - row.trained_from for row in rows)
        self._count_seconds()
        weights = {f"weight_{term.name}": term.weight for term in self.terms}
        self.log.write(step=number, epoch=self.loop["epoch"], seen=self.loop["seen"], rate=rate, gradient_norm=norm, **values, **weights)
        return values

    def hold_out(self) -> None:
        """Score the validation rows and keep the weights when they are the best so far."""
        self.model.eval()
        loss = validate(
            self.validation, student=self.model, pad=self.pad, micro_rows=self.settings.micro_rows, device=self.accelerator.device
        )
        self.model.train()
        self.log.write(step=self.loop["step"], epoch=self.loop["epoch"], seen=self.loop["seen"], validation_ce=loss)
        if not math.isfinite(loss):
            raise CellFailed(f"the validation loss became {loss} at step {self.loop['step']}; try a lower learning_rate")
        if loss < self.loop["best"]:
            self.loop["best"], self.loop["kept_step"] = loss, self.loop["step"]
            if self.accelerator.is_main_process:
                fresh = self.best_file.with_suffix(".part")
                torch.save(self.accelerator.unwrap_model(self.model).state_dict(), fresh)
                fresh.replace(self.best_file)

    def finish(self) -> None:
        """Put the best weights into the model."""
        self.accelerator.unwrap_model(self.model).load_state_dict(torch.load(self.best_file, weights_only=True))
        self._count_seconds()
        self.loop |= {
            "devices": self.accelerator.num_processes, "device_seconds": self.loop["seconds"] * self.accelerator.num_processes,
            "energy_source": self.energy.source if self.loop["energy_joules"] is not None else "", "peak_bytes": peak_bytes(self.device),
        }  # fmt: skip

    def _count_seconds(self) -> None:
        self.loop["seconds"] = self.before["seconds"] + time.monotonic() - self.began
        joules, before = self.energy.joules(), self.before["energy_joules"]
        self.loop["energy_joules"] = None if joules is None or before is None else before + joules
        self.loop["teacher_seconds"] = self.before["teacher_seconds"] + (self.teacher.seconds if self.teacher else 0.0)


def peak_bytes(device: str) -> int | None:
    """Return the peak memory so far: allocated on a GPU, resident on a CPU; None where nothing tells."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return process_bytes("VmHWM")


def forget_state(workdir: Path) -> None:
    """Remove what only a resumed run needs; called once the student is saved. State first: without it best.pt is made again."""
    if (workdir / "state").exists():
        _remove(workdir / "state")
    (workdir / "best.pt").unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill in between leaves nothing that looks whole."""
    torn = folder.with_suffix(".part")
    folder.replace(torn)
    shutil.rmtree(torn, ignore_errors=True)


def _silence_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
