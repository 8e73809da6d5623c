"""Retirement of beta1_prod on a CUDA device: the same bits, no synchronisation, and none under a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from adai_dist import Adai
from adai_dist.optimizer.retirement import STEPS_BETWEEN_CHECKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),  # the first step compiles the kernels
]


@pytest.fixture(params=["require", "off"], ids=["kernels", "equations"], autouse=True)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ADAI_DIST_KERNELS", request.param)
    return request.param


def make(**options: Any) -> Adai:
    groups = [
        {"params": [Parameter(torch.linspace(-1, 1, 1000, device="cuda"))], "eps": 0.1},
        {"params": [Parameter(torch.linspace(-1, 1, 70, device="cuda"))], "eps": 0.02},
    ]
    return Adai(groups, lr=0.05, max_grad_norm=10.0, **options)


def step(optimizer: Adai, generator: torch.Generator) -> None:
    for param in optimizer.params():
        param.grad = torch.randn(param.shape, generator=generator, device="cuda")
        param.grad[:10] = 0.0
    optimizer.step()


def is_retired(optimizer: Adai) -> list[bool]:
    return ["beta1_prod" not in state for state in optimizer.state.values()]


def test_retirement_changes_no_bit() -> None:
    first, second = make(), make(retire_beta1_prod=False)
    seen: set[tuple[bool, ...]] = set()
    for seed in range(2 * STEPS_BETWEEN_CHECKS + 100):
        for optimizer in (first, second):
            step(optimizer, torch.Generator("cuda").manual_seed(seed))
        seen.add(tuple(is_retired(first)))
    assert seen == {(False, False), (True, False), (True, True)}
    for a, b in zip(first.params(), second.params(), strict=True):
        assert torch.equal(a, b)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(first.state[a][name], second.state[b][name])


def test_the_check_for_retirement_does_not_wait_for_the_device() -> None:
    optimizer = make(betas=(0.1, 0.99))
    for param_group in optimizer.param_groups:
        param_group["eps"] = 1e-4  # nothing retires, but the check runs
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(STEPS_BETWEEN_CHECKS - 2):
        step(optimizer, generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert is_retired(optimizer) == [False, False]


def test_retirement_frees_memory() -> None:
    param = Parameter(torch.ones(1 << 20, device="cuda"))
    optimizer = Adai([param], lr=0.05, eps=0.1)
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(STEPS_BETWEEN_CHECKS - 1):
        step(optimizer, generator)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        torch.cuda.synchronize()
        step(optimizer, generator)
    assert is_retired(optimizer) == [True]
    assert before - torch.cuda.memory_allocated() >= 4 << 20


def test_nothing_retires_under_a_captured_step() -> None:
    param = Parameter(torch.ones(100, device="cuda"))
    param.grad = torch.zeros(100, device="cuda")
    optimizer = Adai([param], lr=0.05, eps=0.1)
    for _ in range(3):
        param.grad.normal_()
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(STEPS_BETWEEN_CHECKS + 10):
        param.grad.normal_()
        optimizer.step()
    assert is_retired(optimizer) == [False]
    graph.replay()
    assert torch.isfinite(param).all()
