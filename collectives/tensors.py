"""What every communicator asks of a tensor, and how its parts are put together: the same for each transport."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.errors import InvalidArgumentError


def checked(tensor: Tensor) -> Tensor:
    """The tensor itself; refused unless it is contiguous."""
    if not tensor.is_contiguous():
        raise InvalidArgumentError(f"the tensor is not contiguous: shape {tuple(tensor.shape)}, {tensor.stride()}")
    return tensor


def check_dim(tensor: Tensor, dim: int) -> None:
    """Refuse a dimension that the tensor does not have."""
    if not -tensor.dim() <= dim < tensor.dim():
        raise InvalidArgumentError(f"dim {dim} is not a dimension of a {tensor.dim()}-d tensor", dim=dim)


def check_source(src: int, world_size: int) -> None:
    """Refuse a rank that is not in the group."""
    if not 0 <= src < world_size:
        raise InvalidArgumentError(f"rank {src} is not in a group of {world_size}", rank=src)


def check_peer(peer: int, rank: int, world_size: int) -> None:
    """Refuse a rank that is not another one of the group."""
    if peer == rank or not 0 <= peer < world_size:
        raise InvalidArgumentError(f"rank {peer} is not a peer of rank {rank} in a group of {world_size}", rank=peer)


def concatenate(parts: Tensor, dim: int) -> Tensor:
    """``parts[0]``, ``parts[1]``, ... along ``dim`` of each."""
    if dim % (parts.dim() - 1) == 0:
        return parts.flatten(0, 1)
    return torch.cat(parts.unbind(), dim)


def sum_in_order(parts: Tensor) -> Tensor:
    """Sum over the first dimension, from first to last: ``torch.sum`` promises no order. 16-bit floats in float32."""
    total = parts[0].float() if parts.dtype in (torch.bfloat16, torch.float16) else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
