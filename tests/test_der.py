"""DER as timestamps need it: one form for each value, and everything else refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import VerificationFailed
from harness.format import der


@given(st.integers(0, 2**80))
def test_a_number_is_read_as_it_was_written(value: int) -> None:
    """Oracle: the number itself, in the shortest two's complement."""
    data = der.encode_integer(value)
    assert der.integer(der.parse(data, where="x"), where="x") == value
    assert data[1] == len(data) - 2 == value.bit_length() // 8 + 1


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_a_list_is_read_as_it_was_written(parts: list[bytes]) -> None:
    """Oracle: the parts themselves, of lengths that take one to three bytes."""
    whole = der.encode(der.SEQUENCE, *(der.encode(der.OCTETS, part) for part in parts))
    assert [each.content for each in der.children(der.parse(whole, where="x"), where="x")] == parts


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("1.2.840.113549.1.7.2", "06092a864886f70d010702"),
        ("2.16.840.1.101.3.4.2.1", "0609608648016503040201"),
        ("2.999.1", "0603883701"),
        ("0.9.2342", "0603099226"),
    ],
)
def test_object_identifiers_have_the_bytes_of_x_690(text: str, data: str) -> None:
    """Oracle: ITU-T X.690 section 8.19 by hand; the first two as OpenSSL prints them."""
    assert der.oid(der.parse(bytes.fromhex(data), where="x"), where="x") == text
    assert der.encode_oid(text).hex() == data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "cut off"),
        ("30", "cut off"),
        ("3002", "cut off"),
        ("300201", "cut off"),
        ("30020500ff", "bytes after its end"),
        ("3080020100 0000", "length that is not in its shortest form"),  # BER: no length at all
        ("3081020500", "length that is not in its shortest form"),
        ("308200800500", "length that is not in its shortest form"),
        ("3085000000000205 00", "length that is not in its shortest form"),
        ("3082", "length that is not in its shortest form"),
        ("3f01020500", "tag of several bytes"),
    ],
)
def test_an_element_in_another_form_is_refused(data: str, says: str) -> None:
    """Oracle: X.690 section 10 by hand."""
    with pytest.raises(VerificationFailed, match=says):
        der.children(der.parse(bytes.fromhex(data), where="x"), where="x")


@pytest.mark.parametrize("data", ["0200", "02020001", "0202007f", "0202ff80", "0101ff", "0241" + "01" * 65])
def test_a_number_in_another_form_is_refused(data: str) -> None:
    """Oracle: X.690 section 8.3 by hand; the last has more bytes than any number here."""
    with pytest.raises(VerificationFailed):
        der.integer(der.parse(bytes.fromhex(data), where="x"), where="x")


@pytest.mark.parametrize(
    "data", ["0600", "060180", "060281", "06038001 01", "06052a86488081", "0403550403", "0641" + "01" * 65]
)
def test_an_object_identifier_in_another_form_is_refused(data: str) -> None:
    """Oracle: X.690 section 8.19 by hand."""
    with pytest.raises(VerificationFailed):
        der.oid(der.Element(*_header(bytes.fromhex(data))), where="x")


def _header(data: bytes) -> tuple[int, bytes, bytes]:
    return data[0], data[2:], data
