"""Count how often `release check` passes a faithful export and fails a wrong one of a real model.

    python benchmarks/check_verdicts.py MODEL

MODEL is the folder of a pretrained chat model. A short run of DPO on NF4 is merged in every faithful way and in four
wrong ones; each export is checked on SETS sets of prompts. Writes benchmarks/results/check_verdicts.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the repository

from benchmarks.processes import RESULTS  # noqa: E402

SETS, PROMPTS, TOKENS, LAYER = 5, 3, 12, 15
STEPS, LEARNING_RATE, ALPHA = 12, 3e-4, 16
MIN_SAME, MAX_DIFFERENCE = 0.98, 0.05  # the command's own


def main() -> None:
    """Train, export, check; print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        rows = verdicts(train(options.model, Path(name)), Path(name))
    results = {
        "machine": f"{_processor()}, {os.cpu_count()} cores", "model": options.model.name, "steps": STEPS,
        "prompts": PROMPTS, "tokens": TOKENS, "seconds": time.perf_counter() - started, "rows": rows,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "check_verdicts.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "check_verdicts.md").write_text(table(results), encoding="utf-8")
    print(table(results))


def train(model: Path, folder: Path) -> Path:
    """A finished run on made-up pairs, in NF4 and bfloat16 as by default."""
    from qlora_dpo.cli import main as command

    words = "apple river stone bread cloud horse lamp chair paper garden".split()
    pairs = [
        {"prompt": f"What is a {one}? ({n})", "chosen": f"A {one} is not a {other}.", "rejected": f"{other}?"}
        for n, (one, other) in enumerate(zip(words * 3, words[1:] * 3 + words, strict=False))
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    options = {
        "model_name_or_path": model, "dataset": file, "output_dir": folder / "run", "max_steps": STEPS, "lora_r": 8,
        "lora_alpha": ALPHA,
        "gradient_accumulation_steps": 2, "learning_rate": LEARNING_RATE, "eval_fraction": 0, "reference_store": "none",
        "lint": "off",
    }  # fmt: skip
    assert command(["train", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]) == 0
    return folder / "run"


def verdicts(run: Path, folder: Path) -> list[dict[str, Any]]:
    """For each export how many of its checks passed, with the weights' row and without it."""
    import torch

    from qlora_dpo.release.artefact import open_artefact, tokenizer_of
    from qlora_dpo.release.checking.comparing import answer_rows
    from qlora_dpo.release.checking.prompts import BUILT_IN, as_messages
    from qlora_dpo.release.checking.replay import expected_answers, export_answers, load_export
    from qlora_dpo.release.checking.weights import weights_row

    device = torch.device("cpu")
    artefact = open_artefact(run)
    tokenizer = tokenizer_of(artefact)
    sets = [[as_messages(prompt) for prompt in BUILT_IN[n * PROMPTS : (n + 1) * PROMPTS]] for n in range(SETS)]
    expected = [expected_answers(artefact, tokenizer, prompts, device, TOKENS) for prompts in sets]
    rows = []
    for name, (is_faithful, write) in EXPORTS.items():
        place = write(run, folder / "export")
        weights = weights_row(artefact, place, device)
        export = load_export(place, device, artefact.origin)
        found = [
            answer_rows(one, export_answers(export, prompts, one), tokenizer, MIN_SAME, MAX_DIFFERENCE)
            for one, prompts in zip(expected, sets, strict=True)
        ]
        answers = [all(row.holds is not False for row in one) for one in found]
        rows.append({
            "export": name, "faithful": is_faithful, "checks": SETS, "passed_by_answers": sum(answers),
            "passed": sum(answers) if weights.holds else 0, "weights": weights.value, "wrong": weights.advice,
            "rows": [[(row.name, row.value, row.holds) for row in one] for one in found],
        })  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        del export
        if place != run:
            shutil.rmtree(place)
    return rows


def merged(dtype: str = "bfloat16", change: Callable[[dict[str, Any]], None] | None = None, **config: Any) -> Any:
    """Writes the merge of a run, or of one whose adapter was changed."""

    def write(run: Path, place: Path) -> Path:
        import torch
        from safetensors.torch import load_file, save_file

        from qlora_dpo.release.artefact import open_artefact
        from qlora_dpo.release.merging.weights import Recipe, prepare_merge, write_merged

        with tempfile.TemporaryDirectory(dir=place.parent) as name:
            copy = shutil.copytree(run, Path(name) / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
            if change is not None:
                tensors = load_file(copy / "adapter_model.safetensors")
                change(tensors)
                save_file(tensors, copy / "adapter_model.safetensors", metadata={"format": "pt"})
            file = copy / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
            merge = prepare_merge(open_artefact(copy), torch.device("cpu"))
            write_merged(merge, Recipe("train", getattr(torch, dtype)), place, "5GB")
        return place

    return write


def without_layer(tensors: dict[str, Any]) -> None:
    """One decoder layer's update is left out."""
    for name, tensor in tensors.items():
        if f".layers.{LAYER}." in name and "lora_B" in name:
            tensor.zero_()


def changed_after(change: Callable[[str, Any], Any]) -> Any:
    """Writes the merge and changes each of its linear weights."""

    def write(run: Path, place: Path) -> Path:
        from safetensors.torch import load_file, save_file

        merged()(run, place)
        for file in place.glob("*.safetensors"):
            tensors = {
                name: change(name, tensor) if "_proj" in name else tensor for name, tensor in load_file(file).items()
            }
            save_file(tensors, file, metadata={"format": "pt"})
        return place

    return write


def into_nf4(_name: str, tensor: Any) -> Any:
    """The merged weight, quantized and dequantized again."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)).to(tensor.dtype)


def of_another_base(name: str, tensor: Any) -> Any:
    """As of a base that was trained a little differently: 1 % of each weight."""
    import torch

    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    return (tensor.float() * (1 + 0.01 * noise)).to(tensor.dtype)


EXPORTS: dict[str, tuple[bool, Callable[[Path, Path], Path]]] = {
    "merged, bfloat16": (True, merged()),
    "merged, float16": (True, merged("float16")),
    "merged, float32": (True, merged("float32")),
    "the adapter itself": (True, lambda run, _: run),
    "one layer's update left out": (False, merged(change=without_layer)),
    "scale doubled": (False, merged(lora_alpha=2 * ALPHA)),
    "another base": (False, changed_after(of_another_base)),
    "merged into NF4": (False, changed_after(into_nf4)),
}


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        "# Verdicts of `release check`", "",
        f"{results['model']}, {results['steps']} steps of DPO on NF4 in bfloat16; each check on {results['prompts']} "
        f"other prompts and {results['tokens']} tokens of an answer. `python benchmarks/check_verdicts.py MODEL`", "",
        f"{results['machine']}; {versions}.", "",
        "| export | should | passed | by the answers alone | tensors right |", "|---|---|---:|---:|---:|",
    ]  # fmt: skip
    for row in results["rows"]:
        of = f"of {row['checks']}"
        lines.append(
            f"| {row['export']} | {'pass' if row['faithful'] else 'fail'} | {row['passed']} {of} | "
            f"{row['passed_by_answers']} {of} | {row['weights'].removesuffix(' tensors')} |"
        )
    for is_faithful, kind in ((True, "Faithful"), (False, "Wrong")):
        chosen = [row for row in results["rows"] if row["faithful"] == is_faithful]
        passed, checks = sum(row["passed"] for row in chosen), sum(row["checks"] for row in chosen)
        lines.append(f"\n{kind} exports {'passed' if is_faithful else 'failed'} in "
                     f"{passed if is_faithful else checks - passed} of {checks} checks.")  # fmt: skip
    return "\n".join(lines) + "\n"


def _processor() -> str:
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
