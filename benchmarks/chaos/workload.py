"""The run that is broken: a tiny NF4 LLaMA with LoRA dropout, two epochs, and what must come out of it."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, SAVE_STEPS = 12, 3
OPTIONS = {
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 4,
    "max_tokens_per_microbatch": 300,  # two micro-batches a step
    "activation_checkpointing": "none",  # auto counts what it would save, which takes longer than the run
    "eval_fraction": 0.2,
    "eval_steps": 4,  # between two checkpoints, with one, and at the end
    "save_steps": SAVE_STEPS,
    "lora_r": 4,
    "lora_dropout": 0.1,
    "learning_rate": 0.01,
}
PAIRS = 30  # 6 held out; 24 make 6 steps an epoch
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What depends on the clock or the process and not on the pairs.
NOT_COMPARED = ("seconds", "per_second", "memory/", "hours", "minutes")


@dataclass(frozen=True)
class Workload:
    """A model folder and a file of pairs."""

    model: Path
    pairs: Path

    def arguments(self, output: Path) -> list[str]:
        """The command line, without `python -m qlora_dpo`."""
        named = {"model_name_or_path": self.model, "dataset": self.pairs, "output_dir": output} | OPTIONS
        return ["train", *(str(part) for name, value in named.items() for part in (f"--{name}", value))]


@dataclass(frozen=True)
class Outcome:
    """What a finished run left: the digest of its adapter and its record without what the clock decides."""

    adapter: str
    record: list[dict[str, Any]]

    def differences(self, expected: Outcome) -> list[str]:
        """What is not as in the unbroken run, a sentence each; nothing where all is."""
        found = []
        if self.adapter != expected.adapter:
            found.append("the adapter is not bit-identical")
        steps = [row["step"] for row in self.record]
        if steps != [row["step"] for row in expected.record]:
            found.append(f"metrics.jsonl has the steps {steps}")
        for ours, theirs in zip(self.record, expected.record, strict=False):
            names = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
            if ours["step"] == theirs["step"] and names:
                found.append(f"step {ours['step']} differs in {', '.join(sorted(names)[:4])}")
                break
        return found


def read_outcome(folder: Path) -> Outcome:
    """Read a finished run folder. Every line of the record must be whole, which the tool's own reader does not ask."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        {name: value for name, value in json.loads(line).items() if not any(part in name for part in NOT_COMPARED)}
        for line in lines
    ]
    return Outcome(adapter_digest(folder / "adapter_model.safetensors"), rows)


def adapter_digest(file: Path) -> str:
    """Hash of the names, shapes, types and bytes of all tensors of a safetensors file."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    digest = hashlib.sha256()
    for name, tensor in sorted(header.items()):
        begin, end = tensor["data_offsets"]
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']}\n".encode())
        digest.update(content[start + begin : start + end])
    return digest.hexdigest()


def make_workload(folder: Path, seed: int) -> Workload:
    """Write the model, its tokenizer and the pairs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=tokenizer.eos_token_id, **SHAPE
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.08)  # large enough to tell a difference from noise
    model.bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in make_rows(PAIRS, seed)), encoding="utf-8")
    return Workload(folder / "model", pairs)


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of random letters, of lengths from a few to a few dozen bytes, each with a prompt of its own."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(4, most))).strip() or "a"

    return [
        {"prompt": f"{number} {text(30)}", "chosen": f"a {text(40)}", "rejected": f"b {text(40)}"}
        for number in range(count)
    ]


def byte_tokenizer() -> Any:
    """A token for each byte, and ChatML's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer
