"""What is minimised: loss terms, what they may look at, which positions they count, and where teachers' distributions come from."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from harness.machine.memory import synchronise
from harness.models.language_model import LanguageModel
from methods.training.losses import cross_entropy, ensemble, entropy, forward_kl, top_k_entropy, top_k_kl
from methods.training.rows import Batch, Row, batch_of

if TYPE_CHECKING:
    from methods.training.rollout import Rollout
    from methods.training.taps import Inside, Inwards


@dataclass(frozen=True)
class TopK:
    """A teacher's likeliest tokens at trained positions: ids and log-probabilities at temperature 1, (N, k) each."""

    ids_NK: Tensor
    log_p_NK: Tensor


@dataclass(frozen=True)
class Distribution:
    """What one teacher thinks at the trained positions: logits (live, or kept whole) or its likeliest tokens."""

    logits_NV: Tensor | None
    top: TopK | None = None


@dataclass(frozen=True)
class Positions:
    """What a loss term may look at: the trained positions of a micro-batch, already shifted and selected."""

    student_NV: Tensor
    labels_N: Tensor
    teachers: tuple[Distribution, ...] = ()
    batch: Batch | None = None
    inside: "Inside | None" = None  # hidden states and attention of both models, where a term asked for them

    @property
    def teacher_NV(self) -> Tensor:
        """The only teacher's logits."""
        [one] = self.teachers
        assert one.logits_NV is not None, "the teacher's distributions were not kept whole"
        return one.logits_NV

    @property
    def tags_N(self) -> Tensor:
        """Each position's row's tag."""
        assert self.batch is not None
        return torch.tensor([row.tag for row in self.batch.rows for _ in range(row.trained)], device=self.labels_N.device)


Counts = Callable[[Row], int]


def trained_tokens(row: Row) -> int:
    """Count every trained token of a row: what a term is divided by unless it says otherwise."""
    return row.trained


@dataclass(frozen=True)
class Term:
    """One summand of the loss. `value` returns (N,), one number a trained position; the loop sums, divides and weighs it.

    A weight of `auto` follows the others: the term then counts as much as all terms of fixed weight together.
    """

    name: str
    weight: float | Literal["auto"]
    value: Callable[[Positions], Tensor]
    counts: Counts = trained_tokens  # positions of a row that the term is divided by, known before any of them is computed


def hard_labels(weight: float = 1.0, *, tag: int | None = None) -> Term:
    """Return the cross-entropy term against the text itself; with a tag, of rows with that tag alone."""
    if tag is None:
        return Term("ce", weight, lambda at: cross_entropy(at.student_NV, at.labels_N))
    return Term(
        f"ce-{tag}", weight, lambda at: cross_entropy(at.student_NV, at.labels_N) * (at.tags_N == tag),
        counts=lambda row: row.trained if row.tag == tag else 0,
    )  # fmt: skip


def distribution_kl(student_NV: Tensor, teacher: Distribution, temperature: float) -> Tensor:
    """Return the forward KL to a teacher's whole distribution, or to its likeliest tokens and their rest; (N,)."""
    if teacher.top is not None:
        return top_k_kl(student_NV, teacher.top.ids_NK, teacher.top.log_p_NK, temperature=temperature)
    assert teacher.logits_NV is not None
    return forward_kl(student_NV, teacher.logits_NV, temperature=temperature)


def distribution_entropy(teacher: Distribution) -> Tensor:
    """Return a teacher's entropy at each position; (N,)."""
    if teacher.top is not None:
        return top_k_entropy(teacher.top.log_p_NK)
    assert teacher.logits_NV is not None
    return entropy(teacher.logits_NV)


def mixed_kl(at: Positions, weights_NM: Tensor, temperature: float) -> Tensor:
    """Return the forward KL to a mixture of teachers, weights (N, M) by position.

    Whole distributions are mixed as probabilities. Of kept likeliest tokens the supports differ, so the weighted KLs are added: the same
    up to a constant that the student cannot change, exact for whole distributions, a lower bound for cut ones.
    """
    whole = [one.logits_NV for one in at.teachers if one.logits_NV is not None and one.top is None]
    if len(whole) == len(at.teachers):
        return forward_kl(at.student_NV, ensemble(whole, weights_NM, temperature=temperature), temperature=temperature)
    apart = torch.stack([distribution_kl(at.student_NV, one, temperature) for one in at.teachers], dim=-1)
    return (apart * weights_NM / weights_NM.sum(-1, keepdim=True)).sum(-1)


Score = Literal["kl", "entropy", "excess", "random"]


@dataclass(frozen=True)
class Selection:
    """Trains a share of each row's tokens: those with the highest score, or random ones. At least one a row.

    kl: the teacher's divergence from the student now. entropy: the teacher's. excess: the label's cross-entropy under the student less
    that under the teacher (Lin et al., 2024, Rho-1).
    """

    share: float
    score: Score
    seed: int

    def counts(self, row: Row) -> int:
        """Return how many tokens of a row are trained; known before anything is computed."""
        return max(1, int(self.share * row.trained + 0.5))

    @torch.no_grad()
    def chosen(self, at: Positions, number: int) -> Tensor:
        """Return which positions are trained, (N,) of booleans: exactly `counts` of each row's."""
        assert at.batch is not None
        scores = self._scores(at, number)
        chosen = torch.zeros_like(at.labels_N, dtype=torch.bool)
        start = 0
        for row in at.batch.rows:
            own = scores[start : start + row.trained]
            chosen[start + own.topk(self.counts(row)).indices] = True
            start += row.trained
        return chosen

    def _scores(self, at: Positions, number: int) -> Tensor:
        if self.score == "random":  # by the row itself: the same for any split into micro-batches
            assert at.batch is not None
            drawn = [
                torch.rand(row.trained, generator=torch.Generator().manual_seed(hash((self.seed, number, row.ids)) % 2**63))
                for row in at.batch.rows
            ]
            return torch.cat(drawn).to(at.labels_N.device)
        [teacher] = at.teachers
        if self.score == "kl":
            return distribution_kl(at.student_NV, teacher, 1.0)
        if self.score == "entropy":
            return distribution_entropy(teacher)
        return cross_entropy(at.student_NV, at.labels_N) - label_loss(teacher, at.labels_N)


def label_loss(teacher: Distribution, labels_N: Tensor) -> Tensor:
    """Return the cross-entropy of the labels under a teacher; a label outside the kept tokens counts as half of what they leave over."""
    if teacher.top is None:
        assert teacher.logits_NV is not None
        return cross_entropy(teacher.logits_NV, labels_N)
    found = teacher.top.ids_NK == labels_N[:, None]
    log_p = teacher.top.log_p_NK.float()
    rest = torch.log(0.5 * -torch.expm1(torch.logsumexp(log_p, -1).clamp(max=-1e-7)))
    return -torch.where(found.any(-1), log_p.masked_fill(~found, -torch.inf).amax(-1), rest)


class Source(Protocol):
    """Where one teacher's distributions come from: the teacher itself, or what was kept of it."""

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return what the teacher thinks at the batch's trained positions."""
        ...


class Head:
    """Runs a causal language model and makes logits at the wanted positions only: the head is handed no others.

    Everything behind the head (scales, caps) is the model's own. Logits of a whole batch would be the largest tensor of the step.
    """

    def __init__(self, model: Any) -> None:
        self._wanted: Tensor | None = None
        self.model = model
        head = model.get_output_embeddings()
        self._hook = head.register_forward_pre_hook(self._select) if head is not None else None

    def _select(self, head: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._wanted is None or not given or given[0].ndim != 3 or given[0].shape[1] != self._wanted.shape[1] + 1:
            return None
        return (given[0][:, :-1][self._wanted][None], *given[1:])

    def __call__(self, batch: Batch, *, through: Any = None) -> Tensor:
        """Return logits (N, V); `through` is the wrapped model, where training wraps it."""
        self._wanted = batch.mask
        try:
            logits = (through or self.model)(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
        finally:
            self._wanted = None
        count = int(batch.mask.sum())
        found: Tensor = logits[0] if logits.shape[:2] == (1, count) else logits[:, :-1][batch.mask]
        return found

    def close(self) -> None:
        """Leave the model as it was."""
        if self._hook is not None:
            self._hook.remove()


class Live:
    """A teacher in memory, run beside the student; counts the seconds spent in it and the tokens that it read."""

    def __init__(self, opened: LanguageModel) -> None:
        self.opened = opened
        self.model = opened.model.requires_grad_(False).eval()
        self.head = Head(self.model)
        self.seconds = 0.0
        self.tokens = 0

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Run the teacher on the student's own batch."""
        return Distribution(self._run(batch)[:, :vocabulary])

    def _run(self, batch: Batch) -> Tensor:
        """Return the teacher's logits; the seconds are its own: what a GPU was asked before is waited for."""
        synchronise(self.opened.device)
        began = time.perf_counter()
        with torch.no_grad():
            logits = self.head(batch)
        synchronise(self.opened.device)
        self.seconds += time.perf_counter() - began
        self.tokens += sum(len(row.ids) for row in batch.rows)
        return logits


class OtherTokens(Live):
    """A live teacher with a tokenizer of its own, run on its own tokens of the same text."""

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return its logits (M, W) at the aligned positions, in the rows' order."""
        others = []
        wanted: list[int] = []
        start = 0
        for row in batch.rows:
            assert row.other is not None
            others.append(Row(row.other.ids, row.other.trained_from))
            wanted += [start + theirs for _, theirs in row.other.pairs]
            start += others[-1].trained
        logits = self._run(batch_of(others, self.opened.pad_id, batch.ids.device))
        return Distribution(logits[torch.tensor(wanted, device=logits.device)])


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a method minimises, over which rows it is told apart."""

    terms: Sequence[Term]
    sources: Sequence[Source] = ()
    vocabulary: int | None = None  # leading logit columns that mean the same token in all models
    selection: Selection | None = None
    inwards: "Inwards | None" = None  # which blocks of student and teacher are compared
    rollout: "Rollout | None" = None  # on-policy: rows are the student's own answers
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def live(self) -> list[Live]:
        """The teachers that are run beside the student."""
        return [one for one in self.sources if isinstance(one, Live)]

    def counts(self, term: Term, row: Row) -> int:
        """Return how many positions of a row a term is divided by."""
        return self.selection.counts(row) if self.selection else term.counts(row)

    def trained(self, row: Row) -> int:
        """Return how many tokens of a row are trained."""
        return self.selection.counts(row) if self.selection else row.trained
