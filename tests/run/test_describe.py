"""What a run prints about itself."""

from tir_alp.run.command_line import load_config
from tir_alp.run.describe import (
    describe_end,
    describe_environment,
    describe_start,
    describe_stop,
)


def test_the_start_shows_the_objective_what_differs_and_the_sandbox():
    config = load_config(["--seed", "3", "--trainer.lr", "1e-4", "--algorithm", "grpo"], {})
    report = {
        "tools": {"python": {"sandbox": "landlock", "refused": {"namespaces": "no bubblewrap"}}},
        "warnings": ["the kernel is old"],
    }
    lines = describe_start(config, report, "runs/a").splitlines()
    assert lines[0].startswith("grpo: minimise")
    at = lines.index("settings that differ from the defaults:")
    assert lines[at + 1 :] == [
        "  seed = 3",
        "  trainer.lr = 0.0001",
        "sandbox of python: landlock, its probes held",
        "  not namespaces: no bubblewrap",
        "warning: the kernel is old",
        "run runs/a",
    ]


def test_no_probes_are_claimed_where_none_were_made():
    (line,) = describe_environment({"tools": {"python": {"sandbox": "unsafe", "refused": {}}}})
    assert line == "sandbox of python: unsafe"


def test_the_end_tells_the_truth_about_what_was_trained():
    assert "checkpoints/step_5" in describe_end("runs/a", 5, True)
    assert "--resume runs/a --steps 10" in describe_end("runs/a", 5, False)
    assert "nothing was trained" in describe_end("runs/a", 0, True)
    shown = [has for has in (True, False) if "tensorboard" in describe_end("runs/a", 5, has)]
    assert shown == [True]


def test_an_early_end_names_the_run_and_the_command():
    assert describe_stop("runs/a", 7) == (
        "step 7 is saved; go on from it: python -m tir_alp.train --resume runs/a"
    )
    assert "no checkpoint" in describe_stop("runs/a", None)
