"""The answer is cut out of its column: GSM8K's own form, patterns, and what they refuse."""

import json
import time

import pytest

from tir_alp.config import DataConfig
from tir_alp.rollouts.answer_pattern import cut_answer
from tir_alp.rollouts.data_files import open_rows


def read_jsonl(path, **settings):
    splits = open_rows(DataConfig(source="jsonl", path=path, **settings)).splits.values()
    return [each[index] for each in splits for index in range(len(each))]


def write(path, line):
    path.write_text(f"{line}\n")
    return path


GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips.\nAltogether 72.\n#### 72"


@pytest.mark.parametrize(
    ("settings", "text", "answer"),
    [
        ({}, GSM8K, "72"),
        ({}, "so\n#### 1,234 \n", "1,234"),
        ({}, "#### 72", "#### 72"),  # no working before it: text like any other
        ({}, "a\n#### A heading\nb", "a\n#### A heading\nb"),
        ({}, r"Since $2x=4$, $x=\boxed{2}$, so $\frac{x}{4}=\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ({}, r"\boxed{", r"\boxed{"),
        ({"answer_pattern": "gsm8k"}, GSM8K, "72"),
        ({"answer_pattern": "gsm8k"}, "#### x+1", "x+1"),
        ({"answer_pattern": r"answer is (.+)\."}, "The answer is 5.", "5"),
        ({"answer_pattern": r"= ([0-9]+)"}, "1 = 1, 2 = 2", "2"),
    ],
)
def test_the_answer_is_cut_out_of_its_column(tmp_path, settings, text, answer):
    path = write(tmp_path / "t.jsonl", json.dumps({"question": "q", "answer": text}))
    (row,) = read_jsonl(path, **settings)
    assert row["answer"] == answer


def test_a_row_without_the_pattern_or_a_gradable_answer_is_named(tmp_path):
    path = write(tmp_path / "t.jsonl", json.dumps({"question": "q", "answer": "72"}))
    with pytest.raises(
        ValueError, match=r"t\.jsonl:1: 'answer' has nothing that data\.answer_patt"
    ):
        read_jsonl(path, answer_pattern="gsm8k")
    path = write(tmp_path / "u.jsonl", json.dumps({"question": "q", "answer": "}{"}))
    with pytest.raises(ValueError, match=r"u\.jsonl:1: 'answer' is neither text nor mathematics"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("####", "has 0 groups"),
        ("(a)(b)", "has 2 groups"),
        ("(", "is no regular expression"),
        ("(a+)+b", "repeats a group"),
        ("(a)\\1", "refers to a group"),
        ("(?=a)(b)", "a group other than"),
        ("a*b*c*(d)", "3 repetitions"),
    ],
)
def test_a_pattern_that_could_be_slow_is_refused_when_the_data_is_opened(
    tmp_path, pattern, message
):
    path = write(tmp_path / "t.jsonl", json.dumps({"question": "q", "answer": "72"}))
    with pytest.raises(ValueError, match=message):
        read_jsonl(path, answer_pattern=pattern)


def test_a_pattern_is_searched_in_linear_time():
    times = []
    for size in (10_000, 20_000, 40_000):
        begin = time.perf_counter()
        assert cut_answer("a" * size, "a*a*(b)") is None
        times.append(time.perf_counter() - begin)
    assert times[2] < 8 * times[0]
