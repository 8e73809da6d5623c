"""A check of the assumptions of sharding plans against the parameters of the other ranks.

Pipeline stages, experts in ordinary modules and tensor parallelism in plain tensors look like copies from any single
rank. So each rank writes a few hashes of its parameters to the job's rendezvous store in its first step, and a few
steps later rank 0 of the job compares the hashes that have arrived. No rank waits, no step depends on the outcome, and
a mismatch is a warning.
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

from adai_dist.sharding.local_tensor import is_distributed, local_tensor
from adai_dist.sharding.plan import Ranks, ShardingPlan, in_words

if TYPE_CHECKING:
    from torch.distributed import Store

logger: logging.Logger = logging.getLogger("adai_dist")

CHECK_STEPS = (2, 4, 8, 16)
"""Steps in which rank 0 compares the records if those of all ranks have arrived; in the last one, any that have."""
NUM_SAMPLES = 16
"""Number of elements of a parameter that are hashed."""
MAX_LARGE = 256
"""Number of parameters of a pipeline stage that are compared with those of the other stages, largest first."""

_SEE = "see https://adai-dist.github.io/adai_dist/sharding/"


@dataclass(frozen=True)
class RankRecord:
    """Hashes of one rank's parameters, in a few kilobytes; process groups are named by :func:`_name`."""

    process_groups: list[str]
    """Process groups of the mean, except that of the stages."""
    stages: str
    """Process group of the stages; empty if there is none."""
    held: str
    """Hash of all elements that the rank holds."""
    copied: dict[str, str]
    """Hash, by process group, of the parameters of which all its ranks are assumed to hold a copy."""
    of_one_stage: list[str]
    """Hashes of the parameters that no other stage is assumed to hold."""


class AssumptionCheck:
    """The check of one global mean, in its first few steps."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._name = ""

    def before_step(self, plan: ShardingPlan) -> None:
        """Write this rank's record in the first step; on rank 0, compare the records in a few later steps.

        Collective: none. The store is read without waiting.
        """
        self._num_steps += 1
        if self._num_steps > CHECK_STEPS[-1] or (self._num_steps > 1 and not self._name):
            return
        try:
            if self._num_steps == 1:
                self._write_record(plan)
            elif self._num_steps in CHECK_STEPS and dist.get_rank() == 0:
                self._compare(is_last=self._num_steps == CHECK_STEPS[-1])
        except (RuntimeError, ValueError) as error:  # no store (MPI), or it does not answer
            self._name = ""
            logger.debug("the parameters of the ranks were not compared: %s", error)

    def _write_record(self, plan: ShardingPlan) -> None:
        if plan.assumptions is None or not is_distributed() or dist.get_world_size() == 1:
            return
        number = next(_numbers)
        record = json.dumps(asdict(record_of(plan)))
        _store().set(_key(number, dist.get_rank()), record)
        self._name = str(number)

    def _compare(self, is_last: bool) -> None:
        store, number = _store(), int(self._name)
        keys = {rank: _key(number, rank) for rank in range(dist.get_world_size())}
        if not store.check(list(keys.values())):
            if not is_last:
                return
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        self._name = ""  # done
        found = find_contradiction({rank: RankRecord(**json.loads(store.get(key))) for rank, key in keys.items()})
        if found:
            logger.warning("%s; %s", found, _SEE)


_numbers = itertools.count()
"""Numbers of the means of a process, in the order of their first steps, which is the same on all ranks of a job."""


def record_of(plan: ShardingPlan) -> RankRecord:
    """Return the record of this rank. Collective: none; the host waits for the device."""
    assert plan.assumptions is not None
    stages = _name(plan.assumptions.stages)
    process_groups = [_name(sorted(dist.get_process_group_ranks(each))) for each in plan.process_groups]
    params = list(plan.weights)  # those of all optimizers that share the mean
    hashes = dict(zip(params, _hashes(params), strict=True))
    largest = sorted(plan.assumptions.of_one_stage, key=torch.numel, reverse=True)[:MAX_LARGE]
    return RankRecord(
        process_groups=[name for name in process_groups if name != stages],
        stages=stages,
        held=_digest(sorted(hashes.values())),
        copied={
            _name(ranks): _digest(sorted(hashes[param] for param in copies))
            for ranks, copies in plan.assumptions.copied.items()
        },
        of_one_stage=[hashes[param] for param in largest if hashes[param][-1] != _CONSTANT],
    )


def find_contradiction(records: Mapping[int, RankRecord]) -> str | None:
    """Return a message about the first assumption that the records (by rank) contradict, or None.

    The time is proportional to the number of ranks, times the number of process groups of each.
    """
    meshes = _connected(records, {name for record in records.values() for name in record.process_groups})
    wholes = _connected(
        records, {name for record in records.values() for name in (*record.process_groups, record.stages)}
    )
    messages = itertools.chain(
        _different_process_groups(meshes, records),
        _different_copies(records),
        _shared_by_stages(records),
        _different_models(wholes, records),
    )
    return next(messages, None)


def _different_process_groups(meshes: list[Ranks], records: Mapping[int, RankRecord]) -> Iterator[str]:
    """Check that the ranks of a mesh reduce over equally many process groups of the same sizes."""
    for ranks in meshes:
        sizes = {rank: [len(_ranks(name)) for name in records[rank].process_groups] for rank in ranks}
        for rank in ranks:
            if sizes[rank] != sizes[ranks[0]]:
                groups = {r: [in_words(_ranks(name)) for name in records[r].process_groups] for r in (ranks[0], rank)}
                yield (
                    f"ranks {in_words(ranks)} are connected by process groups, but reduce their means over different "
                    f"ones: rank {ranks[0]} over {', '.join(groups[ranks[0]])}, rank {rank} over "
                    f"{', '.join(groups[rank])}; the means differ between ranks; place all parameters on one mesh, or "
                    "call optimizer.configure_sharding(process_group, num_replicas=...) on all of them"
                )


def _different_copies(records: Mapping[int, RankRecord]) -> Iterator[str]:
    """Check that parameters that are assumed to be copies have the same hashes."""
    for name in sorted({name for record in records.values() for name in record.copied}):
        ranks = [rank for rank in _ranks(name) if rank in records]
        if len({records[rank].copied.get(name) for rank in ranks}) > 1:
            yield (
                f"ranks {in_words(ranks)} are assumed to hold copies of the parameters that are not sharded over them, "
                "but their values differ; the mean is wrong if these are different parameters, such as experts; call "
                "optimizer.configure_sharding(process_group, num_replicas=...) with a function that returns, for each "
                "parameter, how many of these ranks hold the same elements"
            )


def _shared_by_stages(records: Mapping[int, RankRecord]) -> Iterator[str]:
    """Check that no parameter with the same hash is on several stages."""
    for stages in sorted({record.stages for record in records.values() if record.stages}):
        ranks = [rank for rank in _ranks(stages) if rank in records]
        times = Counter(itertools.chain(*(set(records[rank].of_one_stage) for rank in ranks)))
        if shared := sum(count > 1 for count in times.values()):
            yield (
                f"the ranks of stages, {in_words(ranks)}, are assumed to hold different parameters, but {shared} of "
                "them are the same on several stages, and count several times in the mean; if they are tied "
                "(embeddings), call optimizer.configure_sharding(stages=..., num_replicas=...) with a function that "
                "returns how many stages hold a parameter"
            )


def _different_models(wholes: list[Ranks], records: Mapping[int, RankRecord]) -> Iterator[str]:
    """Check that sets of ranks with separate means hold copies of one model."""
    held = {ranks: sorted(records[rank].held for rank in ranks) for ranks in wholes}
    different = [ranks for ranks in wholes if held[ranks] != held[wholes[0]]]
    if different:
        yield (
            f"ranks {in_words(wholes[0])} and ranks {in_words(different[0])} hold different parameters, and each take "
            "the mean over their own; if these are parts of one model, the mean is wrong: call "
            "optimizer.configure_sharding(stages=...) for pipeline stages, or configure_sharding(process_group, "
            "num_replicas=...) for experts and tensor parallelism in plain tensors; if they are separate models, call "
            "configure_sharding(process_group) with the ranks of each"
        )


def _connected(ranks: Iterable[int], names: Iterable[str]) -> list[Ranks]:
    """Partition the ranks into the components that process groups connect, ordered by their first ranks."""
    class_of = {rank: [rank] for rank in ranks}
    for name in names:
        classes = {id(class_of[rank]): class_of[rank] for rank in _ranks(name) if rank in class_of}
        largest, *others = sorted(classes.values(), key=len, reverse=True) or [[]]
        for other in others:
            largest += other
            class_of.update(dict.fromkeys(other, largest))
    return sorted({tuple(sorted(of_class)) for of_class in {id(each): each for each in class_of.values()}.values()})


def _name(ranks: Sequence[int]) -> str:
    """Name ascending ranks: "first:last:distance" if they are equally spaced, as along a mesh, else a list."""
    if len(ranks) > 2 and len({b - a for a, b in itertools.pairwise(ranks)}) == 1:
        return f"{ranks[0]}:{ranks[-1]}:{ranks[1] - ranks[0]}"
    return " ".join(map(str, ranks))


@functools.cache
def _ranks(name: str) -> Ranks:
    """Return the ranks that :func:`_name` has named."""
    if ":" in name:
        first, last, distance = map(int, name.split(":"))
        return tuple(range(first, last + 1, distance))
    return tuple(map(int, name.split()))


_CONSTANT = "="


def _hashes(params: Iterable[Tensor]) -> list[str]:
    """Hash local shape, dtype and some elements of each parameter; "=" at the end marks equal elements."""
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
    """Copy the samples to the host, in one transfer per device."""
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
