"""States that a thread writes: those of their step, whole after any kill, and no error is lost."""

import threading
from pathlib import Path

import pytest
import torch
from distilling import SETTINGS, rows_of
from torch import nn

from harness.files.digests import file_digest
from methods.training import snapshots
from methods.training import state as states
from methods.training.loop import fit
from methods.training.preparation import start_accelerator
from methods.training.settings import Training
from methods.training.snapshots import BackgroundWriter, Snapshot
from methods.training.state import LoopState, SavedStates
from methods.training.terms import Objective, hard_labels


@pytest.fixture
def in_background(monkeypatch):
    """Write states as on a GPU, after every step."""
    monkeypatch.setattr(states, "writes_in_background", lambda device: True)
    monkeypatch.setattr(states, "SECONDS_BETWEEN_STATES", 0.0)


def run(student, folder, stop=None, seen_tokens=900):
    folder.mkdir(exist_ok=True)
    spent = fit(
        student,
        rows=rows_of(24),
        validation=rows_of(6, seed=9),
        objective=Objective(terms=[hard_labels()]),
        settings=SETTINGS,
        training=Training(seen_tokens=seen_tokens, seed=4, workdir=folder, stop_after_steps=stop),
    )
    return {name: tensor.clone() for name, tensor in student.model.state_dict().items()}, spent


def assert_equal(weights, others):
    assert all(torch.equal(others[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_a_stopped_run_goes_on_to_the_same_bytes(small, tmp_path, in_background, stop):
    whole, spent = run(small("Llama"), tmp_path / "whole")
    run(small("Llama"), tmp_path / "parts", stop)
    again, resumed = run(small("Llama"), tmp_path / "parts")
    assert_equal(whole, again)
    assert (spent.step, spent.best, spent.kept_step) == (
        resumed.step,
        resumed.best,
        resumed.kept_step,
    )
    logs = [(tmp_path / name / "training.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_the_files_are_those_that_a_save_in_the_foreground_writes(small, tmp_path, monkeypatch):
    run(small("Llama"), tmp_path / "foreground", stop=5)
    monkeypatch.setattr(states, "writes_in_background", lambda device: True)
    run(small("Llama"), tmp_path / "background", stop=5)
    digests = [
        {path.name: file_digest(path) for path in (tmp_path / name / "state").rglob("*.*")}
        for name in ("foreground", "background")
    ]
    for digest in digests:
        digest.pop("loop.json")  # it holds seconds
    assert digests[0] == digests[1] and len(digests[0]) == 3


class Slow:
    """A writer's stand-in: it completes a state when it is told to."""

    def __init__(self, monkeypatch):
        self.go_on, self.waits = threading.Event(), threading.Event()
        complete = SavedStates._complete

        def slow(saved, *arguments):
            self.waits.set()
            assert self.go_on.wait(timeout=60)
            complete(saved, *arguments)

        monkeypatch.setattr(SavedStates, "_complete", slow)


def linear_training():
    """Return a model, its optimizer, and an accelerator that has prepared both."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    accelerator = start_accelerator(
        "cpu", SETTINGS, Training(seen_tokens=1, seed=1, workdir=Path("unused"))
    )
    return *accelerator.prepare(model, optimizer), accelerator


def one_step(model, optimizer):
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_state_is_that_of_its_step_though_weights_move_while_it_is_written(
    tmp_path, in_background, monkeypatch
):
    model, optimizer, accelerator = linear_training()
    one_step(model, optimizer)
    saved = SavedStates(tmp_path / "state", accelerator)
    slow = Slow(monkeypatch)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved.save(LoopState(step=1))
    drawn = torch.get_rng_state()
    assert slow.waits.wait(timeout=60)
    for _ in range(3):
        one_step(model, optimizer)
    assert not torch.equal(model.state_dict()["weight"], kept["weight"])
    saved.save(LoopState(step=4))  # one is being written: this one is passed over
    slow.go_on.set()
    saved.wait()
    saved.close()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-1"]
    assert SavedStates(tmp_path / "state", accelerator).restore() == LoopState(step=1)
    assert_equal(kept, model.state_dict())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert int(next(iter(optimizer.optimizer.state.values()))["step"]) == 1


def test_a_kill_while_a_state_is_written_leaves_the_one_before(
    small, tmp_path, in_background, monkeypatch
):
    whole, _ = run(small("Llama"), tmp_path / "whole")
    run(small("Llama"), tmp_path / "killed", stop=5)
    [kept] = (tmp_path / "killed" / "state").iterdir()
    torn = kept.with_name("step-6.part")  # what a thread leaves that is killed on its way
    torn.mkdir()
    (torn / "model.safetensors").write_bytes((kept / "model.safetensors").read_bytes()[:100])
    again, _ = run(small("Llama"), tmp_path / "killed")
    assert_equal(whole, again)
    assert not torn.exists()


def test_an_error_of_the_thread_ends_the_training(small, tmp_path, in_background, monkeypatch):
    def full(saved, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SavedStates, "_complete", full)
    with pytest.raises(OSError, match="No space left on device"):
        run(small("Llama"), tmp_path / "a")


def test_an_error_of_the_last_state_is_raised_too(small, tmp_path, monkeypatch):
    def full(saved, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states, "writes_in_background", lambda device: True)
    monkeypatch.setattr(SavedStates, "_complete", full)
    with pytest.raises(OSError, match="No space left on device"):
        run(small("Llama"), tmp_path / "a", stop=3)


def test_tied_weights_share_their_copy(tmp_path):
    model, _, accelerator = linear_training()
    model.twin = nn.Linear(3, 2)
    model.twin.weight = model.weight
    snapshot = Snapshot(accelerator, tmp_path / "step-1.part")
    [weights] = snapshot.weights
    assert weights["weight"].data_ptr() == weights["twin.weight"].data_ptr()
    assert weights["weight"].data_ptr() != model.weight.data_ptr()
    assert torch.equal(weights["twin.weight"], model.weight)


def test_tensors_made_of_others_are_copied_part_by_part():
    """The 8-bit moments of two weights of one shape are such: none has memory of its own."""
    from torch.testing._internal.two_tensor import TwoTensor

    moments = [TwoTensor(torch.full((2, 3), at), torch.full((2, 3), -at)) for at in (1.0, 2.0)]
    copies = snapshots._copied(moments, {})
    for moment in moments:
        moment.a.zero_()
    assert [float(copy.a[0, 0]) for copy in copies] == [1.0, 2.0]
    assert [float(copy.b[0, 0]) for copy in copies] == [-1.0, -2.0]


def test_the_moments_of_bf16_training_are_copied_each_for_itself():
    optim = pytest.importorskip("torchao.optim")
    weights = [nn.Parameter(torch.randn(64, 128, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optim.AdamW8bit(weights, bf16_stochastic_round=True)
    for scale, weight in enumerate(weights, 1):
        weight.grad = torch.full_like(weight, float(scale))
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    state = optimizer.state_dict()["state"]
    copied = snapshots._copied(state, {})
    for number, moments in state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            copy, moment = copied[number][name], moments[name]
            assert torch.equal(copy.dequantize(), moment.dequantize())
            assert copy.codes.data_ptr() != moment.codes.data_ptr()


def test_a_copy_that_has_no_room_is_not_made(small, tmp_path, in_background, monkeypatch):
    """The state is written while training waits, and training comes to the same weights."""
    whole, _ = run(small("Llama"), tmp_path / "whole")
    copies = []
    monkeypatch.setattr(states, "Snapshot", lambda *_: copies.append(1))
    monkeypatch.setattr(snapshots, "free_bytes", lambda device: 1000)
    run(small("Llama"), tmp_path / "parts", stop=5)
    again, _ = run(small("Llama"), tmp_path / "parts")
    assert_equal(whole, again)
    assert not copies


def test_a_copy_has_weights_and_moments(monkeypatch):
    model, optimizer, accelerator = linear_training()
    one_step(model, optimizer)
    # 8 weights in float32, two moments of each, and a count of steps for each of two parameters
    needed = 3 * 8 * 4 + 2 * 4
    for free, fits in ((needed, False), (needed / 0.9 + 1, True), (None, True)):
        monkeypatch.setattr(snapshots, "free_bytes", lambda device, free=free: free)
        assert snapshots.copies_fit(accelerator) is fits


def test_one_thing_is_written_at_a_time_and_an_error_is_raised_once():
    writer, go_on, written = BackgroundWriter(), threading.Event(), []

    def slow():
        assert go_on.wait(timeout=60)
        written.append("slow")

    def failing():
        raise ValueError("torn")

    assert not writer.is_busy
    writer.start(slow)
    assert writer.is_busy
    go_on.set()
    writer.start(failing)  # waits for the first
    assert written == ["slow"]
    with pytest.raises(ValueError, match="torn"):
        writer.wait()
    assert not writer.is_busy
    writer.wait()
    writer.close()


def test_states_are_written_beside_the_training_on_a_gpu_alone():
    assert snapshots.writes_in_background(torch.device("cuda", 0))
    assert not snapshots.writes_in_background(torch.device("cpu"))
