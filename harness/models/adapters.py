"""Opens weights with transformers: a model's own, or a base with a LoRA adapter laid on it.

Adapters are opened through peft and stay beside the base's weights, as they are served. No torch at
import.
"""

from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.models.checkpoint import header_entries, model_class, read_model_json
from harness.models.formats import require_llama_cpp, require_peft

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a LoRA adapter.

    Raises `HarnessError` for another kind of adapter, and for weights that are missing, damaged or
    pickled.
    """
    config = read_model_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise HarnessError(
            f"{folder} holds an adapter of kind {config.get('peft_type')!r}; LoRA adapters are "
            "opened: merge it into its model and give the merged folder"
        )
    if not (folder / WEIGHTS).is_file():
        raise HarnessError(
            f"adapter {folder} has no {WEIGHTS} (pickles are programs and are not opened); save it "
            "again with save_pretrained()"
        )
    header_entries(folder / WEIGHTS)
    return config


def open_weights(path: Path, *, base: Path | None, dtype: Any, **options: Any) -> Any:
    """Return the transformers model of a folder, or of `base` with the adapter in `path`.

    A GGUF file is opened by llama.cpp; `base` is then the folder that describes it.
    """
    if path.suffix == ".gguf" and base is not None:
        return _served(path, base)
    folder = base or path
    model = model_class(folder).from_pretrained(folder, dtype=dtype, **options)
    if base is not None:
        require_peft(path.name)
        _lay_on(model, path)
    return model


def _served(path: Path, description: Path) -> Any:
    """Return a model that llama.cpp holds, computed by as many threads as torch takes."""
    require_llama_cpp(path.stem)
    import torch

    from harness.models.served_model import ServedModel

    return ServedModel(path, description, threads=torch.get_num_threads())


def _lay_on(model: Any, adapter: Path) -> None:
    """Lay an adapter on a model. Raises `HarnessError` where it was made for another model."""
    try:
        loading = model.load_adapter(str(adapter))
    except (ValueError, RuntimeError, KeyError) as problem:
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else "no message"
        raise HarnessError(
            f"adapter {adapter.name} does not fit this model ({first[:160]}); name it beside the "
            "teacher that it was made for"
        ) from problem
    lost = [*getattr(loading, "missing_keys", ()), *getattr(loading, "unexpected_keys", ())]
    if lost:
        raise HarnessError(
            f"adapter {adapter.name} does not fit this model ({len(lost)} of its tensors have no "
            f"place, {sorted(lost)[0]} first); name it beside the teacher that it was made for"
        )
