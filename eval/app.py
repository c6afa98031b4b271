"""`app`: a page to compare, vote and read a run; with one model in memory, or from recorded answers without any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval import prompts as prompt_sources
from eval.compare import config_of, default_folder, load_both
from eval.options import AppOptions, CompareOptions
from eval.page.answers import Comparison
from eval.page.build import build_page, look
from eval.page.parts import Page
from eval.page.prompts import Origin, Pick, PromptList
from eval.page.source import Source, recorded_source
from eval.page.votes import Ballots
from eval.page.words import language_of, words_in
from qlora_dpo.errors import UsageError
from qlora_dpo.models.loading import choose_device
from qlora_dpo.pages import serving as pages
from qlora_dpo.pages.access import credentials
from qlora_dpo.pages.serving import Served
from qlora_dpo.scoring.adapter import ScoredAdapter, check_fit, open_adapter, tokenizer_of


def serve(options: AppOptions) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        QloraDpoError: the adapter, the recorded answers, the address or the password cannot be used.
    """
    _check(options)
    auth = credentials(options.host, options.auth, options.allowed_hosts)
    served = Served(options.host, options.port, auth, options.allowed_hosts)
    page = _page_of_adapter(options) if options.adapter else _page_of_recorded(options)
    pages.serve(lambda: build_page(page), served, page.source.name, look)


def _check(options: AppOptions) -> None:
    if (options.adapter is None) == (options.recorded is None):
        raise UsageError("name either --adapter (a run, with its model) or --recorded (a comparison, without a model).")
    if options.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens {options.max_new_tokens}: must be above 0.")
    if options.recorded is not None and (options.base_model or options.use_cpu):
        raise UsageError("--base_model and --use_cpu are of no use with --recorded, which loads no model.")


def _page_of_recorded(options: AppOptions) -> Page:
    assert options.recorded is not None
    source = recorded_source(options.recorded)
    return page_of(source, options, None, PromptList(source))


def _page_of_adapter(options: AppOptions) -> Page:
    comparing = CompareOptions(
        adapter=str(options.adapter), base_model=options.base_model, use_cpu=options.use_cpu,
        max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
    adapter = open_adapter(comparing.adapter)
    config = config_of(adapter, comparing)
    check_fit(adapter, config)
    tokenizer = tokenizer_of(adapter, config)
    model = load_both(adapter, config, choose_device(options.use_cpu))
    run = None if adapter.run is None else adapter.run.path
    source = Source(run=run, comparison=default_folder(adapter), adapter=adapter.folder)

    def read() -> tuple[Origin, Sequence[Pick]]:
        return prompts_of(adapter, comparing, tokenizer)

    comparison = Comparison(model, tokenizer, longest_answer=options.max_new_tokens, beta=config.loss.beta)
    return page_of(source, options, comparison, PromptList(source, read))


def page_of(source: Source, options: AppOptions, model: Comparison | None, prompts: PromptList) -> Page:
    """What the tabs are made of."""
    language = language_of(options.language)
    ballots = Ballots(source.votes_folder, source.comparison)
    return Page(source, words_in(language), language, model, prompts, ballots)


def prompts_of(adapter: ScoredAdapter, options: CompareOptions, tokenizer: Any) -> tuple[Origin, Sequence[Pick]]:
    """The prompts that `compare` would ask."""
    found = prompt_sources.load(options, adapter.settings, tokenizer)
    origin: Origin = "pick" if found.source == prompt_sources.HELD_OUT else "pick_built_in"
    return origin, [Pick(row.prompt, row.category, row.reference_answer) for row in found.rows]
