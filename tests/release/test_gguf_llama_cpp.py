"""llama.cpp itself reads the GGUF files: the same ids, prompts and log-probs as transformers has of the folder.

Opt-in: `pip install xllamacpp` (a build of llama.cpp) into the environment, or its folder on PYTHONPATH.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import FAMILIES, make_family, plain, write

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp, a build of llama.cpp, is absent")

MESSAGES = [
    [{"role": "user", "content": "Hello, world! It's 1234 o'clock."}],
    [{"role": "user", "content": "two  spaces\n\nand lines"}, {"role": "assistant", "content": "fox"},
     {"role": "user", "content": "中文 é 🚀"}],
]  # fmt: skip
ASK = """
import json, sys, urllib.request
import xllamacpp

file, context, asked = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = file, context, 1, 0, False
params.n_batch, params.cpuparams.n_threads = 1024, 1
server = xllamacpp.Server(params)

def post(route, **body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.listening_address + route, data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))

letter = post("/tokenize", content="a")["tokens"][-1]  # an end token or half a character would come without log-probs

def logps(ids):  # of the model itself: the bias only moves what is drawn
    bias = [[letter, 1000.0]]
    said = post("/completion", prompt=ids, n_predict=1, n_probs=1000, cache_prompt=False, logit_bias=bias)
    return {row["id"]: row["logprob"] for row in said["completion_probabilities"][0]["top_logprobs"]}

prompts = [post("/apply-template", messages=messages)["prompt"] for messages in asked["messages"]]
ids = [post("/tokenize", content=prompt, parse_special=True)["tokens"] for prompt in asked["texts"]]
json.dump({"prompts": prompts, "ids": ids, "logps": [logps(ids) for ids in asked["ids"]]}, sys.stdout)
"""


def ask(file: Path, context: int, **asked: Any) -> dict[str, Any]:
    """What llama.cpp makes of texts and ids, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(file), str(context)], input=json.dumps(asked), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "length"), [*((family, 40) for family in FAMILIES), ("phi3", 300)], ids=lambda value: str(value)
)
def test_llama_cpp_computes_what_the_model_does(
    family: str, length: int, sentencepiece_file: Path, tmp_path: Path
) -> None:
    """Short texts, and one for which Phi 3 has other frequencies; Gemma's window is shorter than either."""
    folder = make_family(family, tmp_path / "model", sentencepiece_file)
    (tmp_path / "out").mkdir()
    write(folder, tmp_path / "out" / "model.gguf")
    model, tokenizer = plain(folder)
    rendered = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for messages in MESSAGES
    ]
    drawn = torch.randint(3, len(tokenizer) - 8, (2, length), generator=torch.Generator().manual_seed(0))
    context = 256 if length < 256 else 512
    found = ask(tmp_path / "out" / "model.gguf", context, messages=MESSAGES, texts=rendered, ids=drawn.tolist())
    assert found["ids"] == [tokenizer(text, add_special_tokens=False).input_ids for text in rendered]
    bos = tokenizer.bos_token or ""
    assert [text.removeprefix(bos) for text in found["prompts"]] == [text.removeprefix(bos) for text in rendered]
    expected = model.half().float()(drawn).logits[:, -1].log_softmax(-1)
    for row, logps in zip(expected, found["logps"], strict=True):
        assert len(logps) == len(row)
        theirs = torch.tensor([logps[str(id_)] for id_ in range(len(row))])
        torch.testing.assert_close(theirs, row, atol=0.02, rtol=0)
