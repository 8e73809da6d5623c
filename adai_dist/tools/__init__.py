"""Instruments around the optimizer: telemetry of its states, plots and tables of runs, a benchmark and a soak test."""
