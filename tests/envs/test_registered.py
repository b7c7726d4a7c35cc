"""Properties of every registered environment."""

import copy
import pickle
import warnings
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

import tir_alp.envs  # registers them

OF_AGENTS = ["Agent-v0"]
"""Environments whose episodes are whole agents: `test_agent_env.py`."""
REGISTERED = sorted(
    id
    for id, spec in gymnasium.registry.items()
    if str(spec.entry_point).startswith("tir_alp.envs.")
    and not str(spec.entry_point).startswith(
        "tir_alp.envs.interop"
    )  # environments of other libraries: tests/envs/interop
)
IDS = [each for each in REGISTERED if each not in OF_AGENTS]
BARE: dict[str, Any] = {"sandbox": {"preload": []}}


def settings(id: str) -> dict[str, Any]:
    return {} if id == "SingleTurnMath-v0" else BARE


def comparable(info):
    return {key: value for key, value in info.items() if not key.endswith("tool_s")}


def test_six_environments_are_registered():
    assert REGISTERED == [
        "Agent-v0",
        "MultiTool-v0",
        "PythonCode-v0",
        "PythonMath-v0",
        "ReasoningGym-v0",
        "SingleTurnMath-v0",
    ]
    assert tir_alp.envs.__doc__


@pytest.mark.parametrize("id", IDS)
def test_gymnasiums_checker_finds_nothing(id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(id, **settings(id))
        check_env(env.unwrapped, skip_render_check=True)
        env.close()
        env = gymnasium.make(id, render_mode="ansi", **settings(id))
        check_env(env.unwrapped)
        env.close()


@pytest.mark.parametrize("id", IDS)
def test_gold_answers_score_one_and_wrong_ones_nothing(id):
    env = gymnasium.make(id, **settings(id))
    for seed in range(3):
        _, info = env.reset(seed=seed)
        _, reward, terminated, truncated, step = env.step(
            env.unwrapped.gold_action(info["task"])  # type: ignore[attr-defined]
        )
        assert (reward, terminated, truncated, step["correct"]) == (1.0, True, False, True)
        _, info = env.reset(seed=seed)
        _, reward, terminated, truncated, step = env.step(
            env.unwrapped.wrong_action(info["task"])  # type: ignore[attr-defined]
        )
        assert (reward, terminated, truncated) == (0.0, True, False)
        assert step["correct"] is not True
    env.close()


@pytest.mark.parametrize(
    ("id", "more", "num_tried"),
    [
        ("PythonMath-v0", {}, 1),
        ("PythonMath-v0", {"call_format": "tool_call"}, 1),
        ("MultiTool-v0", {}, 2),  # the calculator needs nothing that could be missing
        ("SingleTurnMath-v0", {}, 0),
    ],
)
def test_the_actions_before_a_run_reach_the_tools(id, more, num_tried):
    env = gymnasium.make(id, **settings(id), **more)
    actions = env.get_wrapper_attr("harmless_actions")()
    assert len(actions) == num_tried
    for action in actions:
        env.reset(seed=0)
        info = env.step(action)[-1]
        assert (info["outcome"], info["tool_calls"]) == ("ok", 1)
    env.close()


@pytest.mark.parametrize("id", IDS)
def test_the_split_of_a_draw_can_be_chosen(id):
    env = gymnasium.make(id, **settings(id), tasks=[{"question": f"q{n}"} | OWN for n in range(99)])
    prompts = {
        split: {env.reset(seed=seed, options={"split": split})[0] for seed in range(40)}
        for split in ("train", "held_out")
    }
    assert len(prompts["train"]) > len(prompts["held_out"]) > 1
    assert not prompts["train"] & prompts["held_out"]


OWN = {
    "answer": "1",
    "dataset": "gcd",
    "metadata": {},
    "entry_point": "f",
    "tests": [{"args": [], "expected": 1}],
}


NO_RESET = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
PROCESSES = {"shared_memory": False, "context": "spawn"}  # texts have no fixed size to share


@pytest.mark.parametrize(
    ("id", "mode", "more"),
    [*((id, "sync", {}) for id in IDS), ("PythonMath-v0", "async", PROCESSES)],
)
def test_vector_and_single_agree_step_by_step(id, mode, more):
    seeds = [3, 4]
    actions = [
        ["```python\nprint(6*7)\n```", r"\boxed{1}"],
        ['<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>', ""],
        ["<answer>2</answer>", r"\boxed{2}"],
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        how = {"vectorization_mode": mode, "vector_kwargs": NO_RESET | more}
        vector: Any = gymnasium.make_vec(id, num_envs=2, **how, **settings(id))
        singles = [gymnasium.make(id, **settings(id)) for _ in seeds]
        observations, infos = vector.reset(seed=seeds)
        single = [env.reset(seed=seed) for env, seed in zip(singles, seeds, strict=True)]
        assert list(observations) == [each[0] for each in single]
        assert [infos["task"]["question"][i] for i in (0, 1)] == [
            each[1]["task"]["question"] for each in single
        ]
        for step in actions:
            observations, rewards, terminated, truncated, infos = vector.step(tuple(step))
            alone = [env.step(action) for env, action in zip(singles, step, strict=True)]
            for index, (observation, reward, ended, cut, info) in enumerate(alone):
                assert observations[index] == observation
                assert (rewards[index], terminated[index], truncated[index]) == (reward, ended, cut)
                for key in ("outcome", "tool_calls", "void", "answer", "correct", "error"):
                    # The boolean arrays of a vector environment have no None.
                    assert infos[key][index] == info[key] or info[key] is None
            over = terminated | truncated
            if over.any():
                observations, infos = vector.reset(seed=seeds, options={"reset_mask": over})
                for index, env in enumerate(singles):
                    if over[index]:
                        assert observations[index] == env.reset(seed=seeds[index])[0]
        vector.close()
        for env in singles:
            env.close()


@pytest.mark.parametrize("id", IDS)
def test_an_environment_can_be_pickled_and_its_copy_plays_the_same_episode(id):
    env = gymnasium.make(id, **settings(id))
    twin = pickle.loads(pickle.dumps(env))
    _, info = env.reset(seed=5)
    assert twin.reset(seed=5)[1] == info
    gold = env.unwrapped.gold_action(info["task"])  # type: ignore[attr-defined]
    under_way = pickle.loads(pickle.dumps(twin))  # an episode without an open session goes along
    for each in (env, twin, under_way):
        assert each.step(gold)[1:3] == (1.0, True)
        each.close()


def test_an_environment_with_an_open_session_says_why_it_cannot_be_pickled():
    env = gymnasium.make("PythonMath-v0", **BARE)
    env.reset(seed=0)
    env.step("```python\nx = 1\n```")
    with pytest.raises(TypeError, match="while it has an open session of 'python': pickle it"):
        pickle.dumps(env)
    with pytest.raises(TypeError, match="open session"):
        copy.deepcopy(env)
    env.reset()
    assert pickle.loads(pickle.dumps(env)).reset(seed=1) == env.reset(seed=1)
    env.close()


def test_the_mode_ansi_renders_the_episode_as_text_and_no_other_mode_exists():
    env = gymnasium.make("PythonMath-v0", render_mode="ansi", instruction="", **BARE)
    env.reset(options={"task": {"question": "6*7?", "answer": "42"}})
    assert env.render() == "[prompt]\n6*7?\n"
    env.step("```python\nprint(6*7)\n```")
    env.step("\\boxed{42}")
    assert env.render() == (
        "[prompt]\n6*7?\n\n[model]\n```python\nprint(6*7)\n```\n\n"
        "[observation]\n42\n\n[model]\n\\boxed{42}\n"
    )
    env.reset()
    assert "boxed{42}" not in str(env.render())
    env.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"render_mode is 'rgb_array'; environments of texts"):
            gymnasium.make("SingleTurnMath-v0", render_mode="rgb_array")
    env = gymnasium.make("SingleTurnMath-v0")
    env.reset()
    with pytest.warns(UserWarning, match="render.. shows nothing without a render mode"):
        assert env.unwrapped.render() is None
