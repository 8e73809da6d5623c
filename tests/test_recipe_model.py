"""Models are built from a config of transformers, and a config that cannot be is refused in one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adai_dist.recipes.model import block_modules, build_model, row_losses
from adai_dist.recipes.recipe_file import load_recipe
from adai_dist.recipes.refusal import RecipeError
from tests.recipe_runs import ROOT

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def test_weights_depend_on_the_seed_alone() -> None:
    models = [build_model({"architecture": "gpt2", **SMALL}, 256, 8, seed) for seed in (1, 1, 2)]
    parameters = [nn.utils.parameters_to_vector(model.parameters()) for model in models]
    assert torch.equal(parameters[0], parameters[1])
    assert not torch.equal(parameters[0], parameters[2])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_blocks_are_found_and_the_loss_of_new_weights_is_that_of_a_guess(architecture: str) -> None:
    model = build_model({"architecture": architecture, **SMALL, "vocab_size": 300}, 256, 8, seed=0).eval()
    assert len(block_modules(model)) == 3
    losses = row_losses(model, torch.randint(0, 256, (5, 9)))
    assert losses.shape == (5,)
    assert losses.mean().item() == pytest.approx(torch.tensor(300.0).log().item(), abs=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "camel"}, "model.architecture must be a model_type of transformers; got 'camel'"),
        (
            {"architecture": "llama", "hiden_size": 8},
            "unknown key 'model.hiden_size' for llama; valid keys are .*hidden_size",
        ),
        ({"architecture": "llama", "hidden_size": "wide"}, "model must describe a llama decoder; .*wide"),
        (
            {"architecture": "llama", "hidden_size": 15, "num_attention_heads": 2},
            "model must describe a llama decoder; ",
        ),
        ({"architecture": "gpt2", **SMALL, "vocab_size": 100}, "model.vocab_size must be at least 256; got 100"),
        ({"architecture": "gpt2", **SMALL, "n_positions": 4}, "must have at least data.seq_len=8 positions; got 4"),
        ({"architecture": "vit"}, "model must describe a vit decoder; "),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        build_model(settings, 256, 8, seed=0)
    assert "\n" not in str(caught.value)


def test_the_recipe_of_a_billion_parameters_has_them() -> None:
    recipe = load_recipe(ROOT / "configs" / "recipes" / "lm_1b.yaml")
    with torch.device("meta"):
        model = build_model(recipe.model, recipe.model["vocab_size"], 1024, recipe.run.seed)
    assert sum(param.numel() for param in model.parameters()) == 1_175_021_568
    assert len(block_modules(model)) == 22
