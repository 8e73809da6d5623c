"""Local tensors: the elements of a DTensor or a plain tensor that this rank holds."""

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
    """Return whether torch.distributed is initialised."""
    return dist.is_available() and dist.is_initialized()


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether ``tensor`` is a DTensor, without importing DTensor."""
    if type(tensor) in PLAIN_TYPES:  # fast path: called several times per parameter and step
        return False
    # Importing the module takes half a second; if it has not been imported, there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the elements that this rank holds as a real tensor that shares their memory.

    Shape: the local shape; complex tensors get a last dimension of 2 (real, imaginary).
    """
    if type(tensor) not in PLAIN_TYPES and is_dtensor(tensor):
        with torch.no_grad():
            local: Any = tensor.to_local()
        # The communication of an AsyncCollectiveTensor may still be in progress.
        tensor = local.wait() if hasattr(local, "wait") else local
    if tensor.requires_grad:
        tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def sharded_like(tensor: Tensor, local: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return ``local`` itself, or as the local tensor of a DTensor of the mesh and placements of ``tensor``.

    Args:
        shape: of the DTensor, in row-major order; by default shape and strides of ``tensor``.

    Collective: none.
    """
    if not is_dtensor(tensor):
        return local
    from torch.distributed.tensor import DTensor

    whole = tensor if shape is None else torch.empty(shape, device="meta")
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def aligned_gradient(param: Tensor) -> Tensor | None:
    """Return the gradient of ``param`` in the placements of ``param``, or None; ``param.grad`` is not changed.

    Raises:
        TypeError: the gradient is sparse, or only one of parameter and gradient is a DTensor.

    Collective: if the placements differ (tensor parallelism with sequence parallelism leaves partial sums), all ranks
    of the parameter's mesh, to redistribute the gradient; otherwise none.
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
    """Return the number of local padding elements; FSDP1 pads flat parameters, with gradients of 0."""
    return param._shard_numel_padded if getattr(param, "_is_flat_param", False) else 0  # type: ignore[attr-defined]
