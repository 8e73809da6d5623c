"""The equations run with torch's foreach operations, on pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adai_dist import equations, storage
from adai_dist.eight_bits import RECORD_BYTES, RECORD_ELEMENTS, decoded_moment
from adai_dist.equations import LocalTensors, SquaredNorms, StepScalars, Tensors
from adai_dist.hyper import Hyper
from adai_dist.rounding import LOW_DTYPES

PIECE_ELEMENTS = {"cpu": 2**18}
"""Largest piece of a shard by device type; on a CPU, a piece and its temporaries stay near the cache."""
DEFAULT_PIECE_ELEMENTS = 2**24
"""Largest piece on other devices, where it bounds the temporary memory."""


def observe_in_pieces(shards: LocalTensors, hyper: Hyper, c: Tensor, kept: Tensor) -> tuple[SquaredNorms, Tensor]:
    """Run :func:`adai_dist.equations.observe`, and add up each exp_avg_sq."""
    cut = Cut.of(shards._replace(exp_avg=[], exp_avg_sq=[], beta1_prod=[]))
    pieces = cut.pieces
    if hyper.coupled_decay and pieces.remainder:
        pieces = pieces._replace(param=storage.wide_params(pieces))
    norms = SquaredNorms(*(cut.per_shard(norms) for norms in equations.observe(pieces, hyper, c)))
    sums = sums_in_pieces(shards.exp_avg_sq, kept) if shards.exp_avg_sq else torch.zeros_like(norms.grad_grad)
    return norms, sums


def advance_in_pieces(shards: LocalTensors, hyper: Hyper, scalars: StepScalars) -> None:
    """Run :func:`adai_dist.storage.advance`; temporary memory is four tensors of the size of a piece, and eleven for
    parameters or states in fewer bits."""
    cut = Cut.of(shards)
    shard_of_piece = [shard for shard, count in enumerate(cut.num_pieces) for _ in range(count)]
    for batch in _batches(cut.pieces.param, hyper):
        pieces = LocalTensors(*(tensors[batch] for tensors in cut.pieces))
        storage.advance(pieces, hyper, scalars.of_shards(shard_of_piece[batch]), cut.starts[batch])


def sums_in_pieces(exp_avg_sqs: list[Tensor], kept: Tensor) -> Tensor:
    """Return the sum of each tensor, float64; always reads, which costs little beside the operations of a step."""
    del kept
    if exp_avg_sqs[0].dtype == torch.uint8:
        return torch.stack([_sum_of_records(records) for records in exp_avg_sqs])
    cut = Cut.of(LocalTensors(exp_avg_sqs, [], [], [], []))
    return cut.per_shard(equations.sums(cut.pieces.param))


def _sum_of_records(records: Tensor) -> Tensor:
    pieces = records.view(-1, RECORD_BYTES).split(piece_elements([records]) // RECORD_ELEMENTS)
    return torch.stack([equations.sums([decoded_moment(piece)]).squeeze(0) for piece in pieces]).sum()


def piece_elements(shard: Sequence[Tensor]) -> int:
    """Return the largest piece of a shard, given as some of its tensors; half if rounded, as indices are int64."""
    is_low = any(tensor.dtype in (*LOW_DTYPES, torch.uint8) for tensor in shard)
    return PIECE_ELEMENTS.get(shard[0].device.type, DEFAULT_PIECE_ELEMENTS) // (2 if is_low else 1)


class Cut(NamedTuple):
    """LocalTensors cut into pieces of bounded size."""

    pieces: LocalTensors
    num_pieces: list[int]
    """Number of pieces of each shard."""
    starts: list[int]
    """Index of the first element of each piece in its shard."""

    @classmethod
    def of(cls, shards: LocalTensors) -> Cut:
        present = [tensors for tensors in shards if tensors]
        columns: list[Tensors] = [[] for _ in present]
        num_pieces: list[int] = []
        starts: list[int] = []
        for shard in zip(*present, strict=True):
            limit = piece_elements(shard)
            is_cut = shard[0].numel() > limit and all(x.is_contiguous() for x in shard)
            # Of the records of a second moment, a piece has as many bytes as there are for its elements.
            sizes = [limit * x.numel() // max(1, shard[0].numel()) for x in shard]
            pieces = [x.view(-1).split(size) if is_cut else (x,) for x, size in zip(shard, sizes, strict=True)]
            num_pieces.append(len(pieces[0]))
            starts.extend(range(0, len(pieces[0]) * limit, limit))
            for column, of_tensor in zip(columns, pieces, strict=True):
                column.extend(of_tensor)
        filled = iter(columns)
        return cls(LocalTensors(*(next(filled) if tensors else [] for tensors in shards)), num_pieces, starts)

    def per_shard(self, of_pieces: Tensor) -> Tensor:
        """Add up a value of each piece over the pieces of each shard."""
        if len(of_pieces) == len(self.num_pieces):
            return of_pieces
        return torch.stack([of_shard.sum() for of_shard in of_pieces.split(self.num_pieces)])


def _batches(params: Tensors, hyper: Hyper) -> Iterator[slice]:
    """Yield runs of pieces with at most as many elements as one piece may have; single pieces with foreach=False."""
    start, num_elements = 0, 0
    for i, param in enumerate(params):
        limit = 0 if hyper.foreach is False else PIECE_ELEMENTS.get(param.device.type, DEFAULT_PIECE_ELEMENTS)
        if i > start and num_elements + param.numel() > limit:
            yield slice(start, i)
            start, num_elements = i, 0
        num_elements += param.numel()
    yield slice(start, len(params))
