"""The options of the commands that let a model leave the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class MergeOptions:
    """Merge: an adapter and the base it was trained on become one plain model."""

    adapter: Path
    """A finished run or any PEFT LoRA folder."""
    output: Path
    """Folder to write; must be absent or empty."""
    base: Literal["train", "original", "auto"] = "auto"
    """train: the base as training held it, dequantized. original: the base as it is stored. auto: the better one."""
    base_model: str | None = None
    """Where the base is now, when it is not where adapter_config.json says."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type in which the merged weights are stored; the sum is formed in float32. auto: the better 16-bit one."""
    max_shard_size: str = "5GB"
    """Largest size of one safetensors file."""
    allow_unfinished: bool = False
    """Merge a run that has not finished its steps."""
    measure: bool = True
    """Hold each candidate against the trained adapter. `false` writes the one that --base and --dtype name."""
    dataset: str | None = None
    """Pairs to measure on. Default: those that the run held out."""
    fidelity_pairs: int = 64
    """Measure on at most so many pairs."""
    force: bool = False
    """Write the best candidate also where it loses too much of what was trained."""
    use_cpu: bool = False
    """Quantize and measure on the CPU although there is a GPU."""


@dataclass(frozen=True)
class CheckOptions:
    """Check: an exported folder, loaded by plain transformers, must answer as the trained adapter does."""

    folder: Path
    """Merged folder or exported adapter."""
    adapter: Path | None = None
    """The run that it was made from. Default: the one that the folder names."""
    base_model: str | None = None
    """Where the adapter's base is now, when it is not where adapter_config.json says."""
    prompts: str | None = None
    """File of prompts or pairs. Default: the pairs that the run held out, else a short built-in list."""
    max_prompts: int = 20
    """How many prompts are replayed."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    gguf: Path | None = None
    """A GGUF file made from the folder, replayed too: by llama-cpp-python where that is installed, else read back by
    transformers."""
    server: str | None = None
    """Address of a server of the folder with its version, http://localhost:8000/v1: replayed too."""
    server_model: str | None = None
    """Name of the model on the server. Default: the only one that it has."""
    min_same_tokens: float = 0.98
    """Share of the tokens of the adapter's answers that must be the likeliest there too; where two tokens are nearly as
    likely as each other, rounding decides and nothing is asked."""
    max_difference: float = 0.05
    """Largest mean difference of the log-probs of an answer's tokens; where the adapter is further from itself by
    rounding, three times that."""
    use_cpu: bool = False
    """Compute on the CPU even where there is a GPU."""


@dataclass(frozen=True)
class GgufOptions:
    """GGUF: a merged folder becomes a file for llama.cpp and Ollama."""

    folder: Path
    """Merged folder, as `merge` writes it."""
    output: Path
    """File to write, FILE.gguf; a Modelfile is written beside it."""
    outtype: Literal["f16", "q8_0"] = "f16"
    """f16: float16, twice as large. q8_0: 8 bits a number, with a scale for each 32."""
    max_shard_size: str | None = None
    """Largest size of one part, such as 5GB. Default: one file."""


@dataclass(frozen=True)
class AdapterExportOptions:
    """Adapter: the trained adapter alone, as any PEFT program loads it."""

    adapter: Path
    """A finished run, one of its checkpoints, or any PEFT LoRA folder."""
    output: Path
    """Folder to write; must be absent or empty."""
    base_model: str | None = None
    """Name of the base for those who load the adapter, such as its Hub id. Default: the one that it was trained on."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type in which the adapter is stored. Default: as it was trained."""
    allow_unfinished: bool = False
    """Export a run that has not finished its steps."""


@dataclass(frozen=True)
class PushOptions:
    """Push: what goes to which repository. Without --execute it is only said."""

    folder: Path
    """A finished run, a checkpoint or any other adapter folder, a merged folder, or a folder of GGUF files."""
    repo: str
    """Repository, ORG/NAME; it is created where it is not there."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """huggingface: the Hub, or the mirror that HF_ENDPOINT names; modelscope: ModelScope."""
    execute: bool = False
    """Upload. Without it nothing is sent."""
    public: bool = False
    """Create the repository for everybody to see, or push to one that is; else it is private."""
    run: Path | None = None
    """The run whose records the card quotes. Default: the one that the folder is, is in, or names in its report."""
    base_model_id: str | None = None
    """The base's name on the hub, where the adapter names a path of this machine."""
    license: str | None = None
    """License as the Hub writes it, such as apache-2.0. Default: the base's, where its card can be read."""
    samples: int = 3
    """Answers before and after that the card shows, with their prompts; 0 shows none."""
    card: Path | None = None
    """Also write the card to this file, to be read before it goes."""
    commit_message: str | None = None
    """Of the commit. Default: what was uploaded."""
    force: bool = False
    """Push although a measurement speaks against it (merge, release check, gate); the card says so."""
