"""What a report says in words follows from the numbers, and says so where there are too few."""

import json

import pytest

from tests.report.test_report import METRICS, make_run
from tir_alp.report.read import read_run
from tir_alp.report.verdict import headline_of, verdict_of


def judged(path, metrics, **config):
    """Return the headline and the findings of a run as (about, level, text)."""
    findings = verdict_of(read_run(make_run(path, metrics, **config)))
    found = [(each.about, each.level, each.text) for each in findings.findings]
    return headline_of(findings), found


def texts(found, about):
    return " ".join(text for of, _, text in found if of == about)


def levels(found, about):
    return [level for of, level, _ in found if of == about]


def steps(count, **series):
    """Metrics of steps from 1; a value is a constant, or a function of the step from 0 to 1."""
    return [
        (
            step,
            {
                name.replace("__", "/"): value(step / count) if callable(value) else value
                for name, value in series.items()
            },
        )
        for step in range(1, count + 1)
    ]


STEADY = {
    "rollout__reward": lambda t: 0.2 + 0.6 * t,
    "kl_clean__rollout": 0.001,
    "ratio_clean__p2": 0.9,
    "ratio_clean__p98": 1.1,
    "loss_clean__clip_fraction": 0.01,
    "entropy_clean__mean": lambda t: 1.0 - 0.3 * t,
    "rollout__tool_calls": 1.0,
}


def accuracy(value, tasks=100):
    return {"eval/accuracy": value, "eval/tasks": tasks}


def test_a_run_that_learns_and_is_stable(tmp_path):
    metrics = [(0, accuracy(0.1)), *steps(16, **STEADY), (16, accuracy(0.6))]
    headline, found = judged(tmp_path / "run", metrics, steps=16)
    assert headline == "It learned. It is stable by what was measured."
    assert levels(found, "learning") == ["good", "good"]
    said = texts(found, "learning")
    assert "from 10.0% [5.5%, 17.4%] in step 0 to 60.0% [50.2%, 69.1%] in step 16" in said
    assert "100 tasks" in said and "more than chance explains" in said
    # 0.2 + 0.6 t: the means of the first and of the last 8 of 16 steps
    assert "from 0.369 [" in said and "to 0.669 [" in said
    assert levels(found, "stability") == ["good"] * 4
    assert "at most 0.001 nats" in texts(found, "stability")


def test_few_tasks_cannot_tell_a_change_from_chance(tmp_path):
    metrics = [(0, accuracy(0.4, 10)), *steps(16, **STEADY), (16, accuracy(0.6, 10))]
    headline, found = judged(tmp_path / "run", metrics)
    assert levels(found, "learning")[0] == "neutral" and headline.startswith("No learning is shown")
    metrics = [(0, {"eval/accuracy": 0.1}), (16, {"eval/accuracy": 0.9})]
    _, found = judged(tmp_path / "without", metrics)
    assert levels(found, "learning") == ["unknown"]


def test_a_run_that_gets_worse(tmp_path):
    falling = STEADY | {"rollout__reward": lambda t: 0.8 - 0.6 * t}
    headline, found = judged(tmp_path / "run", steps(16, **falling))
    assert headline.startswith("It got worse.") and levels(found, "learning") == ["bad"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"kl_clean__rollout": lambda t: 0.002 * 100**t}, "grew"),
        ({"kl_clean__rollout": -0.5}, "at most 0.5 nats"),
        ({"ratio_clean__p98": 20.0}, "P98 over P2 of the clean sequence ratios was at most 22.22"),
        ({"ratio_clean__p98": lambda t: 0.95 * 8**t}, "grew"),
        ({"ratio_clean__p2": 0.0}, "never finite"),
        ({"loss_clean__clip_fraction": 0.4}, "40.0% were clipped"),
        ({"entropy_clean__mean": lambda t: 1.0 - 0.99 * t}, "nearly stopped to explore"),
        ({"entropy_clean__mean": lambda t: 0.1 + 3.0 * t}, "more random"),
    ],
)
def test_what_is_out_of_bounds_is_named(tmp_path, changed, words):
    headline, found = judged(tmp_path / "run", steps(15, **STEADY | changed))
    assert "Its stability needs a look" in headline
    bad = [text for about, level, text in found if (about, level) == ("stability", "bad")]
    assert len(bad) == 1 and words in bad[0]


def test_few_measurements_show_no_trend(tmp_path):
    metrics = [*steps(9, rollout__reward=0.5), *steps(2, **STEADY)]
    headline, found = judged(tmp_path / "run", metrics)
    assert "Too little data to say whether it is stable" in headline
    assert set(levels(found, "stability")) == {"unknown"}
    metrics = steps(9, rollout__reward=0.5, kl__rollout=0.02)
    _, found = judged(tmp_path / "noisy", metrics)
    assert "was not measured (metrics.clean_every)" in texts(found, "stability")


BROKEN = STEADY | {"rollout__reward": 0.0}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "The mean reward was 0 in every step: compare how answers are written"),
        ({"rollout__reward": 1.0}, "The mean reward was 1 in every step."),
        ({"rollout__void_turns": 1.0}, "100.0% of the turns (all of them) hold neither"),
        ({"rollout__void_turns": 0.75}, "75.0% of the turns hold neither"),
        ({"rollout__tool_calls": 0.0}, "No tool was ever called."),
        ({"rollout__zero_signal_groups": 15}, "15 groups had equal rewards on average (16"),
        (
            {"tokens__generated": lambda t: 100 + 400 * t},
            "The tokens of a step grew from 207 to 420",
        ),
        ({"rollout__truncated": 0.9}, "A limit cut 90.0% of the latest"),
        ({"rollout__failed": 2}, "30 trajectories were lost"),
        ({"train__skipped_updates": 1}, "15 updates were skipped"),
        ({"mine__own": float("nan")}, "In 15 steps a metric was NaN or infinite"),
    ],
)
def test_what_explains_a_run_that_does_not_learn_is_named(tmp_path, changed, words):
    _, found = judged(tmp_path / "run", steps(15, **BROKEN | changed), steps=15)
    assert words in texts(found, "attention")
    usual, _ = judged(tmp_path / "usual", steps(15, **STEADY), steps=15)
    assert "to look at" not in usual


def test_a_reward_that_rises_while_accuracy_falls(tmp_path):
    metrics = [(0, accuracy(0.8)), *steps(16, **STEADY), (16, accuracy(0.3))]
    _, found = judged(tmp_path / "run", metrics)
    assert "The reward rose while held-out accuracy fell" in texts(found, "attention")


def test_a_run_that_was_interrupted_advised_or_stopped(tmp_path):
    path = make_run(tmp_path / "run", [(1, METRICS), (2, METRICS)], steps=10)
    (path / "advice.jsonl").write_text(json.dumps({"step": 1, "advice": "show the format"}) + "\n")
    event = {"step": 2, "kind": "stop", "reason": "KL too large"}
    (path / "events.jsonl").write_text(json.dumps(event) + "\n")
    findings = verdict_of(read_run(path))
    said = " ".join(each.text for each in findings.findings)
    assert "The run has made 2 of 10 steps." in said
    assert "show the format" in said and "stop: KL too large" in said
    assert "0.5, 0.5 in 2 steps, too few to judge by" in said
    assert headline_of(findings).startswith("Too little data to say whether it learned.")


def test_a_run_without_steps_or_without_anything_to_judge_by(tmp_path):
    headline, found = judged(tmp_path / "empty", [])
    assert "no metric has been recorded" in texts(found, "learning")
    assert headline.startswith("Too little data")
    headline, found = judged(tmp_path / "odd", [(1, {"mine/own": 1.0})])
    assert "cannot be said" in texts(found, "learning")


def test_fine_tuning_is_judged_by_its_losses(tmp_path):
    metrics = [(s, {"loss/value": 2.0 - 0.1 * s}) for s in range(1, 11)]
    metrics += [(0, {"eval/loss": 2.0}), (5, {"eval/loss": 1.2}), (10, {"eval/loss": 1.6})]
    path = make_run(tmp_path / "run", metrics)
    origin = json.loads((path / "origin.json").read_text()) | {"command": "sft"}
    (path / "origin.json").write_text(json.dumps(origin))
    findings = verdict_of(read_run(path))
    said = " ".join(each.text for each in findings.findings)
    assert "went from 2 to 1.6; it was lowest, 1.2, in step 5" in said
    assert "The training loss fell from" in said
    assert headline_of(findings).startswith("It learned.")
