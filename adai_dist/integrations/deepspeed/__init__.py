"""DeepSpeed: `"optimizer": {"type": "Adai"}`, exact under every ZeRO stage.

- registration, optimizer_names: import hooks, and the names of the optimizers in a configuration.
- engine_binding: connects the optimizer of an engine to the wrapper that DeepSpeed puts around it.
- zero_mean_source: the global mean under ZeRO, from the gradient norms that ZeRO all-reduces.
- adapters: all that depends on the inside of DeepSpeed: its wrappers, engines and loaders, by range of releases.
- unsupported_settings, model_snapshot, ignored_optimizer, transformers_trainer: settings, model changes and
  optimizers that are refused or warned about.
- universal, checkpoint_file: conversion and files of checkpoints that keep all states.
"""
