"""`app`: a page to compare, vote and read a run; with one model in memory, or from recorded answers without any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval import prompts as prompt_sources
from eval.compare import config_of, default_folder, load_both
from eval.options import AppOptions, CompareOptions
from eval.page.answers import Comparison
from eval.page.build import build_page, credentials, look
from eval.page.guard import Guard
from eval.page.parts import Page
from eval.page.prompts import Origin, Pick, PromptList
from eval.page.source import Source, recorded_source
from eval.page.votes import Ballots
from eval.page.words import language_of, words_in
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.models.loading import choose_device
from qlora_dpo.scoring.adapter import ScoredAdapter, check_fit, open_adapter, tokenizer_of


def serve(options: AppOptions) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        QloraDpoError: the adapter, the recorded answers, the address or the password cannot be used.
    """
    _check(options)
    auth = credentials(options.host, options.auth)
    page = _page_of_adapter(options) if options.adapter else _page_of_recorded(options)
    blocks = build_page(page)
    print(f"{page.source.name}: {launch(blocks, host=options.host, port=options.port, auth=auth)} (Ctrl-C ends it)")
    blocks.block_thread()


def launch(blocks: Any, *, host: str, port: int, auth: tuple[str, str] | None) -> str:
    """Serve a page, until it is closed; returns its address.

    Whatever environment variables say, it is not shared, serves no files and has no open interface.

    Raises:
        StorageError: the address or the port cannot be opened.
    """
    from starlette.middleware import Middleware

    try:
        _, address, _ = blocks.launch(
            prevent_thread_lock=True,
            quiet=True,
            server_name=host,
            server_port=port or None,
            auth=auth,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            pwa=False,
            allowed_paths=[],
            max_file_size="1mb",
            show_error=False,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Guard)], "docs_url": None, "redoc_url": None},
            **look(),
        )
        return str(address)
    except OSError as error:
        raise StorageError(f"{host}, port {port} cannot be opened: {error}. Name another with --port.") from error


def _check(options: AppOptions) -> None:
    if (options.adapter is None) == (options.recorded is None):
        raise UsageError("name either --adapter (a run, with its model) or --recorded (a comparison, without a model).")
    if not 0 <= options.port < 65536:
        raise UsageError(f"--port {options.port}: must be between 0 and 65535.")
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
