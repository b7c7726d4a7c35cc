"""A short run; `python -m tests.fuzz.programs` is the long one."""

import asyncio

import pytest

from tests.fuzz.programs import Program, differences, make_program, plain

pytestmark = pytest.mark.sandbox


@pytest.mark.parametrize("backend", ["namespaces", "landlock"])
def test_random_programs_end_as_with_plain_python(backend):
    programs = [make_program(f"test/{number}") for number in range(20)]
    found = asyncio.run(differences(programs, backend))
    assert not found, "\n".join(map(str, found))


def test_the_programs_print_raise_and_exit():
    ended = [plain(make_program(f"test/{number}")) for number in range(20)]
    ended = [each for each in ended if each is not None]
    assert sum(bool(each.stdout) for each in ended) >= 10
    assert sum(bool(each.last_line) for each in ended) >= 4
    assert len({each.status for each in ended}) >= 3


def test_a_difference_is_found():
    isolated = Program(b"import sys\nprint(sys.flags.isolated)", b"")  # a documented difference
    same = Program(b"print(1)", b"")
    assert [each.number for each in asyncio.run(differences([same, isolated]))] == [1]
