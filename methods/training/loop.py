"""The one training loop of every method that trains: rows, loss terms, budget, validation, resume.

Methods differ by their rows (what text is trained) and by their terms (what loss); everything else is the same
for all of them, so that a table compares methods and not loops. The rules:

- The mask is made from lengths (prompt, completion), never from token ids: a real EOS is trained where pad = EOS.
- The normaliser is the number of trained tokens of the whole optimiser step, known before its first backward.
- Logits are made at trained positions only.
- The budget counts *seen* tokens (prompt and completion, no padding) and is spent to the last row that fits.
- The validation split is scored before the first step and after each epoch; the best weights of an epoch are what is saved.
- State is written every few seconds, less often where that takes long; a run that was killed goes on from it and ends in the same bytes.
- What saving takes is no part of the seconds and joules of training.
"""

import json
import logging
import math
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from harness.contract import Progress
from harness.errors import CellFailed, in_one_line
from harness.files.digests import file_digest
from harness.files.lines import json_line, json_lines
from harness.files.untrusted import Unreadable
from harness.files.writing import read_signed, sync, write_signed, write_whole
from harness.machine.energy import EnergyMeter
from harness.machine.memory import process_bytes
from harness.models.language_model import LanguageModel
from methods.masks import zeros_of
from methods.training.losses import cross_entropy
from methods.training.noise import refuse_noise, restored, silence_noise
from methods.training.positions import Positions
from methods.training.rows import Batch, Row, batch_of, fitting, steps_of
from methods.training.teachers import Head, Live
from methods.training.terms import Objective

if TYPE_CHECKING:
    from methods.training.taps import Inside

SECONDS_BETWEEN_STATES = float(os.environ.get("HARNESS_STATE_SECONDS", "20"))  # 0: a state after each step
SAVES_BETWEEN_STATES = 20  # in times of the last save, so that a large model's states take a twentieth of its training at most
STEPS_BETWEEN_NORMS = 50  # a term's own gradient takes a backward pass of its own
HEAVIEST = 1e6  # what `auto` gives a term at most: one that is nearly 0 from the start (a block and its own copy) has no more to say
EXPLODED = 1_000  # times its first value


class Diverged(CellFailed):
    """A loss or a gradient that is no number any more, or that has exploded."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Hyperparameters that every trained method shares; equal across the rows of a table unless set."""

    learning_rate: float
    batch_size: int
    micro_batch_size: int
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    validation_rows: int
    gradient_checkpointing: bool = False
    patience: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"


def rate_at(progress: float, settings: LoopSettings) -> float:
    """Return the learning rate at a share of the budget: linear warm-up, then cosine to zero."""
    if progress < settings.warmup_ratio:
        return settings.learning_rate * progress / settings.warmup_ratio
    after = (progress - settings.warmup_ratio) / (1 - settings.warmup_ratio)
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


@dataclass
class Stepper:
    """Computes an optimiser step's loss and gradient: the same whatever its split into micro-batches and processes.

    Each term is divided by the positions that it counts in the *whole* step over all processes, known before the first backward; DDP
    averages gradients, so every process divides by its share.
    """

    student: Any  # wrapped or not
    head: Head
    objective: Objective
    micro_batch_size: int
    pad: int
    device: Any = "cpu"
    inside: "Inside | None" = None
    ranks: int = 1
    rank: int = 0

    def backward(
        self, rows: Sequence[Row], *, weights: Mapping[str, float], backward: Callable[[Tensor], None], number: int = 0, norms: bool = False
    ) -> "StepValues":
        """Accumulate one step's gradient; return each term's mean (unweighted), and the norms of their gradients where asked for."""
        found = StepValues({}, {})
        for batch, sums in self._micro_batches(rows, number, found):
            total = sum((weights[name] * value for name, value in sums.items()), torch.zeros((), device=self.device))
            if norms and not found.norms:
                found.norms.update(self._norms(sums, weights, rows, batch))
            if total.requires_grad:
                backward(total * self.ranks)
        return found

    @torch.no_grad()
    def values(self, rows: Sequence[Row], number: int = 0) -> "StepValues":
        """Return each term's mean over a step's rows without a gradient."""
        found = StepValues({}, {})
        for _ in self._micro_batches(rows, number, found):
            pass
        return found

    def _micro_batches(self, rows: Sequence[Row], number: int, found: "StepValues") -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        terms = self.objective.terms
        every = {term.name: sum(self.objective.counts(term, row) for row in rows) for term in terms}
        counts = {name: count for name, count in every.items() if count}  # a step may hold no row that a term counts
        found.means = dict.fromkeys(counts, 0.0)
        mine = rows[self.rank :: self.ranks]
        for start in range(0, len(mine), self.micro_batch_size):
            batch = batch_of(mine[start : start + self.micro_batch_size], self.pad, self.device)
            at = self._positions(batch)
            chosen = self.objective.selection.chosen(at, number) if self.objective.selection else None
            sums: dict[str, Tensor] = {}
            for term in terms:
                if term.name not in counts:
                    continue
                value_N = term.value(at)
                sums[term.name] = (value_N if chosen is None else value_N[chosen]).sum() / counts[term.name]
                found.means[term.name] += float(sums[term.name].detach())
            del at  # the graph keeps what the backward pass needs; teachers' distributions are not among it
            yield batch, sums

    def _positions(self, batch: Batch) -> Positions:
        vocabulary = self.objective.vocabulary
        teachers = tuple(source.read(batch, vocabulary) for source in self.objective.sources)
        student_NV = self.head(batch, through=self.student)[:, :vocabulary]
        return Positions(student_NV, batch.ids[:, 1:][batch.mask], teachers, batch, self.inside)

    def _norms(self, sums: Mapping[str, Tensor], weights: Mapping[str, float], rows: Sequence[Row], batch: Batch) -> dict[str, float]:
        """Return the gradient norm of each weighted term, as this one micro-batch estimates it."""
        parameters = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        found = {}
        for term in self.objective.terms:
            if term.name not in sums:
                continue
            share = sum(self.objective.counts(term, row) for row in batch.rows) / sum(self.objective.counts(term, row) for row in rows)
            value = weights[term.name] * sums[term.name]
            if not value.requires_grad or not share:
                found[term.name] = 0.0
                continue
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
            del gradients  # as large as the model: gone before the next term's are made
            found[term.name] = float(torch.stack(squares).sum().sqrt()) / share
        return found


@dataclass
class StepValues:
    """What a step says of its terms."""

    means: dict[str, float]
    norms: dict[str, float]


@torch.no_grad()
def validate(rows: Sequence[Row], *, head: Head, pad: int, micro_batch_size: int, device: Any) -> float:
    """Return the mean cross-entropy per trained token on held-out rows (nats)."""
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), micro_batch_size):
        batch = batch_of(ordered[start : start + micro_batch_size], pad, device)
        total += float(cross_entropy(head(batch), batch.ids[:, 1:][batch.mask]).sum())
        count += int(batch.mask.sum())
    return total / count


class _Log:
    """`training.jsonl`: one line a step or validation. On resume it is cut back to the state's step."""

    def __init__(self, path: Path, keep_until: int) -> None:
        lines = json_lines(path, torn=True) if path.exists() else ()
        write_whole(path, "".join(json_line(line) for line in lines if isinstance(line, dict) and self._stands(line, keep_until)))
        self._stream = path.open("a", encoding="utf-8")

    @staticmethod
    def _stands(line: dict[str, Any], keep_until: int) -> bool:
        """A state is saved after its step's line and before the validation of that step, which will come again."""
        step = line.get("step")
        return isinstance(step, int) and (step < keep_until or (step == keep_until > 0 and "validation_ce" not in line))

    def write(self, **fields: object) -> None:
        self._stream.write(json.dumps(fields) + "\n")
        self._stream.flush()


class _States:
    """Resumable state below `workdir/state`: always one whole copy on disk, whatever moment the process dies at."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.saved_at = time.monotonic()
        self.pause = SECONDS_BETWEEN_STATES

    def restore(self) -> dict[str, Any] | None:
        for torn in self.folder.glob("*.part"):
            shutil.rmtree(torn, ignore_errors=True)
        done = sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
        if not done:
            return None
        try:
            state = read_signed(done[-1] / "loop.json")
            if state.pop("files", None) != _digests(done[-1]):
                raise Unreadable(f"{done[-1]}: its files are not as they were written")
            if state["kept_step"]:
                _loaded(self.folder.with_name("best.pt"))
        except Unreadable as problem:
            print(f"{problem}; training begins anew", file=sys.stderr)
            _remove(done[-1])
            return None
        self.accelerator.load_state(str(done[-1]))
        return state

    def save(self, loop: dict[str, Any], *, force: bool = False) -> None:
        began = time.monotonic()
        if not force and began - self.saved_at < self.pause:
            return
        target = self.folder / f"step-{loop['step']}"
        fresh = target.with_suffix(".part")
        self.accelerator.save_state(str(fresh))
        write_signed(fresh / "loop.json", {**loop, "files": _digests(fresh)})
        for path in fresh.rglob("*"):
            sync(path)
        if target.exists():
            shutil.rmtree(target)
        fresh.replace(target)
        for old in self.folder.glob("step-*"):
            if old != target and old.suffix != ".part":
                _remove(old)
        self.saved_at = time.monotonic()
        if SECONDS_BETWEEN_STATES:
            self.pause = max(SECONDS_BETWEEN_STATES, SAVES_BETWEEN_STATES * (self.saved_at - began))


def fit(
    student: LanguageModel,
    *,
    rows: Sequence[Row],
    validation: Sequence[Row],
    objective: Objective,
    settings: LoopSettings,
    seen_tokens: int,
    seed: int,
    workdir: Path,
    mixed_precision: str = "no",
    track: str = "",
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
    run = _Run(student, objective, rows, settings, validation, workdir, mixed_precision, track, seed)
    try:
        return _steps(run, rows, seen_tokens, seed, progress, stop_after_steps)
    finally:
        run.close()


def _steps(
    run: "_Run", rows: Sequence[Row], seen_tokens: int, seed: int, progress: Callable[[Progress], None], stop_after_steps: int | None
) -> dict[str, Any]:
    if run.loop["step"] == 0:
        run.start()
    for number, (epoch, planned) in enumerate(steps_of(rows, batch_size=run.settings.batch_size, seed=seed), 1):
        if run.loop["over"]:
            break
        if number <= run.loop["step"]:
            continue
        if epoch != run.loop["epoch"]:
            run.hold_out()
            run.loop["epoch"] = epoch
            if run.stops_early():
                break
        wanted = run.rolled_out(planned, number)
        step_rows = fitting(wanted, seen_tokens - run.loop["seen"])
        run.loop["over"] = len(step_rows) < len(wanted)  # in the state: a run killed after its last step makes no other
        if step_rows:
            told = run.step(number, step_rows, rate=rate_at(run.loop["seen"] / seen_tokens, run.settings))
            progress(Progress(stage="train", done=run.loop["seen"], total=seen_tokens, unit="tokens", detail=told))
            with run.uncounted():
                run.states.save(run.loop, force=number == stop_after_steps)
        if number == stop_after_steps:
            return run.loop
        if run.loop["over"]:
            break
    if not run.trained:
        raise CellFailed(
            f"a budget of {seen_tokens} tokens ends within the first optimiser step, before any weight moves; "
            "give a larger --budget, or fewer rows a step with --set METHOD.batch_size=4"
        )
    run.hold_out()
    run.finish()
    return run.loop


class _Run:
    """One training run: the prepared model, its optimizers, its state on disk, its log and its counts."""

    def __init__(
        self,
        student: LanguageModel,
        objective: Objective,
        rows: Sequence[Row],
        settings: LoopSettings,
        validation: Sequence[Row],
        workdir: Path,
        mixed_precision: str,
        track: str,
        seed: int,
    ) -> None:
        logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns about tied weights at every saved state
        self.accelerator = Accelerator(
            cpu=student.device == "cpu", mixed_precision=mixed_precision, log_with=track or None, project_dir=workdir / "tracker"
        )
        if self.accelerator.num_processes > 1:
            raise CellFailed(f"{self.accelerator.num_processes} processes train at once, which this version does not do; start one process")
        self.tracked = bool(track)
        if track:
            self.accelerator.init_trackers("compression-harness", config={**asdict(settings), "seed": seed})
        self.objective, self.settings, self.validation = objective, settings, validation
        self.student = replace(student, autocast="bfloat16" if mixed_precision == "bf16" else "")
        self.pad, self.device = student.pad_id, student.device
        for term in objective.terms:
            if not any(objective.counts(term, row) for row in rows):
                raise CellFailed(f"the term {term.name} counts no position of any training row (is attention_tokens below the prompts?)")
        self.noise = silence_noise(student.model)
        refuse_noise(student.model)
        self.zeros = _hold_zeros(student.model)
        student.model.train()
        if settings.gradient_checkpointing:
            student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.head = Head(student.model)
        self.inside = self._look_inside(rows, seed)
        optimizers = make_optimizers(student.model, settings)
        modules = [student.model]
        if self.inside is not None and len(self.inside.projections):
            projected = torch.optim.AdamW(self.inside.projections.parameters(), lr=settings.learning_rate, weight_decay=0.0)
            optimizers.append((projected, 1.0))
            modules.append(self.inside.projections)
        self.scales = [scale for _, scale in optimizers]
        prepared = self.accelerator.prepare(*modules, *(optimizer for optimizer, _ in optimizers))
        prepared = prepared if isinstance(prepared, tuple) else (prepared,)
        self.model, self.optimizers = prepared[0], prepared[len(modules) :]
        self.stepper = Stepper(
            self.model, self.head, objective, settings.micro_batch_size, self.pad, self.accelerator.device, self.inside,
            self.accelerator.num_processes, self.accelerator.process_index,
        )  # fmt: skip
        self.best_file = workdir / "best.pt"
        self.states = _States(workdir / "state", self.accelerator)
        fresh = {"step": 0, "epoch": 0, "seen": 0, "trained": 0, "start_ce": math.inf, "best": math.inf, "kept_step": 0, "seconds": 0.0,
                 "teacher_seconds": 0.0, "teacher_tokens": 0,
                 "energy_joules": 0.0, "since_best": 0, "means": {}, "terms": {}, "written": 0, "writing_seconds": 0.0,
                 "over": False}  # fmt: skip
        self.loop: dict[str, Any] = self.states.restore() or fresh
        self.log = _Log(workdir / "training.jsonl", self.loop["step"])
        self.before, self.counted_until, self.energy = dict(self.loop), time.monotonic(), EnergyMeter(student.device)
        self.trained = self.loop["step"] > 1  # the first step of a warm-up has rate 0

    def _look_inside(self, rows: Sequence[Row], seed: int) -> "Inside | None":
        if self.objective.inwards is None:
            return None
        from methods.training.taps import Inside

        [teacher] = self.objective.live
        inside = Inside(self.student, teacher.model, self.objective.inwards)
        if len(inside.projections):
            inside.start_projections(self._seen_by_both(rows, seed, teacher))
        return inside

    def _seen_by_both(self, rows: Sequence[Row], seed: int, teacher: Live) -> Iterator[Batch]:
        """Run the first epoch's batches through both models, one at a time."""
        for epoch, step_rows in steps_of(rows, batch_size=self.settings.batch_size, seed=seed):
            if epoch > 0:
                return
            for start in range(0, len(step_rows), self.settings.micro_batch_size):
                batch = batch_of(step_rows[start : start + self.settings.micro_batch_size], self.pad, self.device)
                with torch.no_grad():
                    teacher.head(batch)
                    self.head(batch)
                yield batch

    def rolled_out(self, rows: Sequence[Row], number: int) -> list[Row]:
        """Return the step's rows; on-policy, the student writes them."""
        if self.objective.rollout is None:
            return list(rows)
        return self.objective.rollout(self.student, rows, number)

    def step(self, number: int, rows: Sequence[Row], *, rate: float) -> str:
        """Make one optimiser step; return what to tell of it."""
        for optimizer, scale in zip(self.optimizers, self.scales, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        weights = self._weights(rows, number)
        several = len(self.objective.terms) > 1
        found = self.stepper.backward(
            rows, weights=weights, backward=self.accelerator.backward, number=number,
            norms=several and (number - 1) % STEPS_BETWEEN_NORMS == 0 and self.accelerator.num_processes == 1,
        )  # fmt: skip
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm))
        self._refuse_explosion(number, found.means, norm)
        self.trained |= rate > 0
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.loop["step"] = number
        self.loop["seen"] += sum(len(row.ids) for row in rows)
        self.loop["trained"] += sum(self.objective.trained(row) for row in rows)
        return self._told(number, rate, norm, weights, found if several else StepValues(found.means, dict.fromkeys(found.means, norm)))

    def _weights(self, rows: Sequence[Row], number: int) -> dict[str, float]:
        """Return each term's weight: `auto` ones count as much as the others together, by running means of earlier steps."""
        terms = self.objective.terms
        fixed = {term.name: float(term.weight) for term in terms if term.weight != "auto"}
        if len(fixed) == len(terms):
            return fixed
        if not self.loop["means"]:
            self.loop["means"] = self.stepper.values(rows, number).means
        means = self.loop["means"]
        anchor = sum(weight * means.get(name, 0.0) for name, weight in fixed.items())
        free = [term.name for term in terms if term.weight == "auto"]
        return fixed | {name: min(anchor / max(means.get(name, anchor), 1e-8), HEAVIEST) if fixed else 1.0 for name in free}

    def _told(self, number: int, rate: float, norm: float, weights: Mapping[str, float], found: StepValues) -> str:
        """Log a step to file and trackers, remember its terms, and return a line of them."""
        means = self.loop["means"]
        self.loop["means"] = {name: 0.9 * means.get(name, value) + 0.1 * value for name, value in found.means.items()}
        for name, value in found.means.items():
            held = self.loop["terms"].setdefault(name, {"first": value, "gradient_norm": None})
            held |= {"weight": weights[name], "last": value, **({"gradient_norm": found.norms[name]} if name in found.norms else {})}
        line: dict[str, Any] = {"step": number, "epoch": self.loop["epoch"], "seen": self.loop["seen"], "rate": rate, "gradient_norm": norm}
        line |= {**found.means, **{f"weight_{name}": weight for name, weight in weights.items()}}
        line |= {f"gradient_norm_{name}": value for name, value in found.norms.items()} if len(found.means) > 1 else {}
        self.log.write(**line)
        if self.tracked:
            self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=number)
        loss = sum(weights[name] * value for name, value in found.means.items())
        parts = [
            f"{name} {value:.3f} x{weights[name]:.3g}"
            + (f" |g| {held:.2g}" if (held := self.loop["terms"][name]["gradient_norm"]) is not None else "")
            for name, value in found.means.items()
        ]
        return f"loss {loss:.3f} ({', '.join(parts)})"

    def _refuse_explosion(self, number: int, values: Mapping[str, float], norm: float) -> None:
        for name, value in values.items():
            first = self.loop["terms"].get(name, {}).get("first", value)
            if not math.isfinite(value) or abs(value) > EXPLODED * max(abs(first), 1.0):
                raise Diverged(f"the term {name} became {value:.4g} at step {number} (first {first:.4g}); try a lower learning_rate")
        if not math.isfinite(norm):
            raise Diverged(f"the gradient's norm became {norm} at step {number} (terms: {dict(values)}); try a lower learning_rate")

    def start(self) -> None:
        """Score the validation rows before the first step: the loss that training has to beat."""
        self.loop["start_ce"] = self.held_out_prompts()

    def held_out_prompts(self) -> float:
        """Return the loss on the validation rows, logged."""
        self.model.eval()
        size, device = self.settings.micro_batch_size, self.accelerator.device
        loss = validate(self.validation, head=self.head, pad=self.pad, micro_batch_size=size, device=device)
        self.model.train()
        self.log.write(step=self.loop["step"], epoch=self.loop["epoch"], seen=self.loop["seen"], validation_ce=loss)
        if self.tracked:
            self.accelerator.log({"validation_ce": loss}, step=self.loop["step"])
        return loss

    def hold_out(self) -> None:
        """Score the validation rows and keep the weights when they are the best so far."""
        loss = self.held_out_prompts()
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss became {loss} at step {self.loop['step']}; try a lower learning_rate")
        self.loop["since_best"] += 1
        if loss < self.loop["best"]:
            self.loop["best"], self.loop["kept_step"], self.loop["since_best"] = loss, self.loop["step"], 0
            if self.accelerator.is_main_process:
                fresh = self.best_file.with_suffix(".part")
                with self.uncounted():
                    torch.save(self.accelerator.unwrap_model(self.model).state_dict(), fresh)
                sync(fresh)
                fresh.replace(self.best_file)

    def stops_early(self) -> bool:
        """Tell whether as many epochs as are patiently waited for have brought nothing better."""
        return 0 < self.settings.patience <= self.loop["since_best"]

    def finish(self) -> None:
        """Put the best weights into the model."""
        self._count()
        self.accelerator.unwrap_model(self.model).load_state_dict(_loaded(self.best_file))
        self.loop |= {
            "devices": self.accelerator.num_processes, "device_seconds": self.loop["seconds"] * self.accelerator.num_processes,
            "energy_source": self.energy.source if self.loop["energy_joules"] is not None else "", "peak_bytes": peak_bytes(self.device),
        }  # fmt: skip
        if self.tracked:
            self.accelerator.end_training()

    def close(self) -> None:
        """Take every hook out of the models: what is saved is the student alone."""
        self.head.close()
        for handle in self.zeros:
            handle.remove()
        restored(self.noise)
        if self.inside is not None:
            self.inside.close()
        for source in self.objective.live:
            source.head.close()
        if self.settings.gradient_checkpointing:
            self.student.model.gradient_checkpointing_disable()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Bring the counts up to date, and leave out of them what is done inside."""
        self._count()
        yield
        self.counted_until = time.monotonic()
        self.energy.joules()

    def _count(self) -> None:
        now = time.monotonic()
        self.loop["seconds"] += now - self.counted_until
        self.counted_until = now
        joules, before = self.energy.joules(), self.loop["energy_joules"]
        self.loop["energy_joules"] = None if joules is None or before is None else before + joules
        self.loop["teacher_seconds"] = self.before["teacher_seconds"] + sum(one.seconds for one in self.objective.live)
        self.loop["teacher_tokens"] = self.before["teacher_tokens"] + sum(one.tokens for one in self.objective.live)
        if self.objective.rollout is not None:
            self.loop["written"] = self.before["written"] + self.objective.rollout.written
            self.loop["writing_seconds"] = self.before["writing_seconds"] + self.objective.rollout.seconds


def _digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a saved state but the one that lists them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "loop.json")
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def _loaded(best_file: Path) -> Any:
    """Return the best weights so far. Raises `Unreadable` where they are torn: torch checks every part's sum."""
    try:
        return torch.load(best_file, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as problem:
        raise Unreadable(f"{best_file}: {in_one_line(problem)}") from problem


def peak_bytes(device: str) -> int | None:
    """Return the peak memory so far: allocated on a GPU, resident on a CPU; None where nothing tells."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return process_bytes("VmHWM")


def forget_state(workdir: Path) -> None:
    """Remove what only a resumed run needs; called once the student is saved. State first: without it best.pt is made again."""
    if (workdir / "state").exists():
        _remove(workdir / "state")
    shutil.rmtree(workdir / "state.part", ignore_errors=True)  # of a kill within `_remove`
    for name in ("best.pt", "best.part"):
        (workdir / name).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill in between leaves nothing that looks whole."""
    torn = folder.with_suffix(".part")
    folder.replace(torn)
    shutil.rmtree(torn, ignore_errors=True)


def _hold_zeros(model: Any) -> list[Any]:
    """Keep what a pruning method set to zero at zero: its gradient is dropped before it is clipped or used, and decay leaves 0 alone."""
    handles = []
    for parameter in model.parameters():
        stays = zeros_of(model.config, parameter.detach()) if parameter.ndim >= 2 and parameter.requires_grad else None
        if stays is not None:

            def drop(one: Tensor, stays: Tensor = stays) -> None:
                if one.grad is not None:
                    one.grad.mul_(stays)

            handles.append(parameter.register_post_accumulate_grad_hook(drop))
    return handles
