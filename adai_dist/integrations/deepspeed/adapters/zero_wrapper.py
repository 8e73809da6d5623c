"""The interface to ZeRO's optimizer wrappers, which keep a model in different attributes.

A *part* is the unit that a wrapper passes to the optimizer: this rank's flat float32 partition of a parameter group
(stages 1 and 2, BF16_Optimizer) or of a sub-group (stage 3). A *fragment* (DeepSpeed's word) is the range of a flat
partition that belongs to one parameter of the model, without padding.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adai_dist.integrations.deepspeed.adapters.names import check_names
from adai_dist.integrations.deepspeed.adapters.reduced_gradients import ReducedGradients
from adai_dist.integrations.deepspeed.adapters.releases import Release

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from adai_dist.integrations.deepspeed.zero_mean_source import ZeroMeanSource


class Fragment(NamedTuple):
    """Range of a flat partition that belongs to one parameter, as in ``deepspeed.utils.tensor_fragment``."""

    start: int
    num_elements: int
    param: Tensor
    """The parameter of the model."""
    is_counted: bool
    """False for a copy that another rank counts, by ZeRO's rule for the gradient norm."""

    def view_of(self, flat: Tensor | None) -> Tensor:
        """Return the view of the fragment's elements in its flat partition, or in a tensor of the same shape."""
        assert flat is not None  # under CPU offload, gradients are never freed
        return flat.view(-1).narrow(0, self.start, self.num_elements)


class ZeroWrapper:
    """Interface to one of ZeRO's wrappers, with what the mean depends on.

    Args:
        wrapper: ``engine.optimizer``.
        release: range of the installed DeepSpeed.

    Raises:
        RuntimeError: the wrapper lacks a method or an attribute of the tables of the release.
    """

    def __init__(self, wrapper: Any, release: Release) -> None:
        self.wrapper = wrapper
        self.release = release
        self._fragments: dict[int, list[Fragment]] = {}
        self._reduced: ReducedGradients | None = None
        check_names(wrapper, release, *self.tables())

    def tables(self) -> tuple[str, ...]:
        """Return the tables of names that the wrapper must have under its settings."""
        return (type(self.wrapper).__name__,)

    def flat_partitions(self) -> list[Tensor]:
        """Return the flat float32 partition of every part."""
        raise NotImplementedError

    def group_indices(self) -> list[int]:
        """Return the index of the parameter group of every part; by default, a part is a group."""
        return list(range(len(self.flat_partitions())))

    def model_groups(self) -> list[list[Any]]:
        """Return the parameters of the model by part."""
        raise NotImplementedError

    def fragments(self, part: int) -> list[Fragment]:
        """Return the fragments of a part on this rank, in the order of the parameters; they never change."""
        if part not in self._fragments:
            self._fragments[part] = self._find_fragments(part)
        return self._fragments[part]

    def _find_fragments(self, part: int) -> list[Fragment]:
        raise NotImplementedError

    def gradients(self, part: int) -> Iterator[tuple[Fragment, Tensor]]:
        """Yield the counted fragments with their scaled gradients, before the optimizer is called."""
        raise NotImplementedError

    def process_groups(self) -> tuple[ProcessGroup, ...]:
        """Return the process groups; reducing over them in order counts every element of the model once."""
        raise NotImplementedError

    def is_swapped(self, part: int) -> bool:
        """Return whether the part is on disk between its steps."""
        return False

    @contextmanager
    def in_memory(self, part: int) -> Generator[None]:
        """Keep the part in memory within the context, reading it from disk if it is swapped."""
        yield

    def collect_late_gradients(self) -> None:
        """Collect gradients that DeepSpeed would drop: of parameters unused in the last micro-batch or on this rank."""

    def clear_stale_gradients(self, part: int) -> None:
        """Zero the gradients of an earlier step of parameters that have none in this step."""

    def clear_accumulated_gradients(self) -> None:
        """Zero the buffers in which micro-batches accumulate gradients, after a step."""

    def checksum_of_reduced(self) -> int:
        """Return the checksum of the gradients reduced in this step, 0 if the wrapper does not mix them."""
        return 0 if self._reduced is None else self._reduced.checksum()

    def check_universal_offsets(self) -> None:
        """Refuse settings under which DeepSpeed loads universal checkpoints to the offsets of other parameters.

        Raises:
            ValueError: the offsets are wrong.
        """

    # -- the methods of the wrapper that take part in a step -------------------------------------------------------

    def attach(self, source: ZeroMeanSource) -> None:
        """Make the methods of the wrapper call those of the source, and leave scaling to the optimizer."""
        self._replace_step(source)
        self._replace_loading(source)

    def global_grad_norm(self) -> Any:
        """Return the norm that ZeRO reports for the current step."""
        return self.wrapper._global_grad_norm

    def _replace_step(self, source: ZeroMeanSource) -> None:
        original = self.wrapper.step

        @functools.wraps(original)
        def step(closure: Any = None) -> Any:
            source.begin()
            result = original(closure)
            source.end(self.global_grad_norm())
            if self._reduced is not None:
                self._reduced.clear()
            return result

        self.wrapper.step = step

    def _replace_loading(self, source: ZeroMeanSource) -> None:
        original = self.wrapper.load_state_dict

        @functools.wraps(original)
        def load_state_dict(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            source.after_loading()

        self.wrapper.load_state_dict = load_state_dict

    def _observe(self, source: ZeroMeanSource, norms: list[Any]) -> None:
        """Pass ZeRO's global norms of the scaled gradients, one per part, to the source.

        Collective: as ZeroMeanSource.observe.
        """
        if len(norms) != len(source.flat_partitions):
            raise RuntimeError(
                f"ZeRO must compute one norm per part of the model ({len(source.flat_partitions)}) in every step, got "
                f"{len(norms)}; use a version of DeepSpeed that this release of adai_dist supports"
            )
        unscaling = 1.0 / torch.as_tensor(self.wrapper.loss_scale, dtype=torch.float64, device=source.device)
        source.observe(unscaling, _squared(norms).to(source.device))


def _squared(norms: list[Any]) -> Tensor:
    """Return the squared norms in float64, with NaN for -1, ZeRO's value for non-finite gradients."""
    stacked = torch.stack([torch.as_tensor(norm, dtype=torch.float64).reshape(()) for norm in norms])
    return torch.where(stacked >= 0, stacked.square(), torch.nan)


def without_none(*process_groups: ProcessGroup | None) -> tuple[ProcessGroup, ...]:
    """Return the process groups that exist."""
    return tuple(process_group for process_group in process_groups if process_group is not None)


def wait_for_copies() -> None:
    """Wait for the asynchronous copies of gradients to the CPU."""
    accelerator: Any = get_accelerator()
    accelerator.synchronize()
