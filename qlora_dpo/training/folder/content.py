"""Fingerprints of what a run's options name, to notice that a path stands for something else than it did."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qlora_dpo.config.training import ModelOptions, TrainConfig
from qlora_dpo.errors import StorageError
from qlora_dpo.models.loading import commit_of, load_config
from qlora_dpo.training.data import TrainingData

SAMPLES, SAMPLE_BYTES = 64, 1 << 14  # of each weights file: enough to notice other weights, at once also on a slow disk


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
    """What tells the base's weights from others: samples of them, or the commit of a Hub model.

    Raises:
        StorageError, ModelError: it cannot be read.
    """
    base = str(model.model_name_or_path)
    if Path(base).expanduser().is_dir():
        return weights_fingerprint(Path(base).expanduser())
    loaded = load_config(base, model.model_revision, model.trust_remote_code)
    return str(commit_of(loaded))


def weights_fingerprint(folder: Path) -> str:
    """Hash of the names and sizes of a folder's weights and of samples of their bytes.

    Raises:
        StorageError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for number in range(SAMPLES):
                    file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()
