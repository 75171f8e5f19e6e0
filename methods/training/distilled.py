"""Settings and loss terms of the methods that read a teacher at every trained token.

They read its logits, hidden states or attention. They are one method with different defaults: any
of them can be given the others' terms, by a weight or by a list.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from harness.contract import Checkpoint, Example, Job
from methods.base import Weight, settings
from methods.training.base import SHARED_WITH_CONTROLS, Trained, TrainOptions, full_solution_pairs
from methods.training.cache_dtype import CacheDtype
from methods.training.sources import Teachers, shared_vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from methods.training.positions import Positions
    from methods.training.selection import Selection
    from methods.training.taps import TapConfig
    from methods.training.terms import Term

DIVERGENCES = ("forward-kl", "reverse-kl", "jsd", "skew-kl")
# terms that compare inner states, which no cache of distributions holds
INNER_TERMS = ("feature", "attention")
TERMS = (*DIVERGENCES, "ce", *INNER_TERMS)


class WeightedTerm(NamedTuple):
    """A term of the loss by name, and its weight."""

    name: str
    weight: float | Literal["auto"]


@settings
class DistillationTerms(Trained):
    """Settings of every loss term; a method chooses which ones have a weight."""

    # above 1 the teacher's ranking of wrong tokens becomes visible
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    divergence: Literal["forward-kl", "reverse-kl", "jsd", "skew-kl"] = "forward-kl"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of jsd: the teacher's share of the mixture
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of skew-kl: the same
    # lambda: weight of the teacher's logits against the labels
    teacher_share: Annotated[float, Field(ge=0, le=1)] = 0.5

    feature_weight: Weight = 0.0  # auto: as much as the terms of fixed weight together
    # pairs of student and teacher blocks: 2-4,4-8; auto: up to four, evenly spread, with the last
    # block of each model as a pair
    feature_layers: str = "auto"
    # mse: after each state is divided by its root mean square
    feature_distance: Literal["mse", "cosine", "plain-mse"] = "mse"
    attention_weight: Weight = 0.0
    attention_layers: str = "auto"  # auto: the last block of each model
    # auto: maps where both models have the same number of heads
    attention_kind: Literal["auto", "maps", "relations"] = "auto"
    relation_heads: Annotated[int, Field(ge=0, le=4096)] = 0  # 0: the most that divide both widths
    # positions of a row that are compared: memory grows with their square
    attention_tokens: Annotated[int, Field(ge=2)] = 512
    # replaces the weights above: ["forward-kl=0.5", "ce=0.5", "feature=auto"]
    terms: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _terms_are_known(self) -> Self:
        terms = self.weights()
        if len({term.name for term in terms}) < len(terms):
            raise ValueError(f"terms={list(self.terms)}: a term is named twice")
        if not any(term.weight == "auto" or term.weight > 0 for term in terms):
            raise ValueError("every term has weight 0, so nothing would be trained")
        return self

    def weights(self) -> list[WeightedTerm]:
        """Return the terms of the loss and their weights; those of weight 0 are left out."""
        if self.terms:
            return [parse_term(text) for text in self.terms]
        terms = [
            WeightedTerm(self.divergence, self.teacher_share),
            WeightedTerm("ce", 1 - self.teacher_share),
            WeightedTerm("feature", self.feature_weight),
            WeightedTerm("attention", self.attention_weight),
        ]
        return [term for term in terms if term.weight != 0]

    def tap_config(self) -> "TapConfig | None":
        """Return which blocks are compared; None where no term compares inner states."""
        from methods.training.taps import TapConfig

        names = {term.name for term in self.weights()}
        if not names & set(INNER_TERMS):
            return None
        return TapConfig(
            hidden_layers=self.feature_layers if "feature" in names else "",
            attention_layers=self.attention_layers if "attention" in names else "",
            hidden_distance=self.feature_distance,
            attention_kind=self.attention_kind,
            relation_heads=self.relation_heads,
            attention_tokens=self.attention_tokens,
        )

    def loss_terms(self) -> "list[Term]":
        """Return the terms of the loss."""
        return [self._loss_term(term.name, term.weight) for term in self.weights()]

    def _loss_term(self, name: str, weight: float | Literal["auto"]) -> "Term":
        from methods.training.terms import Term, hard_labels

        if name == "ce":
            return hard_labels(weight)
        if name == "feature":
            return Term(name, weight, _hidden_state_distance)
        if name == "attention":
            taps = self.tap_config()
            assert taps is not None
            return Term(name, weight, _attention_divergence, taps.attention_positions)
        return Term(name, weight, divergence_of(self, name))


def parse_term(text: str) -> WeightedTerm:
    """Read a term such as `feature=auto` or `ce=0.5`. Raises `ValueError` for any other text."""
    match = re.fullmatch(r"([\w-]+)=(auto|\d*\.?\d+(?:e-?\d+)?)", text.replace(" ", ""))
    if not match or match[1] not in TERMS:
        raise ValueError(
            f"term {text!r} is not NAME=WEIGHT; names are {', '.join(TERMS)}, a weight is "
            "a number or auto"
        )
    return WeightedTerm(match[1], "auto" if match[2] == "auto" else float(match[2]))


def _hidden_state_distance(positions: "Positions") -> "Tensor":
    assert positions.inner_states is not None
    return positions.inner_states.hidden_state_distance(positions)


def _attention_divergence(positions: "Positions") -> "Tensor":
    assert positions.inner_states is not None
    return positions.inner_states.attention_divergence(positions)


@settings
class Distilled(DistillationTerms):
    """A method that trains a student on these terms, against one of the run's teachers."""

    needs_same_vocabulary: ClassVar[bool] = True

    # cache the teacher's distributions; auto: where the budget reads every row at least once
    cache: Literal["auto", "on", "off"] = "auto"
    # tokens kept of a distribution, where the vocabulary is too large to keep whole
    top_k: Annotated[int, Field(ge=1, le=4096)] = 64
    # how the cache keeps log-probabilities: float32 exactly, int8 in 256 steps (its KL is noted)
    cache_dtype: CacheDtype = "float16"
    teacher: str = ""  # which of several teachers, by name; "": the first

    @property
    def reads_teacher_live(self) -> bool:
        """Tell whether the teacher runs beside the student: no cache, or inner states compared."""
        return self.cache == "off" or any(term.name in INNER_TERMS for term in self.weights())

    @property
    def logits_in_parts(self) -> bool:
        """Tell whether no term compares inner states, which takes the logits of a batch whole."""
        return not any(term.name in INNER_TERMS for term in self.weights())

    @property
    def needs_all_probabilities(self) -> bool:
        """Tell whether a divergence reads the teacher's unlikely tokens too."""
        return bool({term.name for term in self.weights()} & {"reverse-kl", "jsd", "skew-kl"})

    def control_settings(self) -> dict[str, object]:
        """Return settings that this row's controls take over, where they have them.

        Controls start alike and use the same divergence from the teacher's logits, so that a row
        and its control differ in one thing.
        """
        loss = ("temperature", "divergence", "beta", "alpha", "teacher_share", "teacher")
        return self.changed(*SHARED_WITH_CONTROLS, *loss, "cache_dtype")

    def compress(self, job: Job) -> Checkpoint:
        """Train against the teacher: from its cached distributions, or beside the live teacher."""
        return self.distil(job, self._examples(job))

    def distil(
        self,
        job: Job,
        examples: list[Example],
        *,
        selection: "Selection | None" = None,
        over: Any = None,
        notes: Any = None,
        shared: Sequence[dict[str, Any]] = (),
    ) -> Checkpoint:
        """Train on examples with this method's terms.

        `over` are the rows of the teacher's cache, where it holds more than these examples;
        `notes` and `shared` are those of `Trained.train`.
        """
        return self.train(
            job,
            full_solution_pairs(examples),
            terms=self.loss_terms(),
            teachers=self.teachers(job, over=over),
            selection=selection,
            options=TrainOptions(taps=self.tap_config()),
            notes=notes,
            shared=shared,
        )

    def _examples(self, job: Job) -> list[Example]:
        from harness.data.examples import training_examples

        return training_examples(job.tasks, job.source, rows=job.budget.rows)

    def chosen_teacher(self, job: Job) -> Checkpoint:
        """Return the teacher that this row distils from."""
        from harness.errors import CellFailed

        if not self.teacher:
            return job.teacher
        by_name = {teacher.name: teacher for teacher in reversed(job.teachers)}
        if self.teacher not in by_name:
            names = ", ".join(teacher.name for teacher in job.teachers)
            raise CellFailed(f"teacher={self.teacher!r}: the run's teachers are {names}")
        return by_name[self.teacher]

    def longest_row(self, job: Job) -> int:
        """Return how many tokens of a row both student and teacher can read."""
        from harness.models.shape import Shape

        models = (job.student_base, self.chosen_teacher(job))
        return min(Shape.of_folder(model.path).context for model in models)

    def teachers(self, job: Job, *, over: Any = None) -> Teachers | None:
        """Return how the loss reads the teacher; None where no term reads it.

        `over` are the rows of its cache, where they are more than the trained ones.
        """
        names = {term.name for term in self.weights()}
        if names == {"ce"} and over is None:
            return None
        teacher = self.chosen_teacher(job)
        return Teachers(
            models=(teacher,),
            vocabulary=shared_vocabulary(job, [teacher]),
            k=self.top_k,
            cache=self.cache,
            cache_dtype=self.cache_dtype,
            over=over,
            needs_all_probabilities=self.needs_all_probabilities,
            needs_inner_states=self.tap_config() is not None,
            temperature=self.temperature,
        )


def divergence_of(method: Any, name: str) -> "Callable[[Positions], Tensor]":
    """Return a divergence from the only teacher, as a function of the positions.

    Temperature, beta and alpha are those of the method.
    """
    from methods.training.divergences import distribution_kl
    from methods.training.losses import jensen_shannon, reverse_kl, skew_kl

    temperature = method.temperature

    def divergence(positions: "Positions") -> "Tensor":
        if name == "forward-kl":
            return distribution_kl(positions.student_NV, positions.teachers[0], temperature)
        logits = positions.student_NV, positions.teacher_NV
        if name == "reverse-kl":
            return reverse_kl(*logits, temperature=temperature)
        if name == "jsd":
            return jensen_shannon(*logits, beta=method.beta, temperature=temperature)
        return skew_kl(*logits, alpha=method.alpha, temperature=temperature)

    return divergence
