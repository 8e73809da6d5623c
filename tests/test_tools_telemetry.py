"""The histogram of inertia equals one that NumPy computes from the states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adai_dist import Adai, AdaiV2
from adai_dist.tools.telemetry import horizon_edges, inertia_histogram, layer_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)])
        self.idle = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.embed, *self.layers):
            x = layer(x)
        return x


def trained(dampening: float) -> tuple[Net, AdaiV2]:
    torch.manual_seed(0)
    net = Net()
    optimizer = AdaiV2(net.parameters(), lr=0.1, dampening=dampening)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randint(0, 7, (9,))).square().sum().backward()
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("dampening", [1.0, 0.25, 0.0])
def test_the_shares_are_those_of_the_formula(dampening: float) -> None:
    net, optimizer = trained(dampening)
    histogram = inertia_histogram(optimizer, net.named_parameters())
    assert histogram is not None
    edges = np.array(horizon_edges(60))
    assert edges[-1] == pytest.approx(1000)
    mean = float(optimizer.inertia_mean)
    for layer, names in {"embed": ["embed."], "block 0": ["layers.0."], "block 1": ["layers.1."]}.items():
        horizons = []
        for name, param in net.named_parameters():
            if any(name.startswith(prefix) for prefix in names):
                v = optimizer.state[param]["exp_avg_sq"].double().numpy().ravel()
                ratio = v / (1 - 0.99**5) / mean
                beta1 = np.clip(1 - 0.1 * ratio ** (1 / (3 - 2 * dampening)), 0, 1 - 1e-3)
                horizons.append(1 / (1 - beta1))
        expected, _ = np.histogram(np.concatenate(horizons).clip(1.0001, 999.99), edges)
        # float32 may move an element to the neighbouring bin
        assert np.abs(np.array(histogram[layer]) * expected.sum() - expected).sum() <= 2
        assert sum(histogram[layer]) == pytest.approx(1)


def test_a_layer_without_gradients_has_zero_shares_instead_of_nan() -> None:
    net, optimizer = trained(1.0)
    histogram = inertia_histogram(optimizer, net.named_parameters())
    assert histogram is not None
    assert list(histogram) == ["embed", "block 0", "block 1", "idle"]
    assert set(histogram["idle"]) == {0.0}


def test_a_smaller_eps_lengthens_the_scale() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = Adai([param], lr=0.1, eps=1e-5)
    param.grad = torch.tensor([0.0, 0.0, 1.0, 1.0])
    optimizer.step()
    histogram = inertia_histogram(optimizer, [("w", param)])
    assert histogram is not None
    assert len(histogram["w"]) == 100
    assert histogram["w"][-1] == 0.5, "zero gradients have the longest horizon, 1 / eps"


@pytest.mark.parametrize("state_dtype", ["bfloat16", "mixed8"])
def test_rounded_states_have_almost_the_histogram_of_those_in_float32(state_dtype: Any) -> None:
    """Cumulative shares, as elements at the edge of a bin may move by one."""
    cumulative: list[np.ndarray] = []
    for dtype in ("float32", state_dtype):
        param = nn.Parameter(torch.zeros(64, 96))
        optimizer = Adai([param], lr=0.1, state_dtype=dtype, independent=True)
        random = torch.Generator().manual_seed(0)
        for _ in range(5):
            param.grad = torch.randn(64, 96, generator=random) * torch.logspace(-2, 1, 96)
            optimizer.step()
        histogram = inertia_histogram(optimizer, [("w", param)])
        assert histogram is not None
        cumulative.append(np.cumsum(histogram["w"]))
    assert np.abs(cumulative[0] - cumulative[1]).max() < 0.02
    assert 0.1 < cumulative[0][20] < 0.9, "horizons are spread over the scale"


def test_there_is_no_histogram_before_a_step_or_for_another_optimizer() -> None:
    param = nn.Parameter(torch.ones(4))
    assert inertia_histogram(Adai([param], lr=0.1), [("w", param)]) is None
    assert inertia_histogram(torch.optim.SGD([param], lr=0.1), [("w", param)]) is None


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.mlp.up_proj.weight", "block 11"),
        ("transformer.h.0.ln_1.bias", "block 0"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("0.weight", "block 0"),
        ("weight", "weight"),
    ],
)
def test_parameters_are_grouped_by_block_or_module(name: str, layer: str) -> None:
    assert layer_of(name) == layer
