"""One optimiser step of `recipe=lora` beside peft's own: get_peft_model and a plain torch loop.

A random Llama with the matrices of SmolLM2-135M (eight of its thirty blocks, vocabulary 49,152, its
head tied to its token table), rank 16 on all linear layers of the blocks, four rows of 256 tokens
that are all trained, float32, clipped gradients, fused AdamW. Both begin with the same adapters;
the program stops where one of them is no longer the same after the steps. A step is everything from
token ids to moved weights. Ratios are of steps by turns, in one process.

python tests/benchmarks/lora-step.py [PAIRS]
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _form import figure, write_figures
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from harness.contract import Checkpoint
from harness.models.language_model import LanguageModel
from harness.models.resolve import EMBEDDED
from methods.training.lora import add_adapters
from methods.training.preparation import PreparedTraining
from methods.training.rows import TokenRow, batch_of
from methods.training.settings import LoopSettings, Training
from methods.training.terms import Objective, hard_labels

ROWS, LENGTH, RANK, ALPHA = 4, 256, 16, 32
SETTINGS = LoopSettings(
    learning_rate=1e-4,
    batch_size=ROWS,
    micro_batch_size=ROWS,
    warmup_ratio=0.1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    validation_rows=1,
)
# of adapters that begin at zero or near it, after a few steps at a rate of 1e-4
FARTHEST = 1e-5


class Arm:
    """A model with adapters, and what makes one step of it."""

    def __init__(self, model: Any, step: Callable[[], None]) -> None:
        self.model, self._step = model, step

    @property
    def adapters(self) -> dict[str, torch.Tensor]:
        """Its adapters, by the names that ours have."""
        return {
            name.removeprefix("base_model.model."): weight
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }

    def seconds(self) -> float:
        """Make a step; return how long it took."""
        began = time.perf_counter()
        self._step()
        return time.perf_counter() - began


def model_of() -> Any:
    """Return the frozen model before it has adapters: the same numbers at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def rows_of() -> list[TokenRow]:
    """Return rows of one length, trained from their second token on."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 49_152, (ROWS, LENGTH), generator=draw).tolist()
    return [TokenRow(tuple(row), 1) for row in ids]


def ours(folder: Path) -> Arm:
    """Return our step: adapters of `methods/training/lora.py`, the training loop's own parts."""
    model, rows = model_of(), rows_of()
    add_adapters(model, rank=RANK, alpha=ALPHA, seed=1, label="lora-step")
    tokenizer = AutoTokenizer.from_pretrained(
        EMBEDDED / "tiny"
    )  # its padding, of which there is none
    random_model = Checkpoint(path=folder, name="random", digest="")
    prepared = PreparedTraining(
        LanguageModel(model, tokenizer, "cpu", random_model),
        rows=rows,
        objective=Objective(terms=[hard_labels()]),
        settings=SETTINGS,
        training=Training(seen_tokens=1, seed=0, workdir=folder),
    )
    stepper = prepared.stepper()

    def step() -> None:
        stepper.backward(rows, weights={"ce": 1.0}, backward=prepared.accelerator.backward)
        prepared.clip_gradient()
        prepared.optimizers.step()

    return Arm(model, step)


def theirs() -> Arm:
    """Return peft's step, as its documentation and plain torch have it."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(model_of(), config).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=SETTINGS.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=SETTINGS.weight_decay,
        fused=True,
    )
    rows = rows_of()

    def step() -> None:
        batch = batch_of(rows, 0)
        model(input_ids=batch.ids, attention_mask=batch.attention, labels=batch.ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return Arm(model, step)


def farthest(arms: tuple[Arm, Arm]) -> float:
    """Return the largest difference between the adapters of two arms."""
    own, others = (arm.adapters for arm in arms)
    if own.keys() != others.keys():
        raise SystemExit(f"other adapters: {own.keys() ^ others.keys()}")
    return max(float((own[name] - others[name]).detach().abs().max()) for name in own)


def main() -> None:
    """Make both steps by turns, and write the figure."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    with tempfile.TemporaryDirectory() as place:
        arms = (ours(Path(place)), theirs())
        with torch.no_grad():
            for name, weight in arms[1].adapters.items():
                weight.copy_(arms[0].adapters[name])
        seconds = []
        for number in range(pairs + 1):  # the first pair warms up
            order = arms if number % 2 == 0 else arms[::-1]
            pair = {arm: arm.seconds() for arm in order}
            seconds.append([pair[arm] for arm in arms])
    difference = farthest(arms)
    if difference > FARTHEST:
        raise SystemExit(f"the two train differently: adapters are {difference:.2g} apart")
    measured = seconds[1:]
    trained = sum(weight.numel() for weight in arms[0].adapters.values())
    details = {
        "seconds, ours and peft's": [[round(value, 3) for value in pair] for pair in measured],
        "trained weights": trained,
        "largest difference of adapters after all steps": difference,
    }
    result = figure(
        "lora-step",
        [our_seconds / their_seconds for our_seconds, their_seconds in measured],
        unit="times peft's own step",
        better="lower",
        target=1.1,
        peer="peft get_peft_model, plain torch loop",
        details=details,
    )
    write_figures(Path(__file__).stem, [result])


if __name__ == "__main__":
    main()
