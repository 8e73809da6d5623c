"""The elements that this rank holds of a tensor, whatever kind of tensor it is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PLAIN_TYPES = (torch.nn.Parameter, Tensor)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    if type(tensor) in PLAIN_TYPES:  # asked several times per parameter and step
        return False
    # Importing the module costs half a second; where nobody has imported it there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """The elements that this rank holds, as a real tensor that shares their memory.

    Shape: the local one; complex tensors get a last dimension of 2 (real, imaginary).
    """
    if type(tensor) not in PLAIN_TYPES and is_dtensor(tensor):
        with torch.no_grad():
            local: Any = tensor.to_local()
        # An AsyncCollectiveTensor's communication may still be under way.
        tensor = local.wait() if hasattr(local, "wait") else local
    if tensor.requires_grad:
        tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def aligned_gradient(param: Tensor) -> Tensor | None:
    """The gradient of ``param``, held like ``param``; None where there is none. ``param.grad`` stays as it is.

    Raises:
        TypeError: the gradient is sparse, or only one of parameter and gradient is a DTensor.

    Collective: all ranks of the parameter's mesh where the placements differ (tensor parallelism with sequence
    parallelism leaves partial sums), to redistribute the gradient; otherwise none.
    """
    grad = param.grad
    if grad is None:
        return None
    if grad.layout is not torch.strided:
        raise TypeError(
            f"gradients must be dense, got layout {grad.layout} for a parameter of shape {tuple(param.shape)}; "
            "use sparse=False in the embedding"
        )
    if type(param) in PLAIN_TYPES and type(grad) in PLAIN_TYPES:
        return grad
    if is_dtensor(param) != is_dtensor(grad):
        raise TypeError(
            "a parameter and its gradient must both be DTensors or both plain tensors, "
            f"got {type(param.data).__name__} with a gradient {type(grad).__name__}, shape {tuple(param.shape)}"
        )
    if is_dtensor(param) and is_dtensor(grad) and grad.placements != param.placements:
        with torch.no_grad():
            return grad.redistribute(param.device_mesh, param.placements)
    return grad


def num_padding(param: Tensor) -> int:
    """How many local elements are no part of the model: FSDP1's flat parameter ends in padding, whose gradient is 0."""
    return param._shard_numel_padded if getattr(param, "_is_flat_param", False) else 0  # type: ignore[attr-defined]
