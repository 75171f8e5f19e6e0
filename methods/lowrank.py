"""Low rank: replaces each matrix of the blocks by a product of two thinner ones, by an SVD.

`lowrank` whitens first (Wang et al., 2025, SVD-LLM): with X^T X = S S^T over calibration text and
`svd(W S) = U Sig V^T`, W' = [U_r sqrt(Sig_r)] [sqrt(Sig_r) V_r^T S^-1]. The error on that text is
exactly the sum of the squares of the dropped singular values, and never above that of a plain SVD.
`lowrank-plain` is that control: the same ranks by the SVD of W alone.

`keep` is the share of a matrix's parameters that is kept: r = floor(keep * O * I / (O + I)).
`allocation=energy` gives all matrices one threshold of dropped energy instead, at the same total.
Under grouped queries the projections of keys and values are small and stay whole. The student opens
after `import methods.packed`. Cost: one pass of second moments and one SVD per layer. Useful up to
20 or 30 % removed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from harness.contract import Checkpoint, Family, Job
from harness.errors import CellFailed
from methods.base import Patterns, non_default_settings, settings
from methods.compression.base import StudentBuilder
from methods.compression.calibrated import Calibrated, calibration_flops

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from methods.compression.calibration import CalibrationData

KEY_VALUE_PROJECTIONS = ("k_proj", "v_proj")


class Factors(NamedTuple):
    """Two thin matrices whose product `up @ down` replaces a matrix: (O, r) and (r, I)."""

    up: "Tensor"
    down: "Tensor"


class Decomposition(NamedTuple):
    """The SVD of W, or of W S where X^T X = S S^T, in fp64."""

    u: "Tensor"
    singular_values: "Tensor"
    vt: "Tensor"
    whitening: "Tensor | None"  # S, lower triangular (I, I); None without whitening


@settings
class LowRank(Calibrated):
    """Replace each matrix by two thinner factors that keep its output on real inputs."""

    works_by_block: ClassVar[bool] = True
    family: ClassVar[Family] = "low-rank"
    controls: ClassVar[tuple[str, ...]] = ("lowrank-plain",)
    _whitened: ClassVar[bool] = True

    keep: Annotated[float, Field(gt=0, lt=1)] = 0.8  # share of a matrix's parameters
    rank: Annotated[int, Field(ge=0)] = 0  # the same rank for every matrix, in place of `keep`
    allocation: Literal["uniform", "energy"] = "uniform"
    # share of the mean second moment, added where the factorisation needs it
    jitter: Annotated[float, Field(gt=0, le=1)] = 1e-4
    ignore: Patterns = ()  # layers to leave as they are, with all below them

    @property
    def _shares_one_threshold(self) -> bool:
        """Tell whether ranks follow from one threshold of energy over all matrices."""
        return self.allocation == "energy" and not self.rank

    @property
    def calibrates(self) -> bool:
        """Tell whether text is read: to whiten, or for one threshold over all matrices."""
        return self._whitened or self._shares_one_threshold

    @property
    def keeps_architecture(self) -> bool:
        """Return False: factors replace matrices."""
        return False

    def control_settings(self) -> dict[str, object]:
        """Return what the control takes over: it has the same ranks."""
        ranks = {name: getattr(self, name) for name in ("keep", "rank", "allocation", "ignore")}
        if self.allocation != "energy":
            return ranks
        text = ("calibration", "num_calibration_samples", "max_seq_length", "jitter")
        return ranks | non_default_settings(self, *text)

    def compress(self, job: Job) -> Checkpoint:
        """Factorise block by block; later blocks get the inputs that the factors give."""
        name = "lowrank" if self._whitened else "lowrank-plain"
        factorizer = _Factorizer(StudentBuilder(job, name, blockwise=True), self)
        if not self.calibrates:
            factorizer.factorize_all()
            return factorizer.save({}, flops=0.0)
        data = self.calibrate(job, factorizer.builder.opened)
        if self._shares_one_threshold:  # the control too, so that it has the same ranks
            factorizer.choose_ranks_by_energy(data, self.keep)
        if self._whitened:
            factorizer.visit_layers(data, factorizer.factorize_layer, changes=True)
        else:
            factorizer.factorize_all()
        passes = (1 if self._shares_one_threshold else 0) + (2 if self._whitened else 0)
        flops = calibration_flops(factorizer.builder, data, passes)
        return factorizer.save({"calibration": dict(data.description)}, flops=flops)

    def factorised_layers(
        self, builder: StudentBuilder, linear: "dict[str, nn.Linear]"
    ) -> "dict[str, nn.Linear]":
        """Return the layers of the blocks that become factors.

        Raises `CellFailed` where there is none, or where the rank saves nothing in one of them.
        """
        config = builder.model.config.get_text_config()
        heads = int(getattr(config, "num_attention_heads", None) or 0)
        grouped = int(getattr(config, "num_key_value_heads", None) or heads) < heads
        layers = {
            name: layer
            for name, layer in linear.items()
            if not (grouped and name.rpartition(".")[2] in KEY_VALUE_PROJECTIONS)
        }
        if not layers:
            raise CellFailed(
                f"{builder.method}: no matrix is left to factorise; the projections of keys and "
                "values stay whole under grouped queries"
            )
        for name, layer in layers.items():
            if self.rank >= break_even_rank(layer):
                raise CellFailed(
                    f"{builder.method}: rank {self.rank} saves nothing in {name} "
                    f"({layer.out_features} x {layer.in_features}); give at most "
                    f"{break_even_rank(layer) - 1}"
                )
        return layers


class _Factorizer:
    """Replaces the matrices of a model by factors, and saves it."""

    def __init__(self, builder: StudentBuilder, method: LowRank) -> None:
        from methods.compression.layers import layers_of

        self.builder, self.jitter = builder, method.jitter
        decoder_layers = layers_of(builder.model, ignore=method.ignore, method=builder.method)
        self.layer_notes = decoder_layers.notes
        self.layers: dict[str, nn.Linear] = method.factorised_layers(builder, decoder_layers.linear)
        self.ranks = {
            name: method.rank or rank_for_share(layer, method.keep)
            for name, layer in self.layers.items()
        }
        self.specs: dict[str, Any] = {}  # entries of `config.json`
        self.shapes: dict[str, tuple[int, int, int]] = {}  # (O, r, I) by the layer's name

    def factorize_layer(self, name: str, layer: "nn.Linear", gram: "Tensor | None") -> None:
        """Factorise a layer, and write the product of its factors into it.

        The factors are in the type that they are saved in: that is half the memory, and later
        blocks get the inputs that the saved student will give.
        """
        writer, bias = self.builder.writer, layer.bias
        up, down = factorize(layer.weight, self.ranks[name], gram, jitter=self.jitter)
        up, down = up.to(writer.dtype), down.to(writer.dtype)
        layer.weight.copy_(up.to(layer.weight.dtype) @ down.to(layer.weight.dtype))
        bias_entry = {"bias": True} if bias is not None else {}
        bias_tensor = {f"{name}.up.bias": bias.to(writer.dtype)} if bias is not None else {}
        self.specs[name] = {"kind": "float", "shape": list(down.shape), "factors": True}
        self.specs[f"{name}.up"] = {"kind": "float", "shape": list(up.shape), **bias_entry}
        writer.add(name, {f"{name}.weight": down})
        writer.add(f"{name}.up", {f"{name}.up.weight": up, **bias_tensor})
        self.shapes[name] = (*up.shape, down.shape[1])

    def factorize_all(self) -> None:
        """Factorise every layer by its weights alone."""
        for name, layer in self.layers.items():
            with self.builder.writer.holding(name):
                self.factorize_layer(name, layer, None)

    def choose_ranks_by_energy(self, data: "CalibrationData", keep: float) -> None:
        """Choose the ranks by one threshold of energy, keeping a share of all parameters."""
        spectra: dict[str, Tensor] = {}

        def read_spectrum(name: str, layer: "nn.Linear", gram: "Tensor | None") -> None:
            spectra[name] = decompose(layer.weight, gram, jitter=self.jitter).singular_values

        self.visit_layers(data, read_spectrum, changes=False)
        self.ranks = ranks_by_energy(spectra, self.layers, keep)

    def visit_layers(
        self,
        data: "CalibrationData",
        visit_layer: "Callable[[str, nn.Linear, Tensor | None], None]",
        *,
        changes: bool,
    ) -> None:
        """Call `visit_layer(name, layer, gram)` block by block; `gram` is X^T X of its inputs.

        `changes`: it changes the layer, and later blocks get what the changed block returns.
        """
        from methods.compression.calibration import InputStatistics, VisitOptions, visit_blocks
        from methods.compression.layers import layers_below

        def visit(block: str, statistics: InputStatistics) -> None:
            for name, layer in layers_below(self.layers, block):
                visit_layer(name, layer, statistics.sums.pop(name))

        builder = self.builder
        options = VisitOptions(
            rerun=changes,
            progress=builder.job.progress,
            method=builder.method,
            changing=builder.writer.changing if changes else builder.writer.holding,
        )
        visit_blocks(builder.opened, data, self.layers, kind="gram", visit=visit, options=options)

    def save(self, notes: dict[str, Any], *, flops: float) -> Checkpoint:
        """Save the model with the factors in place of the matrices."""
        builder = self.builder

        def write(folder: Path) -> None:
            builder.writer.save_packed(folder, self.specs, method=builder.method)

        all_notes = {**self._counts(), **notes, **self.layer_notes}
        return builder.save_as(write, notes=all_notes, flops=flops)

    def _counts(self) -> dict[str, Any]:
        """Return the number of factorised matrices, their ranks, and the share of weights kept."""
        shapes = self.shapes.values()
        before = sum(outputs * inputs for outputs, _, inputs in shapes)
        after = sum(rank * (outputs + inputs) for outputs, rank, inputs in shapes)
        ranks = [rank for _, rank, _ in shapes]
        return {
            "matrices": len(shapes),
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
    cost = layer.out_features + layer.in_features  # parameters of one component
    return max(1, int(keep * layer.out_features * layer.in_features / cost))


def ranks_by_energy(
    spectra: "dict[str, Tensor]", layers: "dict[str, nn.Linear]", keep: float
) -> dict[str, int]:
    """Return the rank of each layer by one threshold over all, from their singular values.

    A component is worth its share of its matrix's energy per parameter that it costs. The most
    worthy components are kept until a share `keep` of all parameters is spent.
    """
    import torch

    values_per_cost, costs_of_layer, layer_numbers = [], [], []
    for number, (name, singular_values) in enumerate(spectra.items()):
        layer, values = layers[name], singular_values.cpu()
        count = break_even_rank(layer) - 1
        cost = layer.out_features + layer.in_features  # parameters of one component
        values_per_cost.append((values.square() / values.square().sum())[:count] / cost)
        costs_of_layer.append(torch.full((count,), cost))
        layer_numbers.append(torch.full((count,), number))
    worths, costs = torch.cat(values_per_cost), torch.cat(costs_of_layer)
    owners = torch.cat(layer_numbers)
    order = worths.argsort(descending=True)
    budget = keep * sum(layer.weight.numel() for layer in layers.values())
    kept_components = order[costs[order].cumsum(0) <= budget]
    counts = torch.bincount(owners[kept_components], minlength=len(spectra))
    return {name: max(1, int(count)) for name, count in zip(spectra, counts, strict=True)}


def decompose(w: "Tensor", gram: "Tensor | None", *, jitter: float) -> Decomposition:
    """Return the SVD of W (O, I), whitened by `gram` (X^T X, (I, I)) where it is given.

    The jitter on the diagonal grows until the factorisation exists. Raises `CellFailed` where it
    never does.
    """
    import torch

    if gram is None:
        return Decomposition(*_svd(w.double()), None)
    h = gram.double()
    mean = h.diagonal().mean().clamp(min=1e-30)
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    share = 0.0
    for _ in range(12):
        lower, failed = torch.linalg.cholesky_ex(h + share * mean * identity)
        if int(failed) == 0 and float(lower.diagonal().min()) > 1e-6 * float(mean.sqrt()):
            return Decomposition(*_svd(w.double() @ lower), lower)
        share = max(jitter * 0.01, share * 10)
    raise CellFailed(
        "the second moments of a layer's inputs cannot be factorised; look for inputs that are not "
        "finite"
    )


def _svd(matrix: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
    """Return the thin SVD of a matrix, computed in `svd_dtype` and given in fp64."""
    import torch

    u, values, vt = torch.linalg.svd(matrix.to(svd_dtype(matrix.device.type)), full_matrices=False)
    return u.double(), values.double(), vt.double()


def svd_dtype(device: str) -> "torch.dtype":
    """Return the type that an SVD is computed in: fp64, and fp32 on a GPU.

    Most GPUs have 1/64 of their speed in fp64. Single precision errs by about 1e-6 of the largest
    singular value, and factors are saved in 16 bits. SVD-LLM's own program takes an SVD in fp32
    behind a Cholesky factor in fp64 (https://github.com/AIoT-MLSys-Lab/SVD-LLM).
    """
    import torch

    return torch.float32 if device == "cuda" else torch.float64


def factorize(
    w: "Tensor", rank: int, gram: "Tensor | None" = None, *, jitter: float = 1e-4
) -> Factors:
    """Return the best factors of their rank, W ~ up @ down, in the type of W.

    Best for inputs with second moments `gram` (I, I), or for the weights themselves without it.
    """
    import torch

    u, values, vt, whitening = decompose(w, gram, jitter=jitter)
    root = values[:rank].sqrt()
    down = root[:, None] * vt[:rank]
    if whitening is not None:
        down = torch.linalg.solve_triangular(whitening.T, down.T, upper=True).T
    up = u[:, :rank] * root
    # Each component gets equal norms in both factors: the product is the same, and one learning
    # rate fits both in a later training.
    balance = (down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-12)
    return Factors((up * balance).to(w.dtype), (down / balance[:, None]).to(w.dtype))
