"""The page: two answers to one prompt, from one model, safe by default."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, with_lora
from visitors import config_of

from qlora_dpo.cli import main
from qlora_dpo.models.lora import save_adapter

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: Any) -> Iterator[str]:
    """A real server over a saved adapter; yields its address."""
    folder = tmp_path_factory.mktemp("app")
    model = with_lora(tiny_model())
    model.peft_config["default"].base_model_name_or_path = str(model_folder)
    adapter = folder / "adapter"
    adapter.mkdir()
    save_adapter(model, adapter)
    log = folder / "log"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}
    with log.open("w") as output:
        arguments = ["-m", "eval", "app", "--adapter", str(adapter), "--port", "0", "--max_new_tokens", "8"]
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
        try:
            deadline = time.monotonic() + 120
            address = None
            while address is None and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.3)
                address = re.search(r"http://[\d.]+:\d+", log.read_text())
            assert address is not None, log.read_text()
            yield address[0]
        finally:
            process.terminate()
            process.wait(20)


def fetch(address: str, body: bytes | None = None) -> str:
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return str(response.read().decode())


@pytest.mark.slow
def test_served_page_is_local_and_serves_no_files(server: str) -> None:
    assert server.startswith("http://127.0.0.1:")  # whatever GRADIO_SHARE and GRADIO_SERVER_NAME say
    assert "Before and after" in fetch(server)
    for path in ("/etc/passwd", "../../etc/passwd", str(ROOT / "README.md")):
        with pytest.raises(urllib.error.HTTPError) as error:
            fetch(f"{server}/gradio_api/file={path}")
        assert error.value.code in {403, 404}
        error.value.close()


@pytest.mark.slow
def test_served_page_answers_twice(server: str) -> None:
    config = config_of(server)
    number = next(row["id"] for row in config["dependencies"] if row["api_name"] == "compare")
    body = {"data": ["w7 w8", 8, 0, 0], "fn_index": number, "session_hash": "s"}
    fetch(f"{server}/gradio_api/queue/join", json.dumps(body).encode())
    with urllib.request.urlopen(f"{server}/gradio_api/queue/data?session_hash=s", timeout=120) as events:
        for line in events:
            if b"process_completed" in line:
                event = json.loads(line.removeprefix(b"data: "))
                break
    assert event["success"], event
    (shown,) = event["output"]["data"]
    assert shown.count("log-prob") > 2 and "adapter off" in shown


def test_missing_adapter_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    from eval.cli import main as eval_main

    assert eval_main(["app", "--adapter", "/no/such/run"]) == 74
    assert "/no/such/run" in capsys.readouterr().err
    assert main(["app"]) == 2  # a command of eval, not of qlora_dpo
