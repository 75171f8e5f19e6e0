"""Settings and loss terms of the methods that read a teacher's logits, hidden states or attention
at every trained token.

They are one method with different defaults: any of them can be given the others' terms, by a weight
or by a list.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from harness.contract import Checkpoint, Example, Job
from methods.base import Weight, settings
from methods.training.base import Trained, TrainOptions, full_solution_pairs
from methods.training.sources import Teachers, shared_vocabulary

if TYPE_CHECKING:
    from methods.training.selection import Selection
    from methods.training.taps import TapConfig
    from methods.training.terms import Term

DIVERGENCES = ("forward-kl", "reverse-kl", "jsd", "skew-kl")
# terms of what stands inside the teacher: no cache of distributions holds it
INNER_TERMS = ("feature", "attention")
TERMS = (*DIVERGENCES, "ce", *INNER_TERMS)


@settings
class Distilled(Trained):
    """Settings of every term; a method chooses which ones have a weight."""

    needs_same_vocabulary: ClassVar[bool] = True

    # above 1 the teacher's ranking of wrong tokens becomes visible
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    divergence: Literal["forward-kl", "reverse-kl", "jsd", "skew-kl"] = "forward-kl"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of jsd: the teacher's share of the mixture
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of skew-kl: the same
    # lambda: weight of the teacher's logits against the labels
    teacher_share: Annotated[float, Field(ge=0, le=1)] = 0.5

    feature_weight: Weight = 0.0  # auto: as much as the terms of fixed weight together
    # pairs of student and teacher blocks: 2-4,4-8; auto: up to four, evenly, the last two among
    # them
    feature_layers: str = "auto"
    # mse: after each state is divided by its root mean square
    feature_distance: Literal["mse", "cosine", "plain-mse"] = "mse"
    attention_weight: Weight = 0.0
    attention_layers: str = "auto"  # auto: the last two blocks
    # auto: maps where both have as many heads
    attention_kind: Literal["auto", "maps", "relations"] = "auto"
    relation_heads: Annotated[int, Field(ge=0, le=4096)] = 0  # 0: as many as divide both widths
    # positions of a row that are compared: memory grows with their square
    attention_tokens: Annotated[int, Field(ge=2)] = 512
    # a list in place of the weights above: ["forward-kl=0.5", "ce=0.5", "feature=auto"]
    terms: tuple[str, ...] = ()

    # keep what the teacher thinks; auto: where the budget reads every row once and more
    cache: Literal["auto", "on", "off"] = "auto"
    # tokens kept of a distribution, where the vocabulary is too large to keep whole
    top_k: Annotated[int, Field(ge=1, le=4096)] = 64
    teacher: str = ""  # which of several teachers, by name; "": the first

    @model_validator(mode="after")
    def _terms_are_known(self) -> Self:
        weights = dict(self.weights())
        if len(weights) < len(self.weights()):
            raise ValueError(f"terms={list(self.terms)}: a term is named twice")
        if not any(weight == "auto" or weight > 0 for weight in weights.values()):
            raise ValueError("every term has weight 0, so nothing would be trained")
        return self

    def weights(self) -> list[tuple[str, float | Literal["auto"]]]:
        """Return the terms of the loss and their weights; those of weight 0 are left out."""
        if not self.terms:
            named: list[tuple[str, Any]] = [
                (self.divergence, self.teacher_share),
                ("ce", 1 - self.teacher_share),
            ]
            named += [("feature", self.feature_weight), ("attention", self.attention_weight)]
            return [(name, weight) for name, weight in named if weight != 0]
        found: list[tuple[str, float | Literal["auto"]]] = []
        for text in self.terms:
            match = re.fullmatch(r"([\w-]+)=(auto|\d*\.?\d+(?:e-?\d+)?)", text.replace(" ", ""))
            if not match or match[1] not in TERMS:
                raise ValueError(
                    f"term {text!r} is not NAME=WEIGHT; names are {', '.join(TERMS)}, a weight is "
                    "a number or auto"
                )
            found.append((match[1], "auto" if match[2] == "auto" else float(match[2])))
        return found

    @property
    def reads_teacher_live(self) -> bool:
        """Tell whether no cache serves: it is off, or a term looks into the teacher."""
        return self.cache == "off" or any(name in INNER_TERMS for name, _ in self.weights())

    def control_settings(self) -> dict[str, object]:
        """Its controls start alike and, where they read the teacher's logits, by the same
        divergence: one thing differs, not three.
        """
        return self.changed(
            "start", "temperature", "divergence", "beta", "alpha", "teacher_share", "teacher"
        )

    def compress(self, job: Job) -> Checkpoint:
        """Train against the teacher: from its cached distributions, or with the teacher beside the
        student.
        """
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
        """Train on examples with this method's terms; `over` are more rows than these that the
        teacher's cache shall hold.
        """
        return self.train(
            job,
            full_solution_pairs(examples),
            terms=self.loss_terms(),
            teachers=self.teachers(job, over=over),
            selection=selection,
            options=TrainOptions(inwards=self.inwards()),
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
        found = [one for one in job.teachers if one.name == self.teacher]
        if not found:
            raise CellFailed(
                f"teacher={self.teacher!r}: the run's teachers are "
                f"{', '.join(one.name for one in job.teachers)}"
            )
        return found[0]

    def longest_row(self, job: Job) -> int:
        """Return how many tokens student and teacher can read at once."""
        from harness.models.shape import Shape

        return min(
            Shape.of_folder(one.path).context
            for one in (job.student_base, self.chosen_teacher(job))
        )

    def teachers(self, job: Job, *, over: Any = None) -> Teachers | None:
        """Return what the loss reads of the teacher; None where no term does."""
        names = {name for name, _ in self.weights()}
        if names == {"ce"} and over is None:
            return None
        chosen = self.chosen_teacher(job)
        return Teachers(
            models=(chosen,),
            vocabulary=shared_vocabulary(job, [chosen]),
            k=self.top_k,
            cache=self.cache,
            over=over,
            whole=bool(names & {"reverse-kl", "jsd", "skew-kl"}),
            inside=self.inwards() is not None,
            temperature=self.temperature,
        )

    def inwards(self) -> "TapConfig | None":
        """Return which blocks are compared; None where no term looks inside."""
        from methods.training.taps import TapConfig

        names = {name for name, _ in self.weights()}
        if not names.intersection(INNER_TERMS):
            return None
        return TapConfig(
            hidden=self.feature_layers if "feature" in names else "",
            attention=self.attention_layers if "attention" in names else "",
            distance=self.feature_distance,
            maps=self.attention_kind,
            relation_heads=self.relation_heads,
            longest=self.attention_tokens,
        )

    def loss_terms(self) -> "list[Term]":
        """Return the terms of the loss."""
        from methods.training.positions import Positions, trained_tokens
        from methods.training.terms import Term, hard_labels

        values: dict[str, Callable[[Positions], Any]] = {
            name: divergence_of(self, name) for name in DIVERGENCES
        }
        values["feature"] = lambda at: at.inside.features(at)  # type: ignore[union-attr]
        values["attention"] = lambda at: at.inside.attentions(at)  # type: ignore[union-attr]
        inwards = self.inwards()
        counts = {"attention": inwards.attended} if inwards is not None else {}
        return [
            hard_labels(weight)
            if name == "ce"
            else Term(name, weight, values[name], counts.get(name, trained_tokens))
            for name, weight in self.weights()
        ]


def divergence_of(method: Any, name: str) -> Callable[[Any], Any]:
    """Return a divergence from the only teacher as a function of the positions, with the method's
    own temperature, beta and alpha.
    """
    from methods.training.divergences import distribution_kl
    from methods.training.losses import jensen_shannon, reverse_kl, skew_kl

    tau = method.temperature
    return {
        "forward-kl": lambda at: distribution_kl(at.student_NV, at.teachers[0], tau),
        "reverse-kl": lambda at: reverse_kl(at.student_NV, at.teacher_NV, temperature=tau),
        "jsd": lambda at: jensen_shannon(
            at.student_NV, at.teacher_NV, beta=method.beta, temperature=tau
        ),
        "skew-kl": lambda at: skew_kl(
            at.student_NV, at.teacher_NV, alpha=method.alpha, temperature=tau
        ),
    }[name]
