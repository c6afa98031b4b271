"""QLoRA DPO on one GPU: quantize, align, compare, merge."""

__version__ = "0.1.0"
