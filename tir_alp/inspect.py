"""`python -m tir_alp.inspect RUN [OTHER ...]`: a local page that shows every token of a run.

The page is served on this machine alone, and loads nothing from elsewhere; it follows a run that
goes on. `--export FILE.html` writes it as one file instead.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from tir_alp.process import run_command

_EVERY_S = 1.0  # between looks for new files of a run


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.inspect", description=__doc__)
    found.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    found.add_argument("--port", type=int, default=0, help="port to serve on; default: a free one")
    found.add_argument("--open", action="store_true", help="open the page in a browser")
    found.add_argument("--export", type=Path, metavar="FILE", help="write the page as one file")
    found.add_argument(
        *("--most", "-n"),
        type=int,
        default=60,
        help="with --export: trajectories of each run whose tokens are included (default: 60)",
    )
    return found


def main(arguments: Sequence[str]) -> int:
    """Serve the page until Ctrl-C, or write it; return 2 if an argument is not a run folder."""
    options = parser().parse_args(arguments)
    # Imported here so that --help does not wait for a web server and a tokenizer.
    from tir_alp.inspector.source import RunSource

    try:
        sources = [RunSource(path) for path in options.runs]
        if options.export is not None:
            return _export(sources, options.export, options.most)
        return _serve(sources, options.port, options.open)
    except ValueError as error:
        print(f"tir_alp.inspect: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tir_alp.inspect: {error}", file=sys.stderr)
        return 2


def _export(sources: Sequence, file: Path, most: int) -> int:
    from tir_alp.inspector.export import write_page

    for source in sources:
        source.index.refresh()
    num_shown = write_page(sources, file, most)
    print(f"{file}: curves of {len(sources)} runs, tokens of {num_shown} trajectories")
    return 0


def _serve(sources: Sequence, port: int, opens: bool) -> int:
    import uvicorn

    from tir_alp.inspector.index import kept_fresh
    from tir_alp.inspector.server import HOST, listening, make_app, new_token

    token = new_token()
    with listening(port) as listener, kept_fresh([each.index for each in sources], _EVERY_S):
        address = f"http://{HOST}:{listener.getsockname()[1]}/{token}/"
        print(f"{address}  (Ctrl-C ends)", flush=True)
        if opens:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        app = make_app(sources, token)
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
        asyncio.run(uvicorn.Server(config).serve([listener]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
