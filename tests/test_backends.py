"""The choice of a backend: kernels, the equations under torch.compile, or the equations."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter

from adai_dist import Adai, AdaiV2
from adai_dist.hyper import Hyper
from adai_dist.kernels import backends, build, foreach, nothing_kept, ops
from adai_dist.kernels.backends import EQUATIONS, Backend
from tests import kernel_cases
from tests.kernel_cases import MIXED, make_scalars, make_shards
from tests.problems import relative_error
from tests.variants import VARIANTS, solve_plainly

VARIABLE = backends.ENVIRONMENT_VARIABLE


def stepped(parameter: Parameter, **arguments: bool) -> Adai:
    parameter.grad = torch.ones_like(parameter)
    optimizer = Adai([parameter], lr=0.1, **arguments)
    optimizer.step()
    return optimizer


def backend_of(optimizer: Adai) -> Backend:
    (owned,) = optimizer.owned_shards()
    return owned.backend


def is_compiled(backend: Backend) -> bool:
    return backend.advance is ops.advance


def test_kernels_step_supported_tensors_and_the_equations_the_rest() -> None:
    assert is_compiled(backend_of(stepped(Parameter(torch.ones(3)))))
    assert is_compiled(backend_of(stepped(Parameter(torch.ones(3, dtype=torch.bfloat16)))))
    assert is_compiled(backend_of(stepped(Parameter(torch.ones(3, dtype=torch.complex64)))))
    assert backend_of(stepped(Parameter(torch.ones(3, dtype=torch.float64)))) is EQUATIONS
    with_gaps = Parameter(torch.ones(4, 6)[:, ::2])
    assert backend_of(stepped(with_gaps)) is EQUATIONS


def test_the_choice_is_shown_and_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_logged", set())
    optimizer = Adai([Parameter(torch.ones(3))], lr=0.1)
    assert "Kernels: chosen in the first step" in repr(optimizer)
    with caplog.at_level(logging.INFO, "adai_dist"):
        for _ in range(2):
            optimizer = stepped(Parameter(torch.ones(3)))
    capability = torch.backends.cpu.get_cpu_capability()
    name = f"compiled kernels (cpu_adai, {capability})"
    assert f"Kernels: cpu: {name}" in repr(optimizer)
    assert "lr: 0.1" in repr(optimizer)
    assert [record.message for record in caplog.records] == [f"stepping cpu tensors with {name}"]


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    optimizer = stepped(Parameter(torch.ones(3)))
    monkeypatch.delenv(VARIABLE)
    assert "Kernels: cpu: the equations (foreach)" in repr(optimizer)
    assert backend_of(optimizer) is EQUATIONS


def test_a_copy_keeps_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    optimizer = stepped(Parameter(torch.ones(3)))
    monkeypatch.delenv(VARIABLE)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        parameter = other.param_groups[0]["params"][0]
        parameter.grad = torch.ones_like(parameter)
        assert backend_of(other) is EQUATIONS


def test_an_unknown_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ValueError, match="ADAI_DIST_KERNELS must be one of auto, off, require, got 'yes'"):
        Adai([Parameter(torch.ones(3))], lr=0.1)


def test_kernels_cannot_be_required_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    with pytest.raises(ValueError, match="require_kernels=True must not be combined with ADAI_DIST_KERNELS=off"):
        Adai([Parameter(torch.ones(3))], lr=0.1, require_kernels=True)
    with pytest.raises(TypeError, match="require_kernels must be a bool, got 'no'"):
        Adai([Parameter(torch.ones(3))], lr=0.1, require_kernels="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_a_tensor_that_required_kernels_cannot_step_is_an_error(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"must be float32, .* which are required; got torch\.\w+ with strides"):
        stepped(Parameter(torch.ones(3, dtype=dtype)), require_kernels=True)


def test_a_device_without_kernels_is_stepped_by_the_equations() -> None:
    assert backends.choose("meta", "auto") is EQUATIONS
    with pytest.raises(RuntimeError, match="must have compiled kernels, which are required; got 'meta'"):
        backends.choose("meta", "require")


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("gradient_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_any_order_of_dimensions_in_memory_gives_the_same_step(
    memory_format: torch.memory_format, gradient_format: torch.memory_format
) -> None:
    random = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 4, 5, 6, generator=random), torch.randn(5, 3, 4, 5, 6, generator=random)
    plain = Parameter(start.clone())
    other = Parameter(start.to(memory_format=memory_format))
    optimizers = [AdaiV2([x], lr=0.1, max_grad_norm=1.0, dampening=0.3) for x in (plain, other)]
    for gradient in gradients:
        plain.grad, other.grad = gradient.clone(), gradient.to(memory_format=gradient_format)
        for optimizer in optimizers:
            optimizer.step()
    assert is_compiled(backend_of(optimizers[1])) == (memory_format == gradient_format)
    torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-6)


def test_a_gradient_may_change_its_dtype_and_layout_between_steps() -> None:
    """The backend then changes as well, and the sums of exp_avg_sq follow."""
    problem = replace(VARIANTS["dampening-0.5"], dtype=torch.float32, steps=12)
    oracle, _ = problem.solve()
    parameters = problem.parameters()
    optimizer = AdaiV2(problem.param_groups(parameters), lr=1.0, max_grad_norm=problem.max_grad_norm)
    found: set[bool] = set()
    for step in range(problem.steps):
        for spec in problem.specs():
            gradient = problem.gradient(spec, step)
            if step % 3 == 1 and gradient is not None and gradient.numel():
                gradient = torch.stack([gradient, gradient], -1)[..., 0]  # not dense
            parameters[spec.name].grad = gradient
        found |= {is_compiled(owned.backend) for owned in optimizer.owned_shards()}
        optimizer.step()
    assert found == {True, False}
    assert relative_error(parameters, oracle, problem) <= 2 * relative_error(solve_plainly(problem), oracle, problem)


@pytest.mark.parametrize("dtypes", kernel_cases.DTYPE_PAIRS[::4], ids=str)
@pytest.mark.parametrize("pieces", [2**18, 1000])
def test_the_equations_are_a_backend_with_sums_that_agree(
    dtypes: tuple[torch.dtype, torch.dtype], pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(foreach.PIECE_ELEMENTS, "cpu", pieces)
    shards = make_shards(MIXED, torch.device("cpu"), dtypes)
    hyper, c, kept = Hyper(lr=1.0, weight_decay=0.1), torch.tensor(0.7), nothing_kept(shards.exp_avg_sq)
    build.load(build.CPU)
    of_equations = EQUATIONS.observe(shards, hyper, c, kept)
    for found, expected in zip(of_equations, ops.observe(shards, hyper, c, kept), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    with_gaps = shards._replace(grad=[torch.stack([grad, grad], -1)[..., 0] for grad in shards.grad])
    for each in (shards, with_gaps):
        assert EQUATIONS.advance(each, hyper, make_scalars(each)) is None, "nothing is kept, so that everything is read"
        assert torch.equal(EQUATIONS.observe(each, hyper, c, kept)[1], EQUATIONS.sums(each.exp_avg_sq, kept))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own code
@pytest.mark.parametrize("retired", [False, True], ids=["with products", "retired"])
@pytest.mark.parametrize("name", kernel_cases.OPTIONS)
def test_the_equations_compiled_by_torch_take_the_same_step(name: str, retired: bool) -> None:
    """This is the backend for CUDA without nvcc, here compiled for the CPU."""
    backend = backends.compiled_equations()
    shards = make_shards([7, 2**12 + 3, 1], torch.device("cpu"), retired=retired)
    expected, scalars = kernel_cases.copied(shards), make_scalars(shards)
    hyper = Hyper(lr=1.0, **kernel_cases.OPTIONS[name])
    for each, of in ((backend, shards), (EQUATIONS, expected)):
        each.advance(of, hyper, scalars)
    for found, other in zip(shards, expected, strict=True):
        torch.testing.assert_close(found, other, rtol=2e-6, atol=1e-7)


def test_the_equations_cut_only_contiguous_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    monkeypatch.setitem(foreach.PIECE_ELEMENTS, "cpu", 1000)
    start, gradient = torch.randn(2, 50, 60, generator=torch.Generator().manual_seed(0))
    plain, other = Parameter(start.clone()), Parameter(start.clone())
    plain.grad, other.grad = gradient, gradient.t().contiguous().t()
    for parameter in (plain, other):
        optimizer = Adai([parameter], lr=0.1)
        optimizer.step()
    assert not other.grad.is_contiguous()
    torch.testing.assert_close(other, plain)
