"""Breaks runs on purpose: kills, signals, damaged checkpoints, full disks, mutated files; and a control."""
