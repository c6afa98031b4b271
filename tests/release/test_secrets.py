"""Every kind of secret is found by its place and kind, and never shown; what a folder may hold is not taken for one."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from released import make_run
from tiny import tiny_tokenizer

from qlora_dpo.cli import main
from qlora_dpo.errors import StorageError
from qlora_dpo.redaction import redacted
from qlora_dpo.release.pushing.secrets import head_of, scan

SECRETS = {
    "a Hugging Face token": "hf_" + "a1B2" * 8,
    "an API key (sk-)": "sk-proj-" + "a1B2" * 6,
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "a GitLab token": "glpat-" + "a1B2" * 5,
    "an AWS access key": "AKIA" + "A1B2" * 4,
    "a ModelScope token": "ms-01234567-89ab-cdef-0123-456789abcdef",
    "a Google API key": "AIza" + "a1B2c" * 7,
    "a Slack token": "xoxb-123456789012-abcdef",
    "a Groq, NVIDIA or wandb key": "nvapi-" + "a1B2" * 6,
    "a JSON web token": "eyJ" + "a1B2" * 4 + ".eyJ" + "a1B2" * 4 + "." + "a1B2" * 4,
    "a private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----",
    "a URL with a user's password": "https://me:p4ss@host/x",
    "a URL with a key": "https://host/x?access_token=p4ssw0rd",
    "a bearer token": "Authorization: Bearer a1b2c3d4e5",
    "a value that is named as a key": "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_each_kind_is_found_by_line_and_redacted(kind: str) -> None:
    secret = SECRETS[kind]
    found = scan("file.txt", f"one\ntwo\nthree {secret}\n".encode())
    assert (f"file.txt:3: {kind}") in map(str, found)
    assert all(secret not in str(finding) for finding in found)
    assert secret not in redacted(f"it is {secret}")
    in_json = scan("config.json", json.dumps({"x": [1, {"note": secret}]}, indent=1).encode())
    assert kind in {finding.kind for finding in in_json}


def test_values_of_the_environment_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "swordfish-9")
    assert [str(one) for one in scan("a.json", b'{"x": "swordfish-9"}')] == ["a.json:1: the value of $MY_SERVICE_TOKEN"]


def test_traces_of_the_machine_are_found_but_not_in_a_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-box-7")
    text = f'{{"a": "{tmp_path}/models/x", "b": "/home/ann/x", "c": "C:\\\\Users\\\\ann\\\\x", "d": "on gpu-box-7 it"}}'
    kinds = {finding.kind for finding in scan("merge_report.json", text.encode())}
    assert kinds == {"a path in your home directory", "a path in a home directory", "the name of this machine"}
    assert len([one for one in scan("merge_report.json", text.replace(", ", ",\n").encode())]) == 4
    assert scan("tokenizer.json", text.encode()) == []
    monkeypatch.setattr(socket, "gethostname", lambda: "model")
    assert scan("config.json", b'{"model": "my-model"}') == []


def test_what_models_consist_of_is_innocent(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    run = make_run(tmp_path / "run")
    for file in [*tmp_path.glob("*.json"), *run.glob("*.json")]:
        assert scan(file.name, file.read_bytes()) == [], file
    innocent = [
        '{"://": 1, "password": 123456, "token": 2, "@": 3, "&token=": 4, "Bearer": 5, " Basic": 6}',
        "Bearer authentication is used. Set eos_token: </s>, revision " + "c" * 40 + ".",
        "hf_model sk-small user@host a:b risk-adjusted-portfolio-x",
        "tokenizer_class: PreTrainedTokenizerFast, secret keys are kept, password policies apply",
    ]
    for text in innocent:
        assert scan("README.md", text.encode()) == [], text


def test_weights_are_looked_through_where_they_hold_text(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    secret = SECRETS["a Hugging Face token"]
    save_file({"x": torch.zeros(4)}, tmp_path / "m.safetensors", metadata={"note": f"by {secret}"})
    assert [finding.kind for finding in scan("m", head_of(tmp_path / "m.safetensors"))] == ["a Hugging Face token"]
    (tmp_path / "m.gguf").write_bytes(b"GGUF\0\0" + secret.encode() + bytes(100))
    (found,) = scan("m.gguf", head_of(tmp_path / "m.gguf"))
    assert str(found) == "m.gguf: a Hugging Face token"
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(StorageError, match="no safetensors file"):
        head_of(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    "place", ["tokenizer_config.json", "README.md", "chat_template.jinja", "config.yaml", "data.json"]
)
def test_push_refuses_a_secret_wherever_it_would_go(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.yaml and data.json stay, but the card quotes them."""
    run, secret = make_run(tmp_path / "run"), SECRETS["a Hugging Face token"]
    texts = {
        "tokenizer_config.json": json.dumps({"x": secret}),
        "README.md": f"# Mine\n\nLoad it with {secret}.\n",
        "chat_template.jinja": f"{{# {secret} #}}",
        "config.yaml": (run / "config.yaml").read_text() + f"wandb_note: {secret}\n",
        "data.json": json.dumps({"summary": [f"https://me:{secret}@host/x: 4 pairs"]}),
    }
    (run / place).write_text(texts[place])
    assert main(["release", "push", str(run), "--repo", "me/demo", "--license", "mit"]) == 2
    said = capsys.readouterr()
    shown = "README.md" if place in {"config.yaml", "data.json"} else place
    assert f"  {shown}:" in said.err and "a Hugging Face token" in said.err and "nothing was sent" in said.err
    assert secret not in said.out + said.err
