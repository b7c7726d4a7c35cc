"""A method of one's own: one entry of a table in the package, or one file outside of it."""

import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from tir_alp.algorithm.advantage import ADVANTAGES, Advantage, group_advantages
from tir_alp.algorithm.aggregations import AGGREGATIONS
from tir_alp.algorithm.corrections import CORRECTIONS, Correction
from tir_alp.algorithm.formula import formula
from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.levels import RATIO_LEVELS
from tir_alp.algorithm.loss import loss_terms, policy_loss
from tir_alp.algorithm.presets import (
    ALGORITHMS,
    AlgorithmConfig,
    CorrectionConfig,
    Level,
    make_presets,
)
from tir_alp.algorithm.ratio_metrics import ratio_metrics
from tir_alp.algorithm.ratio_summary import summarise
from tir_alp.algorithm.surrogates import SURROGATES, Surrogate
from tir_alp.config import RolloutConfig
from tir_alp.run.command_line import load_config
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, TrajectoryGroup, Turn

METHOD = '''
from tir_alp.algorithm import ALGORITHMS, Advantage, AlgorithmConfig, Correction, Surrogate


def soft(ratios, logprobs, advantages, algorithm):
    """A sigmoid instead of a window; ratios above 2 count as clipped, on a side of its own."""
    return -advantages * 4 * (ratios - 1).sigmoid(), {"soft": ratios > 2}


def halve(ratios, correction):
    return ratios / 2


def sign(rewards):
    return tuple(float(reward > 0) for reward in rewards)


SOFT = Surrogate(soft, lambda algorithm: "-4 A sigmoid(r_t - 1)", sides=("soft",))
HALF = Correction(halve, lambda correction: "w / 2")
SIGN = Advantage(sign, "1 where reward > 0, else 0")
PRESET = AlgorithmConfig(
    denominator="rollout",
    ratio_level="token",
    surrogate="own_method:SOFT",
    correction={"type": "own_method:HALF"},
    advantage="own_method:SIGN",
    clip_low=0.1,
)
NUMBER = 3
'''


@pytest.fixture
def own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_method.py").write_text(METHOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_method", raising=False)
    return "own_method"


def inputs() -> LossInputs:
    """One sequence of three loss tokens with ratios 1, 3 and 1/3; the engine is exact."""
    rollout = torch.full((1, 3), -2.0)
    return LossInputs(
        logprobs=rollout + torch.tensor([[0.0, math.log(3), -math.log(3)]]),
        rollout_logprobs=rollout,
        advantages=torch.tensor([1.0]),
        loss_mask=torch.ones(1, 3, dtype=torch.bool),
        proximal_logprobs=rollout,
        turn_ids=torch.zeros(1, 3, dtype=torch.int64),
    )


def group(*rewards: float) -> TrajectoryGroup:
    completion = TokenSpan((7,), (-1.0,))
    end = StopReason.EOS
    trajectories = tuple(
        Trajectory(
            *("t", 0, TokenSpan((5,))),
            turns=(Turn(completion, TokenSpan(()), 0, end, Outcome.OK, reward),),
            terminated=True,
            truncated=False,
        )
        for reward in rewards
    )
    return TrajectoryGroup("t", 0, trajectories)


# ------------------------------------------------------------------------------ outside the package


def test_one_file_outside_the_package_makes_a_method(own_method):
    words = ["--algorithm", "own_method:PRESET", "--algorithm.clip_high", "0.5"]
    algorithm = load_config(words, {}).algorithm
    assert algorithm.name == "own_method:PRESET"
    assert (algorithm.clip_low, algorithm.clip_high) == (0.1, 0.5)

    assert formula(algorithm).splitlines() == [
        "own_method:PRESET: minimise the mean over tokens of L_t",
        "  l_t = log pi(y_t) - log pi_rollout(y_t)",
        "  log r_t = l_t",
        "  L_t = -4 A sigmoid(r_t - 1)",
        "  A   = 1 where reward > 0, else 0",
        "  L_t is multiplied by w = w / 2 (own_method:HALF, no gradient)",
    ]

    terms = loss_terms(inputs(), algorithm)
    expected = sum(-0.5 * 4 / (1 + math.exp(1 - r)) for r in (1, 3, 1 / 3)) / 3
    assert terms.loss.item() == pytest.approx(expected)
    assert terms.metrics["loss/clip_fraction_soft"].item() == pytest.approx(1 / 3)
    assert terms.metrics["loss/clip_fraction"].item() == pytest.approx(1 / 3)

    summary = summarise(inputs(), clipped=terms.clipped)
    assert ratio_metrics(summary + summary)["turn_0/clip_soft"] == pytest.approx(1 / 3)
    assert ratio_metrics(summary)["turn_0/clip_low"] == 0


def test_an_advantage_of_ones_own_is_used_for_groups(own_method):
    algorithm = ALGORITHMS["grpo"].model_copy(update={"advantage": "own_method:SIGN"})
    assert group_advantages(group(-1.0, 0.5, 2.0), algorithm, RolloutConfig()) == (0.0, 1.0, 1.0)


def test_a_method_of_ones_own_comes_back_from_json(own_method):
    config = load_config(["--algorithm", "own_method:PRESET", "--algorithm.clip_low", "0.3"], {})
    saved = config.model_dump(mode="json")
    assert load_config([], saved).algorithm == config.algorithm


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_method:HARD", "the module 'own_method' has no attribute 'HARD'"),
        ("own_method:NUMBER", "own_method:NUMBER is of type int, not Surrogate"),
        ("own_method:HALF", "own_method:HALF is of type Correction, not Surrogate"),
        ("no_such_file:SOFT", "cannot import the module 'no_such_file'"),
        ("own_method:", "'own_method:' is not of the form module:NAME"),
        ("own-method:SOFT", "'own-method:SOFT' is not of the form module:NAME"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_the_reason(own_method, name, message):
    with pytest.raises(ValueError) as caught:
        load_config(["--algorithm.surrogate", name], {})
    assert message in str(caught.value)


def test_a_preset_must_be_an_algorithm(own_method):
    with pytest.raises(ValueError, match="own_method:SOFT is of type Surrogate, not AlgorithmConf"):
        load_config(["--algorithm", "own_method:SOFT"], {})


# ------------------------------------------------------------------------------- inside the package


def test_an_entry_of_a_table_is_all_that_a_method_needs(monkeypatch):
    def linear(ratios, logprobs, advantages, algorithm):
        return -advantages * ratios, {"far": ratios < 0.5}

    entry = Surrogate(
        linear,
        lambda algorithm: "-A r_t",
        sides=("far",),
        presets={"linear": {"surrogate": "linear", "denominator": "rollout"}},
    )
    monkeypatch.setitem(SURROGATES, "linear", entry)
    algorithm = make_presets()["linear"]
    assert algorithm.surrogate == algorithm.name == "linear"
    assert load_config(["--algorithm.surrogate", "linear"], {}).algorithm.surrogate == "linear"
    assert "  L_t = -A r_t" in formula(algorithm).splitlines()
    loss, metrics = policy_loss(inputs(), algorithm)
    assert loss.item() == pytest.approx(-(1 + 3 + 1 / 3) / 3)
    assert metrics["loss/clip_fraction_far"].item() == pytest.approx(1 / 3)
    assert "turn_0/clip_far" in ratio_metrics(summarise(inputs()))


def test_corrections_and_advantages_are_entries_too(monkeypatch):
    monkeypatch.setitem(CORRECTIONS, "none", Correction(lambda w, _: w / w, lambda _: "1"))
    monkeypatch.setitem(ADVANTAGES, "rank", Advantage(lambda r: tuple(map(float, r)), "reward"))
    algorithm = AlgorithmConfig.model_validate(
        ALGORITHMS["grpo"].model_dump() | {"correction": {"type": "none"}, "advantage": "rank"}
    )
    assert "multiplied by w = 1 (none" in formula(algorithm)
    assert policy_loss(inputs(), algorithm)[0] == policy_loss(inputs(), ALGORITHMS["grpo"])[0]


def test_a_side_that_the_entry_does_not_name_is_an_error(monkeypatch):
    wrong = Surrogate(lambda r, *_: (r, {"up": r > 1}), lambda _: "r_t", sides=("low",))
    monkeypatch.setitem(SURROGATES, "wrong", wrong)
    algorithm = ALGORITHMS["grpo"].model_copy(update={"surrogate": "wrong"})
    with pytest.raises(ValueError, match=r"'wrong' clips on the sides \['up'\], which its entry"):
        policy_loss(inputs(), algorithm)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--algorithm.surrogate", "clp"], "no surrogate 'clp'; there are clip, cispo, reinforce"),
        (["--algorithm.surrogate", "clp"], "did you mean 'clip'?"),
        (["--algorithm.advantage", "grp"], "no advantage 'grp'; there are grpo, dr_grpo, rloo"),
        (["--algorithm.correction.type", "tiss"], "no correction 'tiss'; there are tis, mis, ice"),
        (["--algorithm", "gro"], "did you mean 'grpo'?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_names_that_exist(words, message):
    with pytest.raises(ValueError) as caught:
        load_config(words, {})
    assert message in str(caught.value)


def test_names_that_are_typed_are_those_of_the_tables():
    aggregation = AlgorithmConfig.model_fields["aggregation"].annotation
    assert set(get_args(Level)) == set(RATIO_LEVELS)
    assert set(get_args(aggregation)) == set(AGGREGATIONS)
    assert CorrectionConfig.model_fields["level"].annotation == Level


def test_the_tables_and_the_configuration_import_without_torch():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import tir_alp.config, tir_alp.algorithm.formula\n"
        "from tir_alp.algorithm import SURROGATES, CORRECTIONS, ADVANTAGES, LossInputs"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
