"""Files of tasks in the forms that people have: read, or refused with the form and the setting."""

import bz2
import gzip
import json
import lzma

import pytest

from tir_alp.config import DataConfig
from tir_alp.rollouts.data_files import open_rows

ROWS = [{"question": f"What is {n}+1?", "answer": str(n + 1)} for n in range(40)]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()


def questions(**settings) -> set[str]:
    splits = open_rows(DataConfig(**settings)).splits.values()
    return {split[index]["question"] for split in splits for index in range(len(split))}


def refusal(**settings) -> str:
    with pytest.raises(ValueError) as caught:
        open_rows(DataConfig(**settings))
    return str(caught.value)


PACKS = [gzip.compress, bz2.compress, lzma.compress]


@pytest.mark.parametrize("pack", PACKS)
def test_a_compressed_file_is_read(tmp_path, pack):
    (tmp_path / "tasks").write_bytes(pack(LINES))
    assert questions(source="jsonl", path=tmp_path / "tasks") == {row["question"] for row in ROWS}
    (tmp_path / "torn").write_bytes(pack(LINES)[:-20])
    assert "is compressed, and torn" in refusal(source="jsonl", path=tmp_path / "torn")


@pytest.mark.parametrize("separator", ["\t", ";"])
def test_a_table_may_be_separated_by_tabs_or_semicolons(tmp_path, separator):
    rows = [("question", "answer"), ("What is 1,000+1?", "1001"), ("What is 2+3?", "5")]
    text = "".join(f"{separator.join(row)}\n" for row in rows)
    (tmp_path / "tasks.tsv").write_text(text)
    assert questions(source="csv", path=tmp_path / "tasks.tsv") == {row[0] for row in rows[1:]}


@pytest.mark.parametrize("pack", [bytes, *PACKS])
def test_a_csv_file_is_read_and_its_values_stay_texts(tmp_path, pack):
    text = '\ufeffproblem,result\n"What is 1,000+1?",1001\nWhat is 2+3?,5\n"two\nlines?",0.50\n'
    (tmp_path / "tasks.csv").write_bytes(pack(text.encode()))
    config = DataConfig(
        source="csv",
        path=tmp_path / "tasks.csv",
        question_column="problem",
        answer_column="result",
    )
    found = open_rows(config).splits
    tasks = [split[index] for split in found.values() for index in range(len(split))]
    assert {task["question"]: task["answer"] for task in tasks} == {
        "What is 1,000+1?": "1001",
        "What is 2+3?": "5",
        "two\nlines?": "0.50",
    }


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("tasks.jsonl", b"PAR1....", 'is a parquet file: set data.source = "parquet"'),
        ("tasks.csv", b"question,answer\n1+1?,2\n", 'is a CSV file: set data.source = "csv"'),
        ("tasks.json", json.dumps(ROWS, indent=2).encode(), "one JSON array: write one object per"),
        ("tasks.zip", b"PK\x03\x04rest", "zip archive"),
        ("tasks.zst", b"\x28\xb5\x2f\xfdrest", "is compressed with zstd"),
        ("tasks.arrow", b"ARROW1\0\0rest", "is an Arrow file"),
        ("tasks.db", b"SQLite format 3\0", "is a database of SQLite"),
        ("tasks.pkl", b"\x80\x04]q\0.", "is a pickle"),
        ("tasks.jsonl", b"question,answer\nq,1\n", "it begins with b'question,answer"),
        ("tasks.gz", gzip.compress(LINES)[:-9], "is compressed, and torn"),
        ("tasks.jsonl", LINES.decode().encode("utf-16"), "is in UTF-16, not in UTF-8: convert it"),
        ("tasks.jsonl", LINES.decode().encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
        ("tasks.jsonl", LINES.decode().encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
        ("tasks.jsonl", LINES.decode().encode("utf-32"), "is in UTF-32, not in UTF-8"),
        ("tasks.gz", gzip.compress(LINES.decode().encode("utf-16")), "is in UTF-16"),
    ],
)
def test_another_format_is_named_with_the_way_to_read_it(tmp_path, name, contents, words):
    (tmp_path / name).write_bytes(contents)
    assert words in refusal(source="jsonl", path=tmp_path / name)


def test_a_folder_is_named(tmp_path):
    assert "is a folder" in refusal(source="jsonl", path=tmp_path)
    assert "is a folder" in refusal(source="csv", path=tmp_path)
    assert "is a folder" in refusal(source="parquet", path=tmp_path)


def test_another_format_than_parquet_is_named(tmp_path):
    (tmp_path / "tasks.parquet").write_bytes(LINES)
    words = refusal(source="parquet", path=tmp_path / "tasks.parquet")
    assert 'is a file of JSON lines: set data.source = "jsonl"' in words


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"problem": "1+1?", "solution": "2"}\n')
    path = {"source": "jsonl", "path": tmp_path / "tasks.jsonl"}
    assert (
        "there is no column 'question'; the row has 'problem', 'solution': "
        "set data.question_column" in refusal(**path)
    )
    assert "set data.answer_column" in refusal(**path, question_column="problem")


def test_a_csv_row_with_too_few_values_is_named(tmp_path):
    (tmp_path / "tasks.csv").write_text("question,answer\n1+1?\n")
    assert "tasks.csv:2: the row does not have the 2 values" in refusal(
        source="csv", path=tmp_path / "tasks.csv"
    )


@pytest.mark.parametrize("is_split", [False, True])
def test_a_folder_that_datasets_saved_is_read(tmp_path, is_split):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict({"train": saved}) if is_split else saved).save_to_disk(tmp_path / "saved")
    dataset = {"source": "hub", "dataset": str(tmp_path / "saved")}
    assert len(questions(**dataset)) == len(ROWS)
    if is_split:
        assert "it has no split 'test', but train" in refusal(**dataset, split="test")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("question,answer\n1+1?,2\n".encode("utf-16"), "is in UTF-16, not in UTF-8"),
        (b"PAR1....", "is a parquet file"),
    ],
)
def test_a_file_that_is_not_the_csv_that_it_is_called_is_named(tmp_path, pack, contents, words):
    (tmp_path / "tasks.csv").write_bytes(pack(contents))
    assert words in refusal(source="csv", path=tmp_path / "tasks.csv")
