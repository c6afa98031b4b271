"""Measuring a finished run: before and after."""
