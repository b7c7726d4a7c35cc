"""The simulator follows the program: schedules computed by hand, and costs recovered from a run."""

import json
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from tir_alp.studies.simulate.__main__ import main
from tir_alp.studies.simulate.costs import TimedTurn, fit_engine, fit_trainer, read_costs
from tir_alp.studies.simulate.pipeline import (
    Costs,
    EngineCost,
    EpisodeCost,
    GroupCost,
    PipelineLayout,
    TrainerCost,
    TurnCost,
    simulate,
)

TURN = TurnCost(context_tokens=100, new_tokens=100, completion_tokens=10, tool_s=2.0)
COSTS = Costs(
    groups=(GroupCost((EpisodeCost(prepare_s=0.5, turns=(TURN,)),)),),
    engine=EngineCost(step_s=0.08, request_s=0.02, prefill_token_s=0.001),
    trainer=TrainerCost(step_s=1.0, token_s=0.01),
    sync_s=0.3,
)
ALONE = PipelineLayout(groups_per_step=1, group_size=1)


def test_a_lone_episode_takes_the_sum_of_its_phases():
    # 0.5 prepare + 0.1 prefill + 10 x (0.08 + 0.02) + 2 tool + 1 + 110 x 0.01 train + 0.3 sync
    forecast = simulate(COSTS, ALONE, steps=4)
    assert forecast.seconds_per_step == pytest.approx(6.0)
    assert forecast.tokens_per_s == pytest.approx(10 / 6.0)
    assert forecast.trainer_idle == pytest.approx(1 - 2.1 / 6.0)
    assert forecast.engine_idle == pytest.approx(1 - 1.4 / 6.0)
    assert (forecast.staleness, forecast.max_staleness) == (0, 0)


def test_requests_of_one_engine_share_its_steps():
    together = simulate(COSTS, replace(ALONE, group_size=2), steps=2)
    # 0.5 + 0.2 prefill + 10 x (0.08 + 2 x 0.02) + 2 + 1 + 220 x 0.01 + 0.3
    assert together.seconds_per_step == pytest.approx(7.4)
    apart = simulate(COSTS, replace(ALONE, group_size=2, engines=2), steps=2)
    assert apart.seconds_per_step == pytest.approx(7.4 - 0.1 - 0.2)


def test_engine_slots_and_tool_slots_limit_concurrency():
    two = replace(ALONE, group_size=2)
    # One after the other in the engine: the second starts its 1.1 s when the first has ended.
    serial = simulate(COSTS, replace(two, engine_slots=1), steps=2)
    assert serial.seconds_per_step == pytest.approx(0.5 + 2 * 1.1 + 2 + 1 + 2.2 + 0.3)
    tools = simulate(COSTS, replace(two, tool_slots=1), steps=2)
    assert tools.seconds_per_step == pytest.approx(7.4 + 2)


def test_ranks_divide_the_tokens_of_a_step_but_not_its_fixed_cost():
    forecast = simulate(COSTS, replace(ALONE, trainers=2), steps=2)
    assert forecast.seconds_per_step == pytest.approx(6.0 - 0.55)


def test_rollouts_ahead_of_the_weights_overlap_with_training():
    long_training = replace(COSTS, trainer=TrainerCost(step_s=10.0, token_s=0.0))
    ahead = simulate(long_training, replace(ALONE, max_staleness=1), steps=5)
    assert ahead.seconds_per_step == pytest.approx(10.3)
    assert ahead.staleness == ahead.max_staleness == 1


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_no_group_is_older_than_the_limit(max_staleness):
    groups = tuple(
        GroupCost((EpisodeCost(0.1, (replace(TURN, tool_s=s),)),)) for s in (0.1, 1.0, 30.0)
    )
    layout = PipelineLayout(groups_per_step=3, group_size=2, max_staleness=max_staleness)
    forecast = simulate(replace(COSTS, groups=groups), layout, steps=20)
    assert forecast.max_staleness <= max_staleness


def test_a_weight_update_during_completions():
    # Completions alternate between 1 and 200 tokens, with 0.1 s per token and 0.1 s of prefill. Two
    # groups are in flight. The short one is trained on in 1 s while the long one, started at 0,
    # runs.
    quick, slow = (replace(TURN, completion_tokens=n, tool_s=0.0) for n in (1, 200))
    costs = replace(
        COSTS,
        groups=tuple(GroupCost((EpisodeCost(0.0, (turn,)),)) for turn in (quick, slow)),
        engine=EngineCost(step_s=0.1, request_s=0.0, prefill_token_s=0.001),
        trainer=TrainerCost(step_s=1.0, token_s=0.0),
    )

    def pair_s(on_update):
        layout = replace(ALONE, max_staleness=1, on_update=on_update)
        return 2 * simulate(costs, layout, steps=2, warm_up=20).seconds_per_step

    # The update is at 20.1, after the long one: 0.3 each, and 1 to train on the long one.
    assert pair_s("wait") == pytest.approx(20.1 + 0.3 + 1 + 0.3)
    # The update is at 1.1: the long one waits 0.3, its 100 + 10 tokens are prefilled again, and 0.1
    # is the prefill of the next short one.
    assert pair_s("keep") == pytest.approx(20.1 + 0.3 + 0.11 + 0.1 + 1 + 0.3)
    # The same, but only its prompt is prefilled, and its 10 tokens are generated again.
    assert pair_s("drop") == pytest.approx(20.1 + 0.3 + 0.10 + 1.0 + 0.1 + 1 + 0.3)


def test_a_shared_device_slows_both_down():
    costs = replace(COSTS, trainer=TrainerCost(step_s=10.0, token_s=0.0))
    layout = replace(ALONE, max_staleness=1)
    apart = simulate(costs, layout, steps=5).seconds_per_step
    shared = simulate(replace(costs, slowdown=2.0), layout, steps=5).seconds_per_step
    assert (
        apart + 1.0 < shared < 2 * apart
    )  # the engine runs during a fraction of the training only


def test_recorded_groups_keep_their_order_and_other_sizes_are_drawn_by_seed():
    episodes = tuple(EpisodeCost(0.1, (replace(TURN, tool_s=t),)) for t in (0.1, 1.0, 3.0))
    as_recorded = replace(COSTS, groups=tuple(GroupCost((each,)) for each in episodes))
    one, other = (simulate(as_recorded, ALONE, steps=3, seed=seed) for seed in (1, 2))
    assert one == other
    drawn = replace(COSTS, groups=(GroupCost(episodes),))
    assert simulate(drawn, ALONE, steps=9, seed=1) == simulate(drawn, ALONE, steps=9, seed=1)
    assert simulate(drawn, ALONE, steps=9, seed=1) != simulate(drawn, ALONE, steps=9, seed=2)
    whole = replace(ALONE, group_size=3)
    assert simulate(drawn, whole, steps=9, seed=1) == simulate(drawn, whole, steps=9, seed=2)


def test_engine_costs_are_recovered_from_the_times_of_turns():
    # Four completions that start together: prompts of 50 tokens at 1 ms per token, then steps of
    # 10 + 2 b ms while b of them run.
    lengths, prefill = (10, 20, 40, 80), 50
    turns = [
        TimedTurn(
            begin_s=0.0,
            end_s=4 * prefill * 1e-3
            + sum(10e-3 + 2e-3 * sum(n > step for n in lengths) for step in range(length)),
            prefill_tokens=prefill,
            completion_tokens=length,
        )
        for length in lengths
    ]
    turns += [TimedTurn(10.0, 10.0 + 0.5 + 30 * 12e-3, 500, 30)]
    step_s, request_s, prefill_token_s = fit_engine(turns)
    assert step_s == pytest.approx(10e-3, rel=0.06)
    assert request_s == pytest.approx(2e-3, rel=0.06)
    assert prefill_token_s == pytest.approx(1e-3, rel=0.06)


def test_a_cost_is_never_negative():
    assert astuple(fit_trainer([100, 200, 300], [3.0, 2.0, 1.0])) == pytest.approx((2.0, 0.0))
    assert astuple(fit_trainer([100, 200, 300], [1.5, 2.0, 2.5])) == pytest.approx((1.0, 0.005))


def write_run(folder: Path, num_steps: int, max_staleness: int = 0) -> Path:
    """Write a run folder with one episode per step by hand."""
    (folder / "trajectories").mkdir(parents=True)
    rollout = {
        "max_staleness": max_staleness,
        "groups_per_step": 1,
        "group_size": 1,
        "on_update": "wait",
    }
    (folder / "config.json").write_text(json.dumps({"rollout": rollout}))
    metrics = ""
    for step in range(1, num_steps + 1):
        begin = 100.0 * step
        turns = [
            {
                "completion": {"token_ids": [1] * 10},
                "observation": {"token_ids": [2] * 5},
                "timing": {"begin": begin, "generate": 1.0, "tool": 2.0, "prepare": 0.5},
            },
            {
                "completion": {"token_ids": [1] * 20},
                "observation": {"token_ids": []},
                "timing": {"begin": begin + 3.0, "generate": 2.0, "tool": 0.0},
            },
        ]
        trajectory = {"group_id": step, "prompt": {"token_ids": [3] * 7}, "turns": turns}
        file = folder / "trajectories" / f"step_{step:06d}.jsonl"
        file.write_text(json.dumps(trajectory) + "\n")
        record = {"time/rollout": 5.5, "time/train": 4.0, "tokens/generated": 30}
        metrics += json.dumps({"step": step, **record, "tokens/per_second": 3.0}) + "\n"
    (folder / "metrics.jsonl").write_text(metrics)
    return folder


def test_a_recorded_run_is_forecast_as_it_was(tmp_path):
    costs = read_costs(write_run(tmp_path / "run", 4))
    turns = (TurnCost(7, 7, 10, 2.0), TurnCost(22, 5, 20, 0.0))
    assert costs.groups == (GroupCost((EpisodeCost(0.5, turns),)),) * 3
    assert costs.groups[0].episodes[0].num_tokens == 42
    assert costs.sync_s == pytest.approx(0.5)
    forecast = simulate(costs, ALONE, steps=3)
    assert forecast.seconds_per_step == pytest.approx(10.0, rel=0.01)


def test_groups_without_signal_take_time_and_free_their_slot(tmp_path):
    run = write_run(tmp_path / "run", 4)
    (run / "replaced").mkdir()
    for step in (2, 3, 4):
        name = f"step_{step:06d}.jsonl"
        trajectory = json.loads((run / "trajectories" / name).read_text())
        trajectory["group_id"] += 100
        for turn in trajectory["turns"]:
            turn["timing"]["begin"] += 50
        (run / "replaced" / name).write_text(json.dumps(trajectory) + "\n")
    costs = read_costs(run)
    assert [group.has_signal for group in costs.groups] == [True, False] * 3
    # A step plays two groups, one after the other, and trains on one.
    once = simulate(replace(costs, groups=costs.groups[:1]), ALONE, steps=4)
    twice = simulate(costs, ALONE, steps=4)
    rollout_s = 10.0 - 4.0 - costs.sync_s
    assert twice.seconds_per_step - once.seconds_per_step == pytest.approx(rollout_s, rel=0.01)
    assert twice.tokens_per_s * twice.seconds_per_step == pytest.approx(30)


def test_a_table_row_for_each_combination(tmp_path, capsys):
    run = str(write_run(tmp_path / "run", 4))
    assert main([run, "--engines", "1", "2", "--max-staleness", "0", "1", "--steps", "3"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "at most" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["1", "1", "2", "2"]


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main([str(write_run(tmp_path / "stale", 4, max_staleness=2))]) == 2
    assert "had rollout.max_staleness = 2" in capsys.readouterr().err
    assert main([str(write_run(tmp_path / "short", 2))]) == 2
    assert "has 1 steps after the first; at least 2 are needed" in capsys.readouterr().err
    old = write_run(tmp_path / "old", 4)
    file = old / "trajectories" / "step_000002.jsonl"
    file.write_text(file.read_text().replace('"begin"', '"start"'))
    assert main([str(old)]) == 2
    assert "step_000002.jsonl: a trajectory has no 'begin'" in capsys.readouterr().err
