"""The same promises, kept by an ordinary user: the suite again, without root's privileges."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sandbox

# In a mount namespace of its own: folders that only root may enter are replaced by empty ones that
# everybody may enter, in which the interpreter's own folder is bound at its own path.
AS_USER = """
set -e
exec 3<"$1"
if [ -n "$2" ]; then
    mount -t tmpfs -o mode=755 none "$2"
    mkdir -p "$1"
    mount --no-canonicalize --bind /proc/self/fd/3 "$1"
fi
shift 2
exec 3<&- setpriv --reuid 1001 --regid 1001 --clear-groups --bounding-set -all "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the suite runs as an ordinary user already")
def test_suite_passes_as_an_ordinary_user():
    suite = Path(__file__).parent
    tests = [suite / "escape", suite / "test_sandbox_life.py"]
    not_about_users = ["-k", "not weakened and not end_of_the_host and not docker"]
    prefix = Path(sys.base_prefix)
    closed = [p for p in reversed(prefix.parents) if not p.stat().st_mode & 0o001]
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command = ["unshare", "--mount", "sh", "-c", AS_USER, "sh", prefix, closed[0] if closed else ""]
    result = subprocess.run(
        [*command, *pytest_command, *not_about_users, *tests],
        cwd=suite.parents[1],
        env={"PATH": os.environ["PATH"], "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "skipped" not in result.stdout
