"""Which tests run one after another: `make test` shares them among processes.

A file stays in one process, because of its fixtures. The tests of a folder that has servers, a
container engine or clusters stay in one as well, and begin first, because they take longest.
"""

from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

_TESTS = Path(__file__).parent
_TOGETHER = ("tools", "cluster", "engines")


class _Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return _group(Path(nodeid.partition("::")[0]).relative_to("tests"))


def _group(file: Path) -> str:
    return file.parts[0] if file.parts[0] in _TOGETHER else str(file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # in the order of collection
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(_TOGETHER)}
    items.sort(key=lambda item: order.get(_group(item.path.relative_to(_TESTS)), len(order)))
