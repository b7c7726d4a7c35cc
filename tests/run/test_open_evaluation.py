"""What an evaluation reads before it begins."""

import json

from tir_alp.config import Config
from tir_alp.models.tiny import BASE
from tir_alp.run.model_choice import Model
from tir_alp.run.open_evaluation import prepare_evaluation


def test_rows_that_are_left_out_are_named(tmp_path):
    file = tmp_path / "tasks.jsonl"
    rows = [{"question": "1+1?", "answer": "2"}, {"question": "1+2?", "answer": None}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = {"source": "jsonl", "path": file, "broken_rows": "skip"}
    config = Config.model_validate(
        {"model": {"path": str(BASE)}, "eval": {"data": [source], "samples": 1}}
    )
    prepared = prepare_evaluation(config, Model(str(BASE)), tmp_path / "out")
    (sentence,) = prepared.left_out
    assert "tasks.jsonl:2: 'answer' must be a text or a number" in sentence
    assert [len(each.tasks) for each in prepared.sets] == [1]
