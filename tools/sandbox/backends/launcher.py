"""A script that starts the fork server, in bubblewrap or plainly, as an unprivileged user.

Neither may be started by the real root: whatever ids bubblewrap shows inside, its payload would be
root to the kernel (bubblewrap issues 181, 313, 551). So root becomes `nobody` first. `nobody` may
not enter folders below /root, where root may keep its Python. So while it is still root, and in a
mount namespace of its own, this script binds them where everybody can reach them. For bubblewrap
any path will do, since it binds them back to their own paths, as compiled libraries and
`sys.prefix` expect. Otherwise they are bound to their own paths, with empty folders in place of
those that were closed.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Usage: launcher.py JSON.

    Keys: `bwrap`, `binds`, `arguments`, `command`; or, without bubblewrap, `visible`, `command`.
    """
    job = json.loads(sys.argv[1])
    if "bwrap" in job:
        _start_bubblewrap(job["bwrap"], job["binds"], job["arguments"], job["command"])
    if os.geteuid() == 0:
        _uncover(job["visible"])
        _become_nobody()
    os.execve(job["command"][0], job["command"], os.environ)


def _start_bubblewrap(
    bwrap: str, binds: list[list[str]], options: list[str], command: list[str]
) -> None:
    staged = {path: path for path, _ in binds}
    if os.geteuid() == 0:
        staged = _stage(list(staged))
        _become_nobody()
    arguments = [a for path, inside in binds for a in ("--ro-bind", staged[path], inside)]
    arguments += [*options, "--", *command]
    os.execve(_moved(bwrap, staged), ["bwrap", *arguments], {})


def _stage(paths: list[str]) -> dict[str, str]:
    """Bind every path below /tmp, which is private to this process from now on."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    opened = {path: os.open(path, os.O_PATH) for path in paths}
    _mount("tmpfs", "/tmp", "tmpfs", 0, "mode=0755")
    staged = {}
    for path, descriptor in opened.items():
        staged[path] = f"/tmp/{len(staged)}"
        _bind(descriptor, staged[path])
    return staged


def _uncover(paths: list[str]) -> None:
    """Let everybody reach these paths, in this process's own mount namespace; hide their siblings.

    If nothing is closed, nothing is done, so that a container needs no right to mount.
    """
    closed = {top for top in map(_outermost_closed, paths) if top is not None}
    if not closed:
        return
    try:
        _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    except OSError as error:
        sys.exit(
            f"an ordinary user may not enter {', '.join(sorted(closed))}, where this Python is, "
            f"and root may not change that here ({error}): start as an ordinary user"
        )
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    covered = [path for path in paths if _outermost_closed(path) is not None]
    opened = {path: os.open(path, os.O_PATH) for path in covered}
    for folder in closed:
        _mount("tmpfs", folder, "tmpfs", 0, "mode=0755")
    for path, descriptor in opened.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _bind(descriptor, path)


def _outermost_closed(path: str) -> str | None:
    """The first folder on the way to `path` that not everybody may enter."""
    for end in range(1, len(path) + 1):
        folder = path[:end]
        if path[end : end + 1] == "/" and not os.stat(folder).st_mode & 0o001:
            return folder
    return None


def _bind(descriptor: int, target: str) -> None:
    if os.path.isdir(f"/proc/self/fd/{descriptor}"):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(f"/proc/self/fd/{descriptor}", target, "", _MS_BIND | _MS_REC)
    os.close(descriptor)


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _moved(path: str, staged: dict[str, str]) -> str:
    for original, target in staged.items():
        if path.startswith(original + "/"):
            return target + path[len(original) :]
    return path


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _check(result, f"mount {target}")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
