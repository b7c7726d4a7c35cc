"""An environment and a chat template that do not fit together are found before a run."""

import gymnasium
import pytest

from tir_alp.doctor.environment import check_environment
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.command_line import load_config, read_toml

TWO_ROLES = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('only two roles') }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Turns(gymnasium.Env[str, str]):
    """Ends after one turn if the answer has a fence, as a careless author may have it."""

    call_format = "none"

    def __init__(self, num_turns: int) -> None:
        self._num_turns = num_turns

    def reset(self, *, seed=None, options=None):
        self._turn = 0
        return "What?", {}

    def step(self, action):
        self._turn += 1
        return "Go on.", 0.0, "```" in action or self._turn == self._num_turns, False, {}


def check(num_turns, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, call_format="none")
    config = load_config((), read_toml(TRAIN_CONFIG))
    check_environment(config, renderer, [Task("t", "Q", "A")], lambda: Turns(num_turns))


def test_a_template_of_two_roles_fits_an_environment_of_one_turn():
    check(1, TWO_ROLES)


def test_a_template_of_two_roles_does_not_fit_an_environment_of_several_turns():
    with pytest.raises(
        ValueError, match=r"goes on after its first turn.*only two roles.*model\.path"
    ):
        check(2, TWO_ROLES)


def test_a_template_with_the_role_of_tools_fits_an_environment_of_several_turns():
    check(2, make_tokenizer().chat_template)
