"""Low rank: the matrices of the blocks become products of two thinner ones each, by singular values.

Whitened (the default; Wang et al., 2025, SVD-LLM): X^T X = S S^T over calibration text, `svd(W S) = U Sig V^T`, and W' = [U_r sqrt(Sig_r)]
[sqrt(Sig_r) V_r^T S^-1]: what is lost on that text is exactly the sum of the squares of the dropped singular values, and plain SVD never
loses less. `lowrank-plain` is that control: the same ranks by the SVD of W alone.

`keep` is the share of a matrix's parameters that stays: r = floor(keep * O * I / (O + I)). `allocation=energy` gives all matrices one
threshold of dropped energy instead, at the same total. Keys' and values' projections stay whole under grouped queries: they are small.
The student opens after `import methods.packed`. Cost: one pass of second moments and one SVD a layer. Useful to 20 or 30 % removed.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Family, Job
from methods.base import Patterns, changed, settings
from methods.compression.base import Making
from methods.compression.calibrated import Calibrated, calibration_flops

if TYPE_CHECKING:
    from torch import Tensor, nn

GROUPED = ("k_proj", "v_proj")  # small under grouped queries: they stay whole


@settings
class LowRank(Calibrated):
    """Replace every matrix by two thinner factors, by the singular values of what it does to real inputs."""

    family: ClassVar[Family] = "low-rank"
    controls: ClassVar[tuple[str, ...]] = ("lowrank-plain",)
    _whitened: ClassVar[bool] = True

    keep: Annotated[float, Field(gt=0, lt=1)] = 0.8  # of a matrix's parameters
    rank: Annotated[int, Field(ge=0)] = 0  # the same rank for every matrix, in place of `keep`
    allocation: Literal["uniform", "energy"] = "uniform"
    jitter: Annotated[float, Field(gt=0, le=1)] = 1e-4  # of the mean second moment, added where the factorisation needs it
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
        return ranks | (changed(self, *text) if self.allocation == "energy" else {})

    def compress(self, job: Job) -> Checkpoint:
        """Factorise block by block; every block sees the factors before it."""
        from harness.errors import CellFailed
        from harness.models.language_model import stored_dtype
        from methods.compression.calibration import Flow, sweep
        from methods.compression.layers import layers_of, within

        name = "lowrank" if self._whitened else "lowrank-plain"
        making = Making(job, name)
        found = layers_of(making.model, skip=self.ignore, method=name)
        every = found.linear
        config = making.model.config.get_text_config()
        heads = int(getattr(config, "num_attention_heads", None) or 0)
        grouped = int(getattr(config, "num_key_value_heads", None) or heads) < heads
        layers = {one: layer for one, layer in every.items() if not (grouped and one.rpartition(".")[2] in GROUPED)}
        if not layers:
            raise CellFailed(f"{name}: no matrix is left to factorise (keys' and values' projections stay whole under grouped queries)")
        for one, layer in layers.items():
            if self.rank >= saves_below(layer):
                raise CellFailed(
                    f"{name}: rank {self.rank} saves nothing in {one} ({layer.out_features} x {layer.in_features}); "
                    f"give at most {saves_below(layer) - 1}"
                )
        spectra: dict[str, Tensor] = {}
        factors: dict[str, tuple[Tensor, Tensor]] = {}

        ranks = {one: self.rank or rank_of(layer, self.keep) for one, layer in layers.items()}
        by_threshold = self.allocation == "energy" and not self.rank

        def read(one: str, layer: "nn.Linear", gram: "Tensor | None") -> None:
            spectra[one] = decomposed(layer.weight, gram, jitter=self.jitter)[1]

        dtype = stored_dtype(making.base)

        def cut(one: str, layer: "nn.Linear", gram: "Tensor | None") -> None:
            up, down = factorised(layer.weight, ranks[one], gram, jitter=self.jitter)
            factors[one] = (up.to(dtype), down.to(dtype))  # as they will be saved: half the memory, and what later blocks will see
            layer.weight.copy_(factors[one][0].to(layer.weight.dtype) @ factors[one][1].to(layer.weight.dtype))

        if not self._whitened and not by_threshold:  # the weights alone: no text is read
            for one, layer in layers.items():
                cut(one, layer, None)
            return self._saved(job, making, factors, found.told, flops=0.0)
        data = self.calibrate(job, making.opened)

        def swept(do: "Callable[[str, nn.Linear, Tensor | None], None]", *, again: bool) -> None:
            def visit(block: str, flow: Flow) -> None:
                for one, layer in within(layers, block):
                    do(one, layer, flow.sums[one])

            sweep(making.opened, data, layers, kind="gram", visit=visit, progress=job.progress, again=again, method=name)

        if by_threshold:
            swept(read, again=False)
            ranks = by_energy(spectra, layers, self.keep)  # the control's too: it has the same ranks
        if self._whitened:
            swept(cut, again=True)
        else:
            for one, layer in layers.items():
                cut(one, layer, None)
        flops = calibration_flops(making, data, (1 if by_threshold else 0) + (2 if self._whitened else 0))
        return self._saved(job, making, factors, {"calibration": dict(data.told), **found.told}, flops=flops)

    def _saved(
        self, job: Job, making: Making, factors: "dict[str, tuple[Tensor, Tensor]]", told: dict[str, Any], *, flops: float
    ) -> Checkpoint:
        from harness.models.language_model import stored_dtype
        from harness.models.packed import save_packed

        dtype = stored_dtype(making.base)
        specs: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        before = after = 0
        for name, (up, down) in factors.items():
            layer = making.model.get_submodule(name)
            layer.weight.data = layer.weight.data.new_empty(0)  # stands in the file as its factors
            bias = layer.bias
            specs[name] = {"kind": "float", "shape": list(down.shape), "factors": True}
            specs[f"{name}.up"] = {"kind": "float", "shape": list(up.shape), **({"bias": True} if bias is not None else {})}
            tensors |= {f"{name}.weight": down, f"{name}.up.weight": up}
            if bias is not None:
                tensors[f"{name}.up.bias"] = bias.to(dtype)
            before, after = before + up.shape[0] * down.shape[1], after + up.numel() + down.numel()
        ranks = [down.shape[0] for _, down in factors.values()]
        notes = {"matrices": len(factors), "ranks": [min(ranks), max(ranks)], "kept_of_them": round(after / before, 4), **told}

        def write(fresh: Any) -> None:
            save_packed(making.model, making.opened.tokenizer, fresh, specs=specs, tensors=tensors, dtype=dtype, method=making.method)

        return making.save_as(write, notes=notes, flops=flops)


@settings
class PlainLowRank(LowRank):
    """The same ranks by the SVD of the weights alone (control)."""

    controls: ClassVar[tuple[str, ...]] = ()
    is_control: ClassVar[bool] = True
    _whitened: ClassVar[bool] = False


def saves_below(layer: "nn.Linear") -> int:
    """Return the smallest rank that saves nothing: O I / (O + I), rounded up."""
    return -(-layer.out_features * layer.in_features // (layer.out_features + layer.in_features))


def rank_of(layer: "nn.Linear", keep: float) -> int:
    """Return the rank that keeps a share of a matrix's parameters; at least 1."""
    return max(1, int(keep * layer.out_features * layer.in_features / (layer.out_features + layer.in_features)))


def by_energy(spectra: "dict[str, Tensor]", layers: "dict[str, nn.Linear]", keep: float) -> dict[str, int]:
    """Return ranks by one threshold on the share of energy a component carries in its matrix, per parameter that it costs."""
    import torch

    worth, cost, owner = [], [], []
    for at, (name, values) in enumerate(spectra.items()):
        layer, values = layers[name], values.cpu()
        most = saves_below(layer) - 1
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


def decomposed(w: "Tensor", gram: "Tensor | None", *, jitter: float) -> "tuple[Tensor, Tensor, Tensor, Tensor | None]":
    """Return (U, singular values, V^T, S) of W, or of W S where X^T X = S S^T, in fp64."""
    import torch

    from harness.errors import CellFailed

    if gram is None:
        return *torch.linalg.svd(w.double(), full_matrices=False), None
    h = gram.double()
    mean = h.diagonal().mean().clamp(min=1e-30)
    share = 0.0
    for _ in range(12):
        lower, problem = torch.linalg.cholesky_ex(h + share * mean * torch.eye(len(h), dtype=h.dtype, device=h.device))
        if int(problem) == 0 and float(lower.diagonal().min()) > 1e-6 * float(mean.sqrt()):
            return *torch.linalg.svd(w.double() @ lower, full_matrices=False), lower
        share = max(jitter * 0.01, share * 10)
    raise CellFailed("what flows into a layer has no second moments that can be factorised (is a number in it not finite?)")


def factorised(w: "Tensor", rank: int, gram: "Tensor | None" = None, *, jitter: float = 1e-4) -> "tuple[Tensor, Tensor]":
    """Return (up (O, r), down (r, I)) with W ~ up @ down: the best of its rank, for inputs with second moments `gram` where given."""
    import torch

    u, values, vt, lower = decomposed(w, gram, jitter=jitter)
    root = values[:rank].sqrt()
    down = root[:, None] * vt[:rank]
    if lower is not None:
        down = torch.linalg.solve_triangular(lower.T, down.T, upper=True).T
    up = u[:, :rank] * root
    # Of equal norms component by component: the product is the same, and one learning rate fits both factors in a later training.
    balance = (down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-12)
    return (up * balance).to(w.dtype), (down / balance[:, None]).to(w.dtype)
