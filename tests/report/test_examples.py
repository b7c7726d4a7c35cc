"""Which trajectories a report shows, as which text, and how much it reads for it."""

import json
from pathlib import Path

import pytest

from tests.inspector.made import rewrite, trajectory, write_run
from tir_alp.report import examples as module
from tir_alp.report import write_run_report
from tir_alp.report.examples import Examples, episode_of, read_examples


def played(uid, task, reward, *texts):
    return trajectory(uid, (f"question {task}", *(texts or (f"answer {uid}",))), reward), task


def run_of(path: Path, *steps) -> Path:
    """Write a run whose trajectories have the tasks that are named."""
    write_run(path, [[each for each, _ in step] for step in steps])
    for number, step in enumerate(steps, start=1):
        tasks = iter([task for _, task in step])
        file = path / f"trajectories/step_{number:06d}.jsonl"
        rewrite(file, lambda record, tasks=tasks: record.update(task_id=next(tasks)))
    return path


def places(examples):
    return [(each.row["step"], each.row["line"]) for each in examples]


def test_before_and_after_are_of_one_task_if_both_steps_have_one(tmp_path):
    path = run_of(
        tmp_path / "run",
        [played(0, "a", 0.0), played(2, "b", 0.0)],
        [played(4, "c", 0.5)],
        [played(6, "d", 1.0), played(8, "b", 1.0), played(9, "b", 0.0)],
    )
    found = read_examples(path)
    assert found.before is not None and found.after is not None
    assert places([found.before, found.after]) == [(1, 2), (3, 2)]
    assert (found.num_read, found.steps, found.is_whole) == (6, (1, 3), True)
    page = write_run_report(path).read_text()
    assert "of a task that both steps have" in page and "answer 8" in page

    other = run_of(tmp_path / "other", [played(0, "a", 0.0)], [played(2, "b", 1.0)])
    found = read_examples(other)
    assert found.before is not None and found.after is not None
    assert places([found.before, found.after]) == [(1, 1), (2, 1)]
    assert "no task is in both" in write_run_report(other).read_text()


def test_the_best_and_the_worst_are_of_different_tasks(tmp_path):
    rewards = {"a": (1.0, 0.9), "b": (0.8, 0.1), "c": (0.0, 0.5)}
    steps = [
        [played(0, task, values[number]) for task, values in rewards.items()] for number in (0, 1)
    ]
    found = read_examples(run_of(tmp_path / "run", *steps))
    assert [(each.row["task_id"], each.reward) for each in found.best] == [("a", 1.0), ("b", 0.8)]
    assert [(each.row["task_id"], each.reward) for each in found.worst] == [("c", 0.0), ("b", 0.1)]


def test_equal_rewards_have_no_best(tmp_path):
    path = run_of(tmp_path / "run", [played(0, "a", 0.0), played(2, "b", 0.0)])
    page = write_run_report(path).read_text()
    assert "All have the same reward: 2 trajectories of step 1" in page
    assert "Best" not in page and "There is no before and after" in page


def test_nothing_is_shown_where_nothing_was_recorded(tmp_path):
    path = write_run(tmp_path / "run", [])
    assert read_examples(path) == Examples()
    assert 'id="examples"' not in write_run_report(path).read_text()


def test_what_is_read_is_bounded(tmp_path, monkeypatch):
    steps = [[played(2 * n, str(n), n / 50, "words " * 40)] for n in range(50)]
    path = run_of(tmp_path / "run", *steps)
    size = max(file.stat().st_size for file in (path / "trajectories").iterdir())
    monkeypatch.setattr(module, "MOST_BYTES", 5 * size)
    found = read_examples(path)
    assert found.num_read <= 6 and not found.is_whole
    assert found.before is not None and found.before.row["step"] == 1
    assert found.best[0].row["step"] == 50
    assert "which is as many as a report reads" in write_run_report(path).read_text()
    monkeypatch.setattr(module, "MOST_OF_A_FILE", size // 2)
    assert read_examples(path).num_read == 0


def test_an_episode_is_shown_turn_by_turn_and_shortened(tmp_path):
    texts = [text for turn in range(20) for text in (f"call {turn}.", f"output {turn}.")]
    long = "x" * 900  # of the records' own limit, 1000 characters
    path = run_of(tmp_path / "run", [played(0, "a", 1.0, *texts, long)])
    (best,) = read_examples(path).best
    episode = episode_of(best, "Best")
    assert episode.title == "Best: step 1, task a, reward 1"
    assert episode.facts.startswith("21 turns; 20 tool calls")
    said = [(each.author, each.text) for each in episode.said]
    first = [("prompt", "question a"), ("model", "call 0."), ("environment", "output 0.")]
    assert said[:3] == first
    assert ("note", "13 turns are left out here.") in said
    assert said[-1] == ("model", long)
    assert sum(author == "model" for author, _ in said) == module.MOST_TURNS


def test_secrets_and_missing_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "open-sesame-42")
    path = run_of(tmp_path / "run", [played(0, "open-sesame-42", 1.0, "call", "open-sesame-42")])

    def hide(record):
        del record["turns"][0]["completion"]["text"]
        record["turns"][0]["observation"]["text"] = "the key is open-sesame-42"

    rewrite(path / "trajectories/step_000001.jsonl", hide)
    for file in (write_run_report(path), path / "report.md"):
        text = file.read_text()
        assert "open-sesame-42" not in text and "secret redacted" in text
        assert "not in the records" in text


@pytest.mark.parametrize(
    "line",
    [
        "null",
        "{",
        "[]",
        "{}",
        json.dumps({"turns": [], "prompt": {"text": 3, "token_ids": []}}),
        '{"turns": ' + "[" * 5000,
        "\udcff",
    ],
)
def test_lines_that_are_no_trajectories_are_passed_over(tmp_path, line):
    path = run_of(tmp_path / "run", [played(0, "a", 1.0)])
    with (path / "trajectories/step_000001.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
    assert read_examples(path).num_read == 1
    assert write_run_report(path).exists()
