"""Which weights to set to zero: scores, masks by pattern, and SparseGPT's compensated sweep.

Legend: O outputs, I inputs. W is (O, I), x (tokens, I) what flows into the layer. Masks are True
where a weight stays.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from harness.contract import Checkpoint, Job
from methods.base import Patterns, settings
from methods.compression.base import Compressed, StudentBuilder
from methods.compression.calibrated import Calibrated, calibration_flops

if TYPE_CHECKING:
    from torch import Tensor, nn

SparsityPattern = Literal["unstructured", "2:4", "4:8"]


@settings
class SparsityMethod(Compressed):
    """Settings of every method that sets weights to zero and keeps all shapes: it makes nothing
    smaller or faster in dense kernels.
    """

    leaves_zeros: ClassVar[bool] = True

    # of the weights that go; 2:4 and 4:8 are one half
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    pattern: SparsityPattern = "unstructured"  # 2:4: two of every four consecutive inputs stay
    # layers to leave as they are, and all below them; table and head always are
    ignore: Patterns = ()

    @model_validator(mode="after")
    def _a_pattern_is_a_half(self) -> Self:
        if self.pattern != "unstructured" and self.ratio != 0.5:
            raise ValueError(
                f"pattern {self.pattern} zeroes one half, not {self.ratio:g}; leave one of the two "
                "out"
            )
        return self

    @property
    def zero_share(self) -> float:
        """Return the share of weights that go."""
        return self.ratio

    @property
    def zero_pattern(self) -> str:
        """Return which of them may go."""
        return self.pattern

    def control_settings(self) -> dict[str, object]:
        """Its controls cut as much, of the same layers."""
        return {"ratio": self.ratio, "pattern": self.pattern, "ignore": self.ignore}

    def zeroed(
        self, job: Job, name: str, score: "Callable[[str, nn.Linear], Tensor]", *, within: str
    ) -> Checkpoint:
        """Zero the lowest scores of every layer, without data."""
        from methods.compression.layers import layers_of
        from methods.masks import mark_pruned

        making = StudentBuilder(job, name)
        found = layers_of(making.model, skip=self.ignore, method=name)
        layers = found.linear
        before = count_zeros(layers)
        for at, layer in layers.items():
            layer.weight.mul_(
                pruning_mask(
                    score(at, layer), ratio=self.ratio, pattern=self.pattern, within=within
                )
            )
        mark_pruned(making.model.config)
        return making.save(
            notes=sparsity_notes(layers, before) | {"pattern": self.pattern, **found.told}
        )


@settings
class CalibratedSparsityMethod(SparsityMethod, Calibrated):
    """Zeroes by what flows through the layers, block by block, each block seeing the cut ones
    before it.
    """

    def swept(
        self,
        job: Job,
        name: str,
        *,
        kind: Any,
        cut: "Callable[[nn.Linear, Tensor, int, Tensor | None], None]",
    ) -> Checkpoint:
        """Let `cut` change every layer in place, given the sums of what flows into it, the number
        of tokens and an earlier mask.
        """
        from methods.compression.calibration import InputStatistics, VisitOptions, visit_blocks
        from methods.compression.layers import layers_below, layers_of
        from methods.masks import kept_weights, mark_pruned

        making = StudentBuilder(job, name)
        found = layers_of(making.model, skip=self.ignore, method=name)
        layers = found.linear
        before = count_zeros(layers)
        data = self.calibrate(job, making.opened)

        def visit(block: str, flow: InputStatistics) -> None:
            for one, layer in layers_below(layers, block):
                cut(
                    layer,
                    flow.sums[one],
                    flow.tokens,
                    kept_weights(making.model.config, layer.weight),
                )

        options = VisitOptions(progress=job.progress, method=name)
        visit_blocks(making.opened, data, layers, kind=kind, visit=visit, options=options)
        mark_pruned(making.model.config)
        notes = sparsity_notes(layers, before) | {
            "pattern": self.pattern,
            "calibration": dict(data.told),
            **found.told,
        }
        return making.save(notes=notes, flops=calibration_flops(making, data, 2))


def pruning_mask(score: "Tensor", *, ratio: float, pattern: str, within: str) -> "Tensor":
    """Return which weights stay, (O, I) of booleans: the highest scores of the layer or of each
    row, or of each group of a pattern.

    Exactly `round(ratio * n)` weights go of each unit; ties go by position, so that equal scores
    cannot empty a row.
    """
    import torch

    if pattern != "unstructured":
        keep, of = (int(part) for part in pattern.split(":"))
        if score.shape[1] % of:
            from harness.errors import CellFailed

            raise CellFailed(
                f"pattern {pattern} needs inputs in groups of {of}, a layer has {score.shape[1]}; "
                "leave it out with ignore"
            )
        groups = score.reshape(score.shape[0], -1, of)
        best = groups.topk(keep, dim=-1).indices
        return (
            torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).reshape(score.shape)
        )
    units = score if within == "row" else score.reshape(1, -1)
    gone = round(ratio * units.shape[1])
    if gone >= units.shape[1]:
        from harness.errors import CellFailed

        raise CellFailed(
            f"ratio {ratio} leaves nothing of a layer with {units.shape[1]} weights a unit; give a "
            "smaller one"
        )
    order = units.argsort(dim=-1, stable=True)
    stays = torch.ones_like(units, dtype=torch.bool).scatter_(-1, order[:, :gone], False)
    return stays.reshape(score.shape)


def wanda_score(w: "Tensor", squares: "Tensor") -> "Tensor":
    """Return `|W_ij| * ||x_j||_2` (Sun et al., 2024, Wanda), squares being the sums of x_j^2;
    compared within an output's row.
    """
    return w.abs().float() * squares.sqrt()


def sparse_gpt(
    w: "Tensor",
    gram: "Tensor",
    *,
    ratio: float,
    pattern: str,
    damp: float,
    columns: int = 128,
    stays: "Tensor | None" = None,
) -> "Tensor":
    """Return W with zeros, each cut made up for in the columns after it (Frantar and Alistarh,
    2023, SparseGPT).

    A weight's error is `w_j^2 / [H^-1]_jj^2` by the factor's diagonal; masks are chosen for each
    part of `columns` columns (and for each group of a pattern) when its first column comes. Where
    `stays` (O, I) is false a weight is zero already and remains so.
    """
    import torch

    from methods.compression.rounding import inverse_cholesky

    w = w.float().clone()
    factor, dead = inverse_cholesky(gram, damp)
    w[:, dead] = 0
    of = int(pattern.split(":")[1]) if pattern != "unstructured" else 0
    for start in range(0, w.shape[1], columns):
        stop = min(start + columns, w.shape[1])
        part, inside = w[:, start:stop], factor[start:stop, start:stop]
        spread = inside.diagonal()
        errors = torch.zeros_like(part)
        chosen = torch.ones_like(part, dtype=torch.bool)
        if not of:
            chosen = pruning_mask(
                part.square() / spread.square(), ratio=ratio, pattern="unstructured", within="layer"
            )
        for at in range(stop - start):
            if of and at % of == 0:
                score = part[:, at : at + of].square() / spread[at : at + of].square()
                chosen[:, at : at + of] = pruning_mask(
                    score, ratio=ratio, pattern=pattern, within="row"
                )
            kept = part[:, at] * chosen[:, at]
            errors[:, at] = (part[:, at] - kept) / spread[at]
            part[:, at] = kept
            part[:, at + 1 :] -= errors[:, at : at + 1] * inside[at : at + 1, at + 1 :]
            if stays is not None:
                part[:, at + 1 :] *= stays[:, start + at + 1 : stop]
        part.mul_(chosen)
        w[:, stop:] -= errors @ factor[start:stop, stop:]
        if stays is not None:
            w[:, stop:] *= stays[:, stop:]
    return w


def count_zeros(layers: "dict[str, nn.Linear]") -> int:
    """Return how many weights are zero: a file of few bits, unpacked, has some before anything is
    pruned.
    """
    return sum(int((layer.weight == 0).sum()) for layer in layers.values())


def sparsity_notes(layers: "dict[str, nn.Linear]", before: int) -> dict[str, Any]:
    """Return the share of zeros over all layers, and its extremes: what was done, counted in the
    weights themselves.
    """
    shares = {name: float((layer.weight == 0).float().mean()) for name, layer in layers.items()}
    total = sum(layer.weight.numel() for layer in layers.values())
    zeros = count_zeros(layers)
    if zeros <= before:
        from harness.errors import CellFailed

        raise CellFailed("no weight became zero that was not; give a larger ratio")
    low, high = min(shares.values()), max(shares.values())
    return {
        "zeros": round(zeros / total, 5),
        "zeros_of_a_layer": [round(low, 5), round(high, 5)],
        "layers": len(shares),
    }
