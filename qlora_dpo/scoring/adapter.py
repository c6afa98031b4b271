"""The adapter that `score` looks at: what its run says about itself, and whether the options fit to it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_dpo.config.training import TrainConfig
from qlora_dpo.data.templates import set_up_chat_template
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.models.loading import load_tokenizer
from qlora_dpo.models.lora import check_adapter_folder
from qlora_dpo.training.folder.checkpoints import newest_valid
from qlora_dpo.training.folder.content import (
    base_fingerprint,
    is_same_place,
    refuse_other_base,
    refuse_reference_of_other_base,
)
from qlora_dpo.training.folder.run_folder import CONFIG, STATUS, RunFolder
from qlora_dpo.training.policy import load_training_tokenizer

NONE = "none"

# Options that are taken from the run. trust_remote_code is not: who scores has to say it.
_OF_MODEL = (
    "reference_model", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "dtype",
)  # fmt: skip
_OF_PAIRS = ("beta", "prompt_template", "chat_template_kwargs", "system_prompt", "max_length", "max_prompt_length")


@dataclass(frozen=True)
class ScoredAdapter:
    """A folder with an adapter and, where it is of a run of this tool, the run."""

    folder: Path
    config: dict[str, Any]
    """Content of adapter_config.json."""
    run: RunFolder | None = None

    @property
    def base(self) -> str | None:
        """The name of its base, where it has one."""
        return self.config.get("base_model_name_or_path") or self.settings.get("model_name_or_path")

    @property
    def settings(self) -> dict[str, Any]:
        """The options of its run; empty for another tool's adapter."""
        return {} if self.run is None else self.run.options

    def defaults(self) -> dict[str, Any]:
        """What its run says about the model and the tokens of pairs."""
        names = _OF_MODEL if self.settings.get("objective") == "sft" else (*_OF_MODEL, *_OF_PAIRS)
        found = {name: self.settings[name] for name in names if name in self.settings}
        if found.get("reference_model") == self.settings.get("model_name_or_path"):
            found.pop("reference_model", None)  # the base itself, however its path is written
        return found

    def was_trained_on(self, config: TrainConfig) -> bool:
        """Its run names the very data set."""
        dataset = self.settings.get("dataset")
        parts = ("dataset_split", "dataset_config")
        if dataset is None or any(self.settings.get(name) != getattr(config.data, name) for name in parts):
            return False
        return is_same_place(str(dataset), str(config.data.dataset))


def open_adapter(name: str) -> ScoredAdapter:
    """Find the adapter that --adapter names.

    Raises:
        UsageError: it is a run that has not finished.
        StorageError, ModelError: see `check_adapter_folder`; the run's config.yaml cannot be read.
    """
    folder = Path(name).expanduser()
    if (folder / STATUS).is_file() and not RunFolder(folder).is_finished:
        checkpoint, _ = newest_valid(folder)
        newest = f" Its newest one is {checkpoint}." if checkpoint else ""
        raise UsageError(
            f"--adapter {name} is a run that has not finished: finish it, or name one of its checkpoints.{newest}"
        )
    adapter_config = check_adapter_folder(folder)
    run = next((path for path in (folder, folder.absolute().parent) if (path / CONFIG).is_file()), None)
    return ScoredAdapter(folder, adapter_config, None if run is None else RunFolder(run, _settings(run / CONFIG)))


def defaults_of_adapter(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `score` as the run of the adapter has them.

    Raises: as `open_adapter`.
    """
    if options["adapter"] == NONE:
        return {}
    adapter = open_adapter(options["adapter"])
    of_base = {"model_name_or_path": adapter.base, "model_revision": adapter.config.get("revision")}
    # A revision is of the base that the adapter names, not of another place where it is now.
    return adapter.defaults() | (of_base if options["model_name_or_path"] is None else {})


def check_fit(adapter: ScoredAdapter, config: TrainConfig) -> None:
    """Refuse another base than the adapter's; warn where the options are others than its run's.

    Raises:
        ModelError: the base has other weights than the run's.
        StorageError, ModelError: base or reference cannot be read.
    """
    base = str(config.model.model_name_or_path)
    refuse_reference_of_other_base(config.model)
    known = {} if adapter.run is None else adapter.run.status().get("content", {})
    was = known.get("model_name_or_path")
    now = base_fingerprint(config.model)
    refuse_other_base(adapter.folder, base, was, now)
    if was != now and adapter.base is not None and not is_same_place(adapter.base, base):
        _warn(f"{adapter.folder} names {adapter.base} as its base; the scores are of the adapter on {base}.")
    if adapter.run is None:
        _warn(
            f"{adapter.folder} has no {CONFIG} that says how its base was held, so these options do: "
            f"{'NF4' if config.model.load_in_4bit else 'no 4 bit'}, beta {config.loss.beta:g}."
        )
    options = config.flat()
    others = [f"{name} {value}" for name, value in adapter.defaults().items() if not _equal(name, value, options[name])]
    if others:
        _warn(f"the scores are of other options than the run's, which has {', '.join(others)}.")
    if adapter.settings.get("reference_source"):
        _warn(
            f"the run counted its rewards from {adapter.settings['reference_source']}; here they count from its base."
        )


def tokenizer_of(adapter: ScoredAdapter | None, config: TrainConfig) -> Any:
    """The tokenizer that the adapter was trained with."""
    if adapter is None or adapter.run is not None or not (adapter.folder / "tokenizer_config.json").is_file():
        date = adapter.run.chat_template_date() if adapter is not None and adapter.run is not None else None
        return load_training_tokenizer(config, date)
    tokenizer = load_tokenizer(str(adapter.folder))
    set_up_chat_template(
        tokenizer,
        prompt_template=config.data.prompt_template,
        chat_template_kwargs=config.data.chat_template_kwargs,
        system_prompt=config.data.system_prompt,
    )
    return tokenizer


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StorageError(f"{file} cannot be read ({type(error).__name__}). Restore it from the run.") from error
    return settings if isinstance(settings, dict) else {}


def _equal(name: str, was: Any, now: Any) -> bool:
    return was == now or (name == "reference_model" and None not in (was, now) and is_same_place(str(was), str(now)))


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
