"""The page: a prompt, the answers without and with the adapter, one model in memory."""

from __future__ import annotations

from typing import Any

import torch

from eval.options import AppOptions
from qlora_dpo.data.tokenization import PairTokenizer
from qlora_dpo.errors import QloraDpoError, StorageError
from qlora_dpo.models.generation import generate
from qlora_dpo.training.trained_on import load_trained

MAX_PROMPT_CHARACTERS = 8000
LONGEST_PROMPT = 2048  # tokens


def serve(options: AppOptions) -> None:
    """Load the model once and serve the page on 127.0.0.1 until Ctrl-C."""
    model, tokenizer = load_trained(options.adapter, base_model=options.base_model, use_cpu=options.use_cpu)
    page = build_page(Comparison(model, tokenizer, options.max_new_tokens), title=options.adapter.name)
    try:
        page.queue(max_size=16, default_concurrency_limit=1, api_open=False).launch(
            server_name="127.0.0.1",
            server_port=options.port or None,
            share=False,
            allowed_paths=[],
            max_file_size="1mb",
            show_error=False,
            footer_links=[],
        )
    except OSError as error:
        raise StorageError(f"port {options.port} cannot be opened: {error}. Name another with --port.") from error


class Comparison:
    """Answers one prompt twice: adapter off, adapter on, same seed."""

    def __init__(self, model: Any, tokenizer: Any, longest_answer: int) -> None:
        self._model, self._tokenizer, self.longest_answer = model, tokenizer, longest_answer
        self._prompts = PairTokenizer(tokenizer, max_length=2 * LONGEST_PROMPT, max_prompt_length=LONGEST_PROMPT)

    def __call__(self, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> tuple[str, str]:
        """The base's answer and the aligned one; limits are checked here, whatever the page sent."""
        text = prompt.strip()
        if not text:
            raise ValueError("Write a question first.")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"The question has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are taken.")
        ids = self._prompts.render_prompt_ids(text)
        before, after = (
            generate(
                self._model, self._tokenizer, [ids], end_token_ids=[self._prompts.end_id],
                max_new_tokens=max(1, min(int(max_new_tokens), self.longest_answer)),
                temperature=max(0.0, min(float(temperature), 2.0)), seed=int(seed), use_reference=off,
            )[0]
            for off in (True, False)
        )  # fmt: skip
        return before, after


def build_page(compare: Comparison, title: str) -> Any:
    """The Gradio page around a comparison. Answers are shown as text, never as HTML."""
    import gradio as gr

    def answer(prompt: str, max_new_tokens: float, temperature: float, seed: float) -> tuple[str, str]:
        try:
            return compare(prompt, int(max_new_tokens), temperature, int(seed))
        except (ValueError, QloraDpoError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        except torch.OutOfMemoryError as error:
            raise gr.Error("The device ran out of memory: ask for a shorter answer.", print_exception=False) from error

    with gr.Blocks(title=f"Before and after: {title}", analytics_enabled=False) as page:
        gr.Markdown(f"## Before and after\nThe same model, the same prompt, the same seed: without and with `{title}`.")
        prompt = gr.Textbox(label="Prompt", lines=3, max_length=MAX_PROMPT_CHARACTERS, autofocus=True)
        with gr.Accordion("Parameters", open=False), gr.Row():
            longest = compare.longest_answer
            max_new_tokens = gr.Slider(1, longest, value=min(128, longest), step=1, label="Longest answer (tokens)")
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: greedy)")
            seed = gr.Number(0, precision=0, label="Seed")
        ask = gr.Button("Compare", variant="primary")
        with gr.Row():
            before = gr.Textbox(label="Before (adapter off)", lines=10, interactive=False)
            after = gr.Textbox(label="After (adapter on)", lines=10, interactive=False)
        inputs, outputs = [prompt, max_new_tokens, temperature, seed], [before, after]
        gr.on([ask.click, prompt.submit], answer, inputs, outputs, api_name="compare")
    return page
