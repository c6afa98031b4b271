"""A model is known again wherever it lies, and taken for another as soon as its log-probs could be others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora_dpo.errors import StorageError
from qlora_dpo.models.weight_files import weight_files
from qlora_dpo.reference import identity
from qlora_dpo.reference.identity import differences, hashes, local_identity

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def make_model(folder: Path, value: float = 1.0, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({"weight": torch.full((4, 4), value)}, folder / "model.safetensors")
    write(folder / "config.json", {"rope_theta": 1e4, "transformers_version": "5.0", "dtype": "bfloat16", **config})
    return folder


def make_adapter(folder: Path, value: float = 1.0, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({"lora_A": torch.full((4, 4), value)}, folder / "adapter_model.safetensors")
    write(folder / "adapter_config.json", {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "x", **config})
    return folder


def write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content))


def fingerprint(model: Path, **changes: Any) -> str:
    options: dict[str, Any] = {"commit": None, "quantization": NF4, "dtype": "bfloat16", "adapter": None} | changes
    return local_identity(str(model), **options).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"quantization": None},
        {"quantization": NF4 | {"bnb_4bit_quant_type": "fp4"}},
        {"dtype": "float32"},
        {"code": "c0"},
    ],
    ids=str,
)
def test_how_a_model_is_loaded_makes_another(change: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    assert fingerprint(model, **change) != fingerprint(model)


def test_content_makes_a_model_and_its_place_does_not(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere" / "copy"))
    saved_again = make_model(tmp_path / "newer", transformers_version="6.0", _name_or_path="y")
    assert fingerprint(model) == fingerprint(moved) == fingerprint(saved_again)
    others = [make_model(tmp_path / "other", 2.0), make_model(tmp_path / "longer", rope_theta=1e6)]
    assert len({fingerprint(model), *map(fingerprint, others)}) == 3


def test_frozen_adapter_is_part_of_the_reference(tmp_path: Path) -> None:
    model, adapter = make_model(tmp_path / "model"), make_adapter(tmp_path / "adapter")
    same = make_adapter(tmp_path / "same", base_model_name_or_path="z", inference_mode=True)
    others = [make_adapter(tmp_path / "other", 2.0), make_adapter(tmp_path / "scaled", lora_alpha=16)]
    assert fingerprint(model, adapter=adapter) == fingerprint(model, adapter=same)
    assert len({fingerprint(model), *(fingerprint(model, adapter=one) for one in [adapter, *others])}) == 4


def test_description_says_what_differs(tmp_path: Path) -> None:
    options: dict[str, Any] = {"commit": None, "quantization": NF4, "adapter": None}
    one, other = (
        local_identity(str(make_model(tmp_path / dtype)), dtype=dtype, **options) for dtype in ("bfloat16", "float32")
    )
    assert differences(one.description, other.description) == ["dtype", "model"]
    assert one.description["model"] == str(tmp_path / "bfloat16")


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    for name in ("a.safetensors", "b.safetensors", "consolidated.safetensors"):
        shutil.copy(model / "model.safetensors", model / name)
    write(
        model / "model.safetensors.index.json",
        {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}},
    )
    assert [file.name for file in weight_files(model)] == ["model.safetensors"]  # which is what transformers takes
    (model / "model.safetensors").unlink()
    assert [file.name for file in weight_files(model)] == ["a.safetensors", "b.safetensors"]
    write(model / "config.json", {"transformers_weights": "consolidated.safetensors"})
    assert [file.name for file in weight_files(model)] == ["consolidated.safetensors"]
    write(model / "config.json", {"transformers_weights": "model.safetensors.index.json"})
    assert [file.name for file in weight_files(model)] == ["a.safetensors", "b.safetensors"]
    (model / "model.safetensors.index.json").write_text("{")
    with pytest.raises(StorageError, match=r"index\.json cannot be read"):
        weight_files(model)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read to be hashed."""
    read: list[Path] = []
    original: Callable[[Path], str] = identity._hash

    def recorded(file: Path) -> str:
        read.append(file)
        return original(file)

    monkeypatch.setattr(identity, "_hash", recorded)
    return read


def test_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, hashed: list[Path]) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_bytes(file.name.encode())
    expected = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    for _ in range(2):
        assert hashes(files) == expected
    assert hashed == files
    files[0].write_bytes(b"A.safetensors")  # as many bytes
    os.utime(files[0], ns=(1, 1))
    assert hashes(files) == [hashlib.sha256(b"A.safetensors").hexdigest(), expected[1]]
    assert hashed == [*files, files[0]]


def test_damaged_or_unwritable_list_of_hashes_costs_only_time(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"a")
    expected = hashes([file])
    for content in ("{", "[]", json.dumps({str(file): 3}), json.dumps({str(file): []})):
        (identity.reference_cache() / "hashes.json").write_text(content)
        assert hashes([file]) == expected
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "no folder"))
    assert hashes([file]) == hashes([file]) == expected
    assert len(hashed) == 7


def test_blob_of_the_hub_has_its_hash_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, snapshot = tmp_path / "models--x--y" / "blobs", make_model(tmp_path / "models--x--y" / "snapshots" / "c0")
    blobs.mkdir()
    content = (snapshot / "model.safetensors").read_bytes()
    blob = blobs / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("a blob was read"))
    assert hashes([snapshot / "model.safetensors"]) == [blob.name]
    monkeypatch.undo()
    assert fingerprint(snapshot) == fingerprint(make_model(tmp_path / "downloaded"))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone\.safetensors cannot be read: No such file"):
        hashes([tmp_path / "gone.safetensors"])
    with pytest.raises(StorageError, match=r"holds no \*\.safetensors"):
        weight_files(tmp_path)
    model = make_model(tmp_path / "model")
    (model / "config.json").write_text("[")
    with pytest.raises(StorageError, match=r"config\.json cannot be read"):
        fingerprint(model)
