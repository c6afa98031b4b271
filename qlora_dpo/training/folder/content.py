"""Fingerprints of what a run's options name, to notice that a path stands for something else than it did."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from qlora_dpo.config.training import ModelOptions, TrainConfig
from qlora_dpo.errors import ModelError
from qlora_dpo.models.loading import commit_of, load_config
from qlora_dpo.models.lora import check_adapter_folder
from qlora_dpo.models.weight_files import weight_files
from qlora_dpo.reference.identity import combined, hashes
from qlora_dpo.training.data import TrainingData
from qlora_dpo.training.folder.owned import read_status

_COMMIT_LENGTH = 40  # of a Hub model's commit; a hash of weights is longer


def content_of(config: TrainConfig, data: TrainingData) -> dict[str, str]:
    """For each option whose content is compared: all token ids, the base's weights, the reference adapter's.

    Raises:
        StorageError, ModelError: the base or the adapter cannot be read.
    """
    model = config.model
    content = {"dataset": data.fingerprint, "model_name_or_path": base_fingerprint(model)}
    if model.reference_model not in (None, model.model_name_or_path):
        content["reference_model"] = weights_fingerprint(Path(str(model.reference_model)))
    return content


def base_fingerprint(model: ModelOptions) -> str:
    """What tells the base's weights from others: their hash, or the commit of a Hub model.

    Raises:
        StorageError, ModelError: it cannot be read.
    """
    return model_fingerprint(str(model.model_name_or_path), model.model_revision, model.trust_remote_code)


def model_fingerprint(name: str, revision: str | None, trust_remote_code: bool = False) -> str:
    """The same of a model by its name."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return weights_fingerprint(folder)
    return str(commit_of(load_config(name, revision, trust_remote_code)))


def weights_fingerprint(folder: Path) -> str:
    """Hash of all weights in a folder of a model or an adapter; what was hashed before is not read again.

    Raises:
        StorageError: a file cannot be read, or there is none.
    """
    gguf = [] if any(folder.glob("*.safetensors")) else sorted(folder.glob("*.gguf"))
    # Longer than what older runs noted, which was of samples of the weights and cannot be compared with it.
    return hashlib.sha384(combined(hashes(gguf or weight_files(folder))).encode()).hexdigest()


def refuse_reference_of_other_base(model: ModelOptions) -> None:
    """Refuse a reference adapter whose run noted another base than this one; warn where it only names another.

    Raises:
        ModelError: with both fingerprints.
        StorageError, ModelError: base or adapter cannot be read.
    """
    base = str(model.model_name_or_path)
    if model.reference_model in (None, base):
        return
    adapter = Path(str(model.reference_model)).expanduser()
    named = check_adapter_folder(adapter).get("base_model_name_or_path")
    notes = (read_status(folder).get("content", {}) for folder in (adapter, adapter.absolute().parent))
    noted: str | None = next((note["model_name_or_path"] for note in notes if "model_name_or_path" in note), None)
    now = base_fingerprint(model)
    refuse_other_base(adapter, base, noted, now)
    if noted != now and named and not is_same_place(str(named), base):
        print(f"warning: {adapter} names {named} as its base, and here it is put on {base}.", file=sys.stderr)


def is_same_place(one: str, other: str) -> bool:
    """Whether two names stand for the same folder, file or Hub id."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def refuse_other_base(adapter: Path, base: str, noted: str | None, now: str) -> None:
    """Refuse a base that is not the one that the adapter's run noted; a commit tells nothing about a folder.

    Raises:
        ModelError: with both fingerprints.
    """
    if noted is None or len(noted) != len(now) or noted == now:
        return
    what = "is at commit" if len(now) == _COMMIT_LENGTH else "has other weights: their hash is"
    raise ModelError(
        f"{base} is not the base that {adapter} was trained on: it {what} {now[:12]}, the run noted {noted[:12]}. "
        "Restore the base, or name the folder where it is now."
    )
