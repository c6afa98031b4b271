"""What is released, and where its base is: a folder, the Hub's cache, or the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from release.tiny_adapters import save_base, save_run
from tiny import tiny_model

from qlora_dpo.errors import ModelError, StorageError
from qlora_dpo.release.artefact import locate_base, open_artefact, tokenizer_of
from qlora_dpo.training.folder.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
COMMIT, OTHER = "0123456789" * 4, "abcdef0123" * 4
LOCATE = """
import sys
from pathlib import Path
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.release.artefact import locate_base, open_artefact
try:
    artefact = open_artefact(Path(sys.argv[1]))
    print(artefact.origin.revision, locate_base(artefact))
except QloraDpoError as error:
    print(error)
"""


def located(run: Path, home: Path, **environment: str) -> str:
    """What another process says about where the run's base is."""
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, str(run)], cwd=ROOT, env=os.environ | {"HF_HOME": str(home)} | environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def change(run: Path, **values: object) -> None:
    file = run / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def hub_run(tmp_path: Path, pairs_file: Path) -> Path:
    """A run on somebody/tiny, at a commit that it noted."""
    run = save_run(tmp_path / "run", save_base(tmp_path / "base"), pairs_file)
    change(run, base_model_name_or_path="somebody/tiny")
    RunFolder(run).update_status(content={"model_name_or_path": COMMIT})
    return run


@contextmanager
def hub(folder: Path, commit: str) -> Iterator[tuple[str, list[str]]]:
    """A Hub with one model; gives its address and the files that were fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            name = self.path.split("?")[0].rpartition("/")[2]
            if self.path.startswith("/api/"):
                files = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                    for path in sorted(folder.iterdir())
                ]
                about = {"id": "somebody/tiny", "sha": commit, "siblings": [{"rfilename": f["path"]} for f in files]}
                return self._answer(200, json.dumps(files if "/tree/" in self.path else about).encode())
            if "/resolve/" not in self.path or not (folder / name).is_file():
                return self._answer(404, b"")
            fetched.extend([name] if self.command == "GET" else [])
            return self._answer(200, (folder / name).read_bytes())

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            headers = {
                "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
                "X-Repo-Commit": commit,
                "Content-Length": str(len(body)),
            }
            for name, value in (headers | ({"X-Error-Code": "EntryNotFound"} if status == 404 else {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_base_on_the_hub_is_fetched_at_the_noted_commit_without_what_is_not_needed(
    hub_run: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    assert (base / "model.safetensors.index.json").is_file()
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "consolidated.safetensors").write_bytes(b"twice the same")
    with hub(base, COMMIT) as (address, fetched):
        said = located(hub_run, tmp_path / "home", HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert said == f"{COMMIT} {tmp_path / 'home/hub/models--somebody--tiny/snapshots' / COMMIT}"
    shards = {path.name for path in base.glob("model-*.safetensors")}
    assert shards | {"config.json", "generation_config.json", "model.safetensors.index.json"} == set(fetched)
    assert located(hub_run, tmp_path / "home") == said  # now from the cache, offline


@pytest.mark.slow
def test_base_that_is_not_to_be_had_is_said(hub_run: Path, tmp_path: Path) -> None:
    assert "somebody/tiny: not a local folder, not in the cache" in located(hub_run, tmp_path / "home")
    with hub(tmp_path / "base", OTHER) as (address, _):
        said = located(hub_run, tmp_path / "home", HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert f"is at commit {OTHER[:12]}, the run noted {COMMIT[:12]}" in said


def test_revision_is_the_noted_commit_unless_the_base_has_moved(hub_run: Path, tmp_path: Path) -> None:
    change(hub_run, revision="main")
    assert open_artefact(hub_run).origin.revision == COMMIT
    moved = open_artefact(hub_run, base_model=str(tmp_path / "base"))
    assert moved.origin.revision is None and locate_base(moved) == tmp_path / "base"
    RunFolder(hub_run).update_status(content={})
    assert open_artefact(hub_run).origin.revision == "main"


def test_base_in_a_folder_is_compared_with_what_the_run_noted(tmp_path: Path, pairs_file: Path) -> None:
    base = save_base(tmp_path / "base")
    run = save_run(tmp_path / "run", base, pairs_file)
    assert locate_base(open_artefact(run)) == base
    tiny_model(seed=5).save_pretrained(base)
    with pytest.raises(ModelError, match=f"{base} is not the base that {run} was trained on: it has other weights"):
        locate_base(open_artefact(run))
    for file in base.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(StorageError, match=r"model-00001-of-\d+\.safetensors cannot be read: No such file"):
        locate_base(open_artefact(run))


def test_tokenizer_is_the_one_that_was_trained_with(tmp_path: Path, pairs_file: Path) -> None:
    run = save_run(tmp_path / "run", save_base(tmp_path / "base"), pairs_file, prompt_template="anima")
    (run / "chat_template.jinja").write_text("{{ 'of the run' }}")
    of_checkpoint = open_artefact(run / "checkpoint-6")
    assert of_checkpoint.run is not None and of_checkpoint.run.path == run
    assert tokenizer_of(of_checkpoint).chat_template == "{{ 'of the run' }}"
    (run / "tokenizer_config.json").unlink()
    assert "### Instruction:" in tokenizer_of(of_checkpoint).chat_template  # the base's, with the run's template
    alone = shutil.copytree(run, tmp_path / "alone", ignore=shutil.ignore_patterns("config.yaml", "run.json"))
    assert "w5" in tokenizer_of(open_artefact(alone)).chat_template and not open_artefact(alone).origin.is_known
