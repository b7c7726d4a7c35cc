import json

import gymnasium
import pytest

pytestmark = pytest.mark.sandbox

ID = "tir_alp.envs:MultiTool-v0"
TASK = {"task": {"question": "What is 6*7?", "answer": "42"}}


@pytest.fixture
def env():
    env = gymnasium.make(ID, instruction="", max_turns=20)
    env.reset(options=TASK)
    yield env
    env.close()


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_several_tools_serve_one_episode(env):
    assert env.step(call("calculator", expression="6*7"))[0] == "42"
    assert env.step(call("sympy", operation="factor", expression="x**2 - 1"))[0] == (
        "(x - 1)*(x + 1)"
    )
    assert env.step(call("python", code="y = 41"))[4]["outcome"] == "ok"
    assert env.step("I keep y.\n" + call("python", code="print(y + 1)"))[0] == "42"
    assert env.step(r"So \boxed{42}.")[1:3] == (1.0, True)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (call("calculater", expression="1"), "there is no tool named 'calculater'; there are: ["),
        (call("calculator"), "'expression' is a required property"),
        (call("calculator", expression=1), "expression: 1 is not of type 'string'"),
        (call("calculator", expression="1", base=2), "('base' was unexpected)"),
        (call("sympy", operation="guess", expression="x"), "operation: 'guess' is not one of"),
        (call("calculator", expression="1/0"), "Fraction(1, 0)"),
        (call("calculator", expression="9**9**9"), "the numbers become too large"),
        (call("calculator", expression="__import__('os')"), "the calculator does not know"),
        ("<tool_call>nonsense</tool_call>", "the call is not JSON"),
        ("<tool_call>[1]</tool_call>", "a call is a JSON object"),
        ('<tool_call>{"name": "python", "arguments": "x"}</tool_call>', "must be a JSON object"),
        (
            '<tool_call>{"name": "python", "arguments": {"c": NaN}}</tool_call>',
            "NaN is not JSON",
        ),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "the call is not JSON"),
    ],
)
def test_the_model_reads_why_a_call_is_bad_and_the_episode_continues(env, action, message):
    observation, reward, terminated, truncated, info = env.step(action)
    assert observation.startswith("Error: ") and message in observation
    assert len(observation) < 1000
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["outcome"], info["tool_calls"]) == ("tool_error", 1)


def test_lone_surrogates_in_a_call_are_an_error(env):
    action = (
        r'<tool_call>{"name": "python", "arguments": {"code": "print(1) # \ud800"}}</tool_call>'
    )
    _, _, terminated, truncated, info = env.step(action)
    assert (terminated, truncated) == (False, False)
    assert info["outcome"] in ("ok", "tool_error")
    assert env.step(call("python", code="print(2)"))[0] == "2"


def test_code_in_fences_is_no_call_here(env):
    assert env.step("```python\nprint(1)\n```")[4]["void"] is True


def test_a_box_in_a_call_is_no_answer(env):
    env.step(call("calculator", expression=r"\boxed{42}"))
    step = env.step("<tool_call>\\boxed{42}")
    assert (step[1], step[4]["answer"], step[4]["bad_calls"]) == (0.0, None, 1)


def test_either_the_template_or_the_prompt_shows_the_tools():
    native = gymnasium.make(ID, tools=["calculator"], instruction="").unwrapped
    (schema,) = native.tool_schemas  # type: ignore[attr-defined]
    assert schema["function"]["name"] == "calculator"
    assert native.reset(options=TASK)[0] == "What is 6*7?"
    in_prompt = gymnasium.make(
        ID, tools=["calculator"], instruction="", tools_in_prompt=True
    ).unwrapped
    assert in_prompt.tool_schemas == ()  # type: ignore[attr-defined]
    prompt = in_prompt.reset(options=TASK)[0]
    assert '"name": "calculator"' in prompt and prompt.endswith("\n\nWhat is 6*7?")


def test_an_unknown_tool_is_refused():
    with pytest.raises(ValueError, match="there is no tool 'abacus'; there are: python"):
        gymnasium.make(ID, tools=["abacus"])


def test_a_fresh_interpreter_per_call_on_request():
    env = gymnasium.make("tir_alp.envs:PythonMath-v0", stateful=False)
    env.reset(options=TASK)
    assert env.step("```python\nx = 1\n```")[4]["outcome"] == "ok"
    assert "NameError" in env.step("```python\nx\n```")[0]
    env.close()
