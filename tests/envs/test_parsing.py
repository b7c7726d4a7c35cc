import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tir_alp.envs.parsing import Answer, parse_action
from tir_alp.tools.boxed import extract_boxed
from tir_alp.tools.calls import (
    BadCall,
    ToolCall,
    call_blocks,
    call_watcher,
    find_call,
    find_calls,
    read_call,
    write_call,
)
from tir_alp.tools.fenced import code_blocks


def call(code: str) -> ToolCall:
    return ToolCall("python", {"code": code})


# ----------------------------------------------------------------------------- code blocks


@pytest.mark.parametrize("tag", ["", "py", "python", "Python", " python", "python "])
def test_a_block_with_any_of_the_python_tags_is_a_call(tag):
    assert parse_action(f"So:\n```{tag}\nprint(1)\n```") == call("print(1)\n")


def test_no_fence_is_no_call():
    assert parse_action("print(1)") is None


def test_an_unclosed_block_is_no_call():
    assert parse_action("```python\nprint(1)\n") is None


def test_an_opening_fence_alone_is_no_call():
    assert parse_action("```python") is None


def test_of_two_blocks_the_first_is_called():
    assert parse_action("```py\na\n```\nthen\n```py\nb\n```") == call("a\n")


def test_backticks_inside_a_line_of_code_do_not_close_the_block():
    assert parse_action('```python\nprint("```")\n```') == call('print("```")\n')


def test_crlf_ends_lines_too():
    assert parse_action("So:\r\n```python\r\nprint(1)\r\n```\r\n") == call("print(1)\r\n")


@pytest.mark.parametrize("margin", ["    ", "\t", " \t", " " * 8])
def test_a_fence_that_is_indented_as_code_does_not_close_the_block(margin):
    assert parse_action(f"```python\nprint(1)\n{margin}```") is None
    assert parse_action(f"- ```python\n  print(1)\n  {margin}```") is None


def test_a_block_closes_at_its_third_backtick_whatever_follows():
    assert parse_action("```python\nprint(1)\n```python\nprint(2)") == call("print(1)\n")


def test_an_empty_block_is_complete():
    assert parse_action("```python\n```") == call("")


def test_a_tagged_block_may_open_in_mid_line():
    assert parse_action("Let me see: ```python\nprint(1)\n```") == call("print(1)\n")


def test_inline_code_at_the_end_of_a_line_opens_no_block():
    text = "I print ```x```\nand ```y```\n```python\nz\n```"
    assert parse_action(text) == call("z\n")


def test_a_block_of_another_language_is_passed_over_with_its_closing_fence():
    text = "```json\n{}\n```\nnow\n```python\nprint(1)\n```"
    assert parse_action(text) == call("print(1)\n")


def test_blocks_carry_their_place_in_the_text():
    text = "So:\n```python\nprint(1)\n```"
    (block,) = code_blocks(text)
    assert (block.tag, block.start, block.end, block.is_complete) == ("python", 4, 26, True)
    assert text[block.end - 3 : block.end] == "```"


def test_a_block_is_found_as_soon_as_its_closing_fence_is_written():
    text = "So:\n```python\nprint(1)\n```"
    calls = [parse_action(text[:length]) is not None for length in range(len(text) + 1)]
    assert calls == [False] * len(text) + [True]


@pytest.mark.parametrize(
    "text",
    [
        "1. First\n   ```python\n   a = 1\n   ```\n2. Then",
        "- ```python\n  a = 1\n  ```\n",
        "```python3\na = 1\n```",
        "```ipython\na = 1\n```",
        '```python title="a.py"\na = 1\n```',
        "```{python}\na = 1\n```",
        "``` {.python .numberLines}\na = 1\n```",
        "~~~python\na = 1\n~~~",
        "````python\na = 1\n````",
        "see ```python3\na = 1\n```",
        "```python\na = 1```\n",
        "```python\na = 1 ``` \nthen",
        "```python\na = 1```",
        "```python\na = 1 ```  ",
        "  ```py\n  a = 1```",
        "~~~py\na = 1~~~",
        "```python\na = 1\n   ```",
        "1. ```python\n   a = 1\n      ```",
        "> ```python\n> a = 1\n> ```",
        ">```python\n>a = 1\n>```",
        "> > ```python\n> > a = 1\n> > ```\n> so",
        "> ```python\na = 1\n```",
        "> ```python\n> a = 1```",
        "```python3.11\na = 1\n```",
        "```python:main.py\na = 1\n```",
        "```Py3\na = 1\n```",
    ],
)
def test_what_models_write_around_code_is_a_call(text):
    assert parse_action(text) == call("a = 1\n")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("````python\na\n```\nb\n````", "a\n```\nb\n"),
        ("~~~py\na\n```\n~~~", "a\n```\n"),
        ("  ```py\n  if a:\n      b\n  ```", "if a:\n    b\n"),
        ('```py\nx = """\nsee ```\n"""\n```', 'x = """\nsee ```\n"""\n'),
        ("```py\nx = 1  # ```\n```", "x = 1  # ```\n"),
        ('```py\nx = "```\n```', 'x = "```\n'),
        ("> ```py\n> if a:\n>     b\n>\n> c > d\n> ```", "if a:\n    b\n\nc > d\n"),
        (
            '```py\ndef f():\n    """\n    ```\n    """\n```',
            'def f():\n    """\n    ```\n    """\n',
        ),
    ],
)
def test_a_fence_within_code_is_code(text, code):
    assert parse_action(text) == call(code)


@pytest.mark.parametrize(
    "text",
    [
        "I use ```python code here\nx\n```",
        "```python\na = 1``",
        "```python\na = 1  # ```",
        "```python\na = '```",
        '```python\na = """\nsee ```',
        "```python\n a```b",
        "```json\n1```",
        "`````\na\n```",
        "> x ```\ny\n```",
        "> > > > > ```python\ny\n```",
        "```:python\ny\n```",
        "```python-repl\n>>> 1\n```",
        "```pycon\n>>> 1\n```",
        "```python2x\ny\n```",
    ],
)
def test_what_only_resembles_a_block_is_no_call(text):
    assert not isinstance(parse_action(text), ToolCall)


@pytest.mark.parametrize(
    ("call_format", "begun", "piece"),
    [
        *(
            ("fenced", "```json\n", piece)
            for piece in ("`", "\n`", "```\n", "```py\n", "~", "a\n", "x```\n")
        ),
        *(
            ("tool_call", begun, piece)
            for begun in ("", "<tool_call>")
            for piece in (
                ">",
                "<",
                "<tool_call>",
                "</tool_call",
                "a > b",
                "<tool_call></tool_call>",
            )
        ),
    ],
)
def test_a_stop_rule_that_reads_piece_by_piece_is_linear(call_format, begun, piece):
    def seconds(count):
        watch = call_watcher(call_format)
        watch(begun)
        begin = time.process_time()
        for _ in range(count):
            watch(piece)
        return time.process_time() - begin

    seconds(1000)
    short, long = (min(seconds(count) for _ in range(3)) for count in (20_000, 80_000))
    assert long < 10 * short  # four times as much; quadratic would be 16 times


TAGS = ["<tool_call>", "</tool_call>", "<tool", "_call>", "</", "<", ">", "{}", "x"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(TAGS)), st.integers(1, 3))
def test_the_stop_rule_fires_with_the_piece_that_ends_the_last_marked_call(pieces, max_calls):
    watch = call_watcher("tool_call", max_calls)
    fired = next((count for count, each in enumerate(pieces, 1) if watch(each)), None)
    ends = [
        count
        for count in range(len(pieces) + 1)
        if sum(block.is_complete for block in call_blocks("".join(pieces[:count]))) >= max_calls
    ]
    assert fired == (ends[0] if ends else None)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["```", "```py\n", "  ", "~~~", "\n", "x", "`", "- ", "a```\n", "> ", ">", "\t"]
        )
    )
)
def test_the_stop_rule_fires_at_the_end_of_the_block_that_is_parsed(pieces):
    text = "".join(pieces) + "\n"
    block = next((block for block in code_blocks(text) if block.is_python), None)
    watch = call_watcher("fenced")
    fired = next((index + 1 for index, each in enumerate(text) if watch(each)), None)
    assert fired == (None if block is None else block.end)


# ------------------------------------------------------------------------------ calls in JSON


PRINT = ToolCall("python", {"code": "print(1)\nprint(2)"})


@pytest.mark.parametrize(
    "content",
    [
        r'{"name": "python", "arguments": {"code": "print(1)\nprint(2)"}}',
        '{"name": "python", "arguments": {"code": "print(1)\nprint(2)"}}',
        '{"name": "python", "arguments": {"code": "print(1)\nprint(2)"}',
        '{"name": "python", "arguments": {"code": "print(1)\nprint(2)"}\n',
        '{"name": "python", "arguments": {"code": "print(1)\nprint(2)"',
        '\n{"arguments": {"code": "print(1)\nprint(2)"}, "name": "python"',
    ],
)
def test_line_ends_in_strings_and_missing_last_braces_are_understood(content):
    assert read_call(content) == PRINT
    assert find_call(f"<tool_call>{content}</tool_call>", "tool_call") == PRINT


def test_braces_in_strings_are_not_counted():
    content = r'{"name": "f", "arguments": {"text": "}{ \" ] {"}'
    assert read_call(content) == ToolCall("f", {"text": '}{ " ] {'})


def test_a_call_without_its_closing_mark_is_a_bad_call():
    made = '<tool_call>{"name": "f", "arguments": {}}'
    assert find_calls(f"{made}</tool_call>{made}", "tool_call") == (
        ToolCall("f", {}),
        BadCall("the call is not complete: it does not end with </tool_call>"),
    )


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"name": "f", "arguments": {"x": [1, 2', "Expecting ',' delimiter: line 1 column 39"),
        ('{"name": "f", "arguments": {"x": "1', "Unterminated string starting at: line 1 col"),
        ('{"name": "f", "arguments": {"x": 1}]', "char 35), before ']'"),
        ('{"name": "f", "arguments": {"x": }', "Expecting value: line 1 column 34 (char 33)"),
        ('{"name": "f", "arguments": {"x": 1}}}', "Extra data: line 1 column 37"),
        ("{'name': 'f'}", "double quotes: line 1 column 2 (char 1), before \"'name': 'f'}\""),
        ('{"name": "f" "arguments": {}}', "delimiter: line 1 column 14"),
        ('{"name": "f", "arguments": {"x": {"y": 1', "char 40), at its end"),
        ('{"arguments": {"name": "f"}', "a call is a JSON object"),
        ("", "Expecting value: line 1 column 1 (char 0), at its end"),
    ],
)
def test_what_is_wrong_with_a_call_is_described(content, fault):
    found = read_call(content)
    assert isinstance(found, BadCall) and fault in found.error


# --------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{42}", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"{ \boxed{7}", "7"),
        (r"} \boxed{7}", "7"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{7", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed 7", "7"),
        (r"\boxed 3.5.", "3.5"),
        (r"\boxed -1,234 so", "-1,234"),
        (r"\boxed C", "C"),
        (r"\boxed nothing", None),
        (r"\\boxed{7}", "7"),
        (r"\fbox{7}", "7"),
        ("42", None),
        ("", None),
    ],
)
def test_the_last_closed_box_is_the_answer(text, answer):
    assert extract_boxed(text) == answer


def test_a_box_in_prose_is_an_answer():
    assert parse_action(r"It is \boxed{42}.") == Answer("42")


@pytest.mark.parametrize("box_first", [True, False])
def test_a_block_takes_precedence_over_a_box_on_either_side(box_first):
    block, box = "```python\nx\n```", r"\boxed{1}"
    text = f"{box}\n{block}" if box_first else f"{block}\n{box}"
    assert parse_action(text) == call("x\n")


@pytest.mark.parametrize(
    "text",
    [
        "```latex\n\\boxed{1}\n```",
        "```python\nprint('\\boxed{1}')",
        "\\boxed{\n```json\n1}\n```",
    ],
    ids=["other language", "unclosed", "straddling"],
)
def test_a_box_inside_a_block_is_no_answer(text):
    assert parse_action(text) is None


def test_a_box_before_an_unclosed_block_is_an_answer():
    assert parse_action("\\boxed{1}\n```python\nprint(2)") == Answer("1")


@pytest.mark.parametrize(
    "text",
    ["\\boxed{" * 100_000, "{" * 700_000, "```py\n" * 100_000, "\n```x\n```" * 70_000, "`" * 10**6],
    ids=["boxes", "braces", "openings", "blocks", "backticks"],
)
def test_megabytes_of_nesting_are_read_in_linear_time(text):
    begin = time.process_time()
    parse_action(text)
    assert time.process_time() - begin < 5  # quadratic would be minutes


PIECES = ["```", "```py\n", "```python\n", "\n", "\r\n", "\\boxed{", "{", "}", "\\", "`", "x", " "]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, "\ud800"])).map("".join))
def test_a_call_is_known_at_its_closing_fence_and_not_before(text):
    # The rollout stops sampling there, so both must see the same call.
    block = next((block for block in code_blocks(text) if block.is_python), None)
    if block is None:
        assert not isinstance(parse_action(text), ToolCall)
    else:
        assert parse_action(text[: block.end]) == parse_action(text) == call(block.code)
        before = text[: block.end].rstrip()[:-1]
        assert not isinstance(parse_action(before), ToolCall)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, "a```", "'", "#"])).map("".join))
def test_the_end_of_a_turn_closes_a_block_as_the_end_of_its_last_line_does(text):
    assert find_call(text) == find_call(text + "\n")


@pytest.mark.parametrize(
    ("made", "call_format", "is_written"),
    [
        (call("print(1)\n"), "fenced", True),
        (call("'\n```\n'"), "fenced", False),
        (ToolCall("calculator", {"expression": "1"}), "fenced", False),
        (ToolCall("calculator", {"expression": "</tool_call>\ud800"}), "tool_call", True),
        (call("1"), "none", False),
    ],
)
def test_a_call_is_written_as_it_is_read_or_not_at_all(made, call_format, is_written):
    text = write_call(made, call_format)
    assert (text is not None) == is_written
    assert text is None or find_call(text, call_format) == made
