"""How many rows are decoded at once: as many as memory allows, page cache not counted."""

from types import SimpleNamespace

import pytest
import torch

from harness.models.shape import CPU_KV_BYTES, MAX_BATCH_ROWS
from harness.scoring import batch_sizes

LAYERS, HEADS, WIDTH = 4, 2, 64
ROW = 2 * LAYERS * HEADS * WIDTH * 4  # bytes of a token's keys and values in fp32


@pytest.fixture
def model():
    config = SimpleNamespace(
        num_hidden_layers=LAYERS,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=WIDTH,
    )
    return SimpleNamespace(
        device="cpu", text_config=config, model=SimpleNamespace(dtype=torch.float32)
    )


@pytest.mark.parametrize(
    ("free", "tokens", "rows"),
    [
        # a system that does not tell, macOS: what a CPU's caches hold
        (None, 100, MAX_BATCH_ROWS["cpu"]),
        (None, CPU_KV_BYTES // ROW // 10, 10),
        (10 * 2**30, CPU_KV_BYTES // ROW // 10, 10),
        (10 * ROW * 1000, 1000, 4),  # 0.4 of what is free
        (ROW, 1000, 1),  # never none
    ],
)
def test_rows_follow_what_can_be_had(model, monkeypatch, free, tokens, rows):
    monkeypatch.setattr(batch_sizes, "free_bytes", lambda device: free)
    assert batch_sizes.rows_that_fit(model, tokens) == rows


def test_pages_that_the_system_gives_back_count_as_free(monkeypatch):
    """Reading a file fills the page cache, which must not make batches small and scoring slow."""
    from pathlib import Path

    from harness.machine.memory import free_bytes

    read = Path.read_text
    meminfo = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 900 kB\n"
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, *a, **k: meminfo if str(path) == "/proc/meminfo" else read(path, *a, **k),
    )
    assert free_bytes("cpu") == 900 * 1024
