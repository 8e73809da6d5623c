"""Test cases and checks of the compiled kernels, shared by all devices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adai_dist import equations
from adai_dist.equations import LocalTensors, StepScalars
from adai_dist.hyper import Hyper
from adai_dist.kernels import nothing_kept
from adai_dist.kernels.ops import kernel_scalars


class Operators(NamedTuple):
    """Implementations of the operators of :mod:`adai_dist.kernels.ops`, and the device of their tensors."""

    observe: Callable[..., Tensor]
    advance: Callable[..., Tensor]
    sums: Callable[..., Tensor]
    device: torch.device


def torch_operators(device: str) -> Operators:
    ops = torch.ops.adai_dist
    return Operators(ops.observe, ops.advance, ops.sums, torch.device(device))


CHUNK_ELEMENTS, TILE_ELEMENTS = 2**15, 2**11

SIZES = {
    "nothing": [0],
    "one": [1],
    "seven": [7],
    "2^16+1": [2**16 + 1],
    "tiles": [TILE_ELEMENTS - 1, TILE_ELEMENTS, TILE_ELEMENTS + 1],
    "chunks": [CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 1],
    "with nothing between": [0, 0, 5, 0, CHUNK_ELEMENTS + 4, 0, 9, 0],
    "more than a launch takes": [3] * 700,
}
MIXED = [7, 0, CHUNK_ELEMENTS + TILE_ELEMENTS + 3, 1]

OPTIONS: dict[str, dict[str, Any]] = {
    "adai": {},
    "l2": {"weight_decay": 0.1},
    "adaiw": {"weight_decay": 0.1, "decoupled": True},
    "dampening 0": {"dampening": 0.0},
    "dampening 0.4": {"dampening": 0.4, "weight_decay": 0.1, "decoupled": True},
    "dampening 0.4, l2": {"dampening": 0.4, "weight_decay": 0.1},
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_PAIRS = list(itertools.product(DTYPES, DTYPES))

SENTINEL = 7.0
COEFFICIENT, DECAY = 0.7, 0.1


def placed(values: Tensor, offset: int) -> Tensor:
    """Copy values into the middle of a larger tensor, `offset` elements after an aligned address."""
    return torch.full((values.numel() + 32,), SENTINEL).to(values)[offset : offset + values.numel()].copy_(values)


def neighbours(tensor: Tensor) -> Tensor:
    """Return the elements around a placed tensor."""
    whole, start = tensor._base, tensor.storage_offset()
    assert whole is not None
    return torch.cat([whole[:start], whole[start + tensor.numel() :]])


def make_shards(
    sizes: list[int],
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    *,
    retired: bool = False,
    offset: int = 0,
) -> LocalTensors:
    """Make parameters and heavy-tailed gradients, of the given dtypes, and states; equal on all devices."""
    random = torch.Generator().manual_seed(1)
    lists: list[list[Tensor]] = [[], [], [], [], []]
    for size in sizes:
        normal, tails = (torch.randn(5, size, generator=random) for _ in range(2))
        scale = torch.exp(2 * tails)
        values = [
            normal[0].to(dtypes[0]),
            (1e-2 * normal[1] * scale[1]).to(dtypes[1]),
            1e-2 * normal[2] * scale[2],
            1e-4 * normal[3].square() * scale[3],
            torch.sigmoid(normal[4]),
        ]
        for tensors, value in zip(lists, values, strict=True):
            tensors.append(placed(value.to(device), offset))
    return LocalTensors(*lists[:4], [] if retired else lists[4])


def make_scalars(shards: LocalTensors, *, is_finite: bool = True, is_live: bool = True) -> StepScalars:
    device, num = shards.exp_avg[0].device, len(shards.param)
    return StepScalars(
        coefficient=torch.tensor(0.7, device=device),
        lr=torch.tensor(0.3, device=device),
        is_finite=torch.tensor(is_finite, device=device),
        is_live=torch.tensor(is_live, device=device),
        inverse_means=(1e4 / torch.arange(1, num + 1, device=device)) * is_live,
    )


def copied(shards: LocalTensors, offset: int | None = None, **to: Any) -> LocalTensors:
    def copy(x: Tensor) -> Tensor:
        return placed(x, x.storage_offset() if offset is None else offset).to(**to)

    return LocalTensors(*([copy(x) for x in tensors] for tensors in shards))


def observe(
    operators: Operators,
    grads: list[Tensor],
    params: list[Tensor],
    exp_avg_sqs: list[Tensor] | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Run `observe` under coupled decay, at an expected coefficient below 1."""
    exp_avg_sqs = exp_avg_sqs or []
    kept = nothing_kept(exp_avg_sqs).to(operators.device) if kept is None else kept
    c = torch.tensor(COEFFICIENT, device=operators.device)
    return operators.observe(grads, params, exp_avg_sqs, kept, c, DECAY)


def sums(operators: Operators, exp_avg_sqs: list[Tensor]) -> Tensor:
    """Return the sums of tensors without kept sums."""
    return operators.sums(exp_avg_sqs, nothing_kept(exp_avg_sqs))


def step(operators: Operators, shards: LocalTensors, hyper: Hyper, scalars: StepScalars) -> Tensor:
    """Take one step in place; return the sum of each new exp_avg_sq and the sum of its samples."""
    values = (scalars.inverse_means, scalars.coefficient, scalars.lr, scalars.is_finite, scalars.is_live)
    return operators.advance(*shards, *values, kernel_scalars(hyper))


def assert_same_bits(found: LocalTensors, expected: LocalTensors) -> None:
    for name, a, b in zip(LocalTensors._fields, found, expected, strict=True):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert torch.equal(x.cpu(), y.cpu()), f"{name}[{i}] differs in {(x.cpu() != y.cpu()).sum()} elements"


def check_advance(operators: Operators, shards: LocalTensors, hyper: Hyper) -> None:
    """Check that rounding errors are at most twice those of the equations in float32, and gradients unchanged."""
    scalars = StepScalars(*(x.cpu() for x in make_scalars(shards)))
    wide = StepScalars(*(x.double() if x.dtype == torch.float32 else x for x in scalars))
    exact, rounded = copied(shards, dtype=torch.float64, device="cpu"), copied(shards, device="cpu")
    equations.advance(exact, hyper, wide)
    equations.advance(rounded, hyper, scalars)
    found = copied(shards)
    kept = step(operators, found, hyper, make_scalars(shards))
    assert_same_bits(LocalTensors([], found.grad, [], [], []), LocalTensors([], shards.grad, [], [], []))
    for name, a, b, c in zip(LocalTensors._fields, found, rounded, exact, strict=True):
        error, allowed = _error(a, c), _error(b, c)
        ulp = torch.finfo(b[0].dtype).eps if b else 0.0
        assert error <= max(2 * allowed, ulp), f"{name}: {error:.1e}, equations {allowed:.1e}"
    for v, total in zip(found.exp_avg_sq, kept[:, 0].tolist(), strict=True):
        assert math.isclose(total, math.fsum(v.tolist()), rel_tol=1e-13)


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest difference in a list, relative to the largest number in its tensor."""
    pairs = [(x.cpu().double(), y) for x, y in zip(found, exact, strict=True) if y.numel()]
    return max((((x - y).abs().max() / y.abs().max()).item() for x, y in pairs), default=0.0)


def check_alignment(operators: Operators, hyper: Hyper, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Check that alignment changes no bit of results or sums, and that memory around the tensors is unchanged."""
    aligned = make_shards([*MIXED, 2**16 + 1], operators.device, dtypes)
    for offset in (1, 2, 3, 5):
        shifted = copied(aligned, offset)
        observed = [observe(operators, x.grad, x.param, x.exp_avg_sq) for x in (aligned, shifted)]
        assert torch.equal(*observed)
        expected = copied(aligned)
        scalars = make_scalars(aligned)
        assert torch.equal(step(operators, expected, hyper, scalars), step(operators, shifted, hyper, scalars))
        assert_same_bits(shifted, expected)
        assert torch.equal(sums(operators, shifted.exp_avg_sq), sums(operators, expected.exp_avg_sq))
        for x in itertools.chain(*shifted, *expected):
            assert (neighbours(x) == SENTINEL).all()


def check_sums(operators: Operators, shards: LocalTensors) -> None:
    """Check that all operators give the sum of an exp_avg_sq the same bits, also in a step that does not count."""
    for v in shards.exp_avg_sq:  # magnitudes so diverse that the order of summation matters in float64
        v.mul_(torch.exp2(torch.arange(v.numel(), device=v.device) % 61 - 30.0))
    returned = step(operators, shards, Hyper(lr=1.0), make_scalars(shards))
    assert torch.equal(returned[:, 0], sums(operators, shards.exp_avg_sq))
    assert torch.equal(returned[:, 0], observe(operators, shards.grad, [], shards.exp_avg_sq)[:, 1])
    still = make_scalars(shards, is_finite=False, is_live=False)
    assert torch.equal(returned, step(operators, shards, Hyper(lr=1.0), still))


def check_detection_of_writes(operators: Operators, shards: LocalTensors) -> None:
    """Check that a kept sum is used until the tensor is written to."""
    hyper = Hyper(lr=1.0)
    kept = step(operators, shards, hyper, make_scalars(shards))
    marked = kept.clone()
    marked[:, 0] = SENTINEL  # distinguishes kept sums from computed ones
    assert (observe(operators, shards.grad, [], shards.exp_avg_sq, marked)[:, 1] == SENTINEL).all()
    assert (operators.sums(shards.exp_avg_sq, marked) == SENTINEL).all()
    count = len(shards.exp_avg_sq)
    for index in range(count) if count <= 16 else (0, count // 2, count - 1):
        v = shards.exp_avg_sq[index]
        if not v.numel():
            continue
        before = v.clone()
        for write in (lambda x: x.mul_(0.5), lambda x: x.zero_(), lambda x: x.fill_(math.nan)):
            write(v)
            found = observe(operators, shards.grad, [], shards.exp_avg_sq, marked)[:, 1]
            expected = torch.full_like(found, SENTINEL)
            expected[index] = sums(operators, [v])[0]
            torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)
            assert torch.equal(found.isnan(), operators.sums(shards.exp_avg_sq, marked).isnan())
            v.copy_(before)


def check_step_that_does_not_count(
    operators: Operators, dtypes: tuple[torch.dtype, torch.dtype], *, is_finite: bool
) -> None:
    """Check that a step that is not live only decays parameters, and that a non-finite one is a no-op."""
    hyper = Hyper(lr=1.0, weight_decay=0.1, decoupled=True)
    shards = make_shards(MIXED, operators.device, dtypes)
    found, expected = copied(shards), copied(shards)
    scalars = make_scalars(shards, is_finite=is_finite, is_live=False)
    shards.grad[0].fill_(math.inf)
    step(operators, found, hyper, scalars)
    if is_finite:
        equations.advance(expected, hyper, scalars)
    assert_same_bits(found, expected)


def check_observe(operators: Operators, shards: LocalTensors) -> None:
    """Check that sums are exact to float64 rounding; without parameters, the columns that need them are 0."""
    wide = [[x.cpu().double() for x in tensors] for tensors in (shards.grad, shards.param)]
    pairs = zip(shards.grad, shards.param, strict=True)
    effective = [g.cpu().float() * COEFFICIENT + p.cpu().float() * DECAY for g, p in pairs]  # rounded as in a step
    columns = [
        torch.stack([g @ g, v.cpu().double().sum(), g @ p, p @ p, e.double() @ e.double()])
        for g, p, v, e in zip(*wide, shards.exp_avg_sq, effective, strict=True)
    ]
    expected, bounds = torch.stack(columns), torch.stack(columns)
    bounds[:, 2] = torch.stack([g.abs() @ p.abs() for g, p in zip(*wide, strict=True)])
    found = observe(operators, shards.grad, shards.param, shards.exp_avg_sq).cpu()
    assert ((found - expected).abs() <= 1e-13 * bounds).all()
    alone = observe(operators, shards.grad, []).cpu()
    assert torch.equal(alone[:, 0], found[:, 0])
    assert not alone[:, 1:].any()


def check_non_finite(operators: Operators, value: float, dtype: torch.dtype) -> None:
    """Check that a single non-finite element makes the sum of its tensor non-finite, and no other."""
    for position in (0, CHUNK_ELEMENTS + 2, CHUNK_ELEMENTS + TILE_ELEMENTS + 2):
        shards = make_shards(MIXED, operators.device, (torch.float32, dtype))
        shards.grad[2][position] = value
        finite = observe(operators, shards.grad, []).isfinite().all(1).tolist()
        assert finite == [True, True, False, True]


def check_same_as_cpu(operators: Operators, shards: LocalTensors, hyper: Hyper) -> None:
    """Check that every element has the bits of the CPU kernels."""
    on_cpu, found = copied(shards, device="cpu"), copied(shards)
    step(torch_operators("cpu"), on_cpu, hyper, make_scalars(on_cpu))
    step(operators, found, hyper, make_scalars(found))
    assert_same_bits(found, on_cpu)
