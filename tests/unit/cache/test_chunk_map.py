"""The map's format, byte by byte, against a golden file that no release may fail to read."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blobcache_storage.cache.chunk_map import (
    HEADER_SIZE_BYTES,
    WHOLE_RECORD_OFFSET,
    MapHeader,
    decode_header,
    decode_slots,
    decode_whole_record,
    encode_header,
    encode_slots,
    encode_whole_record,
    is_representable,
    owner_key,
    seal_slot,
    slot_crc,
    slot_offset,
)
from blobcache_storage.device import BlobVersion, Validator

GOLDEN = Path(__file__).parent / "golden" / "v1.map"
GENERATION = 0x0123456789ABCDEF
HEADER = MapHeader(
    blob_id="models/größe.bin",
    version=BlobVersion(
        3 * 65536 + 5,
        Validator.ETAG,
        '"abc-1"',
        '"abc-1"',
        "Tue, 24 Nov 2026 06:00:00 GMT",
    ),
    chunk_size_bytes=65536,
    generation=GENERATION,
    created_ns=1_790_000_000_123_456_789,
    owner=owner_key("0c9f2a1e-uid"),
)
CRCS = {0: 0xDEADBEEF, 2: 0, 3: 0x12345678}
"""Chunk 1 is absent; chunk 2 has a CRC of zero, which is not the same."""
SHA256 = bytes(range(1, 33))


def golden_bytes() -> bytes:
    """Return what the golden file was written from."""
    page = bytearray(encode_header(HEADER))
    record = encode_whole_record(GENERATION, SHA256)
    page[WHOLE_RECORD_OFFSET : WHOLE_RECORD_OFFSET + len(record)] = record
    slots = array("Q", [0, 0, 0, 0])
    for index, crc in CRCS.items():
        slots[index] = seal_slot(GENERATION, index, crc)
    return bytes(page) + encode_slots(slots)


def test_the_golden_file_is_what_is_written() -> None:
    """A change of the format needs a new version number and a new golden file."""
    assert GOLDEN.read_bytes() == golden_bytes()


def test_the_golden_file_is_read() -> None:
    """Header, slots and whole-blob record come back."""
    data = GOLDEN.read_bytes()
    header = decode_header(data)
    assert header == HEADER
    assert len(data) == header.map_size_bytes
    slots = decode_slots(header, data[HEADER_SIZE_BYTES:])
    found = {i: slot_crc(GENERATION, i, slot) for i, slot in enumerate(slots)}
    assert found == {**CRCS, 1: None}
    assert decode_whole_record(GENERATION, data) == SHA256


@given(st.integers(0, HEADER_SIZE_BYTES - 1), st.integers(1, 255))
def test_one_wrong_byte_in_the_header_discards_it(offset: int, mask: int) -> None:
    """But for the zeros at its end, and the whole-blob record, which stands alone."""
    data = bytearray(GOLDEN.read_bytes())
    data[offset] ^= mask
    if offset < WHOLE_RECORD_OFFSET:
        assert decode_header(bytes(data)) is None
    elif offset < WHOLE_RECORD_OFFSET + 36:
        assert decode_header(bytes(data)) == HEADER
        assert decode_whole_record(GENERATION, bytes(data)) is None
    else:
        assert decode_header(bytes(data)) == HEADER


@given(st.integers(0, 3), st.integers(0, 63))
def test_one_wrong_bit_discards_a_slot_alone(index: int, bit: int) -> None:
    """The others stand."""
    slots = decode_slots(HEADER, GOLDEN.read_bytes()[HEADER_SIZE_BYTES:])
    slots[index] ^= 1 << bit
    for i, slot in enumerate(slots):
        assert slot_crc(GENERATION, i, slot) == (None if i == index else CRCS.get(i))


@given(st.binary(max_size=2 * HEADER_SIZE_BYTES))
def test_foreign_bytes_are_no_map(data: bytes) -> None:
    """Whatever they are."""
    assert decode_header(data) is None
    assert decode_whole_record(GENERATION, data) is None


@given(st.integers(0, 5 * 8))
def test_a_truncated_map_has_fewer_chunks(length: int) -> None:
    """What is cut off is absent; a slot cut in two is no slot."""
    data = GOLDEN.read_bytes()[HEADER_SIZE_BYTES:][:length]
    slots = decode_slots(HEADER, data)
    for index, slot in enumerate(slots):
        whole = (index + 1) * 8 <= length
        assert slot_crc(GENERATION, index, slot) == (CRCS.get(index) if whole else None)


def test_a_slot_belongs_to_its_place_and_generation() -> None:
    """Moved, or of another file, it vouches for nothing."""
    slot = seal_slot(GENERATION, 5, 77)
    assert slot_crc(GENERATION, 5, slot) == 77
    assert slot_crc(GENERATION, 6, slot) is None
    assert slot_crc(GENERATION + 1, 5, slot) is None


def test_a_whole_record_belongs_to_its_generation() -> None:
    """That of another file says nothing."""
    assert decode_whole_record(GENERATION + 1, GOLDEN.read_bytes()) is None


@pytest.mark.parametrize(
    ("blob_id", "version", "fits"),
    [
        ("a", BlobVersion(0, Validator.ETAG, '"x"', '"x"'), True),
        ("a", BlobVersion(5, Validator.NONE, "", None), False),
        ("", BlobVersion(5, Validator.ETAG, '"x"', '"x"'), False),
        ("é" * 512, BlobVersion(5, Validator.ETAG, '"x"', '"x"'), True),
        ("é" * 513, BlobVersion(5, Validator.ETAG, '"x"', '"x"'), False),
        ("a", BlobVersion(5, Validator.ETAG, "x" * 1025, None), False),
        ("a", BlobVersion(65536 << 24, Validator.ETAG, '"x"', '"x"'), True),
        ("a", BlobVersion((65536 << 24) + 1, Validator.ETAG, '"x"', '"x"'), False),
    ],
)
def test_what_a_map_cannot_describe_is_not_cached(
    blob_id: str, version: BlobVersion, fits: bool
) -> None:
    """The bounds of the header page."""
    assert is_representable(blob_id, version, 65536) is fits


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    st.integers(0, 1 << 40),
    st.sampled_from([v for v in Validator if v is not Validator.NONE]),
    TEXT,
    st.none() | TEXT,
    st.none() | TEXT,
    st.integers(12, 24),
    st.integers(1, (1 << 64) - 1),
)
def test_every_header_comes_back(
    blob_id: str,
    size: int,
    validator: Validator,
    token: str,
    etag: str | None,
    last_modified: str | None,
    chunk_bits: int,
    generation: int,
) -> None:
    """Encoding and decoding are inverse."""
    version = BlobVersion(size, validator, token, etag, last_modified)
    header = MapHeader(blob_id, version, 1 << chunk_bits, generation, 5, owner_key(blob_id))
    if is_representable(blob_id, version, header.chunk_size_bytes):
        assert decode_header(encode_header(header)) == header
        assert slot_offset(header.chunk_count) == header.map_size_bytes
