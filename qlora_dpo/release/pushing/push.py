"""`release push`: a run's adapter, a merged folder or GGUF files go to a hub, after everybody saw what would go."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.config.release import PushOptions
from qlora_dpo.errors import ModelError, StorageError, UsageError
from qlora_dpo.files.guard import check_output
from qlora_dpo.release.cards.card import card_of, hub_datasets, metadata_of
from qlora_dpo.release.cards.records import Records, read_records
from qlora_dpo.release.cards.sections import Facts
from qlora_dpo.release.pushing.files import LeftOut, Sent, sort_files, without_local_paths
from qlora_dpo.release.pushing.hugging_face import license_on_hub, push_to_hugging_face
from qlora_dpo.release.pushing.modelscope import push_to_modelscope
from qlora_dpo.release.pushing.secrets import Finding, head_of, scan
from qlora_dpo.release.pushing.uploading import Upload
from qlora_dpo.training.folder.run_folder import CARD, CURVES, write_atomically
from qlora_dpo.training.records.model_card import is_hub_id
from qlora_dpo.training.records.seal import is_edited, is_untouched

HUBS: dict[str, Callable[[Upload], str]] = {"huggingface": push_to_hugging_face, "modelscope": push_to_modelscope}
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}")
_SHOWN_FINDINGS = 20


def push(options: PushOptions) -> None:
    """The `release push` command: print what goes and what stays and, with --execute, upload it.

    Raises:
        StorageError, UsageError, ModelError: see the message; nothing was committed.
    """
    check_repository(options.repo)
    with _storage_errors(options.folder):
        records = read_records(options.folder, options.run)
        package = pack(options, records)
    if options.card is not None:
        check_output(options.card, is_own=lambda path: not is_edited(path), option="card")
    print("\n".join(table(options, package)))
    refuse_findings(package.files)
    if options.card is not None and package.card is not None:
        with _storage_errors(options.card):
            write_atomically(options.card, package.card)
        print(f"The card is in {options.card}.")
    if (objections := records.objections()) and not options.force:
        raise ModelError(
            f"{options.folder} is not pushed: {'; '.join(objections)}. Make a better one, or push it with --force, and "
            "its card says so."
        )
    if not options.execute:
        print(f"Nothing was sent. The same command with --execute sends this to {options.repo}.")
        return
    message = options.commit_message or f"Upload {records.kind} by qlora_dpo"
    files = sorted(package.files, key=lambda file: file.name)
    upload = Upload(options.repo, files, options.public, message, package.metadata.get("license"))
    print(f"Pushed to {HUBS[options.hub](upload)}")


@dataclass(frozen=True)
class Package:
    """What a push consists of."""

    files: list[Sent]
    left_out: list[LeftOut]
    card: str | None
    """None where the folder's own card, which a person wrote, goes as it is."""
    metadata: dict[str, Any]
    """Of the card that goes."""
    notes: list[str]


def check_repository(name: str) -> None:
    """Raises UsageError where `name` cannot be a repository's."""
    if not _REPOSITORY.fullmatch(name) or re.search(r"\.\.|--|[.-](/|$)|\.git$", name):
        raise UsageError(
            f"--repo {name} cannot be the name of a repository: it is ORG/NAME (or USER/NAME), of letters, digits, - _ "
            "and ., with no -- and .. in it, and . and - at no end."
        )


def pack(options: PushOptions, records: Records) -> Package:
    """Sort the files, replace the paths of this machine in them, and write the card.

    Raises:
        UsageError: an adapter's base is not on a hub; or the folder's own card has metadata that no hub takes.
        StorageError, ModelError: see `sort_files`.
    """
    notes = list(records.notes)
    base = _base_id(options, records, notes)
    revision = records.own.get("revision") if base == records.base else None
    files, left_out = sort_files(records.folder, records.kind)
    files = without_local_paths(files, records.base, base, revision)
    files += _curves_of_run(records, files)
    if not any(file.name == "tokenizer_config.json" for file in files) and records.kind != "gguf":
        notes.append("there is no tokenizer in the folder: who loads this takes the base's, with its chat template.")
    facts = Facts(
        name=options.repo,
        base=base,
        license=_license(options, records, base, notes),
        datasets=hub_datasets(records),
        samples=options.samples,
        has_curves=any(file.name == CURVES for file in files),
    )
    own = next((file for file in files if file.name == CARD), None)
    if own is not None and not is_untouched(_text(own)):
        notes.append(f"{CARD} was written or edited by a person, so it goes as it is. Without it, push writes one.")
        return Package(files, left_out, None, _metadata_of_own(own), notes)
    card = card_of(records, facts)
    files = [file for file in files if file is not own]
    files.append(Sent(CARD, card.encode(), "written anew from what the folder tells"))
    return Package(files, left_out, card, metadata_of(records, facts).to_dict(), notes)


def refuse_findings(files: list[Sent]) -> None:
    """Look through all that would go.

    Raises:
        UsageError: there is a secret, or a trace of this machine; says where, and never what.
    """
    found: list[Finding] = []
    for file in files:
        found += scan(file.name, head_of(file.content) if isinstance(file.content, Path) else file.content)
    if found:
        shown = "\n".join(f"  {finding}" for finding in found[:_SHOWN_FINDINGS])
        more = f"\n  and {len(found) - _SHOWN_FINDINGS} more" if len(found) > _SHOWN_FINDINGS else ""
        raise UsageError(
            f"nothing was sent, because these should not leave this machine:\n{shown}{more}\nTake them out (and revoke "
            "a key that others may have seen), or move the file out of the folder; then run the same command again."
        )


def table(options: PushOptions, package: Package) -> list[str]:
    """All that a push would do, as lines to print."""
    visibility = "public" if options.public else "private"
    total = sum(file.size for file in package.files)
    width = max(map(len, [*(file.name for file in package.files), *(one.name for one in package.left_out)]))
    lines = [f"{options.folder} -> {options.repo} on {options.hub}, {visibility}", "", "goes:"]
    lines += [
        _row(file.name, width, file.size, file.note) for file in sorted(package.files, key=lambda file: file.name)
    ]
    lines += [_row("together", width, total, ""), "", "stays:"]
    lines += [_row(one.name, width, one.size, one.reason) for one in package.left_out] or ["  nothing"]
    lines += ["", f"metadata of the card ({CARD}):"]
    lines += [f"  {name}: {_shown(value)}" for name, value in package.metadata.items()]
    return [*lines, *([""] if package.notes else []), *(f"note: {note}" for note in package.notes), ""]


@contextmanager
def _storage_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or place} cannot be read or written: {error.strerror or error}. Check the path."
        ) from error


def _text(file: Sent) -> str:
    return file.content.decode(errors="replace") if isinstance(file.content, bytes) else ""


def _row(name: str, width: int, size: int, remark: str) -> str:
    return f"  {name:{width}}  {_bytes(size):>9}  {remark}".rstrip()


def _bytes(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.3g} GB"


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):  # the model index
        return "".join(
            f"\n    {metric.get('name', metric['type'])}: {metric['value']}"
            for result in value[0].get("results", [])
            for metric in result.get("metrics", [])
        )
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _base_id(options: PushOptions, records: Records, notes: list[str]) -> str | None:
    """The base's name on the hub."""
    named = options.base_model_id
    if named is not None and not is_hub_id(named):
        raise UsageError(f"--base_model_id {named} is no id on a hub: give ORG/NAME, not a path of this machine.")
    if named is not None:
        return named
    if records.base and is_hub_id(records.base):
        return records.base
    if records.kind == "adapter":
        raise UsageError(
            f"the adapter's base is {records.base}, a path on this machine, where nobody else can load it from. Name "
            "where the base is on the hub: --base_model_id ORG/NAME."
        )
    notes.append("the base is not on a hub, so the card names none: name it with --base_model_id.")
    return None


def _license(options: PushOptions, records: Records, base: str | None, notes: list[str]) -> dict[str, str]:
    """The license's metadata: what was named, else what the base's card says."""
    if options.license:
        return {"license": options.license}
    found: dict[str, str] = {}
    why: str | None = "the card names no license: name it with --license"
    if base is not None and options.hub == "huggingface":
        asked, why = license_on_hub(base)
        found = dict(asked)
    if why:
        notes.append(f"{why}.")
    return found


def _curves_of_run(records: Records, files: list[Sent]) -> list[Sent]:
    """The picture of the run's curves, for a merged model, which has none of its own."""
    picture = records.run / CURVES if records.run is not None else None
    if picture is None or any(file.name == CURVES for file in files) or not picture.is_file():
        return []
    return [Sent(CURVES, picture.read_bytes(), f"of {records.run}")]


def _metadata_of_own(card: Sent) -> dict[str, Any]:
    """The metadata of a card that a person wrote.

    Raises:
        UsageError: they cannot be read, or name paths of this machine.
    """
    from huggingface_hub import ModelCard

    try:
        metadata: dict[str, Any] = ModelCard(_text(card)).data.to_dict()
    except Exception as error:  # a YAML error or whatever the library makes of it
        raise UsageError(
            f"the metadata of {CARD} cannot be read: {' '.join(str(error).split())}. Correct it."
        ) from error
    for name in ("base_model", "datasets"):
        values = metadata.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            if not is_hub_id(str(value)):
                raise UsageError(
                    f"{CARD} has {name}: {value} in its metadata, which is no id on a hub. Correct "
                    "it, or take the file away: then push writes one."
                )
    return metadata
