from __future__ import annotations

import pytest
import torch

from ptq4sam.deploy.packing import pack, packed_size, unpack


def as_bits(values: list[int], bits: int) -> str:
    """The stream as text, lowest bit first, written without any packing."""
    return "".join(f"{value:0{bits}b}"[::-1] for value in values)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 250])
def test_stream_of_bits(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (count,), generator=generator, dtype=torch.int32)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(count, bits) <= (count + 7) * bits / 8
    stream = as_bits(packed.tolist(), 8)
    assert stream == as_bits(codes.tolist(), bits).ljust(len(stream), "0")
    assert torch.equal(unpack(packed, bits, count), codes)


def test_places_of_codes_in_bytes() -> None:
    assert pack(torch.tensor([0x1, 0x2, 0xF, 0x0]), 4).tolist()[:2] == [0x21, 0x0F]
    six = pack(torch.tensor([1, 2, 3, 63]), 6).tolist()[:3]
    assert int.from_bytes(six, "little") == 1 | 2 << 6 | 3 << 12 | 63 << 18
    assert pack(torch.arange(8), 8).tolist() == list(range(8))


def test_sixteen_bits() -> None:
    codes = torch.tensor([0, 1, 1023, 65535], dtype=torch.int32)
    assert torch.equal(unpack(pack(codes, 16), 16, 4), codes)


@pytest.mark.parametrize("code", [-1, 16])
def test_a_code_that_does_not_fit(code: int) -> None:
    with pytest.raises(ValueError, match="do not fit into 4"):
        pack(torch.tensor([0, code]), 4)


def test_bytes_that_are_too_few() -> None:
    with pytest.raises(ValueError, match="take 8 bytes, found 7"):
        unpack(pack(torch.arange(16), 4)[:-1], 4, 16)
