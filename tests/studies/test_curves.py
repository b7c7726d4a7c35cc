"""Curves of reward from rows."""

import json

import pytest

from tir_alp.studies.curves import curves_of, main, mean_of


def row(model: str, seed: int, rewards: list[float], tools: bool = True) -> dict:
    steps = [{"step": n, "rollout/reward": each} for n, each in enumerate(rewards, 1)]
    return {"model": model, "seed": seed, "tools": tools, "steps": steps}


def test_a_model_has_one_curve_per_seed_and_their_mean_over_common_steps():
    sft = {"model": "sft", "seed": 0, "steps": [{"step": 1, "loss/value": 2.0}]}
    base = {"model": "base", "seed": 0}
    rows = [base, sft, row("alp", 0, [0.2, 0.4, 0.9]), row("alp", 1, [0.4, 0.8])]
    curves = curves_of(rows)
    assert [*curves] == ["alp"] and len(curves["alp"]) == 2
    assert mean_of(curves["alp"]) == pytest.approx({1: 0.3, 2: 0.6})


def test_a_file_is_drawn_and_one_without_curves_is_refused(tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "curves.png"
    rows.write_text(json.dumps(row("alp_sequence", 0, [0.1, 0.5])) + "\n")
    assert main([str(rows), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "alp_sequence: seeds: 1, steps: 2" in capsys.readouterr().out
    for text in ('{"model": "base"}\n', "[1]\n", "{"):
        rows.write_text(text)
        with pytest.raises(SystemExit) as end:
            main([str(rows), "--out", str(out)])
        assert end.value.code == 2 and str(rows) in capsys.readouterr().err
