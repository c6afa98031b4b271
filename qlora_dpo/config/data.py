"""The options of the commands that read, check and write data."""

from __future__ import annotations
