"""Wrappers of models: a sleep after each forward pass, an unused buffer, another float type."""

import time
from typing import Any

import torch

SLOWER = 0.10
BUFFER = 64 * 2**20


def make_slower(model: Any) -> Any:
    """Make each forward pass sleep a tenth of what it has just taken."""
    plain = model.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        out = plain(*arguments, **named)
        until = time.perf_counter() + SLOWER * (time.perf_counter() - began)
        # the system's sleep alone is late by more than a tiny model's tenth
        while (remaining := until - time.perf_counter()) > 0:
            if remaining > 0.001:
                time.sleep(remaining - 0.001)
        return out

    model.forward = forward
    return model


def in_bf16(model: Any) -> Any:
    """Let the model compute in bf16."""
    return model.to(torch.bfloat16)


def make_heavier(model: Any) -> Any:
    """Give the model a buffer of 64 MiB, written to, so that it is really there."""
    model.register_buffer("needless", torch.ones(BUFFER, dtype=torch.uint8), persistent=False)
    return model
