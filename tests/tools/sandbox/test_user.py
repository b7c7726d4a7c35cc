"""The sandbox holds for an ordinary user as well: the suite again, without root's privileges."""

import os
from pathlib import Path

import pytest

from tests.tools.sandbox.ordinary_user import run_python_as_user

pytestmark = pytest.mark.sandbox


@pytest.mark.skipif(os.geteuid() != 0, reason="the suite runs as an ordinary user already")
def test_suite_passes_as_an_ordinary_user():
    suite = Path(__file__).parent
    tests = [str(suite / "escape"), str(suite / "test_life.py")]
    # An ordinary user cannot start a Docker engine; test_docker.py lends one.
    not_about_users = ["-k", "not weakened and not end_of_the_host and not docker"]
    pytest_command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    result = run_python_as_user(*pytest_command, *not_about_users, *tests)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "skipped" not in result.stdout
