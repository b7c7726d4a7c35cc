"""Which tests run one after another: `make test` shares them among processes.

A file stays in one process, because of its fixtures. The tests of a folder that has servers, a
container engine or clusters stay in one as well, and begin first, because they take longest.
"""

from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
_TOGETHER = ("tools", "cluster", "engines")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def group(item: pytest.Item) -> str:
        file = item.path.relative_to(_TESTS)
        return file.parts[0] if file.parts[0] in _TOGETHER else str(file)

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    order = {name: number for number, name in enumerate(_TOGETHER)}
    items.sort(key=lambda item: order.get(group(item), len(order)))
