"""The pairs that the benchmarks train on, as token ids.

`belle` and `multi_turn` are real texts where ../shared/data holds them; elsewhere they are random ids of the very same
lengths, which `benchmarks/lengths.json` keeps: counts only. Speed and memory depend on the lengths.

python benchmarks/workloads.py        writes benchmarks/lengths.json anew, from the real texts
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from qlora_dpo.data.preferences import PreferencePair
    from qlora_dpo.data.tokenization import TokenizedPair

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
REAL_FILE = REAL_DATA / "belle_pairs_hh.jsonl"
LENGTHS_FILE = ROOT / "benchmarks" / "lengths.json"
SEED = 0
NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")

Lengths = tuple[int, int, int]  # tokens of prompt, chosen, rejected
Row = dict[str, list[int]]  # ids by NAMES

# How many earlier turns a multi-turn prompt has, by weight: 0, 1, 2, 3.
EARLIER_TURNS = (4, 3, 2, 1)
# The rows whose texts become multi-turn pairs: with them the mean lengths are near 138, 135 and 52 tokens.
LONGEST_PROMPT, LONGEST_CHOSEN, SHORTEST_REJECTED = 256, 264, 12
LONGEST_TURN = 100  # tokens of an earlier question and its answer together


@dataclass(frozen=True)
class Workload:
    """A kind of pairs: their lengths, their vocabulary, and their texts where there are some."""

    lengths: Callable[[], list[Lengths]]
    texts: Callable[[], list[Row]] | None = None
    vocabulary: int = 32_000
    pairs_per_step: int = 16


@dataclass(frozen=True)
class Pairs:
    """Pairs of a workload and where they come from."""

    rows: list[Row]
    source: str

    def mean_lengths(self) -> dict[str, float]:
        """Mean tokens of prompt, chosen and rejected."""
        return {name: round(statistics.mean(len(row[name]) for row in self.rows), 1) for name in NAMES}


def make_pairs(name: str, count: int) -> Pairs:
    """The first `count` pairs of the workload; its lengths (and texts) begin again where it has fewer."""
    workload = WORKLOADS[name]
    if workload.texts is not None and REAL_FILE.is_file():
        return Pairs(list(islice(cycle(workload.texts()), count)), "real texts, LLaMA's tokenizer")
    lengths = islice(cycle(workload.lengths()), count)
    return Pairs(random_rows(lengths, workload.vocabulary), "random ids of the workload's lengths")


def random_rows(lengths: Iterable[Lengths], vocabulary: int) -> list[Row]:
    """Random ids of the given lengths."""
    generator = random.Random(SEED)
    return [
        {name: [generator.randrange(3, vocabulary) for _ in range(n)] for name, n in zip(NAMES, row, strict=True)}
        for row in lengths
    ]


def unshared_tokens(rows: Sequence[Row]) -> int:
    """Tokens of two plain sequences per pair, prompt repeated, no padding: one measure of work for every program."""
    return sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)


def stored_lengths(name: str) -> list[Lengths]:
    """The lengths of a workload of real texts, in its order."""
    stored: dict[str, list[list[int]]] = json.loads(LENGTHS_FILE.read_text(encoding="utf-8"))
    return [(prompt, chosen, rejected) for prompt, chosen, rejected in stored[name]]


def tiny_lengths() -> list[Lengths]:
    """Multi-turn's lengths, an eighth of each."""
    return [(prompt // 8 + 2, chosen // 8 + 2, rejected // 8 + 2) for prompt, chosen, rejected in multi_turn_lengths()]


def belle() -> list[Row]:
    """One turn: Belle's questions, its reference answers and a 33B model's, within the lengths that `train` allows."""
    rows = [_row(pair) for pair in _tokenize(_real_pairs())]
    random.Random(SEED).shuffle(rows)
    return rows


def multi_turn() -> list[Row]:
    """The same texts after 0 to 3 earlier turns, which are other rows' questions and reference answers."""
    texts = _real_pairs()
    lengths = [tuple(len(ids) for ids in _row(pair).values()) for pair in _tokenize(texts)]
    generator = random.Random(SEED)
    turns = [pair for pair, (prompt, chosen, _) in zip(texts, lengths, strict=True) if prompt + chosen <= LONGEST_TURN]
    last = [
        pair
        for pair, (prompt, chosen, rejected) in zip(texts, lengths, strict=True)
        if prompt <= LONGEST_PROMPT and chosen <= LONGEST_CHOSEN and rejected >= SHORTEST_REJECTED
    ]
    rows = [_row(pair) for pair in _tokenize([_after_turns(pair, turns, generator) for pair in last])]
    generator.shuffle(rows)
    return rows


def _after_turns(pair: PreferencePair, turns: Sequence[PreferencePair], generator: random.Random) -> PreferencePair:
    from qlora_dpo.data.preferences import Message

    (count,) = generator.choices(range(len(EARLIER_TURNS)), EARLIER_TURNS)
    history: list[Message] = []
    for turn in generator.sample([turn for turn in turns if turn.prompt != pair.prompt], count):
        history += [*_messages(turn), {"role": "assistant", "content": turn.chosen}]
    return replace(pair, prompt=(*history, *_messages(pair)))


def _messages(pair: PreferencePair) -> tuple[Any, ...]:
    assert not isinstance(pair.prompt, str)  # hh-rlhf gives messages
    return pair.prompt


def _real_pairs() -> list[PreferencePair]:
    """The usable rows of the real file, in its order."""
    from qlora_dpo.data.formats import ColumnNames, parse_row
    from qlora_dpo.data.preferences import RowError

    pairs = []
    with REAL_FILE.open(encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(RowError):
                pairs.append(parse_row("hh-rlhf", json.loads(line), ColumnNames(), "").pair)
    return pairs


def _tokenize(pairs: Sequence[PreferencePair]) -> list[TokenizedPair]:
    """Ids by LLaMA's tokenizer in the form of hh-rlhf dialogues."""
    from qlora_dpo.data.templates import apply_prompt_template
    from qlora_dpo.data.tokenization import PairTokenizer, TokenizedPair
    from qlora_dpo.models.loading import load_tokenizer

    tokenizer = load_tokenizer(str(REAL_DATA / "llama_tokenizer"))
    apply_prompt_template(tokenizer, "hh-rlhf")
    tokenized = PairTokenizer(tokenizer).tokenize(pairs)
    assert all(isinstance(pair, TokenizedPair) for pair in tokenized), "a pair of the real texts is refused"
    return [pair for pair in tokenized if isinstance(pair, TokenizedPair)]


def _row(pair: TokenizedPair) -> Row:
    return {name: list(getattr(pair, name)) for name in NAMES}


def write_lengths() -> None:
    """Store the token counts of the workloads of real texts, and nothing else of them."""
    stored = {}
    for name, workload in WORKLOADS.items():
        if workload.texts is not None:
            pairs = Pairs(workload.texts(), "")
            stored[name] = [[len(row[column]) for column in NAMES] for row in pairs.rows]
            print(f"{name}: {len(pairs.rows)} pairs, mean tokens {pairs.mean_lengths()}")
    lines = [f'"{name}": {json.dumps(rows, separators=(",", ":"))}' for name, rows in stored.items()]
    LENGTHS_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


multi_turn_lengths = partial(stored_lengths, "multi_turn")

WORKLOADS: dict[str, Workload] = {
    "belle": Workload(partial(stored_lengths, "belle"), belle),
    "multi_turn": Workload(multi_turn_lengths, multi_turn),
    "long_prompt": Workload(lambda: [(1000, 200, 200)], pairs_per_step=4),
    "vocabulary_152k": Workload(multi_turn_lengths, vocabulary=152_000),
    "tiny": Workload(tiny_lengths, vocabulary=512, pairs_per_step=4),
}

if __name__ == "__main__":
    write_lengths()
