"""Log-probs from a real vLLM server against those of the same bfloat16 model here. Opt-in:

MODEL_DIR is the folder of a real chat model in bfloat16 (one of 135 million parameters will do), or made by
PYTHONPATH=. python tests/reference/test_real_vllm.py MODEL_DIR   (small and random, with LLaMA's tokenizer)
vllm serve MODEL_DIR --served-model-name m --dtype bfloat16 --port 8000
QLORA_DPO_VLLM_URL=http://127.0.0.1:8000/v1 QLORA_DPO_VLLM_MODEL=MODEL_DIR pytest -s tests/reference/test_real_vllm.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_dpo.cli import main
from qlora_dpo.data.dataset import PairDataset, load_preference_dataset
from qlora_dpo.data.preferences import Message, PreferencePair, RefusedRow
from qlora_dpo.endpoint import Endpoint
from qlora_dpo.models.loading import load_tokenizer
from qlora_dpo.reference import endpoint_logps
from qlora_dpo.reference.drift import drift_between
from qlora_dpo.reference.endpoint_logps import EndpointLogps
from qlora_dpo.reference.fill import keys_of
from qlora_dpo.reference.served_tokens import DIALECTS, LogpsRequest
from qlora_dpo.reference.store import Logps, ReferenceStore
from qlora_dpo.scoring.served import ROUNDING

ROWS = 200
URL, MODEL = os.environ.get("QLORA_DPO_VLLM_URL", ""), os.environ.get("QLORA_DPO_VLLM_MODEL", "")
NAME = os.environ.get("QLORA_DPO_VLLM_NAME", "m")
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)

needs_server = pytest.mark.skipif(
    not (URL and MODEL), reason="QLORA_DPO_VLLM_URL and QLORA_DPO_VLLM_MODEL name no vLLM server and its model"
)


def make_model(folder: Path) -> None:
    """A random LLaMA of 20 million parameters in bfloat16, with LLaMA's tokenizer and the chat template of its time."""
    import torch
    from tiny import tiny_config
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(SHARED / "llama_tokenizer"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = tiny_config(
        "llama", vocab_size=len(tokenizer), hidden_size=256, intermediate_size=704, head_dim=64, num_hidden_layers=4,
        max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.1)  # else all tokens are as likely
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module")
def rows(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of Belle's pairs."""
    source = shared_data / "belle_pairs_hh.jsonl"
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    lines = source.read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[: ROWS + 1]), "utf-8")  # one of them has the same answer twice
    return file


def load(rows: Path) -> PairDataset:
    return load_preference_dataset(str(rows), tokenizer=load_tokenizer(MODEL), bad_rows="skip")


def values(store: Path, pairs: PairDataset) -> list[Logps]:
    keys = [key for pair in pairs for key in keys_of(pair)]
    with ReferenceStore.open(store, read_only=True) as opened:
        (model,) = opened.models()
        found = opened.of(model.identity).get(keys)
    return [found[key] for key in keys]


@needs_server
def test_the_server_gives_what_the_model_gives_here(rows: Path, tmp_path: Path) -> None:
    fill = ["reference", "--model_name_or_path", MODEL, "--dataset", str(rows), "--load_in_4bit", "false",
            "--lint", "off", "--bad_rows", "skip"]  # fmt: skip
    served, local = tmp_path / "served.sqlite", tmp_path / "local.sqlite"
    assert main([*fill, "--store", str(served), "--endpoint", URL, "--endpoint_model", NAME]) == 0
    assert main([*fill, "--store", str(local)]) == 0
    pairs = load(rows)
    drift = drift_between(values(served, pairs), values(local, pairs), beta=0.1)
    print(drift)
    assert drift.pairs == len(pairs) == ROWS
    assert drift.mean_per_token < ROUNDING


@needs_server
def test_all_ways_to_ask_give_the_same(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = load(rows)
    texts = {pair.origin: pair for pair in pairs.texts if isinstance(pair, PreferencePair)}
    found: dict[str, dict[bytes, Any]] = {}
    for dialect in DIALECTS:
        monkeypatch.setattr(endpoint_logps, "DIALECTS", (dialect,))
        logps = EndpointLogps(Endpoint([URL], NAME), lambda token: load_tokenizer(MODEL).decode([token]))
        asked = chain.from_iterable(requests(pair, texts[pair.origin]) for pair in pairs[:20])
        found[dialect.name] = {request.key: answer for request, answer in logps(asked)}
    expected, *others = found.values()
    assert all(not isinstance(answer, RefusedRow) for answer in expected.values())
    for name, other in zip(list(found)[1:], others, strict=True):
        same = [key for key, answer in other.items() if not isinstance(answer, RefusedRow)]
        print(f"{name}: {len(same)} of {len(other)} answers")
        assert len(same) >= len(other) // 2
        assert max(float(np.abs(other[key] - expected[key]).mean()) for key in same) < ROUNDING


def requests(pair: Any, text: PreferencePair) -> Iterator[LogpsRequest]:
    for field, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        messages: list[Message] = [*text.messages, {"role": "assistant", "content": getattr(text, field)}]
        yield LogpsRequest(pair.prompt_ids, ids, pair.origin, field, messages)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    make_model(Path(sys.argv[1]))
