"""What every measured program imports; the server that their processes are forked from imports it once."""

from __future__ import annotations

import importlib

from qlora_dpo.environment import prepare_process

prepare_process()
for name in (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.quantizers.quantizer_bnb_4bit",
    "bitsandbytes",
    "peft",
):
    importlib.import_module(name)
