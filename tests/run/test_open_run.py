"""What a run is put together from."""

import gymnasium
import pytest

from tir_alp.doctor.environment import check_environment
from tir_alp.envs.spaces import TextSpace
from tir_alp.models.tiny import BASE
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.beginning import run_name
from tir_alp.run.command_line import load_config
from tir_alp.training.local_trainer import with_run_seed
from tir_alp.training.policy import load_tokenizer

TASK = Task("task", question="1+1?", answer="2")


class Echo(gymnasium.Env[str, str]):
    observation_space = action_space = TextSpace()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "say", {}

    def step(self, action):
        return action, 0.0, True, False, {}


class ReportingEcho(Echo):
    def run_report(self):
        return {"host": "here", "warnings": ["mind the gap"]}


def noise_seed(*arguments):
    perturbation = with_run_seed(load_config(arguments, {})).perturbation
    return None if perturbation is None else perturbation.seed


def test_noise_follows_the_seed_of_the_run():
    assert noise_seed("--seed", "3") == 3
    assert noise_seed("--seed", "3", "--algorithm.perturbation.seed", "40") == 43


def test_methods_without_noise_stay_without():
    assert noise_seed("--seed", "3", "--algorithm", "grpo") is None


def test_a_run_is_named_by_its_method_and_seed_unless_it_has_a_name():
    assert run_name("mine", "gspo", 5) == "mine"
    assert run_name(None, "gspo", 5).startswith("gspo-seed5-")


class Cautious(Echo):
    """Breaks at the second of the actions that it says are harmless."""

    def harmless_actions(self):
        return "one", "two"

    def step(self, action):
        outcome = {"one": "ok", "two": "infra_error"}[action]
        return "", 0.0, False, True, {"outcome": outcome, "error": f"no room for {action}"}


def report_of(environment):
    gymnasium.register("Echo-v0", entry_point=environment)
    try:
        config = load_config(["--env.id", "Echo-v0", "--env.kwargs", "{}"], {})
        renderer = Renderer(load_tokenizer(str(BASE)))
        return check_environment(config, renderer, [TASK], lambda: make_environment(config))
    finally:
        del gymnasium.registry["Echo-v0"]


def test_any_environment_may_say_what_it_runs_in_and_none_must():
    gymnasium_only, reporting = report_of(Echo), report_of(ReportingEcho)
    assert gymnasium_only == {}
    assert reporting == {"host": "here", "warnings": ["mind the gap"]}


def test_every_action_that_an_environment_calls_harmless_is_tried():
    with pytest.raises(ValueError, match="'Echo-v0' cannot work here: no room for two"):
        report_of(Cautious)
