"""The timing process opens what a row scored, and what a checkpoint weighs is what is stored."""

import pytest
import torch

from harness.measuring.measure import disk_bytes
from harness.measuring.worker import TimingJob, TimingWorker
from harness.models.language_model import open_model
from harness.models.outside import resolve_outside


def test_an_adapter_is_timed_on_its_base_and_weighs_both(random_model, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(random_model.path)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    adapter = resolve_outside(str(tmp_path / "adapter"), cache=tmp_path, base=random_model)
    job = TimingJob(
        path=str(adapter.path),
        base=str(adapter.base),
        device="cpu",
        dtype="float32",
        threads=1,
        vocabulary=100,
    )
    worker = TimingWorker(job)
    assert worker.open()["seconds"] > 0
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        timed, scored = (opened(ids).logits for opened in (worker.model, open_model(adapter).model))
    assert torch.equal(timed, scored)
    stored = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert disk_bytes(adapter) == disk_bytes(random_model) + stored
