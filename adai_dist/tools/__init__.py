"""Instruments beside the optimizer: what it does (telemetry, plots) and how fast (bench)."""
