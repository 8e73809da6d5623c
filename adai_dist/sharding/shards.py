"""The local tensors of one step, listed the way the equations and the kernels take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adai_dist.equations import Shards
from adai_dist.hyper import Hyper
from adai_dist.sharding.ownership import local_tensor

STATE_NAMES = ("exp_avg", "exp_avg_sq", "beta1_prod")

PIECE_ELEMENTS = {"cpu": 2**18}
"""A shard is stepped in pieces, by device type: on a CPU a piece and its temporaries stay near the cache ..."""
DEFAULT_PIECE_ELEMENTS = 2**24
"""... and elsewhere it bounds the temporary memory."""


@dataclass(frozen=True)
class Layout:
    """Constants of a list of parameters, kept on their device between steps."""

    params: list[Tensor]
    """Parameters with a gradient; also those of which this rank holds no element."""
    num_pieces: list[int]
    """Pieces of each parameter."""
    owners: Tensor
    """int64, one per piece: index of the parameter that the piece belongs to."""
    weights: Tensor
    """float64, one per piece: weight of its elements in the mean."""
    num_elements: Tensor
    """float64, 0-dim: weighted number of elements of all pieces together."""

    @classmethod
    def of(
        cls, params: list[Tensor], num_pieces: list[int], pieces: list[Tensor], param_weights: dict[Tensor, float]
    ) -> Layout:
        device = params[0].device
        owners = [index for index, count in enumerate(num_pieces) for _ in range(count)]
        weights = [param_weights[params[owner]] for owner in owners]
        num_elements = sum(piece.numel() * weight for piece, weight in zip(pieces, weights, strict=True))
        return cls(
            params=params,
            num_pieces=num_pieces,
            owners=torch.tensor(owners, dtype=torch.int64, device=device),
            weights=torch.tensor(weights, dtype=torch.float64, device=device),
            num_elements=torch.tensor(num_elements, dtype=torch.float64, device=device),
        )

    def fits(self, params: list[Tensor], num_pieces: list[int]) -> bool:
        return num_pieces == self.num_pieces and all(a is b for a, b in zip(params, self.params, strict=True))


@dataclass
class OwnedShards:
    """What this rank holds of one parameter group, on one device, in one dtype of parameters and one of gradients.

    Large tensors are listed in pieces, so that a step needs little temporary memory whatever their size.
    """

    hyper: Hyper
    layout: Layout
    pieces: Shards
    steps: list[Tensor]
    """``step`` of each parameter of the layout: 0-dim, float32."""
    correction: Tensor
    """float64, one per piece: ``1 - beta2^t`` of this step, if it counts."""

    def by_param(self, pieces: list[Tensor]) -> Iterator[list[Tensor]]:
        """The pieces of each parameter of the layout."""
        start = 0
        for count in self.layout.num_pieces:
            yield pieces[start : start + count]
            start += count

    def batches(self) -> Iterator[slice]:
        """Runs of pieces to be stepped together: as many elements as one piece may have; foreach=False: one by one."""
        start, num_elements = 0, 0
        for i, param in enumerate(self.pieces.param):
            limit = 0 if self.hyper.foreach is False else piece_elements(param)
            if i > start and num_elements + param.numel() > limit:
                yield slice(start, i)
                start, num_elements = i, 0
            num_elements += param.numel()
        if self.pieces.param:
            yield slice(start, len(self.pieces.param))


def piece_elements(tensor: Tensor) -> int:
    return PIECE_ELEMENTS.get(tensor.device.type, DEFAULT_PIECE_ELEMENTS)


class Piece(NamedTuple):
    """A run of elements of one parameter."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    beta1_prod: Tensor


def split(param: Tensor, grad: Tensor, state: dict[str, Any]) -> list[Piece]:
    """The local elements of a parameter as pieces; none if this rank holds none.

    Raises:
        ValueError: gradient or state differ from the parameter in their local shape.
    """
    whole = Piece(*(local_tensor(x) for x in (param, grad, *(state[name] for name in STATE_NAMES))))
    for name, tensor in zip(Piece._fields, whole, strict=True):
        if tensor.shape != whole.param.shape:
            raise ValueError(
                f"{name} must have the local shape of its parameter, {tuple(whole.param.shape)}, got "
                f"{tuple(tensor.shape)}; a state_dict must be loaded into the layout that it was saved from "
                "(torch.distributed.checkpoint converts between layouts)"
            )
    num_elements = whole.param.numel()
    if num_elements == 0:
        return []
    limit = piece_elements(whole.param)
    if num_elements <= limit or not all(tensor.is_contiguous() for tensor in whole):
        return [whole]
    return [Piece(*parts) for parts in zip(*(torch.split(x.view(-1), limit) for x in whole), strict=True)]
