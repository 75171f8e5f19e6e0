"""Keys and values of SmolLM2-135M in int8 and int4 beside the full cache: perplexity and bytes.

The first WINDOWS windows of LENGTH tokens of WikiText-2's raw test text, each read from its start;
a token at the end of a window attends to a thousand that are stored in few bits. Perplexity of each
window is compared with that of the full cache on the same window, so a range is over windows.

HARNESS_GGUF=... HARNESS_DATA_DIR=... python tests/benchmarks/kv-smollm2.py
"""

import math
import tempfile
from itertools import pairwise
from pathlib import Path

from _form import figure, write_figures
from _smollm2 import base_model

WINDOWS, LENGTH = 4, 1_024
STEPS = 128  # that are decoded from codes
PARTS = {"first 128": slice(0, 128), "last 512": slice(511, 1_023)}


def token_losses(checkpoint):
    """Return the nats of every predicted token, (WINDOWS, LENGTH - 1)."""
    import torch

    from harness.data.source import LocalOrHubData
    from harness.models.language_model import open_model

    text = LocalOrHubData.from_environment(None).text("wikitext2/wiki.test.raw")
    opened = open_model(checkpoint)
    ids = opened.tokenizer(text[: WINDOWS * LENGTH * 8])["input_ids"][: WINDOWS * LENGTH]
    losses = []
    with torch.inference_mode():
        for window in torch.tensor(ids).view(-1, 1, LENGTH):
            logits = opened.model(input_ids=window, use_cache=False).logits[0, :-1]
            losses.append(
                torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
            )
    return torch.stack(losses)


def bytes_a_token(checkpoint):
    """Return the bytes that transformers' own loop keeps of a token, counted by storages."""
    import torch
    from transformers import AutoModelForCausalLM

    from harness.measuring.runs import generate_greedily
    from harness.measuring.weighing import cache_bytes
    from harness.models.quantized_cache import give_quantized_cache

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    give_quantized_cache(model)
    return cache_bytes(generate_greedily(model, torch.arange(5, 37)[None], 4)) / 35


def gaps_of_steps(checkpoint, losses):
    """Return how far each of the first STEPS tokens moves, in nats, where codes are decoded.

    The text is read token by token by transformers' own attention from a cache of codes, and
    compared with the reading at once.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from harness.data.source import LocalOrHubData
    from harness.models.language_model import student_tokenizer
    from harness.models.quantized_cache import QuantizedCache

    text = LocalOrHubData.from_environment(None).text("wikitext2/wiki.test.raw")
    ids = student_tokenizer(checkpoint)(text[: STEPS * 20])["input_ids"][: STEPS + 1]
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    codes, decoded = QuantizedCache.of(model.config), []
    with torch.inference_mode():
        for token, target in pairwise(ids):
            logits = model(torch.tensor([[token]]), cache=codes, use_cache=True).logits[0]
            decoded.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([target]))))
    return [abs(one - float(other)) for one, other in zip(decoded, losses[0], strict=False)]


def main() -> None:
    """Read the windows with each cache; write ratios to the full cache."""
    from harness.models.cache_format import CacheFormat
    from harness.models.shaping import copy_student

    teacher = base_model()
    full, full_bytes, figures = token_losses(teacher), bytes_a_token(teacher), []
    for bits, group, most, most_bytes in ((8, 64, 1.005, 0.3), (4, 32, 1.25, 0.2)):
        with tempfile.TemporaryDirectory() as place:
            student = copy_student(
                teacher,
                Path(place) / "student",
                name=f"kv-int{bits}",
                cache_format=CacheFormat(bits=bits, group=group),
            )
            losses, stored = token_losses(student), bytes_a_token(student)
            gaps = gaps_of_steps(student, losses)
        more = losses - full
        by_part = {name: math.exp(float(more[:, part].mean())) for name, part in PARTS.items()}
        figures += [
            figure(
                f"kv-smollm2:int{bits}-perplexity",
                [math.exp(float(window.mean())) for window in more],
                unit="times the full cache's",
                better="lower",
                target=most,
                details={
                    "perplexity": [math.exp(float(each.mean())) for each in (full, losses)],
                    "ratio_of_all_windows": math.exp(float(more.mean())),
                    "ratio_by_place_in_a_window": by_part,
                },
            ),
            figure(
                f"kv-smollm2:int{bits}-bytes",
                [stored / full_bytes],
                unit="of the bytes of a token in fp32",
                better="lower",
                target=most_bytes,
                details={"bytes_a_token": [full_bytes, stored]},
            ),
            figure(
                f"kv-smollm2:int{bits}-steps",
                gaps,
                unit="nats between reading at once and token by token from codes",
                better="lower",
                target=None,
                details={"tokens": STEPS, "mean": sum(gaps) / len(gaps)},
            ),
        ]
    write_figures(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
