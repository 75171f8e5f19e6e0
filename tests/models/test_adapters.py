"""Which folders hold adapters."""

import json

from harness.models.adapters import is_adapter


def test_a_folder_with_a_model_of_its_own_is_no_adapter(tmp_path):
    assert not is_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert is_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # merged, with the adapter left beside it
    assert not is_adapter(tmp_path)
