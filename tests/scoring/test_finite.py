"""The check of each token's logits: its message, and that it makes no step wait for the device."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.errors import CellFailed
from harness.scoring.backend import LikelihoodRequest, Sampling, ignore_report
from harness.scoring.decoding import DecodingCall
from harness.scoring.finite import NonFiniteLogits
from harness.scoring.generation import generate, reason_for_plain_path
from harness.scoring.likelihood import log_likelihoods
from harness.scoring.plain import decoding_mode, reason_for_single_rows
from harness.scoring.stopping import StopRule

PROMPTS = [list(range(5, 14)), list(range(30, 36)), list(range(50, 53))]


class Poisoned:
    """Makes one row's logits bad at one forward of the head, and counts those."""

    def __init__(self, opened, *, at, row, bad):
        self.calls, self.at, self.row, self.bad = 0, at, row, bad
        self.hook = opened.model.get_output_embeddings().register_forward_hook(self)

    def __call__(self, module, inputs, logits):
        self.calls += 1
        if self.calls == self.at:
            logits = logits.clone()
            logits[self.row if len(logits) > self.row else 0, :, 17] = self.bad
        return logits


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=3)])
@pytest.mark.parametrize("path", ["shared", "padded"])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_the_first_step_that_gives_no_number_fails_and_says_how_long_the_text_was(
    path, step, sampling, bad, small, monkeypatch
):
    opened = small("Llama")
    if path == "padded":
        monkeypatch.setattr(
            "harness.scoring.generation.reason_for_plain_path", lambda opened: "asked to"
        )
    assert reason_for_plain_path(opened) == ""
    decoding_mode(opened)  # its probe runs before the head is poisoned
    poison = Poisoned(opened, at=step, row=1, bad=bad)
    rule = {"max_new_tokens": 8, "batch_size": 3, "sampling": sampling}
    with pytest.raises(CellFailed, match="NaN or infinity, computed in float32") as raised:
        generate(opened, PROMPTS, **rule)
    # at the first, rows stand in another form
    assert f"a text of {6 + step - 1} tokens" in str(raised.value) or step == 1
    # nothing is written after it: the one more is the text that is read again to find the place
    assert poison.calls <= step + 1
    poison.hook.remove()
    assert [one.tokens for one in generate(opened, PROMPTS, **rule)]


@pytest.mark.parametrize("path", ["shared", "padded"])
def test_a_scored_text_that_gives_no_number_fails_on_either_path(path, small, monkeypatch):
    opened = small("Llama")
    assert reason_for_plain_path(opened) == "" and reason_for_single_rows(opened) == ""
    if path == "padded":
        monkeypatch.setattr(
            "harness.scoring.likelihood.reason_for_plain_path", lambda opened: "asked to"
        )
    Poisoned(opened, at=1, row=0, bad=float("nan"))
    with pytest.raises(CellFailed, match=r"a text of \d tokens with NaN or infinity"):
        log_likelihoods(
            opened, [LikelihoodRequest([5, 6, 7, 8, token], 2) for token in (9, 10, 11)]
        )


def test_what_is_minus_infinity_for_all_tokens_is_no_number_and_for_some_it_is(small):
    opened = small("Llama")
    decoding = deciding(opened)
    some = torch.zeros(1, 9)
    some[0, :8] = -torch.inf
    assert decoding.choose(some, [0]) == [8]
    with pytest.raises(NonFiniteLogits, match="a text of 9 tokens"):
        decoding.choose(torch.full((1, 9), -torch.inf), [0])


def deciding(opened, sampling=None):
    decoding = DecodingCall(opened, PROMPTS, 8, StopRule.of(opened, ()), sampling, 3, ignore_report)
    decoding.begin([0, 1, 2])
    return decoding


class Waiting(TorchDispatchMode):
    """Counts where a program asks a device for a single number, for which it waits."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.times += function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return function(*args, **(kwargs or {}))


def test_a_greedy_step_waits_once_for_its_tokens_and_never_for_the_check(small, monkeypatch):
    decoding, lists = deciding(small("Llama")), []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or plain(tensor))
    logits = torch.randn(3, 1024, generator=torch.Generator().manual_seed(0))
    with Waiting() as waiting:
        chosen = decoding.choose(logits, [0, 1, 2])
    assert chosen == plain(logits.argmax(dim=-1)) and waiting.times == 0 and len(lists) == 1
    with Waiting() as waiting:  # the count can fail: what it counts is seen
        assert bool(torch.isfinite(logits).all())
    assert waiting.times == 1


def test_a_drawn_step_asks_for_all_its_tokens_at_once_and_draws_what_each_stream_draws(
    small, monkeypatch
):
    sampling = Sampling(temperature=0.7, seed=5)
    logits = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1))
    decoding = deciding(small("Llama"), sampling)
    weights = torch.softmax(logits / 0.7, dim=-1)
    streams = deciding(small("Llama"), sampling).generators
    expected = [int(torch.multinomial(weights[row], 1, generator=streams[row])) for row in range(3)]
    lists, plain = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or plain(tensor))
    assert decoding.choose(logits, [0, 1, 2]) == expected and len(lists) == 1


@pytest.mark.gpu
def test_on_a_gpu_a_greedy_step_synchronises_once():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    from pathlib import Path

    from harness.models.language_model import open_model
    from harness.models.resolve import resolve

    decoding = deciding(open_model(resolve("tiny", cache=Path("unused")), device="cuda"))
    logits = torch.randn(3, 1024, device="cuda")
    decoding.choose(logits, [0, 1, 2])

    def waits(run):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum(
            "synchroniz" in str(warning.message) and "prototype" not in str(warning.message)
            for warning in caught
        )

    if not waits(lambda: logits.sum().item()):
        pytest.skip("this card does not tell when it is waited for")
    assert waits(lambda: decoding.choose(logits, [0, 1, 2])) == 1
