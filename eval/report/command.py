"""`report`: one HTML page of a run, finished or still going, and its curves as pictures."""

from __future__ import annotations

from eval.options import ReportOptions
from eval.report.page import page_of
from eval.report.png import draw_pictures
from eval.report.run import read_run
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.files.guard import check_output, marked
from qlora_dpo.training.folder.owned import is_run
from qlora_dpo.training.folder.run_folder import write_atomically

PAGE, PAGE_MARK = "report.html", b'<meta name="generator" content="qlora_dpo">'


def report(options: ReportOptions) -> None:
    """Write the page.

    Raises:
        StorageError: the folder is no run, or the page cannot be written.
        UsageError: the price is negative.
    """
    price = options.gpu_price_per_hour
    if price is not None and not 0 <= price < float("inf"):
        raise UsageError(f"--gpu_price_per_hour {price}: must be at least 0.")
    run = read_run(options.run, options.comparison)
    output = options.output or options.run / PAGE
    if options.output is not None or not is_run(options.run):
        check_output(output, is_own=marked(PAGE_MARK))
    page = page_of(run, language=options.language, price_per_hour=price)
    try:
        pictures = [] if options.png is None else draw_pictures(run, options.png, options.language)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page)
    except OSError as error:
        raise StorageError(
            f"{error.filename or output} cannot be written: {error.strerror or error}. Name another file with --output."
        ) from error
    total = "" if run.total_steps is None else f" of {run.total_steps}"
    print(f"{output}: {run.state}, step {run.steps}{total}, {output.stat().st_size / 1e6:.2f} MB.")
    if pictures:
        print(f"{options.png}: {', '.join(file.name for file in pictures)}.")
    for note in run.notes:
        print(f"  left out: {note}")
