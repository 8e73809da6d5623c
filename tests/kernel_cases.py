"""Test cases and checks of the compiled kernels, shared by all devices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adai_dist import eight_bits, equations, storage
from adai_dist.eight_bits import RECORD_ELEMENTS
from adai_dist.equations import LocalTensors, StepScalars
from adai_dist.hyper import Hyper
from adai_dist.kernels import nothing_kept
from adai_dist.kernels.ops import kernel_scalars, operator_order
from adai_dist.rounding import (
    LOW_DTYPES,
    TO_NEAREST,
    Origin,
    Rounding,
    global_indices,
    key_of,
    random_words,
    split,
    stochastically_rounded,
    streams,
)


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


STATE_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
"""Of second moments: uint8 is mixed8."""


class Mode(NamedTuple):
    """How parameters, gradients and states are stored: keyword arguments of :func:`make_shards`."""

    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    """Of parameters and gradients."""
    state: torch.dtype = torch.float32
    """One of :data:`STATE_DTYPES`."""
    has_remainder: bool = False

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (*self.dtypes, self.state)]
        return "-".join([*names, "remainder"] if self.has_remainder else names)


MODES = [
    Mode(dtypes, state, has_remainder)
    for dtypes, state, has_remainder in itertools.product(DTYPE_PAIRS, (torch.float32, torch.bfloat16), (False, True))
    if dtypes[0] in LOW_DTYPES or not has_remainder
]
# What is in 8 bits is independent of parameters and gradients: each of their dtypes once with and without a remainder.
MODES += [
    Mode((torch.float32, torch.float32), torch.uint8),
    Mode((torch.float32, torch.float16), torch.uint8),
    Mode((torch.bfloat16, torch.bfloat16), torch.uint8),
    Mode((torch.float16, torch.float32), torch.uint8),
    Mode((torch.float16, torch.bfloat16), torch.uint8, has_remainder=True),
    Mode((torch.bfloat16, torch.bfloat16), torch.uint8, has_remainder=True),
]
LOW_MODES = [mode for mode in MODES if mode.dtypes[0] in LOW_DTYPES or mode.state != torch.float32]
PLAIN_MODES = [mode for mode in MODES if mode not in LOW_MODES]

ORIGINS = (
    Origin(),
    Origin(3, 2, 7),
    Origin(2**32 - TILE_ELEMENTS - 2),
    Origin(2**40 - 2**15, 1001, 4096),
    Origin(12_345, 1, 3),
    Origin(2**32 - 40_000, CHUNK_ELEMENTS + 5, 2**31),
)
"""Contiguous, in runs of few or of many elements, and with indices that cross a multiple of 2^32."""

SENTINEL = 7.0
COEFFICIENT, DECAY = 0.7, 0.1


def placed(values: Tensor, offset: int) -> Tensor:
    """Copy values into the middle of a larger tensor, `offset` elements after an aligned address.

    Records, which have two dimensions, are at twice that distance in bytes, as their scales need even addresses.
    """
    if values.ndim == 2:
        return placed(values.flatten(), 2 * offset).view(values.shape)
    return torch.full((values.numel() + 32,), SENTINEL).to(values)[offset : offset + values.numel()].copy_(values)


def whole(size: int, state: torch.dtype) -> int:
    """Round a number of elements up to whole records in mixed8."""
    return size if state != torch.uint8 else -(-size // RECORD_ELEMENTS) * RECORD_ELEMENTS


def neighbours(tensor: Tensor) -> Tensor:
    """Return the elements around a placed tensor."""
    whole, start = tensor._base, tensor.storage_offset()
    assert whole is not None
    return torch.cat([whole[:start], whole[start + tensor.numel() :]])


def make_shards(
    sizes: list[int],
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    state: torch.dtype = torch.float32,
    *,
    has_remainder: bool = False,
    retired: bool = False,
    offset: int = 0,
) -> LocalTensors:
    """Make parameters and heavy-tailed gradients, of the given dtypes, and states; equal on all devices.

    In mixed8, sizes are rounded up to whole records.
    """
    random = torch.Generator().manual_seed(1)
    shards: list[list[Tensor]] = []
    for size in sizes:
        normal, tails = (torch.randn(5, whole(size, state), generator=random) for _ in range(2))
        scale = torch.exp(2 * tails)
        values = [
            normal[0],
            1e-2 * normal[1] * scale[1],
            1e-2 * normal[2] * scale[2],
            1e-4 * normal[3].square() * scale[3],
            torch.sigmoid(normal[4]),
        ]
        stored = stored_in(values, dtypes, state, has_remainder=has_remainder)
        shards.append([placed(value.to(device), offset) for value in stored])
    return listed(shards, retired=retired)


def stored_in(
    values: list[Tensor], dtypes: tuple[torch.dtype, torch.dtype], state: torch.dtype, *, has_remainder: bool
) -> list[Tensor]:
    """Store float32 numbers, one tensor of each kind, in the given dtypes, with a remainder behind them if wanted."""
    param, grad, m, v, P = values
    params = split(param, dtypes[0]) if has_remainder else (param.to(dtypes[0]),)
    if state == torch.uint8:
        encoded = eight_bits.encoded_moment(v, TO_NEAREST), eight_bits.encoded_complement(1.0 - P, TO_NEAREST)
        states = [m.bfloat16(), *encoded]
    else:
        states = [x.to(state) for x in (m, v, 1.0 - P if state in LOW_DTYPES else P)]
    return [params[0], grad.to(dtypes[1]), *states, *params[1:]]


def listed(shards: list[list[Tensor]], *, retired: bool = False) -> LocalTensors:
    """Turn the tensors of each shard into lists of tensors of each kind."""
    lists = [list(tensors) for tensors in zip(*shards, strict=True)]
    return LocalTensors(*lists[:4], [] if retired else lists[4], *lists[5:])


def make_scalars(
    shards: LocalTensors, *, is_finite: bool = True, is_live: bool = True, origins: Sequence[Origin] = ORIGINS
) -> StepScalars:
    """Make the scalars of a step; the shards have the given origins in turn."""
    device, num = shards.exp_avg[0].device, len(shards.param)
    keys = torch.tensor([key_of(3, i) for i in range(num)], dtype=torch.int32)
    rounding = Rounding(
        streams=streams(keys, torch.arange(num)),
        origins=torch.tensor([origins[i % len(origins)] for i in range(num)]),
        settled=torch.tensor([(0.0, 0.25)[i // 2 % 2] for i in range(num)]),
    )
    return StepScalars(
        coefficient=torch.tensor(0.7, device=device),
        lr=torch.tensor(0.3, device=device),
        is_finite=torch.tensor(is_finite, device=device),
        is_live=torch.tensor(is_live, device=device),
        inverse_means=(1e4 / torch.arange(1, num + 1, device=device)) * is_live,
        rounding=Rounding(*(x.to(device) for x in rounding)),
    )


def turned(index: int) -> tuple[Origin, ...]:
    """Return all origins, beginning with another one for every index."""
    start = index % len(ORIGINS)
    return ORIGINS[start:] + ORIGINS[:start]


def copied(shards: LocalTensors, offset: int | None = None, **to: Any) -> LocalTensors:
    def copy(x: Tensor) -> Tensor:
        start = x.storage_offset() // (2 if x.ndim == 2 else 1)
        return placed(x, start if offset is None else offset).to(**to)

    return LocalTensors(*([copy(x) for x in tensors] for tensors in shards))


def widened(shards: LocalTensors) -> LocalTensors:
    """Return new float32 tensors, except gradients, with master weights joined and P in place of 1 - P."""
    return LocalTensors(
        param=[x.clone() for x in storage.wide_params(shards)],
        grad=[x.clone() for x in shards.grad],
        exp_avg=[x.float().clone() for x in shards.exp_avg],
        exp_avg_sq=[
            storage.moment_of(x, m.shape).clone() for x, m in zip(shards.exp_avg_sq, shards.exp_avg, strict=True)
        ],
        beta1_prod=[storage.product_of(x).clone() for x in shards.beta1_prod],
    )


def rounded_as(shards: LocalTensors, wide: LocalTensors, rounding: Rounding) -> LocalTensors:
    """Store widened tensors as those of `shards` are stored, by the functions of :mod:`adai_dist.rounding`."""
    stored = []
    for i, param in enumerate(shards.param):
        indices = global_indices(rounding.origins[i], 0, param)
        for_states, for_param = (random_words(stream, indices) for stream in rounding.streams[i])
        params: tuple[Tensor, ...] = (wide.param[i],)
        if shards.remainder:
            params = split(wide.param[i], param.dtype)
        elif param.dtype in LOW_DTYPES:
            params = (stochastically_rounded(wide.param[i], param.dtype, for_param),)
        states = [wide.exp_avg[i], wide.exp_avg_sq[i], *(x[i] for x in [wide.beta1_prod] if x)]
        if shards.exp_avg[i].dtype in LOW_DTYPES:
            if wide.beta1_prod:
                P = wide.beta1_prod[i]
                states[2] = torch.where(rounding.settled[i] < P, 1.0 - P, 1.0)
            words = for_states, for_states >> 16, for_states ^ (for_states >> 16)
            dtypes = torch.bfloat16, shards.exp_avg_sq[i].dtype, shards.exp_avg_sq[i].dtype
            store = storage.stored_product, storage.stored_moment, storage.stored_product
            states = [s(x, *how) for s, x, *how in zip(store, states, dtypes, words, strict=False)]
        placeholder = [] if wide.beta1_prod else [torch.empty(0)]
        stored.append([params[0], shards.grad[i], *states, *placeholder, *params[1:]])
    return listed(stored, retired=not wide.beta1_prod)


def observe(
    operators: Operators,
    grads: list[Tensor],
    params: list[Tensor],
    exp_avg_sqs: list[Tensor] | None = None,
    kept: Tensor | None = None,
    remainders: list[Tensor] | None = None,
) -> Tensor:
    """Run `observe` under coupled decay, at an expected coefficient below 1."""
    exp_avg_sqs = exp_avg_sqs or []
    kept = nothing_kept(exp_avg_sqs).to(operators.device) if kept is None else kept
    c = torch.tensor(COEFFICIENT, device=operators.device)
    return operators.observe(grads, params, remainders or [], exp_avg_sqs, kept, c, DECAY)


def sums(operators: Operators, exp_avg_sqs: list[Tensor]) -> Tensor:
    """Return the sums of tensors without kept sums."""
    return operators.sums(exp_avg_sqs, nothing_kept(exp_avg_sqs))


def step(operators: Operators, shards: LocalTensors, hyper: Hyper, scalars: StepScalars) -> Tensor:
    """Take one step in place; return the sum of each new exp_avg_sq and the sum of its samples."""
    return operators.advance(*shards, *operator_order(scalars), kernel_scalars(hyper))


def assert_same_bits(found: LocalTensors, expected: LocalTensors) -> None:
    """Check that all elements have the same bits, or are NaN in both."""
    for name, a, b in zip(LocalTensors._fields, found, expected, strict=True):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            differs = _differs(x.cpu(), y.cpu())
            assert not differs.any(), f"{name}[{i}] differs in {differs.sum()} elements"


def _differs(x: Tensor, y: Tensor) -> Tensor:
    assert x.dtype == y.dtype
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.contiguous().view(integer) != y.contiguous().view(integer)) & ~(x.isnan() & y.isnan())


def check_advance(operators: Operators, shards: LocalTensors, hyper: Hyper) -> None:
    """Check that rounding errors are at most twice those of the equations in float32, and gradients unchanged.

    Where numbers are rounded stochastically, the equations have the same random bits, and nearly all numbers are equal.
    """
    scalars = make_scalars(copied(shards, device="cpu"))
    wide = StepScalars(*(x.double() if x.dtype == torch.float32 else x for x in scalars[:-1]))
    exact = LocalTensors(*([x.double() for x in tensors] for tensors in widened(copied(shards, device="cpu"))))
    rounded = copied(shards, device="cpu")
    equations.advance(exact, hyper, wide)
    storage.advance(rounded, hyper, scalars)
    found = copied(shards)
    kept = step(operators, found, hyper, make_scalars(shards))
    assert_same_bits(LocalTensors([], found.grad, [], [], []), LocalTensors([], shards.grad, [], [], []))
    for name, a, b, c, dtype in zip(
        LocalTensors._fields, widened(found), widened(rounded), exact, _precisions(shards), strict=True
    ):
        error, allowed = _error(a, c), _error(b, c)
        ulp = torch.finfo(dtype).eps if b else 0.0
        assert error <= max(2 * allowed, ulp), f"{name}: {error:.1e}, equations {allowed:.1e}"
    for a, b in zip(itertools.chain(*found[:5]), itertools.chain(*rounded[:5]), strict=True):
        if a.dtype in (*LOW_DTYPES, torch.uint8) and a.numel() > 1000:
            assert _differs(a.cpu(), b).sum() <= 0.01 * a.numel()
    for v, total in zip(widened(found).exp_avg_sq, kept[:, 0].tolist(), strict=True):
        assert math.isclose(total, math.fsum(v.tolist()), rel_tol=1e-13)


def _precisions(shards: LocalTensors) -> list[torch.dtype]:
    """Return the dtype that limits the precision of each list."""
    state = shards.exp_avg[0].dtype
    return [
        torch.float32 if shards.remainder else shards.param[0].dtype,
        shards.grad[0].dtype,
        *(state, state, state, state),
    ]


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest difference in a list, relative to the largest number in its tensor."""
    pairs = [(x.cpu().double(), y) for x, y in zip(found, exact, strict=True) if y.numel()]
    return max((((x - y).abs().max() / y.abs().max()).item() for x, y in pairs), default=0.0)


def check_alignment(operators: Operators, hyper: Hyper, mode: Mode) -> None:
    """Check that alignment changes no bit of results or sums, and that memory around the tensors is unchanged."""
    aligned = make_shards([*MIXED, 2**16 + 1], operators.device, **mode._asdict())
    for offset in (1, 2, 3, 5):
        shifted = copied(aligned, offset)
        observed = [
            observe(operators, x.grad, x.param, x.exp_avg_sq, remainders=x.remainder) for x in (aligned, shifted)
        ]
        assert torch.equal(*observed)
        expected = copied(aligned)
        scalars = make_scalars(aligned)
        assert torch.equal(step(operators, expected, hyper, scalars), step(operators, shifted, hyper, scalars))
        assert_same_bits(shifted, expected)
        assert torch.equal(sums(operators, shifted.exp_avg_sq), sums(operators, expected.exp_avg_sq))
        for x in itertools.chain(*shifted, *expected):
            assert (neighbours(x) == SENTINEL).all()


def change_(v: Tensor, write: Callable[[Tensor], Tensor]) -> None:
    """Write to second moments of any dtype."""
    if v.dtype == torch.uint8:
        v.copy_(eight_bits.encoded_moment(write(eight_bits.decoded_moment(v)), TO_NEAREST))
    else:
        write(v)


def check_sums(operators: Operators, shards: LocalTensors) -> None:
    """Check that all operators give the sum of an exp_avg_sq the same bits, also in a step that does not count."""
    for v in shards.exp_avg_sq:  # magnitudes so diverse that the order of summation matters in float64
        change_(v, lambda x: x.mul_(torch.exp2(torch.arange(x.numel(), device=x.device) % 61 - 30.0).view(x.shape)))
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
            change_(v, write)
            found = observe(operators, shards.grad, [], shards.exp_avg_sq, marked)[:, 1]
            expected = torch.full_like(found, SENTINEL)
            expected[index] = sums(operators, [v])[0]
            torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)
            assert torch.equal(found.isnan(), operators.sums(shards.exp_avg_sq, marked).isnan())
            v.copy_(before)


def check_step_that_does_not_count(operators: Operators, mode: Mode, *, is_finite: bool) -> None:
    """Check that a step that is not live only decays parameters, and that a non-finite one is a no-op."""
    hyper = Hyper(lr=1.0, weight_decay=0.1, decoupled=True)
    for retired in (False, True):
        shards = make_shards(MIXED, operators.device, **mode._asdict(), retired=retired)
        found, wide = copied(shards), widened(shards)
        scalars = make_scalars(shards, is_finite=is_finite, is_live=False)
        found.grad[0].fill_(math.inf)
        step(operators, found, hyper, scalars)
        expected = copied(shards)
        if is_finite:
            assert scalars.rounding is not None
            equations.decay_(wide.param, hyper, scalars)
            decayed = rounded_as(shards, wide, scalars.rounding)
            expected = expected._replace(param=decayed.param, remainder=decayed.remainder)
        assert_same_bits(found._replace(grad=[]), expected._replace(grad=[]))


def check_observe(operators: Operators, shards: LocalTensors) -> None:
    """Check that sums are exact to float64 rounding; without parameters, the columns that need them are 0."""
    params = storage.wide_params(shards)
    wide = [[x.cpu().double() for x in tensors] for tensors in (shards.grad, params)]
    pairs = zip(shards.grad, params, strict=True)
    effective = [g.cpu().float() * COEFFICIENT + p.cpu().float() * DECAY for g, p in pairs]  # rounded as in a step
    columns = [
        torch.stack([g @ g, v.cpu().double().sum(), g @ p, p @ p, e.double() @ e.double()])
        for g, p, v, e in zip(*wide, widened(shards).exp_avg_sq, effective, strict=True)
    ]
    expected, bounds = torch.stack(columns), torch.stack(columns)
    bounds[:, 2] = torch.stack([g.abs() @ p.abs() for g, p in zip(*wide, strict=True)])
    found = observe(operators, shards.grad, shards.param, shards.exp_avg_sq, remainders=shards.remainder).cpu()
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


def check_same_as_cpu(operators: Operators, shards: LocalTensors, hyper: Hyper, origins: Sequence[Origin]) -> None:
    """Check that every element has the bits of the CPU kernels."""
    on_cpu, found = copied(shards, device="cpu"), copied(shards)
    step(torch_operators("cpu"), on_cpu, hyper, make_scalars(on_cpu, origins=origins))
    step(operators, found, hyper, make_scalars(found, origins=origins))
    assert_same_bits(found, on_cpu)


SPECIAL = (0.0, -0.0, 1e-45, -1e-41, 3e-8, 5e-8, 4.9e-6, -6.1e-5, 65_503.9, 65_519.9, 65_520.0, -7e4, 3.4028e38)
NON_FINITE = (math.inf, -math.inf, math.nan)


def check_rounding(operators: Operators, mode: Mode, hyper: Hyper, origins: Sequence[Origin], **how: bool) -> None:
    """Check that a step writes what a step in float32 computes, with the bits of :mod:`adai_dist.rounding`.

    Numbers include subnormal ones of every dtype, those near the largest float16, and non-finite ones.
    """
    shards = make_shards([*MIXED, 999], operators.device, **mode._asdict(), **how)
    special = torch.tensor([*SPECIAL, *NON_FINITE, *NON_FINITE], device=operators.device)
    for tensors in (shards.param, shards.grad, shards.exp_avg):
        for tensor in tensors:
            if tensor.numel() > 900:
                tensor[: len(special)] = special
                tensor[100:700].mul_(torch.exp2(torch.arange(600, device=tensor.device) % 60 - 40.0))
    for remainder in shards.remainder:
        remainder[: len(special)].zero_()
    found, wide = copied(shards), widened(shards)
    scalars = make_scalars(shards, origins=origins)
    assert scalars.rounding is not None
    returned = step(operators, found, hyper, scalars)
    step(operators, wide, hyper, scalars._replace(rounding=None))
    expected = rounded_as(shards, wide, scalars.rounding)
    assert_same_bits(found, expected)
    torch.testing.assert_close(returned[:, 0], sums(operators, expected.exp_avg_sq), rtol=0, atol=0, equal_nan=True)


def check_master_weights(operators: Operators, mode: Mode, hyper: Hyper) -> None:
    """Check that three steps with master weights have the bits of steps with parameters in float32."""
    found = make_shards(MIXED, operators.device, **mode._asdict())
    for param in found.param:
        param.copy_(param.sign() + param)  # float16 and its remainder are float32 down to 2^-16
    expected = copied(found)._replace(param=storage.wide_params(found), remainder=[])
    for number in range(3):
        scalars = make_scalars(found, origins=turned(number))._replace(lr=torch.tensor(1e-3, device=operators.device))
        observed = [
            observe(operators, x.grad, x.param, x.exp_avg_sq, remainders=x.remainder) for x in (found, expected)
        ]
        assert torch.equal(*observed)
        returned = [step(operators, x, hyper, scalars) for x in (found, expected)]
        assert torch.equal(*returned)
        joined = found._replace(param=storage.wide_params(found), remainder=[])
        assert_same_bits(joined, expected)
