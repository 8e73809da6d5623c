"""The step on a CUDA device: the same numbers as on the CPU, and no synchronisation."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from adai_dist import AdaiV2
from tests.problems import Problem, relative_error
from tests.variants import VARIANTS, solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),  # the first step compiles the kernels
]


@pytest.fixture(params=["require", "off"], ids=["kernels", "equations"], autouse=True)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ADAI_DIST_KERNELS", request.param)
    return request.param


def make(problem: Problem, **options: Any) -> tuple[dict[str, Parameter], AdaiV2]:
    params = {name: Parameter(value.detach().cuda()) for name, value in problem.parameters().items()}
    return params, AdaiV2(problem.param_groups(params), lr=1.0, max_grad_norm=problem.max_grad_norm, **options)


def set_gradients(problem: Problem, params: dict[str, Parameter], step: int) -> None:
    for spec in problem.specs():
        gradient = problem.gradient(spec, step)
        params[spec.name].grad = None if gradient is None else gradient.cuda()


@pytest.mark.parametrize("foreach", [False, None], ids=["loop", "foreach"])
@pytest.mark.parametrize("name", VARIANTS)
def test_rounding_errors_are_like_those_on_the_cpu(name: str, foreach: bool | None) -> None:
    problem = replace(VARIANTS[name], dtype=torch.float32)
    oracle, _ = problem.solve()
    params, optimizer = make(problem, foreach=foreach)
    for step in range(problem.steps):
        set_gradients(problem, params, step)
        optimizer.step()
    on_cpu = {key: value.detach().cpu() for key, value in params.items()}
    assert relative_error(on_cpu, oracle, problem) <= 2 * relative_error(solve(problem), oracle, problem)


@pytest.mark.parametrize("name", ["l2", "clipping", "dampening-0"])
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    problem = replace(VARIANTS[name].with_all(), dtype=torch.float32)
    params, optimizer = make(problem)
    set_gradients(problem, params, 0)
    optimizer.step()  # the first step creates the states
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(optimizer.inertia_mean)


def test_a_captured_step_can_be_replayed() -> None:
    def prepared() -> tuple[list[Parameter], AdaiV2]:
        parameters = [Parameter(torch.linspace(-1, 1, size, device="cuda")) for size in (1000, 7)]
        return parameters, AdaiV2(parameters, lr=0.1, dampening=0.5, weight_decay=0.01, max_grad_norm=1.0)

    def set_gradients(parameters: list[Parameter], step: int) -> None:
        for parameter in parameters:
            gradient = torch.sin(torch.arange(parameter.numel(), device="cuda") * (step + 1.0))
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.copy_(gradient)

    (parameters, optimizer), (expected, eager) = prepared(), prepared()
    for step in range(3):  # creates the states and sums with which the captured step begins
        for each, stepped in ((parameters, optimizer), (expected, eager)):
            set_gradients(each, step)
            stepped.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3, 7):
        set_gradients(parameters, step)
        set_gradients(expected, step)
        graph.replay()
        eager.step()
        assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True)), f"step {step}"
        assert torch.equal(optimizer.inertia_mean, eager.inertia_mean)


def test_a_step_of_the_kernels_needs_less_than_a_mebibyte(mode: str) -> None:
    if mode == "off":
        pytest.skip("the equations have temporaries")
    parameters = [Parameter(torch.ones(size, device="cuda")) for size in (2**26, 1000, 7)]
    optimizer = AdaiV2(parameters, lr=0.1, max_grad_norm=1.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= 2**20


def test_skipped_steps_are_logged_without_waiting(caplog: pytest.LogCaptureFixture) -> None:
    parameter = Parameter(torch.ones(5, device="cuda"))
    optimizer = AdaiV2([parameter], lr=0.1)
    with caplog.at_level(logging.WARNING, "adai_dist"):
        for step in range(6):
            parameter.grad = torch.full_like(parameter, math.nan if step in (1, 3) else 1.0)
            optimizer.step()
            torch.cuda.synchronize()
    assert optimizer.num_skipped_steps.item() == 2
    assert optimizer.state[parameter]["step"].item() == 4
    assert ["skipped so far" in record.message for record in caplog.records] == [True, True]


def test_a_gradient_scaler_skips_and_unscales_on_the_device() -> None:
    parameter, twin = (Parameter(torch.ones(5, device="cuda")) for _ in range(2))
    optimizer, other = AdaiV2([parameter], lr=0.1), AdaiV2([twin], lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for step in range(6):
        gradient = torch.linspace(-1, 1, 5, device="cuda") * (step + 1)
        twin.grad = None if step == 2 else gradient.clone()
        parameter.grad = scaler.scale(gradient.clone()) * (math.inf if step == 2 else 1.0)
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            other.step()
    assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(parameter, twin)
