from pathlib import Path

import pytest

from tir_alp.training.structure import local_path


def test_a_folder_below_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert local_path("~/model") == str(tmp_path / "model")


def test_an_id_of_the_hub_stays_as_it_is():
    assert local_path("owner/model") == "owner/model"


@pytest.mark.parametrize("path", ["~/nowhere", "/no/such/folder", "./nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist_is_refused(path: str):
    with pytest.raises(ValueError, match=f"there is no model folder '{path}'"):
        local_path(path)
