"""The same prompts to llama.cpp, through its Python package where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_dpo.data.preferences import Message
from qlora_dpo.errors import ModelError
from qlora_dpo.release.checking.replay import Answer, Expected

_ROOM = 64  # tokens of context beyond what is expected


def llama_cpp_answers(gguf: Path, prompts: Sequence[Sequence[Message]], expected: Expected) -> list[Answer | Exception]:
    """Greedy answers, with the file's own chat template and end tokens; the exception where a prompt is refused.

    In a process of its own: a fault of llama.cpp's kernels ends a process without a word.

    Raises:
        ModelError: llama.cpp cannot read the file, or crashes on it.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        replayed = process.submit(replay, gguf, prompts, expected.answers, expected.max_new_tokens)
        try:
            return replayed.result()
        except BrokenProcessPool as error:
            raise ModelError(
                f"{gguf}: llama.cpp crashed while it computed with this file. On some CPUs its AMX kernels do that "
                "with q8_0: try --outtype f16, another version of llama-cpp-python, or another machine. Whoever serves "
                "the file there will see the same."
            ) from error


def replay(
    gguf: Path, prompts: Sequence[Sequence[Message]], wanted: Sequence[Answer], max_new_tokens: int
) -> list[Answer | Exception]:
    """What llama.cpp answers, in this process.

    Raises:
        ModelError: it cannot read the file.
    """
    from llama_cpp import Llama

    context = max(len(answer.prompt_ids) for answer in wanted) + max_new_tokens + _ROOM
    try:
        llama: Any = Llama(str(gguf), n_ctx=context, logits_all=True, seed=0, verbose=False)
    except (ValueError, OSError, AssertionError) as error:
        raise ModelError(f"{gguf}: llama.cpp cannot read it ({error}). Write it anew with `release gguf`.") from error
    render = _template(llama)
    answers: list[Answer | Exception] = []
    for messages, answer in zip(prompts, wanted, strict=True):
        try:
            prompt_ids = _prompt_ids(llama, render(messages))
            answers.append(_answer(llama, prompt_ids, answer, max_new_tokens))
        except (ValueError, RuntimeError) as error:
            answers.append(error)
    llama.close()
    return answers


def _template(llama: Any) -> Any:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llama.metadata.get("tokenizer.chat_template")
    if not template:
        raise ModelError("the GGUF file has no chat template: write it anew with `release gguf`.")
    texts = {
        name: _text(llama, id_) for name, id_ in (("eos_token", llama.token_eos()), ("bos_token", llama.token_bos()))
    }
    formatter = Jinja2ChatFormatter(template, **texts)
    return lambda messages: formatter(messages=list(messages)).prompt


def _text(llama: Any, id_: int) -> str:
    return "" if id_ < 0 else llama.detokenize([id_], special=True).decode("utf-8", "replace")


def _prompt_ids(llama: Any, text: str) -> tuple[int, ...]:
    """The ids of a rendered prompt, with a BOS where the file asks for one and the template wrote none."""
    ids = llama.tokenize(text.encode(), add_bos=False, special=True)
    adds = llama.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    return (llama.token_bos(), *ids) if adds and ids[:1] != [llama.token_bos()] else tuple(ids)


def _answer(llama: Any, prompt_ids: tuple[int, ...], wanted: Answer, max_new_tokens: int) -> Answer:
    from llama_cpp import llama_model_get_vocab, llama_vocab_is_eog

    vocabulary = llama_model_get_vocab(llama.model)
    ids: list[int] = []
    ended = False
    llama.reset()
    for id_ in llama.generate(list(prompt_ids), top_k=1, temp=0.0, repeat_penalty=1.0):
        ids.append(int(id_))
        ended = bool(llama_vocab_is_eog(vocabulary, id_))
        if ended or len(ids) == max_new_tokens:
            break
    content = ids[:-1] if ended else ids
    text = llama.detokenize(content).decode("utf-8", "replace").strip()
    llama.reset()
    llama.eval([*prompt_ids, *wanted.ids])
    start = len(prompt_ids) - 1
    scores = torch.from_numpy(np.array(llama.scores[start : start + len(wanted.ids)], np.float32)).log_softmax(-1)
    logps = scores.gather(1, torch.tensor(wanted.ids)[:, None])[:, 0]
    return Answer(prompt_ids, tuple(ids), text, ended, tuple(logps.tolist()))
