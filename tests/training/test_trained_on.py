"""An adapter is loaded on the very base that it was trained on, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from release.tiny_adapters import save_base, save_run
from safetensors.torch import load_file, save_file

from qlora_dpo.errors import ModelError
from qlora_dpo.training.trained_on import load_trained


def test_base_of_which_one_number_has_changed_is_refused(tmp_path: Path, pairs_file: Path) -> None:
    base = save_base(tmp_path / "base")
    run = save_run(tmp_path / "run", base, pairs_file)
    load_trained(run, use_cpu=True)
    shard = max(base.glob("*.safetensors"))
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[-1] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{base} is not the base that {run} was trained on: it has other weights"):
        load_trained(run, use_cpu=True)
    moved = save_base(tmp_path / "moved")
    load_trained(run, base_model=str(moved), use_cpu=True)
