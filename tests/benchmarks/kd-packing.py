"""Tokens a second of training on rows of GSM8K's lengths, over those on rows of equal length.

A random Llama (vocabulary and tokenizer of the embedded teacher, width 256, four blocks) makes
steps of sixteen rows, in the order in which the loop makes them. Each step has a twin of as many
rows, tokens and trained tokens, whose rows all have one length: nothing of it is padding. Steps and
twins take turns; tokens are those of the rows, without padding. `packed` is the setting
`packing=on`, `padded` what the loop does on a CPU by default.

HARNESS_DATA_DIR=... python tests/benchmarks/kd-packing.py [STEPS]
"""

import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from _form import figure, write_figures
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import suites
from harness.data.source import LocalOrHubData
from harness.models.resolve import EMBEDDED
from methods.training.base import full_solution_pairs
from methods.training.row_attention import RowAttention
from methods.training.rows import TokenRow, encode, shuffled_steps
from methods.training.stepper import Stepper
from methods.training.teachers import TrainedPositionLogits
from methods.training.terms import Objective, hard_labels

ROWS, BATCH, WIDTH, BLOCKS, LONGEST = 2_048, 16, 256, 4, 1_024
FORMS = ("packed", "padded")


def gsm8k_rows() -> tuple[list[TokenRow], Any]:
    """Return GSM8K's first training rows and their tokenizer."""
    folder = os.environ.get("HARNESS_DATA_DIR")
    if not folder:
        sys.exit("set HARNESS_DATA_DIR to a folder with gsm8k/")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny")
    examples = suites.load("gsm8k").examples("train", LocalOrHubData(folder=Path(folder)))
    pairs = full_solution_pairs(islice(examples, ROWS))
    return encode(tokenizer, pairs, longest=LONGEST)[0], tokenizer


def twin_of(rows: list[TokenRow]) -> list[TokenRow]:
    """Return as many rows of one length, with as many tokens and trained tokens, up to a row's."""
    length = round(sum(len(row.ids) for row in rows) / len(rows))
    trained = round(sum(row.trained_tokens for row in rows) / len(rows))
    stream = [token for row in rows for token in row.ids]
    stream += stream[: length * len(rows) - len(stream)]
    return [
        TokenRow(tuple(stream[start : start + length]), length - trained)
        for start in range(0, length * len(rows), length)
    ]


def model_of(vocabulary: int) -> Any:
    """Return the student."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=WIDTH // 64,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def tokens_per_second(stepper: Stepper, model: Any, rows: list[TokenRow]) -> float:
    """Make the forward and backward pass of a step; return the rows' tokens a second."""
    began = time.perf_counter()
    stepper.backward(rows, weights={"ce": 1.0}, backward=lambda loss: loss.backward())
    seconds = time.perf_counter() - began
    model.zero_grad()
    return sum(len(row.ids) for row in rows) / seconds


def rates_of(steppers: dict[str, Stepper], model: Any, rows: list[TokenRow]) -> dict[str, float]:
    """Return the tokens a second of a step in each form, and of its twin in the padded form.

    The twin is timed before and after, so that a machine that slows down slows all alike.
    """
    twin = twin_of(rows)
    rates = {}
    before = _rate(steppers, "padded", model, twin)
    for form in FORMS:
        rates[form] = _rate(steppers, form, model, rows)
    after = _rate(steppers, "padded", model, twin)
    return {**rates, "equal": (before + after) / 2}


def _rate(steppers: dict[str, Stepper], form: str, model: Any, rows: list[TokenRow]) -> float:
    attention = RowAttention(model, pack=True) if form == "packed" else None
    if attention is not None and attention.refusal:
        sys.exit(f"rows cannot be packed: {attention.refusal}")
    rate = tokens_per_second(steppers[form], model, rows)
    if attention is not None:
        attention.close()
    return rate


def main() -> None:
    """Measure the steps of an epoch's beginning."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    rows, tokenizer = gsm8k_rows()
    model = model_of(len(tokenizer))
    objective = Objective(terms=[hard_labels()])
    steppers = {
        form: Stepper(model, TrainedPositionLogits(model), objective, BATCH, tokenizer.pad_token_id)
        for form in FORMS
    }
    steps = [step for _, step in islice(shuffled_steps(rows, batch_size=BATCH, seed=0), count + 1)]
    for step in steps[:1]:
        rates_of(steppers, model, step)
    rates = [rates_of(steppers, model, step) for step in steps[1:]]
    lengths = sorted(len(row.ids) for row in rows)
    width = [max(len(row.ids) for row in step) for step in steps[1:]]
    tokens = [sum(len(row.ids) for row in step) for step in steps[1:]]
    details = {
        "rows": len(rows),
        "tokens of a row": {
            "median": lengths[len(lengths) // 2],
            "least": lengths[0],
            "most": lengths[-1],
        },
        "padding of the padded form": round(1 - sum(tokens) / sum(BATCH * w for w in width), 4),
        "steps": len(rates),
        "threads": torch.get_num_threads(),
    }
    common: dict[str, Any] = {
        "unit": "of the tokens a second of rows of equal length",
        "better": "higher",
        "peer": "rows of equal length, ours",
    }
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "kd-packing",
                [rate["packed"] / rate["equal"] for rate in rates],
                target=0.95,
                details=details,
                **common,
            ),
            figure(
                "kd-packing:padded",
                [rate["padded"] / rate["equal"] for rate in rates],
                target=None,
                **common,
            ),
        ],
    )


if __name__ == "__main__":
    main()
