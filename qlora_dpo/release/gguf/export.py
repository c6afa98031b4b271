"""`release gguf`: a merged folder as one GGUF file for llama.cpp and Ollama, or several parts of it.

Tensor by tensor: no more than one is in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dpo.config.release import GgufOptions
from qlora_dpo.data.chat import Chat
from qlora_dpo.data.control_tokens import uses_bos
from qlora_dpo.errors import ModelError, StorageError, UsageError
from qlora_dpo.files.guard import check_output, json_with, marked
from qlora_dpo.models.loading import check_local_weights, load_config, load_tokenizer
from qlora_dpo.release.cards.records import GGUF_REPORT, MERGE_REPORT
from qlora_dpo.release.gguf.families import Architecture, architecture_of, notes_of
from qlora_dpo.release.gguf.model import LARGEST_FLOAT16, SourceTensor, add_settings, source_tensors
from qlora_dpo.release.gguf.modelfile import modelfile
from qlora_dpo.release.gguf.vocabulary import GgufVocabulary, gguf_vocabulary
from qlora_dpo.release.staging import require_space, staged, sync_folder

MODELFILE = "Modelfile"
BLOCK = 32  # numbers of a row that q8_0 keeps together
_PHI_3 = re.compile("phi-?3", re.IGNORECASE)
_IS_REPORT = json_with("folder", "outtype")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Source:
    """What is read from the folder."""

    folder: Path
    config: Any
    """Of the part that text runs through."""
    tokenizer: Any
    architecture: Architecture
    vocabulary: GgufVocabulary
    tensors: Sequence[SourceTensor]
    notes: Sequence[str]
    """What a user has to know."""


def write_gguf(options: GgufOptions) -> None:
    """The `release gguf` command.

    Raises:
        StorageError: there is no such folder, or no room for the file.
        UsageError: the output exists, or an option has no meaning.
        ModelError: the architecture or the tokenizer has no form in GGUF, or is an adapter.
    """
    limit = size_of(options.max_shard_size)
    left = _left_by_a_kill(options.output)
    _refuse_output(options.output, left)
    source = read_source(options)
    output = options.output
    require_space(output.parent, _bytes_needed(source.tensors, options.outtype), f"{output}")
    hidden = output.with_name(f".{output.name}.parts")
    with staged(hidden) as folder:
        _write(source, options.outtype, limit, folder / output.name)
        parts = sorted(part.name for part in folder.iterdir())
        (folder / MODELFILE).write_text(modelfile(source.tokenizer, parts[0]), encoding="utf-8")
        (folder / GGUF_REPORT).write_text(_report(options, parts), encoding="utf-8")
        sync_folder(folder)
        for part in left:
            part.unlink()
        for name in (MODELFILE, GGUF_REPORT, *reversed(parts)):  # the part that llama.cpp is given comes last
            (folder / name).rename(output.with_name(name))
    hidden.rmdir()
    for note in source.notes:
        print(note)
    size = sum(output.with_name(part).stat().st_size for part in parts)
    parts_of = f" in {len(parts)} parts" if len(parts) > 1 else ""
    print(
        f"{output.with_name(parts[0])}: {options.outtype}, {size / 1e6:,.1f} MB{parts_of}, tokenizer "
        f"{source.vocabulary.model} ({source.vocabulary.pre}). The {MODELFILE} beside it is for "
        f"`ollama create NAME -f {MODELFILE}`."
    )


def read_source(options: GgufOptions) -> Source:
    """Everything but the weights, checked.

    Raises:
        StorageError, ModelError: see `write_gguf`.
    """
    folder = options.folder
    if not folder.is_dir():
        raise StorageError(f"{folder}: there is no such folder. Name the folder that `merge` wrote.")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} is an adapter, and GGUF holds a whole model: `merge` it first, and name that folder."
        )
    config = load_config(str(folder))
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{folder} is quantized. Name a 16-bit folder, as `merge` writes it.")
    architecture = architecture_of(config, options)
    check_local_weights(str(folder))
    tokenizer, text = load_tokenizer(str(folder)), config.get_text_config()
    vocabulary = gguf_vocabulary(tokenizer, text.vocab_size, folder)
    tensors = list(source_tensors(text, architecture, folder))
    notes = [*notes_of(config, architecture), *vocabulary.notes]
    return Source(folder, text, tokenizer, architecture, vocabulary, tensors, notes)


def size_of(text: str | None) -> int:
    """Bytes of `5GB`; 0 for no limit.

    Raises:
        UsageError: it is no size.
    """
    if text is None:
        return 0
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    if unit not in _UNITS or not number.strip().replace(".", "", 1).isdigit() or float(number) <= 0:
        raise UsageError(f"--max_shard_size {text}: write a size such as 5GB or 500MB.")
    return int(float(number) * _UNITS[unit])


def _refuse_output(output: Path, left: Sequence[Path]) -> None:
    if output.suffix != ".gguf":
        raise UsageError(f"--output {output}: name a file that ends in .gguf.")
    for part in {output, *output.parent.glob(f"{output.stem}-?????-of-?????.gguf")} - set(left):
        check_output(part)
    # A kill may have left these two, which have their names before the first part has its own.
    check_output(output.with_name(GGUF_REPORT), is_own=_IS_REPORT, option=None)
    check_output(output.with_name(MODELFILE), is_own=marked(f"FROM ./{output.stem}".encode()), option=None)


def _left_by_a_kill(output: Path) -> list[Path]:
    """Parts that a killed command had already named: its report lists them, and the first, which comes last, is absent.

    They are this command's own, and are replaced.
    """
    report = output.with_name(GGUF_REPORT)
    if report.is_symlink() or not report.is_file() or not _IS_REPORT(report):
        return []
    listed = json.loads(report.read_bytes()).get("parts")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    own = re.compile(re.escape(output.stem) + r"-\d{5}-of-\d{5}\.gguf")
    parts = [output.with_name(name) for name in names if own.fullmatch(name)]
    there = [part for part in parts if part.is_file() and not part.is_symlink()]
    return there if parts and parts[0] not in there else []


def _kind(tensor: SourceTensor, outtype: str) -> Any:
    """Norms and biases stay in float32, as llama.cpp computes with them; rows that q8_0 cannot cut stay in float16."""
    from gguf import GGMLQuantizationType

    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    whole = outtype == "q8_0" and tensor.shape[-1] % BLOCK == 0
    return GGMLQuantizationType.Q8_0 if whole else GGMLQuantizationType.F16


def _nbytes(tensor: SourceTensor, outtype: str) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[_kind(tensor, outtype)]
    return prod(tensor.shape) // block * size


def _bytes_needed(tensors: Sequence[SourceTensor], outtype: str) -> int:
    return sum(_nbytes(tensor, outtype) for tensor in tensors)


def _report(options: GgufOptions, parts: Sequence[str]) -> str:
    """Where the file comes from: the folder, and the run that this one names; and what was written."""
    try:
        merge = json.loads((options.folder / MERGE_REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        merge = {}
    known = {name: merge[name] for name in ("run", "adapter", "base_model") if isinstance(merge.get(name), str)}
    own = {"folder": str(options.folder.absolute()), "outtype": options.outtype, "parts": parts}
    return json.dumps(known | own, indent=2) + "\n"


def _write(source: Source, outtype: str, limit: int, file: Path) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, quants

    writer = GGUFWriter(file, source.architecture.gguf_name, split_max_size=limit)
    try:
        writer.add_type("model")
        writer.add_name(_name(source.folder.resolve().name, source.vocabulary.swallows))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if outtype == "q8_0" else LlamaFileType.MOSTLY_F16)
        add_settings(writer, source.config, source.architecture)
        add_tokenizer(writer, source.tokenizer, source.vocabulary)
        for tensor in source.tensors:
            # The writer takes the shape of numbers with a type of numbers, and the kind in which they are kept.
            nbytes, kind = _nbytes(tensor, outtype), _kind(tensor, outtype)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in source.tensors:
            values = tensor.read()
            kind = _kind(tensor, outtype)
            _refuse_overflow(tensor, values, kind.name)
            writer.write_tensor_data(quants.quantize(values, kind))
        writer.flush()
    finally:
        writer.close()


def _refuse_overflow(tensor: SourceTensor, values: np.ndarray, kind: str) -> None:
    largest = float(np.abs(values).max(initial=0.0))
    if not np.isfinite(largest):
        raise ModelError(f"{tensor.file}: {tensor.source} holds a number that is none (NaN or infinite). Merge anew.")
    # q8_0 keeps a float16 scale for the largest of 32 numbers: that number by 127.
    if largest > LARGEST_FLOAT16 * {"F16": 1, "Q8_0": 127}.get(kind, np.inf):
        raise ModelError(
            f"{tensor.file}: {tensor.source} holds {largest:.3g}, more than float16 can ({LARGEST_FLOAT16:.0f}). "
            "Use --outtype q8_0, or serve the folder with vLLM in bfloat16."
        )


def _name(folder: str, swallows: bool) -> str:
    """A model whose name holds phi-3, and no other, is one whose control tokens swallow the spaces after them."""
    if swallows == bool(_PHI_3.search(folder)):
        return folder
    return f"{folder} (phi-3)" if swallows else _PHI_3.sub("phi_3", folder)


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: GgufVocabulary) -> None:
    """Tokens, special ids and flags, and the chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name in ("bos", "eos", "unk", "pad"):
        id_ = getattr(tokenizer, f"{name}_token_id")
        if id_ is not None:
            getattr(writer, f"add_{name}_token_id")(id_)
    writer.add_add_bos_token(uses_bos(tokenizer))
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
        end = Chat(tokenizer).form.end_id
        if end != tokenizer.eos_token_id:
            writer.add_eot_token_id(end)
