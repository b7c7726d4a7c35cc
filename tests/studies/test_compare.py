"""What the comparison refuses before it trains anything."""

import pytest

from tir_alp.studies.compare import main


def test_a_setting_that_does_not_exist_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--seeds", "1", "--", "--trainer.learning_rate", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--trainer.learning_rate: there is no such key; did you mean --trainer.lr" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--seeds", "0"]])
def test_a_comparison_of_nothing_is_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "must be at least 1" in capsys.readouterr().err
