"""The options of the commands that make pairs: answers of a model, and who says which one is better."""

from __future__ import annotations
