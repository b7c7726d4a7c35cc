import pytest

from tir_alp.tools.sandbox.jail.frames import FrameReader, encode, read_frame


def test_frames_survive_any_split():
    data = encode({"a": 1}) + encode({"b": "ä\ud800"}) + encode({})
    for piece in range(1, len(data) + 1):
        reader = FrameReader(1000)
        frames = []
        for start in range(0, len(data), piece):
            frames += reader.feed(data[start : start + piece])
        assert frames == [{"a": 1}, {"b": "ä\ud800"}, {}] and not reader.has_rest


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\3\xe9",
        b"\0\0\0\2[]",
        b"\0\0\0\1{",
        b"\0\0\0\0",
        b"\0\0\0\1\xff",
        b"\0\0\3\xe8" + b"[" * 1000,
    ],
)
def test_broken_stream_is_refused(data: bytes):
    with pytest.raises(ValueError):
        FrameReader(1000).feed(data)


def test_blocking_reader_ends_with_the_stream():
    data = bytearray(encode({"a": 1}))

    def receive(count: int) -> bytes:
        piece = bytes(data[: min(count, 2)])
        del data[: len(piece)]
        return piece

    assert read_frame(receive) == {"a": 1}
    assert read_frame(receive) is None
