"""Measure reading, checking and tokenizing 100,000 preference pairs: time and memory, first and second run.

    python benchmarks/data_speed.py [--rows 100000] [--llama_tokenizer FOLDER]

Writes benchmarks/results/data_speed.json and .md. Each run is a process of its own,
so that its peak is its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the repository
RESULTS = ROOT / "benchmarks" / "results"
LLAMA_TOKENIZER = ROOT.parent / "shared" / "data" / "llama_tokenizer"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LIMITS = {"first_seconds": 180.0, "second_seconds": 5.0, "peak_gb": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--llama_tokenizer", type=Path, default=LLAMA_TOKENIZER)
    parser.add_argument("--measure", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "pairs.jsonl"
        write_pairs(data, options.rows)
        tokenizers = {"byte-level BPE, ChatML": byte_bpe(folder / "bpe", data)}
        if (options.llama_tokenizer / "tokenizer.model").is_file():
            tokenizers["LLaMA SentencePiece, hh-rlhf"] = llama(folder / "llama", options.llama_tokenizer)
        runs = {name: two_runs(data, tokenizer, folder / "cache") for name, tokenizer in tokenizers.items()}
        write_results(options.rows, data.stat().st_size, runs)


def two_runs(data: Path, tokenizer: Path, cache: Path) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--measure", str(data), str(tokenizer), str(cache / tokenizer.name)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    outputs = [
        subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        for _ in ("first", "second")
    ]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def measure(data: Path, tokenizer_folder: Path, cache: Path) -> dict[str, Any]:
    """Load the pairs in this process; seconds are of the call alone, the peak is of the whole process."""
    from transformers import AutoTokenizer

    from qlora_dpo.data.dataset import load_preference_dataset

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu_start = time.perf_counter(), time.process_time()
    dataset = load_preference_dataset(str(data), tokenizer=tokenizer, cache_dir=cache)
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "cpu_seconds": round(time.process_time() - cpu_start, 2),
        "peak_before_gb": round(before * 1024 / 1e9, 2),
        "load_average": round(os.getloadavg()[0], 1),
        "pairs": len(dataset),
        "tokens": int(sum(lengths.sum() for lengths in dataset.lengths())),
        "from_cache": dataset.report.from_cache,
    }


def write_pairs(path: Path, rows: int) -> None:
    """Write multi-turn dialogues of about 1.1 kB a side, as hh-rlhf's are."""
    generator = random.Random(0)
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in ("a", "e", "i", "o", "u", "an", "er", "in", "or", "st")]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(20_000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(length: int) -> str:
        return " ".join(generator.choices(words, cum_weights=weights, k=length)).capitalize() + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            history = ""
            for _ in range(generator.randint(1, 4)):
                history += f"\n\nHuman: {text(generator.randint(5, 30))}\n\nAssistant: {text(18)}"
            history += f"\n\nHuman: {text(15)}\n\nAssistant: "
            row = {side: history + text(generator.randint(10, 70)) for side in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")


def byte_bpe(folder: Path, data: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8_000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with data.open(encoding="utf-8") as file:
        backend.train_from_iterator([line for line, _ in zip(file, range(2000), strict=False)], trainer)
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def llama(folder: Path, model: Path) -> Path:
    from transformers import LlamaTokenizer

    from qlora_dpo.data.templates import apply_prompt_template

    tokenizer = LlamaTokenizer.from_pretrained(model)
    apply_prompt_template(tokenizer, "hh-rlhf")
    tokenizer.save_pretrained(folder)
    return folder


def machine_with(*packages: str) -> dict[str, Any]:
    """The processor, Python, and the versions of these packages."""
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write_results(rows: int, file_bytes: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    machine = machine_with("transformers", "tokenizers", "datasets", "pyarrow", "orjson")
    result = {"rows": rows, "file_bytes": file_bytes, "machine": machine, "limits": LIMITS, "runs": runs}
    load = max(run["load_average"] for pair in runs.values() for run in pair)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "data_speed.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Reading and tokenizing preference pairs",
        "",
        f"{rows:,} synthetic hh-rlhf pairs, {file_bytes / 1e6:,.0f} MB of JSON Lines. {machine['cpu']}, "
        f"{machine['cores']} cores. Python {machine['python']}, "
        + ", ".join(f"{name} {machine[name]}" for name in ("transformers", "tokenizers", "pyarrow", "orjson"))
        + ".",
        "",
        "| tokenizer | tokens | first run | CPU time | peak memory | second run | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {first['tokens']:,} | {first['seconds']:.1f} s | {first['cpu_seconds']:.1f} s "
        f"| {first['peak_gb']:.2f} GB "
        f"| {second['seconds']:.1f} s | {second['peak_gb']:.2f} GB |"
        for name, (first, second) in runs.items()
    ]
    lines += [
        "",
        f"Load average of the machine meanwhile: {load:.1f} (above the number of cores, other work took its share).",
        "Seconds are of `load_preference_dataset`; memory is the peak resident size of the whole process, "
        "imports and the memory-mapped cache included. `python benchmarks/data_speed.py` measures again.",
    ]
    (RESULTS / "data_speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
