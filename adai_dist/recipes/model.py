"""The model: a decoder-only transformer with new weights, described by a config of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from adai_dist.recipes.refusal import RecipeError, require, require_known

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # defaults belong to vocabularies of released models


def build_model(settings: Mapping[str, Any], vocab_size: int, seq_len: int, seed: int) -> nn.Module:
    """Makes the model on the CPU, with weights that depend on `seed` alone; nothing is downloaded.

    Args:
        settings: `architecture`, and settings of its config; `vocab_size` defaults to that of the tokenizer.
        vocab_size: number of tokens that occur.
        seq_len: tokens per sequence.
        seed: decides the weights.

    Raises:
        RecipeError: an unknown architecture or setting, or settings that contradict each other.
    """
    given = dict(settings)
    architecture = str(given.pop("architecture"))
    try:
        defaults: Any = AutoConfig.for_model(architecture)
    except ValueError as error:
        advice = "llama, gpt2 and qwen3 are some"
        raise RecipeError(
            f"model.architecture must be a model_type of transformers; got {architecture!r}; {advice}"
        ) from error
    valid = sorted(
        {*defaults.to_dict(), *defaults.attribute_map} - {"transformers_version", "model_type", "architectures"}
    )
    require_known("model.", given, valid, f"for {architecture}")
    given = {**dict.fromkeys(_TOKEN_IDS), "vocab_size": vocab_size, **given}
    require(
        int(given["vocab_size"] or 0) >= vocab_size,
        f"model.vocab_size must be at least {vocab_size}",
        given["vocab_size"],
        "drop it",
    )
    torch.manual_seed(seed)
    try:
        config: Any = AutoConfig.for_model(architecture, **given)
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of many classes, and all about the settings
        raise RecipeError(f"model must describe a {architecture} decoder; {' '.join(str(error).split())}") from error
    positions = getattr(config, "max_position_embeddings", seq_len)
    require(
        positions >= seq_len,
        f"the model must have at least data.seq_len={seq_len} positions",
        positions,
        "raise it in model",
    )
    return model


def block_modules(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model, the natural units of sharding."""
    names: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def row_losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean next-token cross entropy of every row, in nats per token.

    Args:
        model: with the call of a transformers causal language model.
        rows: int64, shape (rows, seq_len + 1).

    Returns:
        float32, shape (rows,).
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    logits: Tensor = model(input_ids=inputs, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(dim=1)
