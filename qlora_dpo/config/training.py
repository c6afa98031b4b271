"""The options of `train` and `plan`: frozen dataclasses whose help is the docstring under each field.

A name that `transformers.TrainingArguments` or `BitsAndBytesConfig` has keeps its meaning and unit. Only the
workflow functions (`train`, `plan`) see these objects; everything below them takes plain arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from qlora_dpo.config.reference import StoreOptions
from qlora_dpo.config.values import Names, Numbers

_ALL_LINEAR, _SIGMOID, _NONE = Names("all-linear"), Names("sigmoid"), Names("none")
_NO_NAMES, _NO_NUMBERS = Names(), Numbers()

REFERENCE_FREE = ("simpo", "orpo", "cpo")  # losses whose rewards are the policy's alone


@dataclass(frozen=True)
class ModelOptions:
    """Model: the base, how it is quantized, and what it is compared with."""

    model_name_or_path: str | None = None
    """Base model: a local folder or a Hub id. Where it is not given `train` takes that of the environment's MODEL_PATH,
    else the embedded base; where --dataset is not given either, the embedded demo runs."""
    model_revision: str | None = None
    """Commit, tag or branch of a Hub model."""
    reference_model: str | None = None
    """Folder of a frozen SFT adapter that is both the start of the policy and the reference (for a loss without a
    reference, the start alone). Default: the base with the adapter off. Never a second model."""
    load_in_4bit: bool = True
    """Quantize the base to 4 bit (NF4). `false` keeps it in --dtype."""
    load_in_8bit: bool = False
    """Quantize the base to 8 bit instead of 4."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type (QLoRA, arXiv 2305.14314, section 3)."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the quantization constants too: 0.37 bit less per weight."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type and type of the weights that are not quantized. auto: bfloat16. float16 is not offered:
    its range makes DPO gradients overflow."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; needs --model_revision with a full commit hash."""
    use_cpu: bool = False
    """Train on the CPU although there is a GPU."""


@dataclass(frozen=True)
class LoraOptions:
    """LoRA: the trained adapter (arXiv 2106.09685)."""

    lora_r: int = 64
    """Rank."""
    lora_alpha: int = 64
    """Scale: the update is multiplied by lora_alpha / lora_r."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(lora_r) instead (rsLoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train the length of each layer's rows apart from their direction (DoRA, arXiv 2402.09353). It starts as the base,
    too; PEFT's forward, which forms whole weights, costs time and memory."""
    modules_to_save: Names = _NO_NAMES
    """Modules that are trained whole beside the adapter, held in fp32: embed_tokens, lm_head, norms; none that is
    quantized."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of B (and of DoRA's lengths) over that of A (LoRA+, arXiv 2402.12354). The paper advises 16."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input. Above 0 the first-step identity (loss ln 2) cannot be checked."""
    lora_target_modules: Names = _ALL_LINEAR
    """Layers that get an adapter: names, or all-linear for all linear ones but the head and a mixture of experts'
    routers."""
    lora_target_parameters: Names = _NO_NAMES
    """Stacks of experts that get an adapter, one for each expert: gate_up_proj down_proj. Default: none."""


@dataclass(frozen=True)
class DataOptions:
    """Data: pairs of a preferred and a dispreferred answer, or conversations."""

    objective: Literal["dpo", "sft"] = "dpo"
    """dpo learns from pairs which answer is preferred; sft learns to write the assistant's turns of conversations.
    The adapter of an SFT run is then the --reference_model of DPO."""
    dataset: str | None = None
    """A .jsonl, .json, .csv or .parquet file, a folder of these, a save_to_disk folder, a Hub id, or
    modelscope:ORG/NAME; or a mixture of such sources: a .yaml (see `data mix`), or OpenDPO's ratio file."""
    dataset_format: str = "auto"
    """hh-rlhf, plaintext, messages, opendpo, sharegpt, alpaca, or a layout of another data set (docs/data.md); auto
    looks at the columns."""
    dataset_split: str = "train"
    """Split of a folder or Hub dataset."""
    dataset_revision: str | None = None
    """Commit, tag or branch of a Hub dataset."""
    dataset_config: str | None = None
    """Config of a Hub dataset that has several; as good as ID:CONFIG, which --eval_dataset takes, too."""
    eval_dataset: str | None = None
    """Held-out pairs, same format. Without it --eval_split or --eval_fraction decides."""
    eval_split: str | None = None
    """Split of --dataset that is held out."""
    eval_fraction: float = 0.05
    """Share of --dataset that is held out (by prompt, so that no prompt is on both sides); 0 for none."""
    max_train_samples: int | None = None
    """Use only the first N pairs for training."""
    max_eval_samples: int = 256
    """Use at most N held-out pairs."""
    prompt_key: str = "prompt"
    """Column of the prompt (plaintext, messages of pairs)."""
    chosen_key: str = "chosen"
    """Column of the preferred answer (plaintext, messages)."""
    rejected_key: str = "rejected"
    """Column of the dispreferred answer (plaintext, messages)."""
    category_key: str = "category"
    """Column of the category, a text; '' for none."""
    confidence_key: str = "confidence"
    """Column of how sure the label of a pair is, above 0 and at most 1; '' for none."""
    ignore_columns: Names = _NO_NAMES
    """Columns to leave out, although they may carry content (system, input, context, tools, ...)."""
    messages_key: str = "messages"
    """With --objective sft: column of a whole conversation (messages)."""
    response_key: str = "response"
    """With --objective sft: column of the answer (plaintext)."""
    prompt_template: str | None = None
    """Named template (hh-rlhf, anima, plain) for a tokenizer without a chat template, or instead of it."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template, as JSON: '{"enable_thinking": false}'. Those of a row's own column
    chat_template_kwargs outrank them."""
    system_prompt: Literal["keep", "fold"] = "keep"
    """fold puts a system prompt in front of the first question, for models without a system role."""
    max_length: int = 1024
    """Tokens of prompt plus completion, or of a conversation. What is longer loses its end (and its end token)."""
    max_prompt_length: int = 512
    """Tokens of the prompt. A longer prompt loses its beginning."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do when rows are unusable: list them and stop, or list them and train on the rest."""
    lint: Literal["warn", "block", "off"] = "block"
    """What errors in the pairs do (see `data lint`): warn prints them, block does not train on them, off looks for
    none."""


@dataclass(frozen=True)
class LossOptions:
    """Loss: names and meanings as in TRL."""

    beta: float = 0.1
    """Strength of the KL constraint (arXiv 2305.18290, eq. 7); for ipo its tau, for orpo its lambda. simpo's paper uses
    2.0 to 2.5."""
    loss_type: Names = _SIGMOID
    """One or more of sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired,
    apo_zero, apo_down, discopop, sft, sigmoid_norm; or, without a reference, simpo, orpo, cpo (docs/losses.md)."""
    loss_weights: Numbers = _NO_NUMBERS
    """Weight of each --loss_type; default 1 each."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels (sigmoid: conservative DPO; robust, exo_pair)."""
    confidence_as: Literal["weight", "label_smoothing"] = "weight"
    """What a pair's confidence below 1 does. weight: multiplies its loss. label_smoothing: 1 - confidence, at most 0.5
    (robust: 0.4), is its share of flipped labels unless --label_smoothing is larger (sigmoid, sigmoid_norm, robust,
    exo_pair)."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence that ties the policy to the reference (arXiv 2309.16240)."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence."""
    discopop_tau: float = 0.05
    """Temperature of discopop (arXiv 2406.08414)."""
    simpo_gamma: float = 0.5
    """Target reward margin of simpo (arXiv 2405.14734, eq. 6). TRL's default; the paper uses 0.3 to 1.6."""
    cpo_alpha: float = 1.0
    """Weight of the NLL in cpo (arXiv 2401.08417). TRL's default, and the paper's."""
    ld_alpha: float | None = None
    """Weight of the log-probs beyond the shorter answer's length (LD-DPO, arXiv 2409.06411)."""
    use_weighting: bool = False
    """Weight each pair by how likely the policy is to write it (WPO, arXiv 2406.11827)."""


@dataclass(frozen=True)
class TrainingOptions:
    """Training: the loop, its budget and its records."""

    output_dir: Path | None = None
    """Run folder. Default: runs/MODEL-DATASET. The same command again continues what is there."""
    fresh: bool = False
    """Start anew, deleting the run that is in --output_dir."""
    allow_changed: Names = _NO_NAMES
    """Options that may differ from those that the run in --output_dir began with; `dataset` also allows the same file
    with other content. What was changed is kept in run.json."""
    learning_rate: float = 1e-5
    """Peak learning rate. TRL's 1e-6 for full fine-tuning times ten, as its guide advises for LoRA."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Schedule after the warmup."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises to its peak; the first step has more than 0."""
    num_train_epochs: float = 1.0
    """Passes over the training pairs."""
    max_steps: int = -1
    """Optimizer steps; above 0 it overrides --num_train_epochs."""
    per_device_train_batch_size: int = 1
    """Times --gradient_accumulation_steps (times the processes, where there are several): the pairs of an optimizer
    step."""
    gradient_accumulation_steps: int = 16
    """See --per_device_train_batch_size. How a step is cut into micro-batches is the engine's affair."""
    max_tokens_per_microbatch: int | None = None
    """Tokens that go through the model at once; the loss of a step does not depend on it. Default: what fits, found by
    measuring before the first step, on a GPU; 2048 on a CPU."""
    activation_checkpointing: Literal["auto", "none", "selective", "full", "offload"] = "auto"
    """What the forward pass keeps: everything, the outputs of matrix products and attention, each layer's input
    only, or that input in CPU memory. auto: per layer, the least recomputation that fits into the free memory."""
    optim: Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "auto"
    """auto: paged_adamw_8bit on a GPU, adamw_torch on a CPU (bitsandbytes has no paged optimizer there)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapter."""
    adam_beta1: float = 0.9
    """First-moment decay."""
    adam_beta2: float = 0.999
    """Second-moment decay."""
    adam_epsilon: float = 1e-8
    """Added to the square root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    on_displacement: Literal["warn", "nll", "stop"] = "warn"
    """What to do when the chosen answers fall by 0.1 nats per token against the reference (likelihood displacement,
    arXiv 2410.08847): warn, add their NLL to the loss with weight 1 (nll), or stop with a checkpoint."""
    logging_steps: int = 1
    """Steps between two lines of metrics.jsonl."""
    eval_steps: int = 50
    """Steps between two evaluations of the held-out pairs."""
    save_steps: int = 50
    """Steps between two checkpoints."""
    save_minutes: float = 10.0
    """Minutes after which a checkpoint is written also between --save_steps; 0 for never."""
    save_total_limit: int = 2
    """Checkpoints to keep, at least 2: should the newest turn out damaged, the run continues from the one before.
    Damaged ones do not count."""
    sample_generate: bool = False
    """Print answers to fixed held-out prompts, adapter off and on, at each evaluation."""
    max_new_tokens: int = 128
    """Longest answer of --sample_generate."""
    report_to: Names = _NONE
    """Mirrors of metrics.jsonl: wandb (offline unless logged in), tensorboard, none."""
    run_name: str | None = None
    """Name of the run in the mirrors. Default: the name of --output_dir."""
    seed: int = 42
    """Data order, adapter initialization, dropout, sampling."""


@dataclass(frozen=True)
class TrainConfig:
    """All options of `train`, by group."""

    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: DataOptions = field(default_factory=DataOptions)
    store: StoreOptions = field(default_factory=StoreOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    @property
    def is_demo(self) -> bool:
        """Neither a model nor a dataset was named."""
        return self.model.model_name_or_path is None and self.data.dataset is None

    @property
    def has_reference(self) -> bool:
        """The policy is compared with a reference."""
        return self.data.objective == "dpo" and set(REFERENCE_FREE).isdisjoint(self.loss.loss_type)

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimizer step."""
        return self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps

    def flat(self) -> dict[str, Any]:
        """Every option by its flag name, as plain YAML values."""
        return {name: _plain(value) for name, value in self.items()}

    def items(self) -> list[tuple[str, Any]]:
        """(flag name, value) of every option."""
        groups = (getattr(self, group.name) for group in fields(self))
        return [(option.name, getattr(group, option.name)) for group in groups for option in fields(group)]


@dataclass(frozen=True)
class PlanOptions:
    """Plan: the machine that the run is for. All options of `train` are read too."""

    gpu_memory: float | None = None
    """GiB of the GPU, as nvidia-smi counts them: 24 for a 24 GB card. Default: this machine's GPU, and without one
    the memory that is available."""
    gpu_price_per_hour: float | None = None
    """Price of an hour of the GPU, for the cost of the run."""
    tokens_per_second: float | None = None
    """Tokens that are trained on per second, where it was measured; it replaces the estimate."""


TRAIN_GROUPS = {
    "model": ModelOptions,
    "lora": LoraOptions,
    "data": DataOptions,
    "store": StoreOptions,
    "loss": LossOptions,
    "training": TrainingOptions,
}


def uses_4bit(model: ModelOptions) -> bool:
    """The base is quantized to 4 bit: asked for (the default) and not overridden by --load_in_8bit."""
    return model.load_in_4bit and not model.load_in_8bit


def quantization_of(model: ModelOptions) -> dict[str, Any] | None:
    """Keyword arguments for transformers' `BitsAndBytesConfig`, or None for no quantization."""
    if model.load_in_8bit:
        return {"load_in_8bit": True}
    if not model.load_in_4bit:
        return None
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": model.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": model.bnb_4bit_use_double_quant,
        "bnb_4bit_compute_dtype": "float32" if model.dtype == "float32" else "bfloat16",
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
