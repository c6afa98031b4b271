"""What is compared between the trained adapter and its export: one row of a table each, with what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.data.control_tokens import control_tokens
from qlora_dpo.models.scoring import NOISE_MARGIN
from qlora_dpo.release.checking.replay import Answer, Expected, Export
from qlora_dpo.release.gguf.llama_cpp_tokens import differing

_PROBES = (
    "Hello, world!", " a leading space", "two  spaces\n\nand lines\n", "12345 and 3.14", "中文和 English 混排。",
    "émigré 🚀", "def f(x):\n\treturn x**2",
)  # fmt: skip
_SPACES = "▁Ġ "
_WHY = (
    "Where the rows above hold it is the weights: look at the fidelity of the merge, and merge with another --base or "
    "--dtype."
)
_COPY = "Copy tokenizer.json, tokenizer_config.json and chat_template.jinja from the run, or export it anew"


@dataclass(frozen=True)
class Row:
    """One thing that was compared."""

    name: str
    value: str
    asked: str
    holds: bool | None
    """None: this export does not tell."""
    advice: str = ""


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each row: whether it holds, what was compared, what was found, and what was asked."""
    width, wide = max(len(row.name) for row in rows), max(len(row.value) for row in rows)
    marks = {True: "yes", False: "NO", None: "?"}
    lines = [f"{'':5}{'compared':{width}}  {'found':>{wide}}  asked"]
    return [*lines, *(f"{marks[row.holds]:5}{row.name:{width}}  {row.value:>{wide}}  {row.asked}" for row in rows)]


def tokenizer_rows(expected: Expected, export: Export) -> list[Row]:
    """The export's tokenizer against the one that was trained with."""
    wanted, found = expected.tokenizer, export.tokenizer
    words, own = wanted.get_vocab(), found.get_vocab()
    other = next((token for token in (*words, *own) if words.get(token) != own.get(token)), None)
    token = "" if other is None else f" ({other!r} is {_id(words.get(other))} in training, {_id(own.get(other))} here)"
    controls, own_controls = (
        {token.content for token in control_tokens(tokenizer).values()} for tokenizer in (wanted, found)
    )
    missing, more = sorted(controls - own_controls), sorted(own_controls - controls)
    ids, own_ids = (tokenizer(list(_PROBES)).input_ids for tokenizer in (wanted, found))
    places = differing(ids, own_ids)
    why = f": {why_other_ids(ids[places[0]], own_ids[places[0]], wanted, found)}" if places else ""
    rows = expected.rows
    return [
        Row(
            "vocabulary", f"{len(own):,} tokens", f"the {len(words):,} of training", other is None,
            f"the export has another tokenizer{token}. {_COPY}.",
        ),
        Row(
            "control tokens", f"{len(own_controls)}", f"the {len(controls)} of training", not missing and not more,
            f"the export {_differs(missing, more)}. {_COPY}.",
        ),
        Row(
            "ids of texts", f"{len(_PROBES) - len(places)} of {len(_PROBES)} the same", "all", not places,
            f"the export's tokenizer makes other ids of the same text{why}. {_COPY}.",
        ),
        Row(
            "embedding rows", f"{export.rows:,}", f"{rows:,}, not below {len(own):,}",
            export.rows == rows and export.rows >= len(own),
            f"the vocabulary was resized: the base has {rows:,} rows, the export {export.rows:,}, its tokenizer "
            f"{len(own):,} tokens. Merge anew, without resizing.",
        ),
    ]  # fmt: skip


def template_row(expected: Expected, export: Export, prompts: Sequence[Any]) -> Row:
    """The text that the export's chat template writes."""
    name, asked = "chat template", "the text of training for all"
    if not export.tokenizer.chat_template:
        return Row(name, "missing", asked, False, f"the export has no chat template. {_COPY}.")
    texts = [_rendered(expected.tokenizer, messages) for messages in prompts]
    found = [_rendered(export.tokenizer, messages) for messages in prompts]
    other = next((pair for pair in zip(texts, found, strict=True) if pair[0] != pair[1]), None)
    same = sum(one == another for one, another in zip(texts, found, strict=True))
    advice = "" if other is None else (
        f"the export's chat template writes {_around(other[1], other[0])} where training had "
        f"{_around(other[0], other[1])}. {_COPY}."
    )  # fmt: skip
    return Row(name, f"{same} of {len(prompts)}", asked, other is None, advice)


def stop_rows(expected: Expected, export: Export) -> list[Row]:
    """The tokens that end an answer."""
    wanted, found = expected.tokenizer, export.tokenizer
    end = wanted.convert_ids_to_tokens(expected.end_id)
    here = ", ".join(f"{found.convert_ids_to_tokens(id_)} ({id_})" for id_ in export.stop_ids) or "none"
    return [
        Row(
            "stops at", here, f"{end} ({expected.end_id}) among them", expected.end_id in export.stop_ids,
            f"training ended each answer with {end} (id {expected.end_id}), and {export.stops_named_in} names "
            f"{here}: answers would run on. Add {expected.end_id} to eos_token_id in generation_config.json.",
        ),
        Row(
            "eos_token", f"{found.eos_token}", f"{wanted.eos_token}", found.eos_token == wanted.eos_token,
            f"the tokenizer's eos_token is {found.eos_token}, and {wanted.eos_token} in training. {_COPY}.",
        ),
    ]  # fmt: skip


def answer_rows(
    expected: Expected, answers: Sequence[Answer | Exception], tokenizer: Any, min_same: float, max_difference: float
) -> list[Row]:
    """Prompt ids, the likeliest tokens in the adapter's answers, and the log-probs of these."""
    pairs = [(one, other) for one, other in zip(expected.answers, answers, strict=True) if isinstance(other, Answer)]
    refusal = next((str(answer) for answer in answers if not isinstance(answer, Answer)), None)
    return [
        _prompt_row(expected, pairs, refusal, tokenizer, len(answers)),
        _token_row(expected, pairs, min_same, max_difference),
        _difference_row(pairs, max(max_difference, NOISE_MARGIN * expected.noise)),
    ]


def same_tokens(wanted: Answer, found: Answer, tokenizer: Any) -> list[bool]:
    """Whether the export goes on as the adapter did, for each token of its answer; of an export that wrote an answer of
    its own up to where the two part, since what follows is another text."""
    if found.gaps:
        return [gap >= 0 for gap in found.gaps]
    content = wanted.ids[:-1] if wanted.ended else wanted.ids
    if found.ids or not content:
        own = found.ids[:-1] if found.ended else found.ids
        same = next((n for n, ids in enumerate(zip(content, own, strict=False)) if ids[0] != ids[1]), None)
        same = min(len(content), len(own)) if same is None else same
        is_over = same == len(content) == len(own)
    else:
        texts = [str(tokenizer.decode(content[: n + 1], skip_special_tokens=True)) for n in range(len(content))]
        starts = [found.text.startswith(text.rstrip("\ufffd").strip()) for text in texts]
        same = starts.index(False) if False in starts else len(content)
        is_over = same == len(content) and found.text == wanted.text
    if is_over and (found.ended or not wanted.ended):
        return [True] * len(wanted.ids)
    return [*([True] * same), False][: len(wanted.ids)]


def _token_row(expected: Expected, pairs: Sequence[tuple[Answer, Answer]], min_same: float, difference: float) -> Row:
    """Nothing is asked where the adapter's two likeliest tokens are nearer than rounding or the limit moves them."""
    nearest = max(expected.gap_noise, 2 * difference)
    counted, ends = list[bool](), 0
    left_out = 0
    for wanted, found in pairs:
        told = same_tokens(wanted, found, expected.tokenizer)
        for place, (same, gap) in enumerate(zip(told, wanted.gaps, strict=False)):
            if gap <= nearest:
                left_out += 1
                continue
            counted.append(same)
            ends += not same and wanted.ended and place == len(wanted.ids) - 1
    name, asked = "likeliest tokens", f"at least {min_same:.0%}"
    near = f" ({left_out} too near to the next left out)" if left_out else ""
    if not counted:
        return Row(name, f"none told{near}", asked, None if pairs else False, f"no prompt could be answered. {_COPY}.")
    reason = f"the export goes on otherwise than the adapter in {counted.count(False)} places"
    reason += f", in {ends} of them where the adapter ends its answer" if ends else ""
    return Row(
        name, f"{sum(counted):,} of {len(counted):,} the same{near}", asked, sum(counted) >= min_same * len(counted),
        f"{reason}. {_WHY}",
    )  # fmt: skip


def why_other_ids(wanted: Sequence[int], found: Sequence[int], tokenizer: Any, own: Any) -> str:
    """What sets two lists of ids apart, in words."""
    bos = tokenizer.bos_token_id
    begins, own_begins = _count_of(bos, wanted), _count_of(bos, found)
    if list(wanted[begins:]) == list(found[own_begins:]) and bos is not None:
        what = "missing" if own_begins < begins else "doubled" if begins else "added"
        return f"BOS ({tokenizer.bos_token}) is {what}"
    place = next((at for at, ids in enumerate(zip(wanted, found, strict=False)) if ids[0] != ids[1]), None)
    if place is None and len(found) < len(wanted):
        return f"its end is missing: {tokenizer.decode(wanted[len(found) :])!r}"
    if place is None:
        return f"there is more at its end: {own.decode(found[len(wanted) :])!r}"
    before, after = tokenizer.convert_ids_to_tokens(wanted[place]), own.convert_ids_to_tokens(found[place])
    text, own_text = _spelled(wanted, tokenizer), _spelled(found, own)
    if text != own_text and text.replace(" ", "") == own_text.replace(" ", ""):
        what = "lost" if len(own_text) < len(text) else "added"
        return f"a leading space is {what} ({before!r} is {after!r} now)"
    return f"token {place + 1} is {before!r} ({wanted[place]}) in training, {after!r} ({found[place]}) here"


def _prompt_row(
    expected: Expected, pairs: Sequence[tuple[Answer, Answer]], refusal: str | None, tokenizer: Any, count: int
) -> Row:
    name, asked = "prompt ids", "all the ids of training"
    if pairs and not any(found.prompt_ids for _, found in pairs):
        return Row(name, "not told", asked, None)
    wrong = [(one, other) for one, other in pairs if one.prompt_ids != other.prompt_ids]
    value = f"{len(pairs) - len(wrong)} of {count}"
    if refusal is not None:
        return Row(name, value, asked, False, f"a prompt is refused ({refusal}). {_COPY}.")
    if not wrong:
        return Row(name, value, asked, True)
    why = why_other_ids(wrong[0][0].prompt_ids, wrong[0][1].prompt_ids, expected.tokenizer, tokenizer)
    return Row(name, value, asked, False, f"prompts reach the model with other ids than in training: {why}. {_COPY}.")


def _difference_row(pairs: Sequence[tuple[Answer, Answer]], limit: float) -> Row:
    name, asked = "log-probs", f"mean difference at most {limit:.2g}"
    both = [(one.logps, other.logps) for one, other in pairs if other.logps]
    differences = [abs(a - b) for one, other in both for a, b in zip(one, other, strict=True)]
    if not differences:
        return Row(name, "not told", asked, None)
    mean = sum(differences) / len(differences)
    return Row(
        name, f"mean {mean:.2g}, max {max(differences):.2g}", asked, mean <= limit,
        f"the adapter's answers have other log-probs under the export. {_WHY}",
    )  # fmt: skip


def _spelled(ids: Sequence[int], tokenizer: Any) -> str:
    """The tokens as they are spelled, with a space where they mark one."""
    text = "".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))
    return text.translate(str.maketrans(_SPACES, " " * len(_SPACES)))


def _count_of(id_: int | None, ids: Sequence[int]) -> int:
    """How often the ids begin with it."""
    return next((at for at, one in enumerate(ids) if one != id_), len(ids))


def _rendered(tokenizer: Any, messages: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program and raises what it likes
        return f"an error: {error}"


def _around(text: str, other: str) -> str:
    """The text where it begins to differ from another."""
    place = next((at for at, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[max(0, place - 10) : place + 40])


def _differs(missing: Sequence[str], more: Sequence[str]) -> str:
    parts = [f"lacks {' '.join(missing)}"] if missing else []
    return " and ".join([*parts, f"has {' '.join(more)} besides"] if more else parts)


def _id(id_: int | None) -> str:
    return "absent" if id_ is None else f"id {id_}"
