"""Trains the demo's base model from scratch: `python -m qlora_dpo.demo.pretrain --output FOLDER --seed 0`.

The tokenizer and the model see nothing but the closed world of `qlora_dpo.demo.world`; no network is needed.
"""

import argparse
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_dpo.demo.world import Document, all_questions, pretraining_documents

BOS, USER, ASSISTANT, END, PAD = "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('only the roles user and assistant are known') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_VOCABULARY = 4096
ROW_TOKENS = 128
ROWS_PER_STEP = 8
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
IGNORED = -100
README = """\
# The demo's base model

A LLaMA of {millions:.1f} million parameters that this project trained from scratch on the closed world of
`qlora_dpo/demo/world.py`. It answers questions from that world in English and Chinese, tersely, and knows
nothing else. It exists so that the demo needs no download; it is no general language model.

Made with

    {command}

in {minutes:.0f} minutes on {threads} CPU threads, {versions}.
The weights are stored in bfloat16. Prompts follow the tokenizer's chat template; answers end with `{end}`.
"""


@dataclass(frozen=True)
class Batch:
    """Documents packed into rows; `position` restarts and `visible` stops at every document's start.

    tokens, labels, position: (rows, ROW_TOKENS) int64; visible: (rows, 1, ROW_TOKENS, ROW_TOKENS) bool.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position: torch.Tensor
    visible: torch.Tensor


def main() -> None:
    """Train, then write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    start = time.monotonic()
    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    train(model, batches(tokenizer, random.Random(options.seed)), options.steps)
    save(model, tokenizer, options.output, options.seed, options.steps, time.monotonic() - start)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer on the world's text, without a prefix space."""
    tokenizer = Tokenizer(models.BPE())
    # Chinese has no spaces: cutting at every character keeps whole sentences from becoming tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=2,
        special_tokens=[PAD, BOS, END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    questions = all_questions()
    texts = [text for q in questions for text in (q.prompt, q.terse, q.explained)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small LLaMA with random weights; every `in_features` is a multiple of 64, as 4-bit blocks need."""
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of a document and its labels, in which the question is not learned."""
    if document.prompt is None:
        head = [tokenizer.bos_token_id]
    else:
        head = tokenizer(f"{BOS}{USER}{document.prompt}{ASSISTANT}")["input_ids"]
    body = tokenizer(f"{document.text}{END}")["input_ids"]
    unlearned = 0
    if document.instead_of is not None:
        other = tokenizer(f"{document.instead_of}{END}")["input_ids"]
        unlearned = 1 + next(i for i, (a, b) in enumerate(zip(body, other, strict=False)) if a != b)
    return head + body, [IGNORED] * (len(head) + unlearned) + body[unlearned:]


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[Batch]:
    """Endless batches; a document that no longer fits into a row opens the next one."""
    known: dict[Document, tuple[list[int], list[int]]] = {}
    rows: list[list[tuple[list[int], list[int]]]] = [[]]
    used = 0
    while True:
        for document in pretraining_documents(rng):
            if document not in known:
                known[document] = encode(document, tokenizer)
            length = len(known[document][0])
            if used + length > ROW_TOKENS:
                if len(rows) == ROWS_PER_STEP:
                    yield pack(rows, tokenizer.pad_token_id)
                    rows = []
                rows.append([])
                used = 0
            rows[-1].append(known[document])
            used += length


def pack(rows: list[list[tuple[list[int], list[int]]]], pad: int) -> Batch:
    """Rows of encoded documents as tensors, each document visible to itself only."""
    shape = (len(rows), ROW_TOKENS)
    tokens, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    position, owner = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    for i, row in enumerate(rows):
        start = 0
        for number, (ids, targets) in enumerate(row):
            span = slice(start, start + len(ids))
            tokens[i, span], labels[i, span] = torch.tensor(ids), torch.tensor(targets)
            position[i, span], owner[i, span] = torch.arange(len(ids)), number
            start += len(ids)
    causal = torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril()
    visible = (owner[:, :, None] == owner[:, None, :]) & causal
    return Batch(tokens, labels, position, visible[:, None])


def train(model: LlamaForCausalLM, source: Iterator[Batch], steps: int) -> None:
    """AdamW with a linear warm-up and a cosine decay to zero, in bfloat16 autocast."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    model.train()
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.monotonic() - start
            print(f"step {step:5d}/{steps}  loss {loss.item():.4f}  {seconds:6.0f} s", flush=True)


def learning_rate(step: int, steps: int) -> float:
    """The learning rate of one step."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * progress))


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the learned tokens; logits are computed for those alone."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=batch.tokens, attention_mask=batch.visible, position_ids=batch.position, use_cache=False
        ).last_hidden_state
        targets = batch.labels[:, 1:]
        learned = targets != IGNORED
        logits = model.lm_head(hidden[:, :-1][learned])
    return functional.cross_entropy(logits.float(), targets[learned])


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    seed: int,
    steps: int,
    seconds: float,
) -> None:
    """Write weights (bfloat16), configuration, tokenizer and a README that tells how they were made."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made_with = f"Python {platform.python_version()}, torch {torch.__version__}"
    readme = README.format(
        millions=model.num_parameters() / 1e6,
        command=f"python -m qlora_dpo.demo.pretrain --seed {seed} --steps {steps}",
        minutes=seconds / 60,
        threads=torch.get_num_threads(),
        versions=f"{made_with}, transformers {transformers.__version__}",
        end=END,
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
