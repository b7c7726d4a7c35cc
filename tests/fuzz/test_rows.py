"""A short run; `python -m tests.fuzz.rows` is the long one."""

from tests.fuzz.rows import fuzz


def test_malformed_rows_are_named_one_by_one(tmp_path):
    seen = fuzz(num_rows=1000, folder=tmp_path)
    assert seen.total() == 1000
    for complaint in ("not JSON", "not an object", "'question' must be", "'answer' must be"):
        assert any(each.startswith(complaint) for each in seen), seen
    assert any(each.startswith("'reward_model.ground_truth' must be") for each in seen), seen
