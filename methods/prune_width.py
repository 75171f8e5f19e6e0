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
from methods._base import settings
from methods._compress import Calibrated, Compressed, Making, calibration_flops

if TYPE_CHECKING:
    from torch import Tensor

    from harness.arithmetic import Shape

Allocation = Literal["uniform", "global"]


@settings
class Narrowing(Compressed):
    """Settings of both rows: what is dropped, and how much of it."""

    needs_plain: ClassVar[bool] = True
    drops_inputs: ClassVar[bool] = True

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2  # of the feed-forward channels that go
    groups: Annotated[int, Field(ge=0)] = 0  # KV groups that go from every block
    multiple: Annotated[int, Field(ge=1)] = 16  # channels that stay, rounded to the nearest of it: what kernels take without filling up

    def shaped(self, before: "Shape") -> "Shape":
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

    def hands_on(self) -> dict[str, object]:
        """Its control drops as many."""
        return {"ratio": self.ratio, "groups": self.groups, "multiple": self.multiple}

    def compress(self, job: Job) -> Checkpoint:
        """Sum what flows into every down and output projection, keep the largest."""
        import torch

        from methods._calibration import Flow, watched

        making = Making(job, "prune-width", plain=True)
        cut = _Cut(making, self)
        data = self.calibrate(job, making.opened)
        flow = Flow("magnitude")
        with torch.no_grad(), watched(flow, cut.readers()):
            for batch in data.batches():
                making.model(input_ids=batch, use_cache=False, logits_to_keep=1)
        tokens = int(data.ids.numel())
        channels = {name: flow.sums[f"{name}.down_proj"] / tokens * cut.down(name).float().norm(dim=0) for name in cut.feed_forwards}
        heads = {name: flow.sums[f"{name}.o_proj"] / tokens * cut.out(name).float().norm(dim=0) for name in cut.attentions}
        told = {"calibration": dict(data.told), "allocation": self.allocation}
        return cut.saved(channels, heads, self.allocation, told, flops=calibration_flops(making, data, 1))


@settings
class RandomWidthPruning(Narrowing):
    """Drop as many random channels and head groups (control)."""

    is_control: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    def compress(self, job: Job) -> Checkpoint:
        """Draw a score for every channel and group."""
        import torch

        making = Making(job, "prune-width-random", plain=True)
        cut = _Cut(making, self)
        draw = torch.Generator().manual_seed(job.seed)
        channels = {name: torch.rand(cut.down(name).shape[1], generator=draw) for name in cut.feed_forwards}
        heads = {name: torch.rand(cut.out(name).shape[1], generator=draw) for name in cut.attentions}
        return cut.saved(channels, heads, "uniform", {})


def kept_channels(width: int, ratio: float, multiple: int) -> int:
    """Return how many of so many channels stay: the share, rounded to the nearest multiple; all of them for a ratio of 0."""
    return min(width, int((1 - ratio) * width / multiple + 0.5) * multiple) if ratio else width


class _Cut:
    """Cuts the same parts out of every matrix that they run through."""

    def __init__(self, making: Making, asked: Narrowing) -> None:
        from harness.errors import CellFailed

        self.making, self.model, self.config = making, making.model, making.model.config
        ratio, groups, multiple = asked.ratio, asked.groups, asked.multiple
        self.groups = groups
        named = dict(self.model.named_modules())
        self.feed_forwards = [name.removesuffix(".down_proj") for name in named if name.endswith(".down_proj")]
        self.attentions = [name.removesuffix(".o_proj") for name in named if name.endswith(".o_proj")]
        layers = int(self.config.num_hidden_layers)
        needed = [f"{name}.{part}_proj" for name in self.feed_forwards for part in ("gate", "up")]
        needed += [f"{name}.{part}_proj" for name in self.attentions for part in "qkv"]
        if len(self.feed_forwards) != layers or len(self.attentions) != layers or not all(one in named for one in needed):
            raise CellFailed(
                f"{making.method} knows blocks with q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj, and "
                f"{type(self.model).__name__} has others; use prune-depth"
            )
        self.kv_heads = int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)
        self.head = int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)
        self.width = int(self.config.intermediate_size)
        self.keep = kept_channels(self.width, ratio, multiple)
        if self.keep == self.width and groups == 0:
            raise CellFailed(
                f"{making.method}: ratio={ratio:g} of {self.width} channels (in multiples of {multiple}) and groups=0 cut nothing; give "
                "one of them, or a smaller multiple"
            )
        odd = next((name for name in self.feed_forwards if self.down(name).shape[1] != self.width), None)
        if odd:
            raise CellFailed(
                f"{making.method}: {odd} has {self.down(odd).shape[1]} channels and the configuration says {self.width} (an expert, or a "
                "model with widths of its own?); use prune-depth"
            )
        if self.keep < 1 or groups >= self.kv_heads:
            raise CellFailed(
                f"{making.method}: ratio={ratio} leaves {self.keep} of {self.width} channels and groups={groups} leaves "
                f"{self.kv_heads - groups} of {self.kv_heads} head groups; at least one of each must stay"
            )

    def down(self, name: str) -> "Tensor":
        weight: Tensor = self.model.get_submodule(f"{name}.down_proj").weight
        return weight

    def out(self, name: str) -> "Tensor":
        weight: Tensor = self.model.get_submodule(f"{name}.o_proj").weight
        return weight

    def readers(self) -> dict[str, Any]:
        """Return the layers whose inputs are the channels and the heads."""
        names = [*(f"{name}.down_proj" for name in self.feed_forwards), *(f"{name}.o_proj" for name in self.attentions)]
        return {name: self.model.get_submodule(name) for name in names}

    def saved(
        self, channels: "dict[str, Tensor]", heads: "dict[str, Tensor]", allocation: str, told: dict[str, Any], *, flops: float = 0.0
    ) -> Checkpoint:
        """Keep the highest scores, and save."""
        self._refuse_strangers()
        state = dict(self.model.state_dict())
        before = sum(parameter.numel() for parameter in self.model.parameters())
        kept = self._kept(channels, allocation)
        gone = 0
        for name, chosen in kept.items():
            gone += self._take(state, name, ("gate_proj", "up_proj"), "down_proj", chosen)
        if self.groups:
            for name, score in heads.items():
                gone += self._take_heads(state, name, score)
        widths = [len(chosen) for chosen in kept.values()]
        notes = {
            "channels": [self.width, [min(widths), max(widths)]], "head_groups": [self.kv_heads, self.kv_heads - self.groups],
            "parameters": [before, before - gone], **told,
        }  # fmt: skip
        if len(set(widths)) == 1:
            return self._even(state, widths[0], before - gone, notes, flops)
        return self._uneven(state, dict(zip(kept, widths, strict=True)), notes, flops)

    def _refuse_strangers(self) -> None:
        """Refuse weights that run along the heads and are none of the matrices that are cut (a norm over all heads' queries)."""
        import torch
        from transformers import AutoModelForCausalLM

        from harness.errors import CellFailed

        with torch.device("meta"):
            small = AutoModelForCausalLM.from_config(self._configured())
        own = dict(self.model.named_parameters())
        cut = tuple(f"{name}.{part}_proj." for name in self.attentions for part in "qkvo")
        odd = next((name for name, one in small.named_parameters() if own[name].shape != one.shape and not name.startswith(cut)), None)
        if odd:
            raise CellFailed(
                f"{self.making.method}: groups={self.groups} does not know {odd}, which runs along the heads too; give groups=0 or use "
                "prune-depth"
            )

    def _kept(self, channels: "dict[str, Tensor]", allocation: str) -> "dict[str, Tensor]":
        import torch

        if allocation == "uniform":
            return {name: score.topk(self.keep).indices.sort().values for name, score in channels.items()}
        # Scores of a block are divided by their mean first: blocks differ in scale, not in how much they matter.
        alike = {name: score / score.mean() for name, score in channels.items()}
        lowest = torch.cat(list(alike.values())).sort(descending=True).values[self.keep * len(alike) - 1]
        kept = {name: (score >= lowest).nonzero().flatten() for name, score in alike.items()}
        return {name: chosen if len(chosen) else alike[name].argmax().view(1) for name, chosen in kept.items()}

    def _take(self, state: "dict[str, Any]", name: str, rows: tuple[str, ...], columns: str, chosen: "Tensor") -> int:
        """Keep the chosen outputs of some layers and the same inputs of another; return how many parameters went."""
        before = 0
        for layer in rows:
            for leaf in ("weight", "bias"):
                if (tensor := state.get(f"{name}.{layer}.{leaf}")) is not None:
                    state[f"{name}.{layer}.{leaf}"] = tensor[chosen]
                    before += tensor.numel() - state[f"{name}.{layer}.{leaf}"].numel()
        tensor = state[f"{name}.{columns}.weight"]
        state[f"{name}.{columns}.weight"] = tensor[:, chosen]
        return before + tensor.numel() - state[f"{name}.{columns}.weight"].numel()

    def _take_heads(self, state: "dict[str, Any]", name: str, score: "Tensor") -> int:
        import torch

        each = len(score) // self.kv_heads  # outputs of a group's query heads, side by side
        best = score.view(self.kv_heads, each).sum(1).topk(self.kv_heads - self.groups).indices.sort().values
        queries = torch.cat([torch.arange(int(at) * each, int(at + 1) * each) for at in best])
        keys = torch.cat([torch.arange(int(at) * self.head, int(at + 1) * self.head) for at in best])
        gone = self._take(state, name, ("q_proj",), "o_proj", queries)
        for layer in ("k_proj", "v_proj"):
            for leaf in ("weight", "bias"):
                if (tensor := state.get(f"{name}.{layer}.{leaf}")) is not None:
                    state[f"{name}.{layer}.{leaf}"] = tensor[keys]
                    gone += tensor.numel() - state[f"{name}.{layer}.{leaf}"].numel()
        return gone

    def _configured(self) -> Any:
        config = self.config.__class__.from_dict(self.config.to_dict())
        if self.groups:
            config.head_dim = self.head
            config.num_attention_heads = config.num_attention_heads * (self.kv_heads - self.groups) // self.kv_heads
            config.num_key_value_heads = self.kv_heads - self.groups
        return config

    def _even(self, state: dict[str, Any], width: int, parameters: int, notes: dict[str, Any], flops: float) -> Checkpoint:
        from dataclasses import replace

        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        config = self._configured()
        config.intermediate_size = width
        dtype, generation = next(self.model.parameters()).dtype, self.model.generation_config
        del self.model
        self.making.opened = replace(self.making.opened, model=None)  # two whole models are not held at once
        with init_empty_weights(include_buffers=False):
            small = AutoModelForCausalLM.from_config(config, dtype=dtype)
        small.load_state_dict(state, assign=True)
        small.tie_weights()
        state.clear()
        small.generation_config = generation
        assert sum(parameter.numel() for parameter in small.parameters()) == parameters, "not the count that the formula says"
        self.making.opened = replace(self.making.opened, model=small.eval())
        return self.making.save(notes=notes, flops=flops)

    def _uneven(self, state: dict[str, Any], widths: dict[str, int], notes: dict[str, Any], flops: float) -> Checkpoint:
        from harness.model import stored_dtype
        from harness.packed import save_packed

        specs: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        dtype = stored_dtype(self.making.base)
        for name in widths:
            for layer in ("gate_proj", "up_proj", "down_proj"):
                weight = state[f"{name}.{layer}.weight"]
                bias = state.get(f"{name}.{layer}.bias")
                specs[f"{name}.{layer}"] = {"kind": "float", "shape": list(weight.shape), **({"bias": True} if bias is not None else {})}
                tensors[f"{name}.{layer}.weight"] = weight.to(dtype)
                if bias is not None:
                    tensors[f"{name}.{layer}.bias"] = bias.to(dtype)
        changed = {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] not in specs}

        def write(fresh: Any) -> None:
            save_packed(
                self.model, self.making.opened.tokenizer, fresh, specs=specs, tensors=tensors, dtype=dtype, state=changed,
                config=self._configured(),
            )  # fmt: skip

        return self.making.save_as(write, notes=notes, flops=flops)
