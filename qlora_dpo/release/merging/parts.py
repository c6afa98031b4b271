"""Weights that a checkpoint stores in parts, such as each expert's: joined as transformers joins them when it loads,
and taken apart as it does when it saves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor


class Parts:
    """The parts of each parameter that is stored in parts.

    Args:
        model: without weights.
        patterns: for every tensor that is such a part, by its name: the parameter, and the pattern of its converter.
        shapes: of these tensors.
    """

    def __init__(self, model: Any, patterns: Mapping[str, tuple[str, str]], shapes: Mapping[str, tuple[int, ...]]):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key

        self._model = model
        self._patterns = patterns
        self._converters = {
            pattern: entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)
            for pattern in entry.source_patterns
        }  # fmt: skip
        self.names: dict[str, list[str]] = defaultdict(list)
        """The names of a parameter's parts, in the order in which they are joined."""
        for name in sorted(patterns, key=dot_natural_key):
            self.names[patterns[name][0]].append(name)
        self.separable: Collection[str] = {name for name in self.names if self._comes_apart(name, shapes)}
        """The parameters that can be joined and taken apart again."""

    def joined(self, parameter: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The whole parameter of its parts by name."""
        names = self.names[parameter]
        converter: Any = deepcopy(self._converters[self._patterns[names[0]][1]])
        for name in names:
            converter.add_tensor(parameter, name, self._patterns[name][1], parts[name])
        found = converter.convert(parameter, model=self._model, config=self._model.config)[parameter]
        whole: Tensor = found[0] if isinstance(found, list) else found
        return whole

    def apart(self, parameter: str, whole: Tensor) -> dict[str, Tensor]:
        """The parts of a parameter, by their names."""
        from transformers.core_model_loading import revert_weight_conversion

        parts: dict[str, Tensor] = revert_weight_conversion(self._model, {parameter: whole})
        return parts

    def _comes_apart(self, parameter: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        whole = torch.empty(self._model.state_dict()[parameter].shape, device="meta")
        try:
            found = {name: tuple(part.shape) for name, part in self.apart(parameter, whole).items()}
        except Exception:  # a conversion that transformers cannot undo
            return False
        return found == {name: shapes[name] for name in self.names[parameter]}
