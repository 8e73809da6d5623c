"""The equations as a backend: torch's foreach operations, on pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adai_dist import equations
from adai_dist.equations import LocalTensors, SquaredNorms, StepScalars, Tensors
from adai_dist.hyper import Hyper

PIECE_ELEMENTS = {"cpu": 2**18}
"""A shard is stepped in pieces, by device type: on a CPU a piece and its temporaries stay near the cache ..."""
DEFAULT_PIECE_ELEMENTS = 2**24
"""... and elsewhere it bounds the temporary memory."""


class Equations:
    """Runs :mod:`adai_dist.equations` operation by operation, as any device can.

    Temporary memory: four tensors of a piece.
    """

    name = "the equations (foreach)"

    def takes(self, shard: Sequence[Tensor]) -> bool:
        del shard
        return True

    def observe(self, shards: LocalTensors, hyper: Hyper, c: Tensor, kept: Tensor) -> tuple[SquaredNorms, Tensor]:
        cut = Cut.of(shards._replace(exp_avg=[], exp_avg_sq=[], beta1_prod=[]))
        norms = SquaredNorms(*(cut.per_shard(norms) for norms in equations.observe(cut.pieces, hyper, c)))
        sums = self.sums(shards.exp_avg_sq, kept) if shards.exp_avg_sq else torch.zeros_like(norms.grad_grad)
        return norms, sums

    def advance(self, shards: LocalTensors, hyper: Hyper, scalars: StepScalars) -> None:
        cut = Cut.of(shards)
        counted = zip(scalars.inverse_means.unbind(), cut.num_pieces, strict=True)
        inverse_means = [inverse_mean for inverse_mean, count in counted for _ in range(count)]
        for batch in _batches(cut.pieces.param, hyper):
            pieces = LocalTensors(*(tensors[batch] for tensors in cut.pieces))
            equations.advance(pieces, hyper, scalars._replace(inverse_means=torch.stack(inverse_means[batch])))

    def sums(self, exp_avg_sqs: list[Tensor], kept: Tensor) -> Tensor:
        del kept  # a read of exp_avg_sq is little beside what the operations of a step read
        cut = Cut.of(LocalTensors(exp_avg_sqs, [], [], [], []))
        return cut.per_shard(equations.sums(cut.pieces.param))


class CompiledEquations(Equations):
    """Runs the equations through ``torch.compile``, which fuses them: for devices whose kernels cannot be built.

    The first step of every list of shapes compiles, which takes a while.
    """

    name = "the equations (torch.compile)"

    def __init__(self) -> None:
        self._advance = torch.compile(equations.advance, dynamic=False)

    def advance(self, shards: LocalTensors, hyper: Hyper, scalars: StepScalars) -> None:
        self._advance(shards, hyper, scalars)


class Cut(NamedTuple):
    """Shards cut into pieces of bounded size."""

    pieces: LocalTensors
    num_pieces: list[int]
    """Pieces of each shard."""

    @classmethod
    def of(cls, shards: LocalTensors) -> Cut:
        present = [tensors for tensors in shards if tensors]
        columns: list[Tensors] = [[] for _ in present]
        num_pieces: list[int] = []
        for whole in zip(*present, strict=True):
            limit = PIECE_ELEMENTS.get(whole[0].device.type, DEFAULT_PIECE_ELEMENTS)
            is_cut = whole[0].numel() > limit and all(x.is_contiguous() for x in whole)
            parts = [x.view(-1).split(limit) if is_cut else (x,) for x in whole]
            num_pieces.append(len(parts[0]))
            for column, of_shard in zip(columns, parts, strict=True):
                column.extend(of_shard)
        filled = iter(columns)
        return cls(LocalTensors(*(next(filled) if tensors else [] for tensors in shards)), num_pieces)

    def per_shard(self, of_pieces: Tensor) -> Tensor:
        """Sums over the pieces of each shard."""
        if len(of_pieces) == len(self.num_pieces):
            return of_pieces
        return torch.stack([of_shard.sum() for of_shard in of_pieces.split(self.num_pieces)])


def _batches(params: Tensors, hyper: Hyper) -> Iterator[slice]:
    """Runs of pieces to be stepped together: as many elements as one piece may have; foreach=False: one by one."""
    start, num_elements = 0, 0
    for i, param in enumerate(params):
        limit = 0 if hyper.foreach is False else PIECE_ELEMENTS.get(param.device.type, DEFAULT_PIECE_ELEMENTS)
        if i > start and num_elements + param.numel() > limit:
            yield slice(start, i)
            start, num_elements = i, 0
        num_elements += param.numel()
    yield slice(start, len(params))
