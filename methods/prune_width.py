"""Width pruning: feed-forward channels and whole groups of heads go, by what flows through them on calibration text.

A channel's score is `mean |act(gate) * up| * ||down column||`; a KV group's (its query heads, key head and value head together, so that
the ratio of heads and the head size stay) is the same of its part of the output projection's input. By default every block loses as
much, and the student opens with plain transformers; `allocation=global` compares channels over all blocks, so that widths differ: such
a student opens after `import methods.packed`. Control: random channels and groups.

Parameters of a gated block afterwards: 3 H F + 2 H A d + 2 H K d and norms, asserted. Cost: one pass over the calibration text.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.base import Compressed, Making
from methods.compression.calibrated import Calibrated, calibration_flops

if TYPE_CHECKING:
    from torch import Tensor

    from harness.models.shape import Shape

Allocation = Literal["uniform", "global"]


@settings
class Narrowing(Compressed):
    """Settings of both rows: what is dropped, and how much of it."""

    needs_plain: ClassVar[bool] = True
    drops_inputs: ClassVar[bool] = True

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2  # of the feed-forward channels that go
    groups: Annotated[int, Field(ge=0)] = 0  # KV groups that go from every block
    multiple: Annotated[int, Field(ge=1)] = 16  # channels that stay, rounded to the nearest of it: what kernels take without filling up

    def resulting_shape(self, before: "Shape") -> "Shape":
        """Return the shape of what is left of a model; at least one channel and one group stays."""
        from dataclasses import replace

        kept = max(1, before.kv_heads - self.groups)
        channels = max(1, kept_channels(before.intermediate, self.ratio, self.multiple))
        return replace(before, intermediate=channels, kv_heads=kept, heads=before.heads // before.kv_heads * kept)


@settings
class WidthPruning(Narrowing, Calibrated):
    """Drop the feed-forward channels (and head groups) through which least flows."""

    controls: ClassVar[tuple[str, ...]] = ("prune-width-random",)

    allocation: Allocation = "uniform"  # global: channels of all blocks are compared; widths differ

    @property
    def keeps_architecture(self) -> bool:
        """Tell whether all blocks are of one width."""
        return self.allocation == "uniform"

    def control_settings(self) -> dict[str, object]:
        """Its control drops as many."""
        return {"ratio": self.ratio, "groups": self.groups, "multiple": self.multiple}

    def compress(self, job: Job) -> Checkpoint:
        """Sum what flows into every down and output projection, keep the largest."""
        import torch

        from methods.compression.calibration import Flow, watched

        making = Making(job, "prune-width", plain=True)
        cut = _Cut(making, self)
        data = self.calibrate(job, making.opened)
        flow = Flow("magnitude")
        with torch.no_grad(), watched(flow, cut.readers()):
            for batch in data.batches():
                making.model(input_ids=batch, use_cache=False, logits_to_keep=1)
        tokens = int(data.ids.numel())
        channels = {part.name: flow.sums[part.reader] / tokens * cut.reads(part.reader).float().norm(dim=0) for part in cut.parts}
        heads = {name: flow.sums[f"{name}.o_proj"] / tokens * cut.reads(f"{name}.o_proj").float().norm(dim=0) for name in cut.attentions}
        told = {"calibration": dict(data.told), "allocation": self.allocation}
        return cut.saved(channels, heads, self.allocation, told, flops=calibration_flops(making, data, 1))


@settings
class RandomWidthPruning(Narrowing):
    """Drop as many random channels and head groups (control)."""

    is_control: ClassVar[bool] = True
    draws_random_numbers: ClassVar[bool] = True

    def compress(self, job: Job) -> Checkpoint:
        """Draw a score for every channel and group."""
        import torch

        making = Making(job, "prune-width-random", plain=True)
        cut = _Cut(making, self)
        draw = torch.Generator().manual_seed(job.seed)
        channels = {part.name: torch.rand(part.width, generator=draw) for part in cut.parts}
        heads = {name: torch.rand(cut.reads(f"{name}.o_proj").shape[1], generator=draw) for name in cut.attentions}
        return cut.saved(channels, heads, "uniform", {})


def kept_channels(width: int, ratio: float, multiple: int) -> int:
    """Return how many of so many channels stay: the share, rounded to the nearest multiple; all of them for a ratio of 0."""
    return min(width, int((1 - ratio) * width / multiple + 0.5) * multiple) if ratio else width


class _Cut:
    """Cuts the same parts out of every matrix that they run through."""

    def __init__(self, making: Making, asked: Narrowing) -> None:
        from harness.models.width import feed_forwards, narrower_config

        self.making, self.model, self.asked = making, making.model, asked
        self.groups = asked.groups
        text = self.model.config.get_text_config()
        heads = int(getattr(text, "num_attention_heads", 0) or 0)
        self.kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        self.head = int(getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
        widths: list[int] = []

        def keep(width: int) -> int:
            widths.append(width)
            return max(1, kept_channels(width, asked.ratio, asked.multiple))

        self.config = narrower_config(self.model, keep, cut=making.method)
        self.width = widths[-1]
        self.keep = kept_channels(self.width, asked.ratio, asked.multiple)
        self._refuse_sizes()
        cuts = self.keep < self.width
        self.parts = feed_forwards(self.model, self.config, cut=making.method) if cuts else []
        self.attentions = self._attentions() if self.groups else []

    def _refuse_sizes(self) -> None:
        from harness.errors import CellFailed

        ratio, multiple = self.asked.ratio, self.asked.multiple
        if self.keep == self.width and self.groups == 0:
            raise CellFailed(
                f"{self.making.method}: ratio={ratio:g} of {self.width} channels (in multiples of {multiple}) and groups=0 cut nothing; "
                "give one of them, or a smaller multiple"
            )
        if self.keep < 1 or (self.groups and self.groups >= self.kv_heads):
            raise CellFailed(
                f"{self.making.method}: ratio={ratio} leaves {self.keep} of {self.width} channels and groups={self.groups} leaves "
                f"{self.kv_heads - self.groups} of {self.kv_heads} head groups; at least one of each must stay"
            )

    def _attentions(self) -> list[str]:
        """Return the attentions by name; refuses those whose heads do not run through four projections of the known names alone."""
        from harness.errors import CellFailed
        from harness.models.blocks import blocks_of

        prefix, blocks = blocks_of(self.model)
        named = dict(self.model.named_modules())
        found = [name.removesuffix(".o_proj") for name in named if name.startswith(f"{prefix}.") and name.endswith(".o_proj")]
        sizes = {name: [self._outputs(named.get(f"{name}.{part}_proj")) for part in "qkv"] for name in found}
        fit = [
            size[0] == self.reads(f"{name}.o_proj").shape[1] and size[1:] == [self.kv_heads * self.head] * 2 for name, size in sizes.items()
        ]
        if len(found) != len(blocks) or not all(fit):
            raise CellFailed(
                f"{self.making.method}: groups={self.groups} knows attentions of q_proj, k_proj, v_proj and o_proj, and "
                f"{type(self.model).__name__} has others; give groups=0"
            )
        return found

    @staticmethod
    def _outputs(layer: Any) -> int:
        return 0 if layer is None else int(layer.weight.shape[0])

    def reads(self, name: str) -> "Tensor":
        """Return a layer's matrix, (O, I)."""
        from harness.models.width import outputs_axis

        layer = self.model.get_submodule(name)
        weight: Tensor = layer.weight if outputs_axis(layer) == 0 else layer.weight.T
        return weight

    def readers(self) -> dict[str, Any]:
        """Return the layers whose inputs are the channels and the heads."""
        names = [*(part.reader for part in self.parts), *(f"{name}.o_proj" for name in self.attentions)]
        return {name: self.model.get_submodule(name) for name in names}

    def saved(
        self, channels: "dict[str, Tensor]", heads: "dict[str, Tensor]", allocation: str, told: dict[str, Any], *, flops: float = 0.0
    ) -> Checkpoint:
        """Keep the highest scores, compare with the model whose other channels are masked, and save."""
        from harness.models.width import keep_channels, mask_of, masked_steps

        state = dict(self.model.state_dict())
        before = sum(parameter.numel() for parameter in self.model.parameters())
        kept = self._kept(channels, allocation)
        masks = {part.reader: mask_of(part.width, kept[part.name]) for part in self.parts}
        gone = sum(keep_channels(self.model, state, part, kept[part.name]) for part in self.parts)
        for name, score in heads.items():
            queries, keys = self._heads(score)
            masks[f"{name}.o_proj"] = mask_of(len(score), queries)
            gone += self._take_heads(state, name, queries, keys)
        self._refuse_strangers(state)
        base = masked_steps(self.model, masks)
        widths = [len(chosen) for chosen in kept.values()] or [self.width]
        notes = {
            "channels": [self.width, [min(widths), max(widths)]], "head_groups": [self.kv_heads, self.kv_heads - self.groups],
            "parameters": [before, before - gone], **told,
        }  # fmt: skip
        if allocation == "uniform" or len(set(widths)) == 1:
            return self._even(state, before - gone, base, notes, flops)
        return self._uneven(state, base, notes, flops)

    def _refuse_strangers(self, state: "dict[str, Tensor]") -> None:
        """Refuse weights that run along the heads and are none of the matrices that are cut (a norm over all heads' queries)."""
        from harness.errors import CellFailed
        from harness.models.width import empty_model

        own = {layer for part in self.parts for layer in (*part.writers, part.reader)}
        shapes = {name: one.shape for name, one in empty_model(self.model, self._configured(), self.making.method).named_parameters()}
        odd = [name for name, shape in shapes.items() if name.rpartition(".")[0] not in own and state[name].shape != shape]
        if odd:
            raise CellFailed(
                f"{self.making.method}: groups={self.groups} does not know {odd[0]}, which runs along the heads too; give groups=0 or use "
                "prune-depth"
            )

    def _kept(self, channels: "dict[str, Tensor]", allocation: str) -> "dict[str, Tensor]":
        import torch

        if allocation == "uniform" or not channels:
            return {part.name: channels[part.name].topk(part.kept).indices.sort().values for part in self.parts}
        # Scores of a block are divided by their mean first: blocks differ in scale, not in how much they matter.
        alike = {name: score / score.mean() for name, score in channels.items()}
        lowest = torch.cat(list(alike.values())).sort(descending=True).values[self.keep * len(alike) - 1]
        kept = {name: (score >= lowest).nonzero().flatten() for name, score in alike.items()}
        return {name: chosen if len(chosen) else alike[name].argmax().view(1) for name, chosen in kept.items()}

    def _heads(self, score: "Tensor") -> "tuple[Tensor, Tensor]":
        """Return which outputs of the queries and of the keys stay: whole groups, those with the largest sums."""
        import torch

        each = len(score) // self.kv_heads  # outputs of a group's query heads, side by side
        best = score.view(self.kv_heads, each).sum(1).topk(self.kv_heads - self.groups).indices.sort().values
        queries = torch.cat([torch.arange(int(at) * each, int(at + 1) * each) for at in best])
        keys = torch.cat([torch.arange(int(at) * self.head, int(at + 1) * self.head) for at in best])
        return queries, keys

    def _take_heads(self, state: "dict[str, Tensor]", name: str, queries: "Tensor", keys: "Tensor") -> int:
        """Cut an attention's projections down to these outputs; return how many weights went."""
        before = after = 0
        for layer, axis, index in (("q_proj", 0, queries), ("k_proj", 0, keys), ("v_proj", 0, keys), ("o_proj", 1, queries)):
            for leaf in ("weight", "bias"):
                full = f"{name}.{layer}.{leaf}"
                if full in state and not (axis and leaf == "bias"):
                    before += state[full].numel()
                    state[full] = state[full].index_select(axis, index.to(state[full].device))
                    after += state[full].numel()
        return before - after

    def _configured(self, *, narrow: bool = True) -> Any:
        """Return the configuration of what is left; without `narrow` of the heads alone (widths that differ stand beside it)."""
        from harness.models.blocks import edited, is_tied

        config = self.config if narrow else self.model.config
        text = config.get_text_config()
        if not self.groups:
            return config
        left = self.kv_heads - self.groups
        changes = {
            "head_dim": self.head,
            "num_attention_heads": text.num_attention_heads * left // self.kv_heads,
            "num_key_value_heads": left,
        }
        return edited(config, changes, tied=is_tied(self.model))

    def _across(self, layer: str, weight: "Tensor") -> "Tensor":
        """Return a cut matrix as (O, I): the form of the file's own layers."""
        from harness.models.width import outputs_axis

        return weight if outputs_axis(self.model.get_submodule(layer)) == 0 else weight.T.contiguous()

    def _even(self, state: dict[str, Any], parameters: int, base: Any, notes: dict[str, Any], flops: float) -> Checkpoint:
        from dataclasses import replace

        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        from harness.errors import CellFailed
        from harness.models.width import refuse_unlike

        config = self._configured()
        dtype, generation = next(self.model.parameters()).dtype, self.model.generation_config
        del self.model
        self.making.opened = replace(self.making.opened, model=None)  # two whole models are not held at once
        with init_empty_weights(include_buffers=False):
            small = AutoModelForCausalLM.from_config(config, dtype=dtype)
        small.load_state_dict(state, assign=True)
        small.tie_weights()
        state.clear()
        small = small.to(self.making.job.device).eval()
        small.generation_config = generation
        left = sum(parameter.numel() for parameter in small.parameters())
        if left != parameters:
            raise CellFailed(f"{self.making.method}: {left:,} weights are left and {parameters:,} should be; use prune-depth")
        refuse_unlike(small, base, cut=self.making.method)
        self.making.opened = replace(self.making.opened, model=small)
        return self.making.save(notes=notes, flops=flops)

    def _uneven(self, state: dict[str, Any], base: Any, notes: dict[str, Any], flops: float) -> Checkpoint:
        from transformers import AutoModelForCausalLM

        from harness.models.language_model import stored_dtype
        from harness.models.packed import save_packed
        from harness.models.width import refuse_unlike

        specs: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        dtype = stored_dtype(self.making.base)
        for layer in (layer for part in self.parts for layer in (*part.writers, part.reader)):
            weight, bias = state[f"{layer}.weight"], state.get(f"{layer}.bias")
            specs[layer] = {
                "kind": "float",
                "shape": list(self._across(layer, weight).shape),
                **({"bias": True} if bias is not None else {}),
            }
            tensors[f"{layer}.weight"] = self._across(layer, weight).to(dtype)
            if bias is not None:
                tensors[f"{layer}.bias"] = bias.to(dtype)
        changed = {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] not in specs}

        def write(fresh: Any) -> None:
            save_packed(
                self.model, self.making.opened.tokenizer, fresh, specs=specs, tensors=tensors, dtype=dtype, state=changed,
                config=self._configured(narrow=False), method=self.making.method,
            )  # fmt: skip
            again = AutoModelForCausalLM.from_pretrained(fresh, dtype=next(self.model.parameters()).dtype)
            refuse_unlike(again.to(self.making.job.device).eval(), base, cut=self.making.method)

        return self.making.save_as(write, notes=notes, flops=flops)
