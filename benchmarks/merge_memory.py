"""Measure the memory that a merge takes: a base of about 2 GB in several files, each merge in a process of its own.

    python benchmarks/merge_memory.py

Writes benchmarks/results/merge_memory.json and .md. The base has random weights: memory does not depend on them. The
peak is the process's own (VmHWM after it was started anew), with all that Python and the libraries take. The candidates
are not measured against the adapter, which takes the memory of a whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the repository

from benchmarks.processes import RESULTS, peak_gib  # noqa: E402

DEMO = ROOT / "qlora_dpo" / "demo" / "base"
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 19, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32_000,
}  # fmt: skip
TINY_SHAPE = SHAPE | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
RANK, FACTOR, BESIDES_GIB = 16, 1.5, 1.0  # the limit: FACTOR times the largest file and BESIDES_GIB
MERGES = (("train", "bfloat16"), ("original", "bfloat16"), ("train", "float32"), ("original", "float32"))


def main() -> None:
    """Make the base, measure every merge; print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a base of a few MB; needs --output")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    parser.add_argument("--folder", type=Path, default=None, help="where base and merged model lie meanwhile (7 GB)")
    options = parser.parse_args()
    if options.tiny and options.output is None:
        parser.error("--tiny needs --output, so that it cannot replace real results")
    shape, shard_size = (TINY_SHAPE, "1MB") if options.tiny else (SHAPE, "500MB")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        base, adapter = Path(name) / "base", Path(name) / "adapter"
        in_a_process(make, str(base), str(adapter), json.dumps(shape), shard_size)
        files = [file.stat().st_size for file in base.glob("*.safetensors")]
        rows = [in_a_process(measure, str(adapter), kind, dtype, shard_size) for kind, dtype in MERGES]
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "safetensors")},
        "shape": shape, "lora_r": RANK, "base_gib": sum(files) / 2**30, "files": len(files), "rows": rows,
    }  # fmt: skip
    folder = options.output or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merge_memory.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "merge_memory.md").write_text(table(results), encoding="utf-8")
    print(table(results))


def in_a_process(function: Any, *words: str) -> dict[str, Any]:
    """Call a function of this file in a new interpreter, with words; it prints its result as JSON."""
    call = f"{function.__name__}(*{words!r})"
    code = f"import json; from benchmarks.merge_memory import *; print(json.dumps({call}))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make(base: str, adapter: str, shape: str, shard_size: str) -> dict[str, Any]:
    """Write a random base file by file, and a random adapter on all its linear layers."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from qlora_dpo.models.loading import model_on_meta

    def random(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, dtype=tensor.dtype) * 0.02

    Path(adapter).mkdir()
    shutil.copytree(DEMO, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = LlamaConfig(**json.loads(shape), tie_word_embeddings=False, dtype="bfloat16")
    model = model_on_meta(config, dtype=torch.bfloat16)
    config.save_pretrained(base)
    state = model.state_dict()
    shards = split_torch_state_dict_into_shards(state, max_shard_size=shard_size)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: random(state[name]) for name in names}, Path(base) / file, metadata={"format": "pt"})
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (Path(base) / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    policy: Any = get_peft_model(model, lora, low_cpu_mem_usage=True)
    policy.peft_config["default"].base_model_name_or_path = base
    policy.peft_config["default"].save_pretrained(adapter)
    weights = {name: random(tensor.float()) for name, tensor in get_peft_model_state_dict(policy).items()}
    save_file(weights, Path(adapter) / "adapter_model.safetensors", metadata={"format": "pt"})
    return {}


def measure(adapter: str, base: str, dtype: str, shard_size: str) -> dict[str, Any]:
    """Merge in this process; the peak before the command began is what the libraries take."""
    from qlora_dpo.cli import main as command
    from qlora_dpo.release.merging import merge  # noqa: F401

    before, start = peak_gib(), time.perf_counter()
    output = Path(adapter).with_name("merged")
    words = {"adapter": adapter, "output": str(output), "base": base, "dtype": dtype, "max_shard_size": shard_size}
    flags = [word for name, value in words.items() for word in (f"--{name}", value)]
    assert command(["merge", *flags, "--measure", "false", "--use_cpu"]) == 0
    seconds = time.perf_counter() - start
    written = [file.stat().st_size for file in output.glob("*.safetensors")]
    largest = max([*written, *(file.stat().st_size for file in output.with_name("base").glob("*.safetensors"))])
    shutil.rmtree(output)
    limit = FACTOR * largest / 2**30 + BESIDES_GIB
    return {
        "base": base, "dtype": dtype, "written_gib": sum(written) / 2**30, "files": len(written),
        "largest_file_gib": largest / 2**30, "libraries_gib": before, "peak_gib": peak_gib(), "limit_gib": limit,
        "holds": peak_gib() < limit, "seconds": seconds,
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    rows = [
        f"| {row['base']}, {row['dtype']} | {row['written_gib']:.2f} | {row['largest_file_gib']:.2f} | "
        f"{row['libraries_gib']:.2f} | {row['peak_gib']:.2f} | {row['limit_gib']:.2f} | "
        f"{'yes' if row['holds'] else '**no**'} | {row['seconds']:.0f} |"
        for row in results["rows"]
    ]
    return "\n".join([
        "# Memory of a merge",
        "",
        f"A base of {results['base_gib']:.2f} GiB in {results['files']} files (bfloat16, random), an adapter of rank "
        f"{results['lora_r']} on all linear layers. Peak: of a process of its own, GiB. Limit: {FACTOR} times the "
        f"largest file and {BESIDES_GIB:g} GiB. `python benchmarks/merge_memory.py`",
        "",
        f"{results['machine']}; {versions}.",
        "",
        "| merge | written | largest file | libraries alone | peak | limit | holds | seconds |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
        *rows,
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
