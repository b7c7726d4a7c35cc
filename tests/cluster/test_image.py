"""Actors in images, by Ray and podman, as the ordinary user that `--userns=keep-id` requires."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("ray")

from tests.runs import assert_honest
from tests.tools.sandbox.ordinary_user import USER, command_as_user

NEEDED = ("podman", "runc", "newuidmap")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes an ordinary user's namespaces as root"),
    pytest.mark.skipif(
        not all(map(shutil.which, NEEDED)), reason=f"needs {', '.join(NEEDED)} (apt)"
    ),
]
REPOSITORY = Path(__file__).parents[2]
# No network: podman has no slirp4netns here. The limits are those of this process.
CONTAINERS = """
[containers]
netns = "host"
default_ulimits = ["nofile={files}:{files}", "nproc=4096:4096"]
volumes = [{volumes}]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
# Users that podman needs on this machine, and what `--ipc=host` mounts.
BEFORE = """
for name in passwd group subuid subgid; do mount --bind {folder}/etc/$name /etc/$name; done
mount -t tmpfs -o mode=1777 none /dev/shm
mount -t mqueue none /dev/mqueue
"""
IMPORT = """
set -e
for name in new old; do
    podman import --quiet --change "ENV PATH=$PATH" \
        --change "ENV PYTHONPATH=/of-$name:$PYTHONPATH" image.tar parts:$name
done
exec python -m tests.cluster.image_actors localhost/parts:new localhost/parts:old
"""


def make_user(folder):
    """Write the files by which podman knows `USER` to `folder`/etc."""
    etc = folder / "etc"
    etc.mkdir()
    entry = {"passwd": f"ray:x:{USER}:{USER}::{folder}/home:/bin/sh", "group": f"ray:x:{USER}:"}
    entry |= dict.fromkeys(("subuid", "subgid"), "ray:100000:65536")
    for name, line in entry.items():
        known = Path("/etc", name).read_text().splitlines() if Path("/etc", name).exists() else []
        others = [each for each in known if f":{USER}:" not in each and "100000" not in each]
        (etc / name).write_text("\n".join([*others, line, ""]))
        Path("/etc", name).touch()


def make_image(folder, volumes):
    """An archive of empty folders, on which this machine's own programs are mounted."""
    root = folder / "root"
    for name in ("usr", "etc", "proc", "sys", "dev", "run", "tmp", *volumes):
        (root / str(name).lstrip("/")).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
        shutil.copy(Path("/etc", name), root / "etc")
    # The package with one module that differs, which the image `old` finds first.
    old = root / "of-old"
    shutil.copytree(
        REPOSITORY / "tir_alp", old / "tir_alp", ignore=shutil.ignore_patterns("__pycache__")
    )
    (old / "tir_alp" / "loss.py").open("a").write("\n")
    with tarfile.open(folder / "home" / "image.tar", "w") as archive:
        archive.add(root, arcname=".")


@pytest.fixture
def folder():
    """A folder of the user. Its path is short, because Ray's sockets are in it."""
    made = Path(tempfile.mkdtemp(prefix="p-", dir="/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def test_actors_run_in_containers_and_wrong_images_are_named(folder):
    home = folder / "home"
    volumes = {"/usr", str(REPOSITORY), sys.base_prefix, sys.prefix}
    make_user(folder)
    for name in ("", ".config/containers", "run", "ray", "runs"):
        (home / name).mkdir(parents=True, exist_ok=True)
    make_image(folder, volumes | {home})
    mounts = [f'"{each}:{each}:ro"' for each in sorted(volumes)] + [f'"{home}:{home}"']
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    settings = CONTAINERS.format(files=files, volumes=", ".join(mounts))
    (home / ".config/containers/containers.conf").write_text(settings)
    (home / ".config/containers/storage.conf").write_text('[storage]\ndriver = "vfs"\n')
    subprocess.run(["chown", "-R", f"{USER}:{USER}", home], check=True)
    (home / "run").chmod(0o700)
    queues = Path("/dev/mqueue")
    had_queues = queues.exists()
    queues.mkdir(exist_ok=True)
    try:
        ended = subprocess.run(
            command_as_user(
                *("sh", "-c", IMPORT),
                before=BEFORE.format(folder=folder),
                may_use_setuid=True,
                unshare=("--pid", "--fork", "--kill-child", "--mount-proc"),
            ),
            cwd=home,
            env={
                "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin",
                "PYTHONPATH": str(REPOSITORY),
                "PYTHONDONTWRITEBYTECODE": "1",
                "HOME": str(home),
                "XDG_RUNTIME_DIR": str(home / "run"),
                "RAY_TMPDIR": str(home / "ray"),
            },
            capture_output=True,
            text=True,
            timeout=560,
        )
    finally:
        if not had_queues:
            queues.rmdir()
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert_honest(home / "runs/run")
    # Bubblewrap cannot run in a container, so the service's sandbox is the one without it.
    assert "remote (landlock)" in ended.stdout
    assert found["replaced"] == [True, True]
    assert "cluster.environments.image = 'localhost/nothing:there'" in found["missing"]
    assert "environment-0 cannot be started: " in found["missing"]
    assert "docker://localhost/nothing:there" in found["missing"]  # in podman's words
    assert "other code of tir_alp than this process: loss.py; build its image" in found["old"]
