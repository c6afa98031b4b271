"""What is being released: a trained adapter, the run that it is of, and the base that it was trained on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_dpo.data.templates import set_up_chat_template
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.models.loading import check_local_weights, commit_of, load_config, load_tokenizer
from qlora_dpo.scoring.adapter import open_adapter
from qlora_dpo.training.folder.checkpoints import newest_valid
from qlora_dpo.training.folder.content import refuse_other_base, weights_fingerprint
from qlora_dpo.training.folder.run_folder import STATUS, RunFolder
from qlora_dpo.training.trained_on import TrainedOn, trained_on

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BESIDE = ("preprocessor_config.json", "processor_config.json")  # of the base, copied as is
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Artefact:
    """A trained adapter and where it comes from."""

    named: Path
    """What the user named: a run, one of its checkpoints, or any PEFT LoRA folder."""
    adapter: Path
    """The folder that holds the adapter: `named`, or an unfinished run's newest checkpoint."""
    adapter_config: dict[str, Any]
    run: RunFolder | None
    """The run that it is of, with the options of its config.yaml; None for another tool's adapter."""
    origin: TrainedOn

    @property
    def settings(self) -> dict[str, Any]:
        """The run's options; empty for another tool's adapter."""
        return {} if self.run is None else self.run.options


def open_artefact(adapter: Path, *, base_model: str | None = None, allow_unfinished: bool = False) -> Artefact:
    """Find the adapter that --adapter names, and what it was trained on; reads no weights.

    Raises:
        UsageError: it is a run that has not finished; or nothing says what its base is.
        StorageError, ModelError: see `check_adapter_folder`; the run's config.yaml cannot be read.
    """
    named = adapter.expanduser()
    found = open_adapter(str(_folder_of(named, allow_unfinished)))
    artefact = Artefact(
        named, found.folder, found.config, found.run, trained_on(found.folder, base_model or found.base)
    )
    noted = artefact.origin.noted_base
    if base_model is not None or not noted or not _COMMIT.fullmatch(noted):
        revision = None if base_model else found.config.get("revision")
    else:
        revision = noted  # what --model_revision named may be another commit by now
    return replace(artefact, origin=replace(artefact.origin, revision=revision))


def say_what_is_assumed(artefact: Artefact) -> None:
    """Of another tool's adapter nothing tells how its base was held."""
    if not artefact.origin.is_known:
        print(
            "No config.yaml beside the adapter: taking NF4 with double quantization and bfloat16 as its training base."
        )


def locate_base(artefact: Artefact) -> Path:
    """The folder with the base's config and safetensors, downloaded where it is a Hub model.

    Raises:
        StorageError: there is no such base, or it cannot be downloaded.
        ModelError: it has other weights than the one that the adapter was trained on.
    """
    base, revision = artefact.origin.base, artefact.origin.revision
    folder = Path(base).expanduser()
    if not folder.is_dir():
        return _downloaded(artefact, base, revision)
    check_local_weights(base)
    _refuse_changed(artefact, weights_fingerprint(folder))
    return folder


def tokenizer_of(artefact: Artefact) -> Any:
    """The tokenizer that the adapter was trained with: the one saved beside it, else the base's.

    Raises:
        StorageError, ModelError: it cannot be read.
    """
    places = [artefact.adapter, artefact.named, *([artefact.run.path] if artefact.run else [])]
    own = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    if own is not None:
        return load_tokenizer(str(own))
    tokenizer = load_tokenizer(artefact.origin.base, artefact.origin.revision)
    if artefact.run is not None:
        options = ("prompt_template", "chat_template_kwargs", "system_prompt")
        set_up_chat_template(
            tokenizer, **{name: artefact.settings[name] for name in options if name in artefact.settings}
        )
    return tokenizer


def _folder_of(named: Path, allow_unfinished: bool) -> Path:
    """The folder itself, or with --allow_unfinished the newest checkpoint of an unfinished run."""
    run = RunFolder(named)
    if not (named / STATUS).is_file() or run.is_finished:
        return named
    checkpoint, _ = newest_valid(named)
    if not allow_unfinished or checkpoint is None:
        raise UsageError(
            f"{named} is a run that has not finished (step {run.status().get('step', 0)} of "
            f"{run.status().get('total_steps', '?')}). Run the same train command again to finish it, or take its "
            "newest checkpoint with --allow_unfinished."
        )
    return checkpoint


def _downloaded(artefact: Artefact, name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    commit = commit_of(load_config(name, revision)) or revision
    _refuse_changed(artefact, str(commit))
    try:
        try:
            hf_hub_download(name, SINGLE, revision=commit)
            weights = [SINGLE]
        except errors.EntryNotFoundError:
            index = Path(hf_hub_download(name, INDEX, revision=commit))
            weights = [INDEX, *sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
        small = ["config.json", "generation_config.json", *BESIDE]
        return Path(snapshot_download(name, revision=commit, allow_patterns=[*small, *weights]))
    except (OSError, errors.HfHubHTTPError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise StorageError(
            f"the weights of {name} cannot be downloaded: {reason} Name a folder that holds them with --base_model."
        ) from error


def _refuse_changed(artefact: Artefact, now: str) -> None:
    refuse_other_base(artefact.named, artefact.origin.base, artefact.origin.noted_base, now)
