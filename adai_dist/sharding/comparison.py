"""Compares what ranks hold with what each of them takes for granted of the others.

Pipeline stages, experts in ordinary modules and tensor parallelism in plain tensors look like copies to every single
rank: only the other ranks know better. So each rank leaves a few hashes of its parameters in the job's rendezvous store
in its first step, and a few steps later rank 0 of the job compares those that are there. Nobody waits for anybody, and
no step depends on the outcome: what differs is a warning.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from adai_dist.sharding.ownership import is_distributed, local_tensor
from adai_dist.sharding.plan import Ranks, ShardingPlan, in_words

if TYPE_CHECKING:
    from torch.distributed import Store

logger: logging.Logger = logging.getLogger("adai_dist")

LOOKS = (2, 4, 8, 16)
"""The steps in which rank 0 looks: at the records of all ranks once they are complete, in the last one at any."""
NUM_SAMPLES = 16
"""Elements of a parameter that its hash is made of."""
MAX_LARGE = 256
"""Parameters of a pipeline stage that are compared with those of the other stages, the largest ones."""

_SEE = "see https://adai-dist.github.io/adai_dist/sharding/"


@dataclass(frozen=True)
class Record:
    """What one rank says of itself, in a few kilobytes; process groups by their names (:func:`_name`)."""

    process_groups: list[str]
    """Those that its mean is added up over, that of the stages left out."""
    stages: str
    held: str
    """Of all elements that it holds."""
    copied: dict[str, str]
    """By process group, of what every rank of it is taken to hold a copy of."""
    of_one_stage: list[str]
    """One per parameter that no other stage is taken to hold."""


class Comparison:
    """One per global mean."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._name = ""

    def before_step(self, plan: ShardingPlan) -> None:
        """Leave a record in the first step, and on rank 0 compare the records in a few later ones.

        Collective: none. The store is asked for what is there, and not waited for.
        """
        self._num_steps += 1
        if self._num_steps > LOOKS[-1] or (self._num_steps > 1 and not self._name):
            return
        try:
            if self._num_steps == 1:
                self._leave_record(plan)
            elif self._num_steps in LOOKS and dist.get_rank() == 0:
                self._look(is_last=self._num_steps == LOOKS[-1])
        except (RuntimeError, ValueError) as error:  # no store (MPI), or it does not answer
            self._name = ""
            logger.debug("what ranks hold was not compared: %s", error)

    def _leave_record(self, plan: ShardingPlan) -> None:
        if plan.assumptions is None or not is_distributed() or dist.get_world_size() == 1:
            return
        number = next(_numbers)
        record = json.dumps(asdict(record_of(plan)))
        _store().set(_key(number, dist.get_rank()), record)
        self._name = str(number)

    def _look(self, is_last: bool) -> None:
        store, number = _store(), int(self._name)
        keys = {rank: _key(number, rank) for rank in range(dist.get_world_size())}
        if not store.check(list(keys.values())):
            if not is_last:
                return
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        self._name = ""  # done
        found = contradiction({rank: Record(**json.loads(store.get(key))) for rank, key in keys.items()})
        if found:
            logger.warning("%s; %s", found, _SEE)


_numbers = itertools.count()
"""The means of a process are numbered in the order of their first steps, which is the same on all ranks of a job."""


def record_of(plan: ShardingPlan) -> Record:
    """What this rank says of itself. Collective: none; the host waits for the device."""
    assert plan.assumptions is not None
    stages = _name(plan.assumptions.stages)
    process_groups = [_name(sorted(dist.get_process_group_ranks(each))) for each in plan.process_groups]
    params = list(plan.weights)  # of all optimizers that share the mean
    hashes = dict(zip(params, _hashes(params), strict=True))
    largest = sorted(plan.assumptions.of_one_stage, key=torch.numel, reverse=True)[:MAX_LARGE]
    return Record(
        process_groups=[name for name in process_groups if name != stages],
        stages=stages,
        held=_digest(sorted(hashes.values())),
        copied={
            _name(ranks): _digest(sorted(hashes[param] for param in copies))
            for ranks, copies in plan.assumptions.copied.items()
        },
        of_one_stage=[hashes[param] for param in largest if hashes[param][-1] != _CONSTANT],
    )


def contradiction(records: Mapping[int, Record]) -> str | None:
    """The first thing in the records of some ranks, by rank, that tells against what others take for granted.

    Takes time in proportion to the number of ranks, times that of the process groups of each.
    """
    meshes = _connected(records, {name for record in records.values() for name in record.process_groups})
    wholes = _connected(
        records, {name for record in records.values() for name in (*record.process_groups, record.stages)}
    )
    found = itertools.chain(
        _unlike_process_groups(meshes, records),
        _unlike_copies(records),
        _shared_by_stages(records),
        _unlike_models(wholes, records),
    )
    return next(found, None)


def _unlike_process_groups(meshes: list[Ranks], records: Mapping[int, Record]) -> Iterator[str]:
    """Ranks of one mesh add up over as many process groups of the same sizes, or some elements count several times."""
    for ranks in meshes:
        sizes = {rank: [len(_ranks(name)) for name in records[rank].process_groups] for rank in ranks}
        for rank in ranks:
            if sizes[rank] != sizes[ranks[0]]:
                groups = {r: [in_words(_ranks(name)) for name in records[r].process_groups] for r in (ranks[0], rank)}
                yield (
                    f"ranks {in_words(ranks)} are connected by process groups, but add up their means over different "
                    f"ones: rank {ranks[0]} over {', '.join(groups[ranks[0]])}, rank {rank} over "
                    f"{', '.join(groups[rank])}; the means differ between ranks; place all parameters on one mesh, or "
                    "call optimizer.configure_sharding(process_group, num_replicas=...) on all of them"
                )


def _unlike_copies(records: Mapping[int, Record]) -> Iterator[str]:
    for name in sorted({name for record in records.values() for name in record.copied}):
        ranks = [rank for rank in _ranks(name) if rank in records]
        if len({records[rank].copied.get(name) for rank in ranks}) > 1:
            yield (
                f"ranks {in_words(ranks)} are taken to hold copies of the parameters that are not sharded over them, "
                "but what they hold differs; the mean is wrong where these are different parameters, such as experts; "
                "call optimizer.configure_sharding(process_group, num_replicas=...) with a function that says of each "
                "parameter how many of these ranks hold the same"
            )


def _shared_by_stages(records: Mapping[int, Record]) -> Iterator[str]:
    for stages in sorted({record.stages for record in records.values() if record.stages}):
        ranks = [rank for rank in _ranks(stages) if rank in records]
        times = Counter(itertools.chain(*(set(records[rank].of_one_stage) for rank in ranks)))
        if shared := sum(count > 1 for count in times.values()):
            yield (
                f"the ranks of stages, {in_words(ranks)}, are taken to hold different parameters, but {shared} of them "
                "are the same on several, and count several times in the mean; where they are tied (embeddings), call "
                "optimizer.configure_sharding(stages=..., num_replicas=...) with a function that says on how many "
                "stages a parameter is"
            )


def _unlike_models(wholes: list[Ranks], records: Mapping[int, Record]) -> Iterator[str]:
    """Ranks that do not share a mean hold copies of one model, or parts of it."""
    held = {ranks: sorted(records[rank].held for rank in ranks) for ranks in wholes}
    unlike = [ranks for ranks in wholes if held[ranks] != held[wholes[0]]]
    if unlike:
        yield (
            f"ranks {in_words(wholes[0])} and ranks {in_words(unlike[0])} hold different parameters, and each take the "
            "mean over their own; where these are parts of one model, the mean is wrong: call "
            "optimizer.configure_sharding(stages=...) for pipeline stages, or configure_sharding(process_group, "
            "num_replicas=...) for experts and tensor parallelism in plain tensors; where they are models of their "
            "own, configure_sharding(process_group) with these ranks says so"
        )


def _connected(ranks: Iterable[int], names: Iterable[str]) -> list[Ranks]:
    """The ranks in classes, of which each is connected by process groups; ordered by their first ranks."""
    class_of = {rank: [rank] for rank in ranks}
    for name in names:
        classes = {id(class_of[rank]): class_of[rank] for rank in _ranks(name) if rank in class_of}
        largest, *others = sorted(classes.values(), key=len, reverse=True) or [[]]
        for other in others:
            largest += other
            class_of.update(dict.fromkeys(other, largest))
    return sorted({tuple(sorted(of_class)) for of_class in {id(each): each for each in class_of.values()}.values()})


def _name(ranks: Sequence[int]) -> str:
    """Ranks in ascending order, briefly: "first:last:distance" where all distances are the same, as along a mesh."""
    if len(ranks) > 2 and len({b - a for a, b in itertools.pairwise(ranks)}) == 1:
        return f"{ranks[0]}:{ranks[-1]}:{ranks[1] - ranks[0]}"
    return " ".join(map(str, ranks))


@functools.cache
def _ranks(name: str) -> Ranks:
    if ":" in name:
        first, last, distance = map(int, name.split(":"))
        return tuple(range(first, last + 1, distance))
    return tuple(map(int, name.split()))


_CONSTANT = "="


def _hashes(params: Iterable[Tensor]) -> list[str]:
    """Of shape, dtype and some elements of what this rank holds of each; ends in "=" where these are all the same."""
    samples = [_samples(local_tensor(param)) for param in params]
    hashes: list[str] = []
    for param, values in zip(params, _to_host(samples), strict=True):
        shape = tuple(local_tensor(param).shape)
        digest = _digest([str(shape), str(param.dtype), *map(repr, values)])
        hashes.append(digest + (_CONSTANT if len(set(values)) <= 1 else " "))
    return hashes


def _samples(local: Tensor) -> Tensor:
    if local.is_meta or local.numel() == 0:
        return torch.empty(0, dtype=torch.float64)
    flat = local.reshape(-1)
    step = max(1, flat.numel() // NUM_SAMPLES)
    return flat[::step][:NUM_SAMPLES].double() if flat.device.type != "mps" else flat[::step][:NUM_SAMPLES].float()


def _to_host(samples: list[Tensor]) -> list[list[float]]:
    """One transfer per device."""
    values: dict[int, list[float]] = {}
    for device in {sample.device for sample in samples}:
        there = [index for index, sample in enumerate(samples) if sample.device == device]
        together = torch.cat([samples[index] for index in there]).cpu()
        sizes = [samples[index].numel() for index in there]
        values.update(zip(there, (part.tolist() for part in together.split(sizes)), strict=True))
    return [values[index] for index in range(len(samples))]


def _digest(texts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()


def _key(number: int, rank: int) -> str:
    return f"adai_dist/held/{number}/{rank}"


def _store() -> Store:
    return dist.distributed_c10d._get_default_store()
