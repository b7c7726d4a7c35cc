from tir_alp.envs.spaces import TextSpace


def test_any_text_is_inside_and_nothing_else_is():
    space = TextSpace()
    assert all(text in space for text in ["", "π ≈ 3\n", "\x00", "\ud800", "a" * 100_000])
    assert all(thing not in space for thing in [None, 1, b"a", ["a"]])


def test_samples_follow_the_seed():
    space = TextSpace(seed=3)
    first = [space.sample() for _ in range(5)]
    space.seed(3)
    assert [space.sample() for _ in range(5)] == first
    assert len(set(first)) > 1
    assert all(text in space for text in first)
