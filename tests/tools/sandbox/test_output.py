import pytest

from tir_alp.tools.sandbox.output import HeadTail, cut_middle


def test_short_text_is_left_alone():
    assert cut_middle("abc", 3) == ("abc", False)


@pytest.mark.parametrize("max_chars", [1, 10, 50, 51, 999])
def test_cut_text_is_as_long_as_allowed(max_chars: int):
    text, cut = cut_middle("H" * 500 + "T" * 500, max_chars)
    assert cut and len(text) == max_chars


def test_cut_text_keeps_both_ends():
    text, _ = cut_middle("head" + "x" * 1000 + "tail", 100)
    assert text.startswith("head") and text.endswith("tail")


def feed(output: HeadTail, data: bytes, piece: int) -> HeadTail:
    for start in range(0, len(data), piece):
        output.feed(data[start : start + piece])
    return output


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_what_fits_is_kept_whole_however_it_arrives(piece: int):
    data = "äöü€𝄞".encode() * 20
    assert feed(HeadTail(100), data, piece).text() == (data.decode(), False)


def test_ends_of_a_long_stream_are_kept_in_bounded_memory():
    output = feed(HeadTail(100), b"head" + b"x" * 1_000_000 + b"tail", 4096)
    text, cut = output.text()
    assert cut and text.startswith("head") and text.endswith("tail") and len(text) == 100
    assert len(output._head) + len(output._tail) < 10_000


def test_bytes_that_are_no_text_are_spelled_out():
    assert feed(HeadTail(100), b"a\xff\xfeb", 1).text() == ("a\\xff\\xfeb", False)
