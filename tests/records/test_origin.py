"""The clock and the end tokens of a run are those that it was created with."""

from datetime import datetime

import pytest

from tir_alp.config import Config
from tir_alp.records.folder import RunFolder, read_origin
from tir_alp.types import Origin


def test_the_origin_of_a_run_is_read_back(tmp_path):
    origin = Origin(datetime(2026, 1, 31, 23, 59), (1, 7))
    folder = RunFolder(tmp_path / "run")
    folder.create(Config(), origin)
    folder.close()
    assert read_origin(folder.path) == origin
    (folder.path / "origin.json").write_text('{"created": "yesterday"}')
    with pytest.raises(ValueError, match=r"cannot read .*origin\.json"):
        read_origin(folder.path)


def test_a_folder_without_an_origin_was_created_when_its_config_was_written(tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert read_origin(tmp_path) == Origin(datetime.fromtimestamp(config.stat().st_mtime))
