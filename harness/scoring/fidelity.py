"""How near a student's distributions are to its teacher's: on choices, and token by token.

Forward Kullback-Leibler divergence, teacher || student, in nats. Standard errors are clustered by
item, because the tokens of one answer are not independent. Only for models with one vocabulary.

Shapes: T tokens of an answer, V vocabulary, W hidden size.
"""

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from harness.contract import Checkpoint
from harness.errors import CellFailed
from harness.files.digests import file_digest
from harness.files.untrusted import Unreadable
from harness.files.writing import read_signed, replace_file, write_signed
from harness.models.checkpoint import weight_files
from harness.models.encoding import encode_pair, with_leading_space
from harness.models.language_model import LanguageModel
from harness.models.llama_cpp import is_served
from harness.records.record import Fidelity
from harness.scoring.backend import CanRead, LikelihoodRequest
from harness.scoring.llama_cpp_backend import LlamaCppBackend
from harness.scoring.plain_reading import LeftPaddedReader, target_logits

if TYPE_CHECKING:
    import torch

    from harness.scoring.items import ItemRow

MAX_COMPARED_ANSWERS = 32  # of the teacher's answers to a task, that both models read
_ROWS_PER_BATCH = 4


class ClusterSum(NamedTuple):
    """The sum of a quantity over one cluster (an item), and the cluster's size in tokens."""

    total: float
    size: float


class MeanEstimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    stderr: float


def choice_fidelity(
    task: str, teacher_rows: "Sequence[ItemRow]", student_rows: "Sequence[ItemRow]"
) -> Fidelity | None:
    """Compare the two distributions over each question's choices; None without common questions.

    A distribution is the softmax of the choices' log-probabilities.
    """
    teacher_row_of = {row.item: row for row in teacher_rows}
    pairs = [
        (teacher_row_of[row.item].log_probabilities, row.log_probabilities)
        for row in student_rows
        if row.item in teacher_row_of
    ]
    pairs = [
        (teacher, student) for teacher, student in pairs if teacher and len(teacher) == len(student)
    ]
    if not pairs:
        return None
    if any(not math.isfinite(value) for pair in pairs for values in pair for value in values):
        raise CellFailed(
            f"{task}: a log-probability of a choice is NaN or infinite; score the models again "
            "(--force)"
        )
    divergences = [
        ClusterSum(_divergence(_softmax(teacher), _softmax(student)), 1.0)
        for teacher, student in pairs
    ]
    agreements = [
        ClusterSum(float(_argmax(teacher) == _argmax(student)), 1.0) for teacher, student in pairs
    ]
    return _fidelity_of(task, "choices", divergences, agreements)


def _softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def _divergence(teacher: Sequence[float], student: Sequence[float]) -> float:
    return sum(
        p * (math.log(p) - math.log(max(q, 1e-300)))
        for p, q in zip(teacher, student, strict=True)
        if p > 0
    )


def _argmax(values: Sequence[float]) -> int:
    """Return the index of the largest value; the first one in a tie."""
    return max(range(len(values)), key=lambda index: (values[index], -index))


class PromptedAnswer(NamedTuple):
    """A prompt and the teacher's answer to it, as token ids."""

    prompt: Sequence[int]
    answer: Sequence[int]

    @property
    def length(self) -> int:
        """The number of tokens of both."""
        return len(self.prompt) + len(self.answer)

    @property
    def request(self) -> LikelihoodRequest:
        """The request to read the text; its answer is compared."""
        return LikelihoodRequest([*self.prompt, *self.answer], len(self.answer))


@dataclass(frozen=True)
class TeacherReading:
    """One of the teacher's answers, and the teacher's distribution at each of its tokens."""

    text: PromptedAnswer
    log_p: "torch.Tensor"  # (T, V), over the tokens that both models know


def distribution_reader(opened: LanguageModel, rows: int = _ROWS_PER_BATCH) -> CanRead:
    """Return a reader of a few rows at a time, because whole distributions are large."""
    if is_served(opened.checkpoint):
        return LlamaCppBackend(opened)
    return LeftPaddedReader(opened, rows)


def answers_to_compare(
    teacher: LanguageModel, task: str, rows: "Sequence[ItemRow]"
) -> list[PromptedAnswer]:
    """Draw a seeded sample of the teacher's answers to a task; those beyond its context are out."""
    answered = [row for row in rows if row.prompt and row.text]
    random.Random(f"fidelity/{task}").shuffle(answered)
    tokenizer = teacher.tokenizer
    texts = [
        PromptedAnswer(
            *encode_pair(tokenizer, row.prompt, with_leading_space(tokenizer, row.prompt, row.text))
        )
        for row in answered[: 2 * MAX_COMPARED_ANSWERS]
    ]
    fitting = [text for text in texts if text.answer and text.length <= teacher.context]
    return fitting[:MAX_COMPARED_ANSWERS]


def read_answers(
    teacher: CanRead, texts: Sequence[PromptedAnswer], *, width: int | None = None
) -> Iterator[TeacherReading]:
    """Yield what the teacher reads in its answers, over the first `width` tokens.

    `width` is the size of the vocabulary that the student knows too.
    """
    requests = [text.request for text in texts]
    tops = teacher.top_k(requests, k=None, width=width)
    for text, top in zip(texts, tops, strict=True):
        yield TeacherReading(text, top.log_p_NK)


def save_hidden_states(
    path: Path,
    teacher: LanguageModel,
    texts_of: Mapping[str, Sequence[PromptedAnswer]],
    *,
    rows_at_once: int = _ROWS_PER_BATCH,
) -> None:
    """Save the teacher's last hidden states at texts of each task, for all of its students.

    The head makes the logits of them again. Nothing is saved where the head alone does not make the
    logits, for example where a bias, a scale or a cap follows it. Backends do not return hidden
    states, so a hook on the opened model records them.
    """
    import torch
    from safetensors.torch import save_file

    head = teacher.model.get_output_embeddings()
    is_linear = (
        head is not None and getattr(head, "bias", None) is None and head.weight.is_floating_point()
    )
    head_name = _name_in_files(head.weight, teacher) if is_linear else None
    if head_name is None:
        return
    tensors: dict[str, torch.Tensor] = {}
    for task, texts in texts_of.items():
        all_hidden = _hidden_states(teacher, head, texts, rows_at_once)
        for index, (text, hidden) in enumerate(zip(texts, all_hidden, strict=True)):
            if hidden is None:
                return
            tensors[f"{task}/{index}/hidden"] = hidden.cpu().clone()
            tensors[f"{task}/{index}/ids"] = torch.tensor([*text.prompt, *text.answer])
            tensors[f"{task}/{index}/written"] = torch.tensor(len(text.answer))
    if tensors:
        metadata = {"head": head_name, "teacher": teacher.checkpoint.digest}
        replace_file(path, lambda new_path: save_file(tensors, new_path, metadata=metadata))
        write_signed(path.with_suffix(".json"), {"file": file_digest(path)})


def _hidden_states(
    teacher: LanguageModel, head: Any, texts: Sequence[PromptedAnswer], rows_at_once: int
) -> "Iterator[torch.Tensor | None]":
    """Yield the head's inputs at each text's answer, (answer tokens, hidden width).

    None where the head alone does not make the text's logits.
    """
    import torch

    inputs_of_head: list[torch.Tensor] = []  # one a row, padded on the left
    hook = head.register_forward_pre_hook(
        lambda module, inputs: inputs_of_head.extend(inputs[0].detach())
    )
    try:
        for start in range(0, len(texts), rows_at_once):
            batch = [text.request for text in texts[start : start + rows_at_once]]
            inputs_of_head.clear()
            logits = target_logits(teacher, batch)
            for request, states, own_logits in zip(
                batch, inputs_of_head[-len(batch) :], logits, strict=True
            ):
                hidden = states[-request.count - 1 : -1]
                head_logits = torch.nn.functional.linear(hidden, head.weight.detach())
                agrees = torch.allclose(head_logits, own_logits, atol=1e-2, rtol=1e-2)
                yield hidden if agrees else None
    finally:
        hook.remove()


def _name_in_files(weight: "torch.Tensor", opened: LanguageModel) -> str | None:
    """Return a weight's name in the model's own files; a tied head is there as the embedding."""
    from safetensors import safe_open

    names = [
        name
        for name, parameter in opened.model.named_parameters(remove_duplicate=False)
        if parameter is weight
    ]
    for file in weight_files(opened.checkpoint.path):
        with safe_open(file, framework="pt") as tensors:
            stored = next((str(name) for name in names if name in tensors.keys()), None)  # noqa: SIM118  no mapping
        if stored is not None:
            return stored
    return None


def load_teacher_readings(
    path: Path, teacher: Checkpoint, task: str, *, device: str, width: int | None = None
) -> Iterator[TeacherReading] | None:
    """Return what the teacher read on a task, from the file of its own cell.

    None where the file is missing, damaged (said on stderr), or of another teacher. Distributions
    are over the first `width` tokens, which the student knows too.
    """
    from safetensors import safe_open

    if not path.exists():
        return None
    if damage := _damage_of(path):
        print(f"{path} is damaged ({damage}); the teacher reads its answers again", file=sys.stderr)
        return None
    with safe_open(path, framework="pt") as tensors:
        metadata = tensors.metadata()
        if metadata["teacher"] != teacher.digest:
            return None
        weights = (_read_tensor(file, metadata["head"]) for file in weight_files(teacher.path))
        head = next((weight for weight in weights if weight is not None), None)
        if head is None:
            return None
        names = set(tensors.keys())

    return _saved_readings(path, task, head, names, device, width)


def _damage_of(path: Path) -> str:
    """Say why a file of hidden states is not as it was written; "" where its digest matches."""
    try:
        matches = read_signed(path.with_suffix(".json")).get("file") == file_digest(path)
    except Unreadable as problem:
        return str(problem)
    return "" if matches else "its digest does not match"


def _saved_readings(
    path: Path,
    task: str,
    head: "torch.Tensor",
    names: set[str],
    device: str,
    width: int | None = None,
) -> Iterator[TeacherReading]:
    """Yield the readings of a task: logits are computed from saved hidden states and the head.

    `names` are the file's tensors; `width` is how many tokens of the vocabulary are compared.
    """
    import torch
    from safetensors import safe_open

    index = 0
    with safe_open(path, framework="pt") as tensors:
        while f"{task}/{index}/hidden" in names:
            hidden = tensors.get_tensor(f"{task}/{index}/hidden")
            ids = tensors.get_tensor(f"{task}/{index}/ids").tolist()  # prompt and answer
            answer_length = int(tensors.get_tensor(f"{task}/{index}/written"))
            cut = len(ids) - answer_length
            head = head.to(device, hidden.dtype)  # moves once, since all items have one type
            logits = torch.nn.functional.linear(hidden.to(device), head)
            log_p = torch.log_softmax(logits[:, :width].float(), dim=-1)
            yield TeacherReading(PromptedAnswer(ids[:cut], ids[cut:]), log_p)
            index += 1


def _read_tensor(file: Path, name: str) -> "torch.Tensor | None":
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118  no mapping


def token_fidelity(
    task: str,
    teacher_readings: Iterable[TeacherReading],
    student: CanRead,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Fidelity | None:
    """Compare student and teacher at every token of the teacher's answers, with the same prompts.

    Readings are made as they are taken, a batch at a time. Answers longer than the student's
    context are left out; None where none remains.
    """
    divergences: list[ClusterSum] = []
    agreements: list[ClusterSum] = []
    fitting = (reading for reading in teacher_readings if reading.text.length <= student.max_length)
    # the distributions of all answers would not fit into memory
    while batch := list(islice(fitting, _ROWS_PER_BATCH)):
        requests = [reading.text.request for reading in batch]
        tops = student.top_k(requests, k=None, width=batch[0].log_p.shape[-1])
        for reading, top in zip(batch, tops, strict=True):
            compared = _compare_tokens(reading.log_p, top.log_p_NK)
            size = float(len(reading.text.answer))
            divergences.append(ClusterSum(compared.divergence, size))
            agreements.append(ClusterSum(compared.agreements, size))
        progress(len(batch))
    return _fidelity_of(task, "tokens", divergences, agreements) if divergences else None


class TokenComparison(NamedTuple):
    """Two distributions compared over the tokens of one answer."""

    divergence: float  # summed over the tokens, in nats
    agreements: float  # tokens with the same likeliest successor


def _compare_tokens(
    teacher_log_p: "torch.Tensor", student_log_p: "torch.Tensor"
) -> TokenComparison:
    """Compare log-probabilities, (T, V) each; raises `CellFailed` for NaN."""
    import torch

    # padded vocabularies: the shorter one has all tokens that exist
    width = min(teacher_log_p.shape[-1], student_log_p.shape[-1])
    teacher, student = (renormalised(log_p, width) for log_p in (teacher_log_p, student_log_p))
    for whose, log_p in (("the teacher's", teacher), ("the student's", student)):
        if bool(torch.isnan(log_p).any()):
            token = int(torch.isnan(log_p).any(dim=-1).nonzero()[0])
            raise CellFailed(
                f"{whose} logits at token {token + 1} of an answer are no numbers (NaN); see its "
                "row, and score it in float32"
            )
    divergence = (teacher.exp() * (teacher - student)).sum(dim=-1)
    agrees = teacher.argmax(dim=-1) == student.argmax(dim=-1)
    return TokenComparison(float(divergence.sum()), float(agrees.sum()))


def renormalised(log_p: "torch.Tensor", width: int) -> "torch.Tensor":
    """Return log-probabilities over the first `width` tokens alone.

    Those that have this width already are returned unchanged, to the last bit.
    """
    import torch

    return log_p if log_p.shape[-1] == width else torch.log_softmax(log_p[:, :width], dim=-1)


def _fidelity_of(
    task: str,
    form: Literal["choices", "tokens"],
    divergences: Sequence[ClusterSum],
    agreements: Sequence[ClusterSum],
) -> Fidelity:
    divergence, agreement = clustered_mean(divergences), clustered_mean(agreements)
    return Fidelity(
        task=task,
        form=form,
        items=len(divergences),
        kl=divergence.mean,
        kl_stderr=divergence.stderr,
        agreement=min(1.0, agreement.mean),
        agreement_stderr=agreement.stderr,
    )


def clustered_mean(clusters: Sequence[ClusterSum]) -> MeanEstimate:
    """Return the mean over clusters, and its standard error with the clusters as the units.

    The ratio estimator of survey sampling (Cochran 1977, chapter 6): the residual of a cluster is
    its sum less the mean times its size.
    """
    total_size = sum(size for _, size in clusters)
    mean = sum(total for total, _ in clusters) / total_size
    if len(clusters) < 2:
        return MeanEstimate(mean, math.nan)
    squares = sum((total - mean * size) ** 2 for total, size in clusters)
    stderr = math.sqrt(squares * len(clusters) / (len(clusters) - 1)) / total_size
    return MeanEstimate(mean, stderr)
