"""Labels by people: a blind page on this machine; several annotators fill one record, and the majority decides."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from qlora_dpo.config.labeling import HumanOptions
from qlora_dpo.errors import UsageError
from qlora_dpo.labeling.annotation import Annotation, View
from qlora_dpo.labeling.records import finish, load_candidates, open_record
from qlora_dpo.pages.serving import Served, serve

MOST_ANSWERS = 9  # there are as many keys
OTHER_ACTIONS = {"0": "Tie  [0]", "s": "Skip  [s]", "u": "Undo  [u]"}
_NAME = re.compile(r"\w[\w .@+-]{0,63}")

# The buttons do what the keys do; a key held down counts once.
SHORTCUTS = """() => {
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches?.("input, textarea, [contenteditable]");
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (typing && !event.target.disabled && !event.target.readOnly) return;
    const key = event.key.toLowerCase();
    if (!/^[0-9su]$/.test(key)) return;
    const button = document.getElementById("label-" + key);
    if (button?.offsetParent && !button.disabled) { event.preventDefault(); button.click(); }
  });
}"""


def label_by_hand(options: HumanOptions) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C, then write the pairs.

    Raises:
        DataError, StorageError, UsageError: the candidates, the record or the port cannot be used.
    """
    if not _NAME.fullmatch(options.annotator):
        raise UsageError(f"--annotator {options.annotator!r}: use up to 64 letters, digits, spaces and . @ + - _.")
    served = Served(port=options.port)
    candidates = load_candidates(options.candidates, options.bad_rows)
    record = open_record(options.output, "human", options.candidates)
    annotation = Annotation(candidates, record, options.annotator)
    if annotation.longest > MOST_ANSWERS:
        raise UsageError(
            f"{options.candidates} has {annotation.longest} answers to one prompt, and a person compares at most "
            f"{MOST_ANSWERS}. Generate fewer, or label by rules, reward_model or judge."
        )
    print(finish(options.output, candidates, record.verdicts()))
    try:
        serve(lambda: build_page(annotation), served, str(options.output))
    finally:
        print(finish(options.output, candidates, record.verdicts()))


def build_page(annotation: Annotation) -> Any:
    """The Gradio page around an annotation. Everything that comes from data is shown in text boxes, never as HTML."""
    import gradio as gr

    numbers = range(1, annotation.longest + 1)
    with gr.Blocks(title="Which answer is better?", analytics_enabled=False) as page:
        gr.Markdown("## Which answer is better?\nKeys: the number of an answer, `0` tie, `s` skip, `u` undo.")
        key = gr.Textbox(visible=False)
        with gr.Row():
            message = gr.Textbox(label="Message", interactive=False, elem_id="label-message", scale=3)
            progress = gr.Textbox(label="Progress", interactive=False, elem_id="label-progress", scale=2)
        prompt = gr.Textbox(label="Prompt", lines=3, max_lines=16, interactive=False, elem_id="label-prompt")
        boxes, choices = [], []
        with gr.Row():
            for number in numbers:
                with gr.Column(min_width=240):
                    boxes.append(gr.Textbox(lines=10, max_lines=30, **_of_answer(number)))
                    choices.append(gr.Button(variant="primary", elem_id=f"label-{number}"))
        with gr.Row():
            others = {action: gr.Button(text, elem_id=f"label-{action}") for action, text in OTHER_ACTIONS.items()}
        agreement = gr.Textbox(label="Agreement", interactive=False, elem_id="label-agreement", visible=False)

        def shown(view: View) -> list[Any]:
            count = len(view.answers)
            answers = dict(enumerate(view.answers, 1))
            return [
                view.key,
                view.prompt,
                view.message,
                view.progress,
                gr.update(value=view.agreement, visible=bool(view.agreement)),
                *(gr.update(value=answers.get(number, ""), visible=number <= count) for number in numbers),
                *(
                    gr.update(value=_words(number, view), visible=number <= count, interactive=number - 1 != view.best)
                    for number in numbers
                ),
            ]

        outputs = [key, prompt, message, progress, agreement, *boxes, *choices]
        page.load(lambda: shown(annotation.view()), None, outputs, show_progress="hidden")
        page.load(None, None, None, js=SHORTCUTS)
        for action, button in {**dict(zip(map(str, numbers), choices, strict=True)), **others}.items():
            # The page says which answers it shows, so a press is about what was seen.
            press = partial(_pressed, annotation, shown, action)
            button.click(press, [key], outputs, show_progress="hidden", api_name=f"press_{action}")
    return page


def _pressed(annotation: Annotation, shown: Callable[[View], list[Any]], action: str, key: str) -> list[Any]:
    return shown(annotation.act(action, key))


def _of_answer(number: int) -> dict[str, Any]:
    return {"label": f"Answer {number}", "interactive": False, "elem_id": f"label-answer-{number}"}


def _words(number: int, view: View) -> str:
    """What is written on the button of an answer."""
    if len(view.answers) == 2:
        return f"Answer {number} is better  [{number}]"
    return f"Answer {number} is the {'best' if view.best is None else 'worst'}  [{number}]"
