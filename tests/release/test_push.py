"""A push to a Hub on this machine: what was said arrives, byte for byte, and whatever goes wrong is a sentence."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import EXPIRED, GOOD, READS, FakeHub, Repository, slow
from released import add_comparison, change, make_gguf, make_merged, make_run

from qlora_dpo.cli import main
from qlora_dpo.release.pushing import uploading

ROOT = Path(__file__).resolve().parents[2]
USAGE, DATA, STORAGE = 2, 65, 74
GOES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json", "training_curves.png",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """The endpoint is read when huggingface_hub is imported, so its constants are replaced; one test does without."""
    from huggingface_hub import constants

    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", GOOD)
        monkeypatch.setattr(uploading, "WAITS", (0.01, 0.01, 0.01))
        monkeypatch.setattr(uploading, "LONGEST_WAIT", 0.01)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        server.repositories["org/base"] = Repository(False, license="apache-2.0")
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def push(folder: Path, *more: str, repo: str = "me/demo") -> int:
    return main(["release", "push", str(folder), "--repo", repo, *more])


def test_dry_run_says_all_and_sends_nothing(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / ".env").write_text("KEY=x")
    before = sorted(path for path in run.rglob("*"))
    assert push(run, "--card", str(run.parent / "card.md")) == 0
    said = capsys.readouterr().out
    assert f"{run} -> me/demo on huggingface, private" in said and "--execute sends this" in said
    goes, stays = said.split("stays:")
    for name in GOES:
        assert f"\n  {name} " in goes
    for name, reason in {
        ".env": "hidden", "checkpoint-40/ (2 files)": "a checkpoint", "pairs/ (1 files)": "data", "run.json": "machine",
        "config.yaml": "paths of this machine", "data.json": "the card", "metrics.jsonl": "a log",
    }.items():  # fmt: skip
        assert any(line.startswith(f"  {name}") and reason in line for line in stays.splitlines()), name
    for line in ("base_model: org/base", "license: apache-2.0", "datasets: org/pairs", "base_model_relation: adapter"):
        assert f"  {line}\n" in stays
    assert {asked.split()[0] for asked in hub.asked} == {"GET"} and set(hub.repositories) == {"org/base"}
    assert sorted(path for path in run.rglob("*")) == before and (run.parent / "card.md").is_file()


def test_what_was_said_arrives_byte_for_byte_in_one_commit(
    hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(run, "--execute", "--commit_message", "first") == 0
    there = hub.repositories["me/demo"]
    assert there.private and set(there.files) == GOES
    sent = json.loads(there.files["tokenizer_config.json"])
    assert sent["tokenizer_class"] == "PreTrainedTokenizerFast" and "is_local" not in sent
    for name in GOES - {"README.md", "tokenizer_config.json"}:
        assert there.files[name] == (run / name).read_bytes(), name
    assert [commit["summary"] for commit in there.commits] == ["first"]
    assert f"Pushed to {hub.address}/me/demo/commit/" in capsys.readouterr().out
    assert b"base_model: org/base" in there.files["README.md"]
    assert "PUT put" in hub.asked  # weights by LFS, texts within the commit
    hub.asked.clear()
    assert push(run, "--execute") == 0
    assert "PUT put" not in hub.asked and len(there.commits) == 1
    assert "had all of this already" in capsys.readouterr().out


def test_merged_folder_in_shards_and_gguf_arrive(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    merged, gguf = make_merged(tmp_path / "merged", run), make_gguf(tmp_path / "gguf")
    assert push(merged, "--execute", repo="me/merged") == 0
    files = hub.repositories["me/merged"].files
    shards = {path.name for path in merged.glob("*.safetensors")}
    assert len(shards) > 1 and shards | {"model.safetensors.index.json", "config.json", "training_curves.png"} <= set(
        files
    )
    assert all(files[name] == (merged / name).read_bytes() for name in shards)
    report = json.loads(files["merge_report.json"])
    assert report["run"] == "run" and str(tmp_path) not in files["README.md"].decode()
    assert push(gguf, "--execute", "--base_model_id", "org/base", repo="me/gguf") == 0
    assert set(hub.repositories["me/gguf"].files) == {"README.md", "Modelfile", "model-q8_0.gguf"}


@pytest.mark.slow
def test_through_the_environment_alone(run: Path, tmp_path: Path) -> None:
    """In a process of its own, by HF_ENDPOINT."""
    with FakeHub() as server:
        result = subprocess.run(
            command(run), env=environment(server, tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        assert set(server.repositories["me/demo"].files) == GOES and server.repositories["me/demo"].private


def command(run: Path) -> list[str]:
    arguments = ["release", "push", str(run), "--repo", "me/demo", "--license", "mit", "--execute"]
    return [sys.executable, "-m", "qlora_dpo", *arguments]


def environment(server: FakeHub, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {
        "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": server.address, "HF_TOKEN": GOOD,
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.mark.parametrize("route", ["info", "create", "validate", "preupload", "batch", "put", "commit", "paths-info"])
@pytest.mark.parametrize("status", [500, 429])
def test_a_server_that_fails_twice_is_asked_again(route: str, status: int, hub: FakeHub, run: Path) -> None:
    hub.troubles[route] = [status, status]
    assert push(run, "--execute", "--license", "mit") == 0
    assert set(hub.repositories["me/demo"].files) == GOES and len(hub.repositories["me/demo"].commits) == 1


@pytest.mark.parametrize("route", ["info", "create", "put", "commit"])
def test_a_server_that_fails_always_is_one_sentence(
    route: str, hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.troubles[route] = [503] * 99
    assert push(run, "--execute", "--license", "mit") == STORAGE
    assert "nothing was committed to me/demo: the Hub answers 503" in (said := capsys.readouterr().err)
    assert said.count("\n") <= 3 + said.count("%|") and "Traceback" not in said  # a line, and what progress bars leave
    assert not hub.repositories.get("me/demo", Repository(True)).commits


@pytest.mark.parametrize(
    ("token", "repo", "code", "said"),
    [
        (EXPIRED, "me/demo", STORAGE, "the token is not accepted"),
        (READS, "me/demo", STORAGE, "the token may not write there"),
        (GOOD, "theirs/demo", STORAGE, "the token may not write there"),
        ("", "me/demo", USAGE, "nobody is logged in to the Hub"),
    ],
)
def test_tokens_that_do_not_do(
    token: str, repo: str, code: int, said: str, hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(run, "--execute", "--license", "mit", repo=repo) == code
    error = capsys.readouterr().err
    assert said in error and (not token or token not in error) and "Traceback" not in error
    assert set(hub.repositories) == {"org/base"}


def test_no_network_and_offline_mode(
    hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(run) == 0  # a dry run needs no network
    assert "cannot be asked for" in capsys.readouterr().out
    assert push(run, "--execute", "--license", "mit") == STORAGE
    assert "the Hub cannot be reached" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(run, "--execute", "--license", "mit") == USAGE
    assert "Unset HF_HUB_OFFLINE" in capsys.readouterr().err


def test_public_only_when_asked(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["me/open"] = Repository(False, {"old.safetensors": b"x", ".gitattributes": b"x"})
    assert push(run, "--execute", repo="me/open") == USAGE
    assert "exists and is public" in capsys.readouterr().err and not hub.repositories["me/open"].commits
    assert push(run, "--execute", "--public", repo="me/open") == 0
    assert "stay in me/open: old.safetensors.\n" in capsys.readouterr().out
    assert push(run, "--execute", "--public", repo="me/new") == 0 and not hub.repositories["me/new"].private
    hub.repositories["me/closed"] = Repository(True)
    assert push(run, "--execute", "--public", repo="me/closed") == 0 and hub.repositories["me/closed"].private
    assert "is private and stays so" in capsys.readouterr().out
    hub.is_always_public = True  # whatever it was asked for
    assert push(run, "--execute", repo="me/other") == USAGE and not hub.repositories["me/other"].files


@pytest.mark.parametrize(
    "repo",
    ["demo", "me/", "/demo", "a/b/c", "me/de mo", "me/../x", "me/x.git", "me/a--b", "-me/x", "me/x-", "我/x", ""],
)
def test_names_that_no_repository_has(repo: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(run, repo=repo) == USAGE
    assert "cannot be the name of a repository" in capsys.readouterr().err


def test_a_base_on_this_machine_is_named_or_refused(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", str(tmp_path / "models" / "mine"))
    assert push(run, "--execute") == USAGE
    assert "--base_model_id ORG/NAME" in capsys.readouterr().err
    assert push(run, "--base_model_id", "/home/x/y") == USAGE
    assert push(run, "--execute", "--base_model_id", "org/base") == 0
    files = hub.repositories["me/demo"].files
    sent = json.loads(files["adapter_config.json"])
    assert (sent["base_model_name_or_path"], sent["revision"]) == ("org/base", None)
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"].startswith("/")
    assert all(str(tmp_path).encode() not in content for content in files.values())
    kept = {key: value for key, value in sent.items() if key not in {"base_model_name_or_path", "revision"}}
    assert kept.items() <= json.loads((run / "adapter_config.json").read_text()).items()


@pytest.mark.parametrize("way", ["merge", "check", "gate"])
def test_what_the_measurements_refuse_goes_only_by_force_and_says_so(
    way: str, hub: FakeHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_merged(tmp_path / "merged", run, ("it keeps 60 % of the margin",) if way == "merge" else ())
    if way == "check":
        (folder / "release_check.json").write_text('{"passed": false, "problems": ["the end token is another"]}')
    if way == "gate":
        add_comparison(run, holds=False)
    assert push(folder, "--execute") == DATA
    why = {"merge": "60 %", "check": "the end token is another", "gate": "the gate does not hold: kl.mean"}[way]
    assert why in capsys.readouterr().err and "me/demo" not in hub.repositories
    assert push(folder, "--execute", "--force") == 0
    assert why in hub.repositories["me/demo"].files["README.md"].decode()


def test_an_unfinished_run_never_goes(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run / "run.json", status="training", step=41)
    assert push(run, "--execute", "--force") == USAGE
    assert "has not finished (step 41 of 60)" in capsys.readouterr().err and "me/demo" not in hub.repositories


def test_a_card_of_a_person_goes_as_it_is(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "---\nlicense: mit\nbase_model: org/base\n---\n# Mine\n"
    (run / "README.md").write_text(text)
    assert push(run, "--execute") == 0
    assert hub.repositories["me/demo"].files["README.md"].decode() == text
    assert "written or edited by a person" in capsys.readouterr().out
    for bad, said in (("base_model: /a/b", "no id on a hub"), ("base_model: [", "cannot be read")):
        (run / "README.md").write_text(f"---\n{bad}\n---\n# Mine\n")
        assert push(run) == USAGE
        assert said in capsys.readouterr().err


def test_a_card_that_the_hub_refuses_is_said(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "README.md").write_text("---\nlanguage: 3\n---\n# base_model: not a model\n")
    assert push(run, "--execute") == USAGE
    assert '"base_model" must be a model id' in capsys.readouterr().err


def test_links_out_of_the_folder_and_other_things_stay(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (run / "generation_config.json").symlink_to(tmp_path / "secret.json")
    (run / "tokenizer.model").symlink_to(tmp_path / "secret.json")
    (run / "LICENSE").symlink_to(run / "run.json")
    (run / "NOTICE").symlink_to(run / "chat_template.jinja")
    (run / "vocab.txt").symlink_to(run / "nowhere")
    os.mkfifo(run / "merges.txt")
    (run / "adapter_model.bin").write_bytes(b"pickle")
    (run / "other.safetensors").write_bytes(b"")
    (run / "additional_chat_templates").mkdir()
    (run / "additional_chat_templates" / "tools.jinja").write_text("x")
    (run / "additional_chat_templates" / "x.py").write_text("x")
    assert push(run, "--license", "mit") == 0
    goes, stays = capsys.readouterr().out.split("stays:")
    assert "\n  NOTICE " in goes and "additional_chat_templates/tools.jinja" in goes
    for name, reason in {
        "tokenizer.model": "a link that leads out of the folder", "LICENSE": "a link to run.json, which stays",
        "vocab.txt": "a link to nowhere", "merges.txt": "no file", "adapter_model.bin": "a pickle",
        "other.safetensors": "not on the list", "additional_chat_templates/x.py": "not on the list",
    }.items():  # fmt: skip
        assert any(line.startswith(f"  {name} ") and reason in line for line in stays.splitlines()), name


def test_a_file_that_changes_meanwhile_stops_the_push(
    hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run / "adapter_model.safetensors"
    hub.before["put"] = lambda: os.utime(weights, ns=(1, 1))
    assert push(run, "--execute") == STORAGE
    assert "adapter_model.safetensors changed while it was uploaded" in capsys.readouterr().err
    assert not hub.repositories["me/demo"].commits


def test_a_file_that_the_hub_leaves_out_is_said(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.ignored.add("tokenizer.json")
    assert push(run, "--execute") == STORAGE
    assert "but without tokenizer.json as it is here" in capsys.readouterr().err


def test_a_place_for_the_card_that_is_not_there_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(run, "--license", "mit", "--card", str(run / "nowhere" / "card.md")) == STORAGE
    assert "nowhere" in capsys.readouterr().err


def test_broken_json_in_the_folder_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "tokenizer_config.json").write_text("{")
    assert push(run) == DATA
    assert "tokenizer_config.json is no JSON" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_the_upload_commits_nothing(number: signal.Signals, run: Path, tmp_path: Path) -> None:
    with FakeHub() as server:
        server.before["put"] = slow(4)
        process = subprocess.Popen(
            command(run), env=environment(server, tmp_path), cwd=ROOT, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        while "PUT put" not in server.asked:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else 75)
        assert "Nothing was committed to me/demo" in said and "Traceback" not in said
        assert not server.repositories["me/demo"].commits
        server.before.clear()
        result = subprocess.run(
            command(run), env=environment(server, tmp_path), cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0 and len(server.repositories["me/demo"].commits) == 1


class Stub:
    """What push asks of modelscope_hub's HubApi; how it uploads is the package's affair and is not tested."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.files: dict[str, bytes] = {}
        self.visibility: str | None = None
        self._config = type("Config", (), {"token": "ms-token", "endpoint": "https://modelscope.example/"})()

    def repo_exists(self, name: str, kind: str) -> bool:
        return self.visibility is not None

    def create_repo(self, name: str, kind: str, *, visibility: str, license: str) -> None:
        self.visibility = visibility
        self.calls.append(("create", name, kind, visibility, license))

    def get_repo(self, name: str, kind: str) -> Any:
        return type("Info", (), {"visibility": type("Visibility", (), {"label": self.visibility})()})()

    def upload_folder(self, name: str, kind: str, folder: str, *, commit_message: str, use_cache: bool) -> None:
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    modelscope_hub = pytest.importorskip("modelscope_hub")
    made = Stub()
    monkeypatch.setattr(modelscope_hub, "HubApi", lambda: made)
    return made


def test_modelscope_gets_the_same_files(stub: Stub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(run, "--hub", "modelscope", "--execute") == 0
    assert stub.calls == [("create", "me/demo", "model", "private", "other")] and set(stub.files) == GOES
    assert stub.files["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    assert "https://modelscope.example/models/me/demo" in capsys.readouterr().out
    stub.visibility, stub.files = "public", {}
    assert push(run, "--hub", "modelscope", "--execute") == USAGE and not stub.files
    stub._config.token = None
    assert push(run, "--hub", "modelscope", "--execute") == USAGE
    assert "MODELSCOPE_API_TOKEN" in capsys.readouterr().err


def test_the_stub_has_the_shape_of_the_package() -> None:
    modelscope_hub = pytest.importorskip("modelscope_hub")
    for name in ("repo_exists", "create_repo", "get_repo", "upload_folder"):
        stubs, real = (inspect.signature(getattr(kind, name)).parameters for kind in (Stub, modelscope_hub.HubApi))
        ours, theirs = list(stubs.values()), list(real.values())
        assert all(one.name in real for one in ours if one.kind is one.KEYWORD_ONLY), name
        positional = [one for one in ours if one.kind is not one.KEYWORD_ONLY]
        assert all(one.kind is not one.KEYWORD_ONLY for one in theirs[: len(positional)]), name
        assert all(one.default is not one.empty or one.kind is one.VAR_KEYWORD for one in theirs[len(positional) :]), (
            name
        )
    config = modelscope_hub.HubApi(token="x", endpoint="https://modelscope.example")._config
    assert (config.token, config.endpoint) == ("x", "https://modelscope.example")


def test_modelscope_without_its_package_or_with_an_error(
    stub: Stub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modelscope_hub.errors import AuthenticationError

    def refuse(*_: Any, **__: Any) -> None:
        raise AuthenticationError("401", status_code=401)

    monkeypatch.setattr(stub, "upload_folder", refuse)
    assert push(run, "--hub", "modelscope", "--execute") == STORAGE
    assert "on ModelScope failed: the token is not accepted" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    assert push(run, "--hub", "modelscope", "--execute") == USAGE
    assert "pip install modelscope-hub" in capsys.readouterr().err
