"""Integer codes of a few bits in bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GROUP = 8
"""Codes that end on a byte together, whatever their bits."""


def packed_size(count: int, bits: int) -> int:
    """Bytes that so many codes take: whole groups of eight codes, or two bytes a code above 8 bits.

    Args:
        count: number of codes.
        bits: of a code, 2 to 16.
    """
    return 2 * count if bits > 8 else -(-count // _GROUP) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Write codes one after the other into a stream of bits, lowest bit first.

    Code i takes bits i * bits to (i + 1) * bits - 1 of the stream: two codes a byte at 4 bits (the
    first in the lower half), four codes in three bytes at 6 bits. The stream is filled up with
    zeros to a group of eight codes. Above 8 bits a code takes two bytes, the lower one first.

    Args:
        codes: integers 0 to 2^bits - 1, any shape.
        bits: 2 to 16.

    Returns:
        uint8 [packed_size(codes.numel(), bits)].

    Raises:
        ValueError: a code does not fit.
    """
    flat = codes.detach().cpu().numpy().reshape(-1)
    if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < 1 << bits:
        raise ValueError(
            f"codes from {flat.min()} to {flat.max()} do not fit into {bits} unsigned bits"
        )
    if bits > 8:
        return torch.from_numpy(flat.astype("<u2").view(np.uint8).copy())
    groups = np.zeros((-(-flat.size // _GROUP), _GROUP), "<u8")
    groups.reshape(-1)[: flat.size] = flat
    words = np.bitwise_or.reduce(groups << _shifts(bits), axis=1)
    packed = words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :bits]
    return torch.from_numpy(packed.reshape(-1).copy())


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8 [packed_size(count, bits)].
        bits: 2 to 16.
        count: number of codes.

    Returns:
        int32 [count], values 0 to 2^bits - 1.

    Raises:
        ValueError: there are more or fewer bytes.
    """
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count, bits),):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, found "
            f"{packed.numel()} of {packed.dtype}"
        )
    stream = packed.cpu().numpy()
    if bits > 8:
        return torch.from_numpy(stream.view("<u2").astype(np.int32))
    padded = np.zeros((stream.size // bits, 8), np.uint8)
    padded[:, :bits] = stream.reshape(-1, bits)
    codes = (padded.view("<u8") >> _shifts(bits)) & np.uint64((1 << bits) - 1)
    return torch.from_numpy(codes.reshape(-1)[:count].astype(np.int32))


def _shifts(bits: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.arange(_GROUP, dtype=np.uint64) * np.uint64(bits)
