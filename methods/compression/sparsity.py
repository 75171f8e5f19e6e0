"""Which weights to set to zero: settings, scores, masks by pattern, and SparseGPT.

Legend: O outputs, I inputs. W is (O, I). Masks are True where a weight is kept.
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

    from methods.compression.calibration import StatisticsKind

SparsityPattern = Literal["unstructured", "2:4", "4:8"]


@settings
class SparsityMethod(Compressed):
    """Settings of a method that sets weights to zero and keeps all shapes.

    Dense kernels make such a model neither smaller nor faster.
    """

    works_by_block: ClassVar[bool] = True
    leaves_zeros: ClassVar[bool] = True

    # share of the weights to prune; 2:4 and 4:8 prune one half
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    pattern: SparsityPattern = "unstructured"  # 2:4: two of every four consecutive inputs are kept
    # layers to leave as they are, with all below them; table and head always are
    ignore: Patterns = ()

    @model_validator(mode="after")
    def _pattern_prunes_a_half(self) -> Self:
        if self.pattern != "unstructured" and self.ratio != 0.5:
            raise ValueError(
                f"pattern {self.pattern} prunes one half, and ratio is {self.ratio:g}; leave one "
                "of the two settings out"
            )
        return self

    @property
    def zero_share(self) -> float:
        """Return the share of weights that are pruned."""
        return self.ratio

    @property
    def zero_pattern(self) -> str:
        """Return the pattern that zeros follow."""
        return self.pattern

    def control_settings(self) -> dict[str, object]:
        """Return what controls take over: they prune as much, of the same layers."""
        return {"ratio": self.ratio, "pattern": self.pattern, "ignore": self.ignore}

    def prune_lowest(
        self, job: Job, name: str, score: "Callable[[nn.Linear], Tensor]"
    ) -> Checkpoint:
        """Prune the weights of every layer with the lowest scores, without data."""
        from methods.compression.layers import blocks_of, layers_of
        from methods.masks import mark_pruned

        builder = StudentBuilder(job, name, blockwise=True)
        decoder_layers = layers_of(builder.model, ignore=self.ignore, method=name)
        zeros = ZeroCounts()
        for block, names in blocks_of(decoder_layers.linear, builder.writer):
            with builder.writer.changing(block):
                for layer_name in names:
                    layer = decoder_layers.linear[layer_name]
                    zeros.count_before(layer)
                    mask = pruning_mask(
                        score(layer), ratio=self.ratio, pattern=self.pattern, compare="layer"
                    )
                    layer.weight.mul_(mask)
                    zeros.count_after(layer)
        mark_pruned(builder.model.config)
        return builder.save(notes=zeros.notes() | {"pattern": self.pattern, **decoder_layers.notes})


@settings
class CalibratedSparsityMethod(SparsityMethod, Calibrated):
    """Settings of a method that prunes by the inputs of the layers, block by block.

    The inputs of a block come from the pruned blocks before it.
    """

    def prune_blocks(
        self,
        job: Job,
        name: str,
        *,
        kind: "StatisticsKind",
        prune: "Callable[[nn.Linear, Tensor, Tensor | None], None]",
    ) -> Checkpoint:
        """Let `prune(layer, sums, keep_mask)` change every layer in place.

        `sums` are those of the layer's inputs; `keep_mask` (O, I) is that of an earlier pruning.
        """
        from methods.compression.calibration import InputStatistics, VisitOptions, visit_blocks
        from methods.compression.layers import layers_below, layers_of
        from methods.masks import kept_weights, mark_pruned

        builder = StudentBuilder(job, name, blockwise=True)
        decoder_layers = layers_of(builder.model, ignore=self.ignore, method=name)
        layers = decoder_layers.linear
        zeros = ZeroCounts()
        data = self.calibrate(job, builder.opened)

        def visit(block: str, statistics: InputStatistics) -> None:
            for path, layer in layers_below(layers, block):
                zeros.count_before(layer)
                keep_mask = kept_weights(builder.model.config, layer.weight)
                prune(layer, statistics.sums.pop(path), keep_mask)
                zeros.count_after(layer)

        options = VisitOptions(progress=job.progress, method=name, changing=builder.writer.changing)
        visit_blocks(builder.opened, data, layers, kind=kind, visit=visit, options=options)
        mark_pruned(builder.model.config)
        notes = zeros.notes() | {
            "pattern": self.pattern,
            "calibration": dict(data.description),
            **decoder_layers.notes,
        }
        return builder.save(notes=notes, flops=calibration_flops(builder, data, 2))


def pruning_mask(score: "Tensor", *, ratio: float, pattern: str, compare: str) -> "Tensor":
    """Return which weights are kept, (O, I) of booleans: those with the highest scores.

    `compare` says among which weights scores are compared: all of a `layer`, or those of a `row`.
    A pattern compares those of each group instead. Exactly `round(ratio * n)` of n compared weights
    are pruned. Equal scores are pruned in the order of their positions, so that they cannot empty a
    row. Raises `CellFailed` where a pattern does not divide the inputs, or nothing would be left.
    """
    import torch

    from harness.errors import CellFailed

    if pattern != "unstructured":
        kept_of_group, group_size = (int(number) for number in pattern.split(":"))
        if score.shape[1] % group_size:
            raise CellFailed(
                f"pattern {pattern} needs inputs in groups of {group_size}, and a layer has "
                f"{score.shape[1]}; leave that layer out with ignore"
            )
        groups = score.reshape(score.shape[0], -1, group_size)
        best = groups.topk(kept_of_group, dim=-1).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
        return mask.reshape(score.shape)
    compared = score if compare == "row" else score.reshape(1, -1)
    num_pruned = round(ratio * compared.shape[1])
    if num_pruned >= compared.shape[1]:
        raise CellFailed(
            f"ratio {ratio} prunes all {compared.shape[1]} weights of a {compare}; give a smaller "
            "ratio"
        )
    order = compared.argsort(dim=-1, stable=True)
    mask = torch.ones_like(compared, dtype=torch.bool).scatter_(-1, order[:, :num_pruned], False)
    return mask.reshape(score.shape)


def wanda_score(w: "Tensor", squares: "Tensor") -> "Tensor":
    """Return Wanda's score of every weight, `|W_ij| * ||x_j||_2` (Sun et al., 2024), (O, I).

    `squares` are the sums of x_j^2, (I,). Scores are compared within the row of an output.
    """
    return w.abs().float() * squares.sqrt()


def sparse_gpt(
    w: "Tensor",
    gram: "Tensor",
    *,
    ratio: float,
    pattern: str,
    dampening: float,
    columns: int = 128,
    keep_mask: "Tensor | None" = None,
) -> "Tensor":
    """Prune column by column; the columns after each compensate its error (SparseGPT).

    Frantar and Alistarh, 2023. `gram` is X^T X of the layer's inputs, (I, I). Weight j costs
    `w_j^2 / [H^-1]_jj^2`, by the factor's diagonal. The mask of each part of `columns` columns, or
    of each group of a pattern, is chosen when its first column is reached. A weight is zero before,
    and stays so, where `keep_mask` (O, I) is False. Returns W with zeros, fp32.
    """
    import torch

    from methods.compression.rounding import inverse_cholesky, subtract_correction

    w = w.float().clone()
    width = w.shape[1]
    factor, dead = inverse_cholesky(gram, dampening)
    w[:, dead] = 0
    group_size = int(pattern.split(":")[1]) if pattern != "unstructured" else 0
    for start in range(0, width, columns):
        stop = min(start + columns, width)
        part, diagonal = w[:, start:stop], factor.diagonal()[start:stop]
        errors = torch.zeros_like(part)
        mask = torch.ones_like(part, dtype=torch.bool)
        if not group_size:
            costs = part.square() / diagonal.square()
            mask = pruning_mask(costs, ratio=ratio, pattern="unstructured", compare="layer")
        for column in range(start, stop):
            offset = column - start
            if group_size and offset % group_size == 0:
                group = slice(offset, offset + group_size)
                costs = part[:, group].square() / diagonal[group].square()
                mask[:, group] = pruning_mask(costs, ratio=ratio, pattern=pattern, compare="row")
            pruned = w[:, column] * mask[:, offset]
            errors[:, offset] = (w[:, column] - pruned) / diagonal[offset]
            w[:, column] = pruned
            correction = errors[:, offset : offset + 1] * factor[column, None, column + 1 : stop]
            subtract_correction(w, column + 1, stop, correction, keep_mask)
        part.mul_(mask)
        subtract_correction(w, stop, width, errors @ factor[start:stop, stop:], keep_mask)
    return w


class ZeroCounts:
    """Zeros of every layer, counted in the weights themselves before and after they are pruned.

    Some weights are zero before, in a file of few bits that was unpacked.
    """

    def __init__(self) -> None:
        self.before = self.after = self.weights = 0
        self.shares: list[float] = []  # of zeros in each layer, after it was pruned

    def count_before(self, layer: "nn.Linear") -> None:
        """Count the zeros of a layer that is not pruned yet."""
        self.before += int((layer.weight == 0).sum())

    def count_after(self, layer: "nn.Linear") -> None:
        """Count the zeros of a pruned layer."""
        is_zero = layer.weight == 0
        self.after += int(is_zero.sum())
        self.weights += layer.weight.numel()
        self.shares.append(float(is_zero.float().mean()))

    def notes(self) -> dict[str, Any]:
        """Return the share of zeros over all layers, and the lowest and highest of a layer.

        Raises `CellFailed` where no weight was pruned.
        """
        if self.after <= self.before:
            from harness.errors import CellFailed

            raise CellFailed("no weight was pruned; give a larger ratio")
        return {
            "zeros": round(self.after / self.weights, 5),
            "zeros_of_a_layer": [round(min(self.shares), 5), round(max(self.shares), 5)],
            "layers": len(self.shares),
        }
