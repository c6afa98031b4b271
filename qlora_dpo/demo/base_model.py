"""The embedded base, and which model `train` takes where none is named beside the pairs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

BASE = Path(__file__).parent / "base"


def default_model(options: dict[str, Any]) -> dict[str, Any]:
    """That of the environment's MODEL_PATH, else the embedded one; nothing for the demo, which names neither."""
    if options["dataset"] is None or options["model_name_or_path"] is not None:
        return {}
    named = os.environ.get("MODEL_PATH")
    what = "that of MODEL_PATH" if named else "the embedded base, which is tiny and knows little"
    print(f"No --model_name_or_path: {named or BASE} is trained, {what}.", file=sys.stderr)
    return {"model_name_or_path": named or str(BASE)}
