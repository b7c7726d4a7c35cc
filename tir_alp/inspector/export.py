"""The page with its data as one file, which needs neither a server nor a network.

Its policy allows the two scripts and the style that are in it, by their digests, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tir_alp.inspector.assets import as_data, as_one, policy_of, static_text
from tir_alp.inspector.index import Query
from tir_alp.inspector.server import meanings_of
from tir_alp.inspector.source import RunSource

MODULES = (
    *("dom.js", "data.js", "charts.js", "runs.js", "trajectories.js", "colours.js"),
    *("blocks.js", "tokens.js", "main.js"),
)
"""The page's modules, each after those that it imports."""
MOST_ROWS = 20_000


def write_page(sources: Sequence[RunSource], file: Path, most: int) -> int:
    """Write the page as one file; returns the number of trajectories whose tokens it holds.

    Args:
        sources: The runs.
        file: The file to write.
        most: Trajectories of each run whose tokens are included: the best and the worst by reward,
            and the newest.
    """
    data, num_shown = _data_of(sources, most)
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(page_of(data), encoding="utf-8")
    os.replace(temporary, file)
    return num_shown


def page_of(data: Mapping[str, Any]) -> str:
    """Return the page with its data."""
    style = static_text("uplot.css") + static_text("style.css")
    library, program = static_text("uplot.js"), bundle()
    policy = policy_of((library, program), style)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<title>tir_alp inspector</title>\n'
        f'<link rel="icon" href="data:,">\n<style>{style}</style>\n<script>{library}</script>\n'
        '</head>\n<body>\n<header id="top"></header>\n<main id="view" tabindex="-1"></main>\n'
        '<div id="status" role="status" aria-live="polite"></div>\n'
        f'<script type="application/json" id="data">{as_data(data)}</script>\n'
        f'<script type="module">{program}</script>\n</body>\n</html>\n'
    )


def bundle() -> str:
    """Return the page's modules as one, which imports nothing."""
    return as_one(map(static_text, MODULES))


def _data_of(sources: Sequence[RunSource], most: int) -> tuple[dict[str, Any], int]:
    names = {name for each in sources for name in each.curves.all()}
    data: dict[str, Any] = {
        "runs": [each.about() for each in sources],
        "state": [each.state() for each in sources],
        "meanings": meanings_of(names),
        "trajectories": [],
    }
    num_shown = 0
    for number, source in enumerate(sources):
        data[f"metrics/{number}"] = source.metrics(None)
        data["trajectories"].append(source.trajectories(Query(limit=MOST_ROWS)))
        for row in _chosen(source, most):
            place = row["kind"], row["step"], row["line"]
            path = "trajectory/{}/{}/{}/{}".format(number, *place)
            data[path] = source.trajectory(*place)
            for sequence in range(1, len(data[path]["sequences"])):
                data[f"{path}?{sequence}"] = source.trajectory(*place, sequence)
            num_shown += 1
    return data, num_shown


def _chosen(source: RunSource, most: int) -> list[dict[str, Any]]:
    """The rows whose tokens are included, each once."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    share = max(1, most // 3)
    for sort, descending in (("reward", True), ("reward", False), ("step", True)):
        _, rows = source.index.select(Query(sort=sort, descending=descending, limit=most))
        new = [row for row in rows if (row["kind"], row["step"], row["line"]) not in found]
        for row in new[: min(share, most - len(found))]:
            found[row["kind"], row["step"], row["line"]] = row
    return [*found.values()]
