import pytest

from tests.envs.test_tool_env import CODE, Quiz, Script, begin
from tir_alp.envs.reward_shaping import EpisodeFacts, RewardShaping, reward_terms
from tir_alp.envs.tool_env import CODE_EXECUTION_RESULT
from tir_alp.tools.base import ToolResult
from tir_alp.tools.outcome import Outcome

SHAPING = {"format": 0.1, "tool_use": 0.2, "length": -0.4, "length_chars": 40}


def quiz(outcome=Outcome.OK, **settings):
    tool = Script(ToolResult(outcome=outcome, text="42", duration_s=0.0))
    tasks = [{"question": "6*7?", "answer": "42"}]
    return begin(Quiz(tools=[tool], tasks=tasks, **settings))


def test_the_terms_add_up():
    parts = reward_terms({"answer": 1.0}, RewardShaping(**SHAPING), EpisodeFacts(True, 3, 10))
    assert parts == {"answer": 1.0, "format": 0.1, "tool_use": 0.2, "length": -0.1}


def test_length_counts_in_full_at_its_limit_and_no_more():
    shaping = RewardShaping(length=-0.4, length_chars=40)
    assert reward_terms({}, shaping, EpisodeFacts(False, 0, 40))["length"] == -0.4
    assert reward_terms({}, shaping, EpisodeFacts(False, 0, 4000))["length"] == -0.4


def test_only_the_last_step_of_an_episode_earns():
    env = quiz(shaping=SHAPING)
    assert env.step(CODE)[1] == 0.0
    _, reward, _, _, info = env.step(r"\boxed{42}")
    assert info["rewards"] == {
        "answer": 1.0,
        "format": 0.1,
        "tool_use": 0.2,
        "length": -0.4 * (len(CODE) + 10) / 40,
    }
    assert reward == pytest.approx(sum(info["rewards"].values()))


def test_a_void_turn_has_no_format_and_a_failed_call_no_use():
    env = quiz(Outcome.TOOL_ERROR, shaping={"format": 0.1, "tool_use": 0.2})
    env.step(CODE)
    assert env.step("")[4]["rewards"] == {"answer": 0.0, "format": 0.0, "tool_use": 0.0}


def test_nothing_is_earned_where_infrastructure_failed():
    step = quiz(Outcome.INFRA_ERROR, shaping=SHAPING).step(CODE)
    assert (step[1], step[4]["rewards"]) == (0.0, {})


def test_the_terms_of_an_episode_start_at_zero():
    env = quiz(shaping={"tool_use": 0.2})
    env.step(CODE)
    begin(env)
    assert env.step(r"\boxed{42}")[4]["rewards"] == {"answer": 1.0, "tool_use": 0.0}


def test_an_unknown_term_is_refused():
    with pytest.raises(ValueError, match=r"env\.kwargs\.shaping: .*'lenght'"):
        quiz(shaping={"lenght": 1.0})
    with pytest.raises(ValueError, match=r"shaping\.length_chars is 0"):
        quiz(shaping={"length_chars": 0})


def test_the_wording_of_an_observation_is_a_setting():
    assert quiz(observation=CODE_EXECUTION_RESULT).step(CODE)[0] == (
        "\nCode execution result: 42\n"
    )
    with pytest.raises(ValueError, match="it must contain"):
        quiz(observation="Result:")
