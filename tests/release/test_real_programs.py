"""The demo's merged model under llama.cpp and vLLM gives the trained adapter's answers. Opt-in:

./run_dpo_training.sh
python -m qlora_dpo merge --adapter runs/demo --output runs/demo-merged
python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python
vllm serve runs/demo-merged --served-model-name m --dtype bfloat16 --port 8000
QLORA_DPO_RUN=runs/demo QLORA_DPO_MERGED=runs/demo-merged \\
QLORA_DPO_LLAMA_CPP=LLAMA/lib/python3.11/site-packages QLORA_DPO_SERVER=http://127.0.0.1:8000/v1 \\
pytest -s tests/release/test_real_programs.py

On a CPU with AMX llama-cpp-python 0.3.36 crashes on q8_0, also on a file that llama.cpp quantized itself: the q8_0 case
then fails, and says so.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from qlora_dpo.cli import main

RUN, MERGED = os.environ.get("QLORA_DPO_RUN", ""), os.environ.get("QLORA_DPO_MERGED", "")
LLAMA_CPP, SERVER = os.environ.get("QLORA_DPO_LLAMA_CPP", ""), os.environ.get("QLORA_DPO_SERVER", "")
PROMPTS, SAME = 50, 0.95

needs_run = pytest.mark.skipif(
    not (RUN and MERGED), reason="QLORA_DPO_RUN and QLORA_DPO_MERGED name no run and no merged folder of it"
)


def check(*options: object) -> dict[str, str]:
    """What `release check` found beside the merged folder itself, by row."""
    arguments = [MERGED, "--adapter", RUN, "--max_prompts", PROMPTS, "--min_same_tokens", SAME, *options]
    assert main(["release", "check", *map(str, arguments)]) == 0
    compared = json.loads((Path(MERGED) / "release_check.json").read_text())["compared"]
    return {row["name"]: row["value"] for row in list(compared.values())[-1]}


@needs_run
@pytest.mark.skipif(not LLAMA_CPP, reason="QLORA_DPO_LLAMA_CPP names no folder with llama-cpp-python")
@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_llama_cpp_answers_as_the_adapter_does(outtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, LLAMA_CPP])
    file = tmp_path / "model.gguf"
    assert main(["release", "gguf", MERGED, "--output", str(file), "--outtype", outtype]) == 0
    found = check("--gguf", file)
    assert found["prompt ids"] == f"{PROMPTS} of {PROMPTS}"


@needs_run
@pytest.mark.skipif(not SERVER, reason="QLORA_DPO_SERVER names no server of the merged folder")
def test_a_server_answers_as_the_adapter_does() -> None:
    found = check("--server", SERVER)
    assert found["prompt ids"] == f"{PROMPTS} of {PROMPTS}"
