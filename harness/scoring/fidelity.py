"""How near a student's distributions are to its teacher's: on the choices of questions, and token
by token.

Forward Kullback-Leibler divergence, teacher || student, in nats; standard errors are clustered by
item (the tokens of one answer are not independent). Only for models that share a vocabulary.
"""

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contract import Checkpoint
from harness.errors import CellFailed
from harness.files.digests import file_digest
from harness.files.untrusted import Unreadable
from harness.files.writing import read_signed, replace_file, write_signed
from harness.models.checkpoint import weight_files
from harness.models.encoding import encode_pair, with_leading_space
from harness.models.language_model import LanguageModel
from harness.records.record import Fidelity
from harness.scoring.backend import CanRead, Scored
from harness.scoring.plain_reading import PlainReader, end_logits

if TYPE_CHECKING:
    import torch

    from harness.scoring.items import ItemRow

TOKEN_ITEMS = 32  # of the teacher's answers that both models read
_ROWS = 4  # read at once


def choice_fidelity(
    task: str, teacher: "Sequence[ItemRow]", student: "Sequence[ItemRow]"
) -> Fidelity | None:
    """Compare the two distributions over each question's choices (softmax of their
    log-probabilities); None without pairs.
    """
    theirs = {row.item: row for row in teacher}
    pairs = [
        (theirs[row.item].log_probabilities, row.log_probabilities)
        for row in student
        if row.item in theirs
    ]
    pairs = [(left, right) for left, right in pairs if left and len(left) == len(right)]
    if not pairs:
        return None
    if any(not math.isfinite(value) for pair in pairs for values in pair for value in values):
        raise CellFailed(
            f"{task}: a log-probability of a choice is no number; score the models again (--force)"
        )
    divergences = [_divergence(_softmax(left), _softmax(right)) for left, right in pairs]
    same = [float(_first_largest(left) == _first_largest(right)) for left, right in pairs]
    return _summary(
        task, "choices", [(value, 1.0) for value in divergences], [(value, 1.0) for value in same]
    )


def _softmax(logs: Sequence[float]) -> list[float]:
    top = max(logs)
    weights = [math.exp(value - top) for value in logs]
    total = sum(weights)
    return [weight / total for weight in weights]


def _divergence(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(
        p * (math.log(p) - math.log(max(q, 1e-300)))
        for p, q in zip(left, right, strict=True)
        if p > 0
    )


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: (values[index], -index))


@dataclass(frozen=True)
class Read:
    """One of the teacher's answers behind its prompt, as token ids, and what the teacher thought at
    each of its tokens.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    log_p: "torch.Tensor"  # (len(after), V), over the tokens that both models know

    @property
    def row(self) -> Scored:
        """The text and how many of its tokens are compared, as a backend is asked."""
        return _row(self.before, self.after)


def _row(before: Sequence[int], after: Sequence[int]) -> Scored:
    return Scored([*before, *after], len(after))


def reader(opened: LanguageModel) -> PlainReader:
    """Return what reads a model for a distance: a few rows at a time, for whole distributions are
    large.
    """
    return PlainReader(opened, _ROWS)


def texts_to_read(
    teacher: LanguageModel, task: str, rows: "Sequence[ItemRow]"
) -> list[tuple[list[int], list[int]]]:
    """Draw the answers that are compared, as (prompt, answer) ids: a seeded sample, those longer
    than the context left out.
    """
    written = [row for row in rows if row.prompt and row.text]
    random.Random(f"fidelity/{task}").shuffle(written)
    tokenizer = teacher.tokenizer
    texts = [
        encode_pair(tokenizer, row.prompt, with_leading_space(tokenizer, row.prompt, row.text))
        for row in written[: 2 * TOKEN_ITEMS]
    ]
    return [
        (before, after)
        for before, after in texts
        if after and len(before) + len(after) <= teacher.context
    ][:TOKEN_ITEMS]


def reads(
    teacher: CanRead, texts: Sequence[tuple[list[int], list[int]]], *, width: int | None = None
) -> Iterator[Read]:
    """Let the teacher read its answers now; distributions are over the first `width` tokens, which
    the student knows too.
    """
    rows = [_row(before, after) for before, after in texts]
    for (before, after), top in zip(texts, teacher.top_k(rows, k=None, width=width), strict=True):
        yield Read(tuple(before), tuple(after), top.log_p_NK)


def remember(
    path: Path, teacher: LanguageModel, rows: "Sequence[ItemRow]", tasks: Sequence[str]
) -> None:
    """Keep what the teacher reads for every student to come: its last hidden states, from which the
    head makes the logits.

    Nothing is kept where the head alone does not make them (a bias, a scale or a cap behind it). No
    backend gives hidden states: the live model is watched.
    """
    import torch
    from safetensors.torch import save_file

    head = teacher.model.get_output_embeddings()
    plain = (
        head is not None and getattr(head, "bias", None) is None and head.weight.is_floating_point()
    )
    name = _name_of(head.weight, teacher) if plain else None
    if name is None:
        return
    kept: dict[str, torch.Tensor] = {}
    for task in tasks:
        texts = texts_to_read(teacher, task, [row for row in rows if row.task == task])
        for index, ((before, after), hidden) in enumerate(
            zip(texts, _hidden(teacher, head, texts), strict=True)
        ):
            if hidden is None:
                return
            kept[f"{task}/{index}/hidden"] = hidden.cpu().clone()
            kept[f"{task}/{index}/ids"] = torch.tensor([*before, *after])
            kept[f"{task}/{index}/written"] = torch.tensor(len(after))
    if kept:
        replace_file(
            path,
            lambda fresh: save_file(
                kept, fresh, metadata={"head": name, "teacher": teacher.checkpoint.digest}
            ),
        )
        write_signed(path.with_suffix(".json"), {"file": file_digest(path)})


def _hidden(
    teacher: LanguageModel, head: Any, texts: Sequence[tuple[list[int], list[int]]]
) -> "Iterator[torch.Tensor | None]":
    """Yield the hidden states (T, width) before the head at each text's answer; None where the head
    alone does not make its logits.
    """
    import torch

    seen: list[torch.Tensor] = []  # of the rows read last
    watching = head.register_forward_pre_hook(
        lambda module, inputs: seen.extend(inputs[0].detach())
    )
    try:
        for start in range(0, len(texts), _ROWS):
            batch = [_row(before, after) for before, after in texts[start : start + _ROWS]]
            seen.clear()
            logits = end_logits(teacher, batch)
            for row, states, own in zip(batch, seen[-len(batch) :], logits, strict=True):
                hidden = states[-row.count - 1 : -1]
                same = torch.allclose(
                    torch.nn.functional.linear(hidden, head.weight.detach()),
                    own,
                    atol=1e-2,
                    rtol=1e-2,
                )
                yield hidden if same else None
    finally:
        watching.remove()


def _name_of(weight: "torch.Tensor", opened: LanguageModel) -> str | None:
    """Return the name under which a weight lies in the model's own files (a tied head lies there as
    the embedding).
    """
    from safetensors import safe_open

    names = [
        name for name, one in opened.model.named_parameters(remove_duplicate=False) if one is weight
    ]
    for file in weight_files(opened.checkpoint.path):
        with safe_open(file, framework="pt") as tensors:
            found = next((str(name) for name in names if name in tensors.keys()), None)  # noqa: SIM118  no mapping
        if found is not None:
            return found
    return None


def recall(
    path: Path, teacher: Checkpoint, task: str, *, device: str, width: int | None = None
) -> Iterator[Read] | None:
    """Return what the teacher read on a task, from its own cell's file; None where there is none
    for this teacher.

    Distributions are over the first `width` tokens, which the student knows too.
    """
    from safetensors import safe_open

    if not path.exists():
        return None
    if wrong := _damage(path):
        print(f"{path} is not believed ({wrong}); the teacher reads again", file=sys.stderr)
        return None
    with safe_open(path, framework="pt") as kept:
        told = kept.metadata()
        if told["teacher"] != teacher.digest:
            return None
        weight = next(
            (
                w
                for file in weight_files(teacher.path)
                if (w := _tensor(file, told["head"])) is not None
            ),
            None,
        )
        if weight is None:
            return None
        names = set(kept.keys())

    return _recalled(path, task, weight, names, device, width)


def _damage(path: Path) -> str:
    """Say why a file of what a teacher read is not the one that was written, "" where it is: by the
    digest beside it.
    """
    try:
        same = read_signed(path.with_suffix(".json")).get("file") == file_digest(path)
    except Unreadable as problem:
        return str(problem)
    return "" if same else "its digest does not match"


def _recalled(
    path: Path,
    task: str,
    weight: "torch.Tensor",
    names: set[str],
    device: str,
    width: int | None = None,
) -> Iterator[Read]:
    import torch
    from safetensors import safe_open

    index = 0
    with safe_open(path, framework="pt") as kept:
        while f"{task}/{index}/hidden" in names:
            hidden = kept.get_tensor(f"{task}/{index}/hidden")
            ids = kept.get_tensor(f"{task}/{index}/ids").tolist()
            cut = len(ids) - int(kept.get_tensor(f"{task}/{index}/written"))
            weight = weight.to(device, hidden.dtype)  # crosses once: every item has the same type
            logits = torch.nn.functional.linear(hidden.to(device), weight)
            yield Read(
                tuple(ids[:cut]),
                tuple(ids[cut:]),
                torch.log_softmax(logits[:, :width].float(), dim=-1),
            )
            index += 1


def _tensor(file: Path, name: str) -> "torch.Tensor | None":
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118  no mapping


def token_fidelity(
    task: str,
    teacher: Iterable[Read],
    student: CanRead,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Fidelity | None:
    """Let the student read prompts with the teacher's answers; compare the two at every token of
    the answers.

    Answers longer than the student's context are left out; None when nothing is left.
    """
    divergences: list[tuple[float, float]] = []
    same: list[tuple[float, float]] = []
    fitting = (read for read in teacher if len(read.before) + len(read.after) <= student.max_length)
    while batch := list(islice(fitting, _ROWS)):  # a few answers' distributions at once, never all
        tops = student.top_k([read.row for read in batch], k=None, width=batch[0].log_p.shape[-1])
        for read, ours in zip(batch, tops, strict=True):
            kl, agree = _compared(read.log_p, ours.log_p_NK)
            divergences.append((kl, float(len(read.after))))
            same.append((agree, float(len(read.after))))
        progress(len(batch))
    return _summary(task, "tokens", divergences, same) if divergences else None


def _compared(left: "torch.Tensor", right: "torch.Tensor") -> tuple[float, float]:
    """Return (summed divergence, tokens with the same likeliest successor) of log-probabilities (T,
    V) each.
    """
    import torch

    # padded vocabularies: no token lives beyond the shorter one
    width = min(left.shape[-1], right.shape[-1])
    theirs, ours = (_narrowed(part, width) for part in (left, right))
    for which, logs in (("the teacher's", theirs), ("the student's", ours)):
        if bool(torch.isnan(logs).any()):
            token = int(torch.isnan(logs).any(dim=-1).nonzero()[0])
            raise CellFailed(
                f"{which} logits at token {token + 1} of an answer are no numbers (NaN); see its "
                "row, and score it in float32"
            )
    kl = (theirs.exp() * (theirs - ours)).sum(dim=-1)
    return float(kl.sum()), float((theirs.argmax(dim=-1) == ours.argmax(dim=-1)).sum())


def _narrowed(log_p: "torch.Tensor", width: int) -> "torch.Tensor":
    """Return log-probabilities over the first `width` tokens alone; those that are, stay as they
    are to the last bit.
    """
    import torch

    return log_p if log_p.shape[-1] == width else torch.log_softmax(log_p[:, :width], dim=-1)


def _summary(
    task: str,
    form: str,
    divergences: Sequence[tuple[float, float]],
    same: Sequence[tuple[float, float]],
) -> Fidelity:
    kl, kl_error = clustered_mean(divergences)
    agreement, agreement_error = clustered_mean(same)
    return Fidelity(
        task=task,
        form=form,  # type: ignore[arg-type]
        items=len(divergences),
        kl=kl,
        kl_stderr=kl_error,
        agreement=min(1.0, agreement),
        agreement_stderr=agreement_error,
    )


def clustered_mean(sums: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean of clusters given as (sum, size), and its standard error with the clusters as
    the units.

    The ratio estimator of survey sampling (Cochran 1977, chapter 6): the residual of a cluster is
    its sum less the mean times its size.
    """
    total = sum(size for _, size in sums)
    mean = sum(value for value, _ in sums) / total
    if len(sums) < 2:
        return mean, math.nan
    squares = sum((value - mean * size) ** 2 for value, size in sums)
    return mean, math.sqrt(squares * len(sums) / (len(sums) - 1)) / total
