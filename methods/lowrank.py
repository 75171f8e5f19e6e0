"""Low rank: the matrices of the blocks become products of two thinner ones each, by singular
values.

Whitened (the default; Wang et al., 2025, SVD-LLM): X^T X = S S^T over calibration text, `svd(W S) =
U Sig V^T`, and W' = [U_r sqrt(Sig_r)] [sqrt(Sig_r) V_r^T S^-1]: what is lost on that text is
exactly the sum of the squares of the dropped singular values, and plain SVD never loses less.
`lowrank-plain` is that control: the same ranks by the SVD of W alone.

`keep` is the share of a matrix's parameters that stays: r = floor(keep * O * I / (O + I)).
`allocation=energy` gives all matrices one threshold of dropped energy instead, at the same total.
Keys' and values' projections stay whole under grouped queries: they are small. The student opens
after `import methods.packed`. Cost: one pass of second moments and one SVD a layer. Useful to 20 or
30 % removed.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Family, Job
from harness.errors import CellFailed
from methods.base import Patterns, non_default_settings, settings
from methods.compression.base import StudentBuilder
from methods.compression.calibrated import Calibrated, calibration_flops

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.compression.calibration import CalibrationData

KEY_VALUE_PROJECTIONS = ("k_proj", "v_proj")  # small under grouped queries: they stay whole


@settings
class LowRank(Calibrated):
    """Replace every matrix by two thinner factors, by the singular values of what it does to real
    inputs.
    """

    family: ClassVar[Family] = "low-rank"
    controls: ClassVar[tuple[str, ...]] = ("lowrank-plain",)
    _whitened: ClassVar[bool] = True

    keep: Annotated[float, Field(gt=0, lt=1)] = 0.8  # of a matrix's parameters
    rank: Annotated[int, Field(ge=0)] = 0  # the same rank for every matrix, in place of `keep`
    allocation: Literal["uniform", "energy"] = "uniform"
    # of the mean second moment, added where the factorisation needs it
    jitter: Annotated[float, Field(gt=0, le=1)] = 1e-4
    ignore: Patterns = ()  # layers to leave as they are, and all below them

    @property
    def calibrates(self) -> bool:
        """Tell whether text is read: for the factors, or for one threshold over all matrices."""
        return self._whitened or (self.allocation == "energy" and not self.rank)

    @property
    def keeps_architecture(self) -> bool:
        """Tell that factors stand in place of matrices."""
        return False

    def control_settings(self) -> dict[str, object]:
        """Its control has the same ranks."""
        ranks = {name: getattr(self, name) for name in ("keep", "rank", "allocation", "ignore")}
        text = ("calibration", "num_calibration_samples", "max_seq_length", "jitter")
        return ranks | (non_default_settings(self, *text) if self.allocation == "energy" else {})

    def compress(self, job: Job) -> Checkpoint:
        """Factorise block by block; every block sees the factors before it."""
        name = "lowrank" if self._whitened else "lowrank-plain"
        factoring = _Factorizer(StudentBuilder(job, name), self)
        by_threshold = self.allocation == "energy" and not self.rank
        if not self._whitened and not by_threshold:  # the weights alone: no text is read
            factoring.cut_all()
            return factoring.saved({}, flops=0.0)
        data = self.calibrate(job, factoring.making.opened)
        if by_threshold:  # the control's ranks too: it has the same ones
            factoring.spread_ranks(data, self.keep)
        if self._whitened:
            factoring.sweep(data, factoring.cut, again=True)
        else:
            factoring.cut_all()
        passes = (1 if by_threshold else 0) + (2 if self._whitened else 0)
        flops = calibration_flops(factoring.making, data, passes)
        return factoring.saved({"calibration": dict(data.told)}, flops=flops)

    def factorised_layers(
        self, making: StudentBuilder, every: "dict[str, nn.Linear]"
    ) -> "dict[str, nn.Linear]":
        """Return the layers that become factors. Raises `CellFailed` where none is left, or the
        rank saves nothing in one.
        """
        config = making.model.config.get_text_config()
        heads = int(getattr(config, "num_attention_heads", None) or 0)
        grouped = int(getattr(config, "num_key_value_heads", None) or heads) < heads
        layers = {
            name: layer
            for name, layer in every.items()
            if not (grouped and name.rpartition(".")[2] in KEY_VALUE_PROJECTIONS)
        }
        if not layers:
            raise CellFailed(
                f"{making.method}: no matrix is left to factorise (keys' and values' projections "
                "stay whole under grouped queries)"
            )
        for name, layer in layers.items():
            if self.rank >= break_even_rank(layer):
                raise CellFailed(
                    f"{making.method}: rank {self.rank} saves nothing in {name} "
                    f"({layer.out_features} x {layer.in_features}); "
                    f"give at most {break_even_rank(layer) - 1}"
                )
        return layers


class _Factorizer:
    """A model whose matrices become factors one after another, (O, r) and (r, I) by the layer's
    name.
    """

    def __init__(self, making: StudentBuilder, method: LowRank) -> None:
        from harness.models.language_model import stored_dtype
        from methods.compression.layers import layers_of

        self.making, self.jitter = making, method.jitter
        every = layers_of(making.model, skip=method.ignore, method=making.method)
        self.left_alone = every.told
        self.layers: dict[str, nn.Linear] = method.factorised_layers(making, every.linear)
        self.ranks = {
            name: method.rank or rank_for_share(layer, method.keep)
            for name, layer in self.layers.items()
        }
        self.dtype = stored_dtype(making.base)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}

    def cut(self, name: str, layer: "nn.Linear", gram: "Tensor | None") -> None:
        """Factorise a layer, and put into it what its factors stand for.

        They are of the type that they will be saved in: half the memory, and what later blocks will
        see.
        """
        up, down = factorize(layer.weight, self.ranks[name], gram, jitter=self.jitter)
        self.factors[name] = up, down = up.to(self.dtype), down.to(self.dtype)
        layer.weight.copy_(up.to(layer.weight.dtype) @ down.to(layer.weight.dtype))

    def cut_all(self) -> None:
        """Factorise every layer by its weights alone."""
        for name, layer in self.layers.items():
            self.cut(name, layer, None)

    def spread_ranks(self, data: "CalibrationData", keep: float) -> None:
        """Give all matrices one threshold of energy in place of one share."""
        spectra: dict[str, Tensor] = {}

        def read(name: str, layer: "nn.Linear", gram: "Tensor | None") -> None:
            spectra[name] = decompose(layer.weight, gram, jitter=self.jitter)[1]

        self.sweep(data, read, again=False)
        self.ranks = ranks_by_energy(spectra, self.layers, keep)

    def sweep(
        self,
        data: "CalibrationData",
        do: "Callable[[str, nn.Linear, Tensor | None], None]",
        *,
        again: bool,
    ) -> None:
        """Go through the blocks, and `do` something to each layer, given the second moments (I, I)
        of what flows into it.
        """
        from methods.compression.calibration import InputStatistics, VisitOptions, visit_blocks
        from methods.compression.layers import layers_below

        def visit(block: str, flow: InputStatistics) -> None:
            for name, layer in layers_below(self.layers, block):
                do(name, layer, flow.sums[name])

        making = self.making
        options = VisitOptions(again=again, progress=making.job.progress, method=making.method)
        visit_blocks(making.opened, data, self.layers, kind="gram", visit=visit, options=options)

    def saved(self, told: dict[str, Any], *, flops: float) -> Checkpoint:
        """Save the factors in place of the matrices."""
        from harness.models.packed import save_packed

        making = self.making
        specs: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for name, (up, down) in self.factors.items():
            layer = making.model.get_submodule(name)
            layer.weight.data = layer.weight.data.new_empty(0)  # stands in the file as its factors
            bias = layer.bias
            specs[name] = {"kind": "float", "shape": list(down.shape), "factors": True}
            specs[f"{name}.up"] = {
                "kind": "float",
                "shape": list(up.shape),
                **({"bias": True} if bias is not None else {}),
            }
            tensors |= {f"{name}.weight": down, f"{name}.up.weight": up}
            if bias is not None:
                tensors[f"{name}.up.bias"] = bias.to(self.dtype)

        def write(fresh: Any) -> None:
            save_packed(
                making.opened,
                fresh,
                specs=specs,
                tensors=tensors,
                dtype=self.dtype,
                method=making.method,
            )

        return making.save_as(
            write, notes={**self._counts(), **told, **self.left_alone}, flops=flops
        )

    def _counts(self) -> dict[str, Any]:
        """Return how many matrices became factors, their smallest and largest rank, and the share
        of their weights that is left.
        """
        pairs = self.factors.values()
        before = sum(up.shape[0] * down.shape[1] for up, down in pairs)
        after = sum(up.numel() + down.numel() for up, down in pairs)
        ranks = [down.shape[0] for _, down in pairs]
        return {
            "matrices": len(pairs),
            "ranks": [min(ranks), max(ranks)],
            "kept_of_them": round(after / before, 4),
        }


@settings
class PlainLowRank(LowRank):
    """The same ranks by the SVD of the weights alone (control)."""

    controls: ClassVar[tuple[str, ...]] = ()
    is_control: ClassVar[bool] = True
    _whitened: ClassVar[bool] = False


def break_even_rank(layer: "nn.Linear") -> int:
    """Return the smallest rank that saves nothing: O I / (O + I), rounded up."""
    return int(
        -(-layer.out_features * layer.in_features // (layer.out_features + layer.in_features))
    )


def rank_for_share(layer: "nn.Linear", keep: float) -> int:
    """Return the rank that keeps a share of a matrix's parameters; at least 1."""
    return max(
        1,
        int(
            keep * layer.out_features * layer.in_features / (layer.out_features + layer.in_features)
        ),
    )


def ranks_by_energy(
    spectra: "dict[str, Tensor]", layers: "dict[str, nn.Linear]", keep: float
) -> dict[str, int]:
    """Return ranks by one threshold on the share of energy a component carries in its matrix, per
    parameter that it costs.
    """
    import torch

    worth, cost, owner = [], [], []
    for at, (name, values) in enumerate(spectra.items()):
        layer, values = layers[name], values.cpu()
        most = break_even_rank(layer) - 1
        each = layer.out_features + layer.in_features
        worth.append((values.square() / values.square().sum())[:most] / each)
        cost.append(torch.full((most,), each))
        owner.append(torch.full((most,), at))
    worths, costs, owners = torch.cat(worth), torch.cat(cost), torch.cat(owner)
    order = worths.argsort(descending=True)
    total = keep * sum(layer.weight.numel() for layer in layers.values())
    chosen = order[costs[order].cumsum(0) <= total]
    counts = torch.bincount(owners[chosen], minlength=len(spectra))
    return {name: max(1, int(count)) for name, count in zip(spectra, counts, strict=True)}


def decompose(
    w: "Tensor", gram: "Tensor | None", *, jitter: float
) -> "tuple[Tensor, Tensor, Tensor, Tensor | None]":
    """Return (U, singular values, V^T, S) of W, or of W S where X^T X = S S^T, in fp64."""
    import torch

    if gram is None:
        return *torch.linalg.svd(w.double(), full_matrices=False), None
    h = gram.double()
    mean = h.diagonal().mean().clamp(min=1e-30)
    share = 0.0
    for _ in range(12):
        lower, problem = torch.linalg.cholesky_ex(
            h + share * mean * torch.eye(len(h), dtype=h.dtype, device=h.device)
        )
        if int(problem) == 0 and float(lower.diagonal().min()) > 1e-6 * float(mean.sqrt()):
            return *torch.linalg.svd(w.double() @ lower, full_matrices=False), lower
        share = max(jitter * 0.01, share * 10)
    raise CellFailed(
        "what flows into a layer has no second moments that can be factorised (is a number in it "
        "not finite?)"
    )


def factorize(
    w: "Tensor", rank: int, gram: "Tensor | None" = None, *, jitter: float = 1e-4
) -> "tuple[Tensor, Tensor]":
    """Return (up (O, r), down (r, I)) with W ~ up @ down: the best of its rank, for inputs with
    second moments `gram` where given.
    """
    import torch

    u, values, vt, lower = decompose(w, gram, jitter=jitter)
    root = values[:rank].sqrt()
    down = root[:, None] * vt[:rank]
    if lower is not None:
        down = torch.linalg.solve_triangular(lower.T, down.T, upper=True).T
    up = u[:, :rank] * root
    # Of equal norms component by component: the product is the same, and one learning rate fits
    # both factors in a later training.
    balance = (down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-12)
    return (up * balance).to(w.dtype), (down / balance[:, None]).to(w.dtype)
