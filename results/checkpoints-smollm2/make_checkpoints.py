"""Make the checkpoints of this study from one GGUF file, each by the library of its own format.

No Hub could be reached where the study was made, so nobody's published checkpoint is here: what
AWQ's or Unsloth's files of this model would score is not said. Each maker runs in a process of its
own and is skipped where its file is there.

LLM Compressor asks for older versions of torch and transformers than the harness. It was installed
without its requirements here, beside those of the harness:

    pip install llama-cpp-python bitsandbytes peft accelerate loguru
    pip install --no-deps llmcompressor compressed-tensors==0.19.0 auto-round
    python results/checkpoints-smollm2/make_checkpoints.py SmolLM2-135M-Instruct.Q4_1.gguf FOLDER
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedTokenizerBase,
)

GROUP_SIZE = (
    64  # the base was stored in groups of 32 once: groups of 32 would find its values again
)
CALIBRATION_SEQUENCES = 64
CALIBRATION_TOKENS = 256
ADAPTER_STEPS = 40
ADAPTER_BATCH = 8
ADAPTER_TOKENS = 192


def base_folder(gguf: Path, out: Path) -> Path:
    """Unpack the file beside the checkpoints, once, by plain transformers; return the folder."""
    folder = out.with_name("base")
    if not folder.exists():
        place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**place, quantization_config=unpacked)
        AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def open_base(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the unpacked model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder)


def data_file(name: str) -> Path:
    """Return a file of the folder that HARNESS_DATA_DIR names."""
    return Path(os.environ["HARNESS_DATA_DIR"]) / name


def calibration_set(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return sequences of equal length of the C4 sample."""
    with gzip.open(data_file("c4_demo/c4_demo.jsonl.gz"), "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    rows = (tokenizer(text)["input_ids"] for text in texts)
    long_rows = [ids[:CALIBRATION_TOKENS] for ids in rows if len(ids) >= CALIBRATION_TOKENS]
    return Dataset.from_dict({"input_ids": long_rows[:CALIBRATION_SEQUENCES]})


def make_compressed_tensors(gguf: Path, out: Path, kind: str) -> None:
    """Write int8 by channel, int4 by GPTQ in groups, or FP8 with LLM Compressor."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model, tokenizer = open_base(base_folder(gguf, out), torch.bfloat16)
    options = {}
    if kind == "fp8":
        recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    else:
        bits = {"int8": {"num_bits": 8, "strategy": "channel"}}.get(
            kind, {"num_bits": 4, "strategy": "group", "group_size": GROUP_SIZE}
        )
        weights = QuantizationArgs(type="int", symmetric=True, **bits)
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        modifier = QuantizationModifier if kind == "int8" else GPTQModifier
        recipe = modifier(config_groups=groups, ignore=["lm_head"])
    if kind == "int4":
        options = {
            "dataset": calibration_set(tokenizer),
            "num_calibration_samples": CALIBRATION_SEQUENCES,
            "max_seq_length": CALIBRATION_TOKENS,
        }
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **options)
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def make_gguf(gguf: Path, out: Path, kind: str) -> None:
    """Write F16, Q8_0 or Q4_K_M with llama.cpp's own quantizer, from the Q4_1 file."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize = True
    status = llama_cpp.llama_model_quantize(str(gguf).encode(), str(out).encode(), options)
    if status:
        raise SystemExit(f"llama.cpp could not write {out}: status {status}")


def make_nf4(gguf: Path, out: Path) -> None:
    """Write bitsandbytes' NF4 with double quantization of its scales."""
    folder = base_folder(gguf, out)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    packed.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


def make_adapter(gguf: Path, out: Path) -> None:
    """Train a LoRA adapter of rank 8 on some of GSM8K's train split, by peft in a plain loop."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, tokenizer = open_base(base_folder(gguf, out), torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    path = next(data_file("gsm8k").glob("*train*.jsonl*"))
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        items = [json.loads(line) for line in lines][: ADAPTER_STEPS * ADAPTER_BATCH]
    texts = [f"Question: {item['question']}\nAnswer: {item['answer']}" for item in items]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=2e-4
    )
    for step in range(ADAPTER_STEPS):
        batch = tokenizer(
            texts[step * ADAPTER_BATCH : (step + 1) * ADAPTER_BATCH],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=ADAPTER_TOKENS,
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {ADAPTER_STEPS}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(out)


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "gguf-f16.gguf": lambda gguf, out: make_gguf(gguf, out, "F16"),
    "gguf-q8_0.gguf": lambda gguf, out: make_gguf(gguf, out, "Q8_0"),
    "gguf-q4_k_m.gguf": lambda gguf, out: make_gguf(gguf, out, "Q4_K_M"),
    "ct-int8": lambda gguf, out: make_compressed_tensors(gguf, out, "int8"),
    "ct-int4": lambda gguf, out: make_compressed_tensors(gguf, out, "int4"),
    "ct-fp8": lambda gguf, out: make_compressed_tensors(gguf, out, "fp8"),
    "bnb-nf4": make_nf4,
    "lora": make_adapter,
}


def main() -> None:
    """Make every checkpoint that is missing, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=MAKERS, help="make this one, in this process")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.only:
        MAKERS[options.only](options.gguf, options.folder / options.only)
        return
    for name in MAKERS:
        if (options.folder / name).exists():
            continue
        start = time.monotonic()
        command = [sys.executable, __file__, str(options.gguf), str(options.folder)]
        ending = subprocess.run([*command, "--only", name], check=False)
        state = "made" if ending.returncode == 0 else f"failed ({ending.returncode})"
        print(f"{name}: {state} in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
