"""The elements of one parameter, and of its states, that this rank holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adai_dist.kernels import Backend
from adai_dist.precision import Precision
from adai_dist.sharding.local_tensor import PLAIN_TYPES, is_dtensor, local_tensor
from adai_dist.sharding.records import check_records, records_shape

STATE_NAMES = ("exp_avg", "exp_avg_sq", "beta1_prod")
"""States shaped like the parameter, except for an exp_avg_sq of 8 bits (:mod:`adai_dist.eight_bits`). beta1_prod is
absent once retired (:mod:`adai_dist.optimizer.retirement`), and holds 1 minus the product unless states are float32."""

MASTER = "master_param"
"""Key of the master weights of a 16-bit parameter, of which the state holds the remainder, as int16
(:func:`adai_dist.rounding.split`), and a checkpoint the float32 value. torch's tools require the same keys in both."""


class ParamShard:
    """The local tensors of one parameter and its states; they may be empty.

    Finding the local tensors takes many small calls, so a shard is reused until the parameter or a state is replaced.
    :class:`adai_dist.sharding.shard_cache.ShardCache` keeps the shards and combines those of each step into
    :class:`adai_dist.sharding.owned_shards.OwnedShards`.

    Raises:
        ValueError: a state is incomplete, or its local shape differs from the parameter's.
        TypeError: the dtype of a state does not match that of the parameter.
        RuntimeError: the parameter or a state was made in inference mode.
    """

    __slots__ = (
        *("_is_complex", "_source", "_states", "num_writes", "row", "whole_exp_avg"),
        *("backend", "beta1_prod", "exp_avg", "exp_avg_sq", "gradient_form", "local_param", "param", "remainder"),
        "state",
    )

    def __init__(self, param: Tensor, state: dict[str, Any], precision: Precision) -> None:
        self.param = param
        self.state = state
        self._source = _source(param)
        self._is_complex = param.is_complex()
        check_state_is_complete(state)
        check_not_made_in_inference_mode(param, state)
        self._states = tuple(state.get(name) for name in (*STATE_NAMES, MASTER))
        # The parameter itself if possible, so that assignments to param.data are followed.
        self.local_param: Tensor = local_tensor(param) if self._is_complex else self._source
        self.exp_avg: Tensor = local_tensor(state["exp_avg"])
        self.exp_avg_sq: Tensor = local_tensor(state["exp_avg_sq"])
        self.beta1_prod: Tensor | None = local_tensor(state["beta1_prod"]) if "beta1_prod" in state else None
        self.remainder: Tensor | None = local_tensor(state[MASTER]) if MASTER in state else None
        has_records = records_shape(param, precision) is not None
        low = torch.uint8 if has_records else precision.state_dtype_of(param.dtype).to_real()
        dtypes = (precision.state_dtype_of(param.dtype).to_real(), low, low)
        for name, tensor, dtype in zip(STATE_NAMES, self.states, dtypes, strict=False):
            if tensor.dtype != dtype:
                raise TypeError(
                    f"{name} must be {dtype}, as its parameter is {param.dtype} and state_dtype is "
                    f"{precision.state_dtype!r}, got {tensor.dtype}; convert it"
                )
            if name == "exp_avg_sq" and has_records:
                check_records(tensor, self.local_param)
            else:
                self.check_shape(name, tensor)
        if self.remainder is not None:
            self.check_shape(MASTER, self.remainder)
        self.whole_exp_avg: Tensor | None = state["exp_avg"] if is_dtensor(state["exp_avg"]) else None
        """``exp_avg`` as a DTensor; None for a plain tensor."""
        self.row: tuple[Tensor, int] | None = None
        """Record of exp_avg_sq after the last step: a tensor, and an index into it (see :class:`ShardConstants`)."""
        self.num_writes: int = 0
        """:func:`count_writes` after the last step."""
        self.gradient_form: tuple[Any, ...] = ()
        """Dtype, shape and strides of the gradient for which the backend was chosen."""
        self.backend: Backend | None = None

    @property
    def states(self) -> list[Tensor]:
        """The local states, in the order of ``STATE_NAMES``; without the remainder."""
        states = [self.exp_avg, self.exp_avg_sq]
        return states if self.beta1_prod is None else [*states, self.beta1_prod]

    def is_of(self, param: Tensor, state: dict[str, Any]) -> bool:
        """Return whether the shard was made from these objects and from the tensors that are in them now."""
        exp_avg, exp_avg_sq, beta1_prod, master = self._states
        try:
            return (
                self.param is param
                and self.state is state
                and state["exp_avg_sq"] is exp_avg_sq
                and state["exp_avg"] is exp_avg
                and state.get("beta1_prod") is beta1_prod
                and state.get(MASTER) is master
                and self._source is (param if type(param) in PLAIN_TYPES else _source(param))
                and not self._is_complex
            )
        except KeyError:
            return False

    def check_shape(self, name: str, tensor: Tensor) -> None:
        """Raise ValueError if ``tensor`` does not have the local shape of the parameter."""
        shape = self.local_param.shape
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have the local shape of its parameter, {tuple(shape)}, got {tuple(tensor.shape)}; a "
                "state_dict must be loaded into the layout that it was saved from (torch.distributed.checkpoint "
                "converts between layouts)"
            )

    def kept_row(self) -> tuple[Tensor, int] | None:
        """Return ``row``, or None if torch has recorded a write to a moment since; kernels detect other writes."""
        return self.row if self.num_writes == count_writes([self])[0] else None


def count_writes(param_shards: list[ParamShard]) -> list[int]:
    """Return the number of writes to the moments of each shard that torch has recorded.

    Torch counts writes to a DTensor and to its local tensor separately.
    """
    return [
        s.exp_avg_sq._version + s.exp_avg._version + (0 if s.whole_exp_avg is None else s.whole_exp_avg._version)
        for s in param_shards
    ]


def check_state_is_complete(state: dict[str, Any]) -> None:
    """Raise ValueError if the state lacks an entry that every state has."""
    names = ("step", *STATE_NAMES[:2])
    missing = [name for name in names if not isinstance(state.get(name), Tensor)]
    if missing:
        raise ValueError(
            f"a state must have tensors {', '.join(names)}, got one without {', '.join(missing)}; to restart a "
            "parameter from an empty state, delete all of its state"
        )


def check_not_made_in_inference_mode(param: Tensor, state: dict[str, Any]) -> None:
    """Raise RuntimeError for inference tensors, which cannot be written to outside of inference mode."""
    tensors = {"parameter": param, **state}
    found = [name for name, value in tensors.items() if isinstance(value, Tensor) and value.is_inference()]
    if found:
        raise RuntimeError(
            "parameters and states must be made outside of torch.inference_mode(), got one from within it "
            f"({', '.join(found)}, of shape {tuple(param.shape)}); make or load the model outside, or train a "
            "copy.deepcopy() of it, made outside"
        )


def _source(param: Tensor) -> Tensor:
    """Return the tensor that holds a parameter's memory; engines replace the one inside a DTensor."""
    return param._local_tensor if is_dtensor(param) else param
