"""Evaluation plays every task k times, and greedily once, with draws of its own."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import gymnasium

from tir_alp.config import RolloutConfig
from tir_alp.engines.base import Completion, Sampling
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.rollouts.data import EvalSet, Task
from tir_alp.rollouts.episode import EpisodeFailed, EpisodeRunner
from tir_alp.rollouts.evaluation import (
    UIDS_PER_TASK,
    group_id_of,
    play_sets,
    summary,
)
from tir_alp.rollouts.renderer import Renderer
from tir_alp.types import StopReason

TASKS = [Task(f"t{index}", f"q{index}", "a") for index in range(3)]
SETS = (EvalSet("", TASKS),)
END, A = 1, 70


class Judge(gymnasium.Env[str, str]):
    """Task 0 is always right, task 1 where the policy was greedy, and task 2 never."""

    def reset(self, *, seed=None, options=None):
        assert options is not None
        self._task = options["task"]["task_id"]
        return self._task, {}

    def step(self, action):
        correct = self._task == "t0" or (self._task == "t1" and action == "a")
        return "", float(correct), True, False, {"correct": correct}


def uid(task: int, sample: int) -> int:
    return task * UIDS_PER_TASK + sample


GREEDY = UIDS_PER_TASK - 1


def run(lost: frozenset[int] = frozenset(), sets=SETS, **how):
    asked: list[Sampling] = []
    failures: list[EpisodeFailed] = []

    async def generate(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        asked.append(sampling)
        ids = (A, END) if sampling.temperature == 0 else (END,)
        return Completion(
            token_ids=ids,
            logprobs=(0.0,) * len(ids),
            stop_reason=StopReason.ABORT if sampling.sequence_uid in lost else StopReason.EOS,
            policy_version=0,
        )

    async def main():
        runner = EpisodeRunner(
            make_env=Judge,
            generate=generate,
            renderer=Renderer(make_tokenizer()),
            limits=RolloutConfig(temperature=0.7),
            threads=threads,
            slots=asyncio.Semaphore(2),
            seed=5,
            on_failure=failures.append,
        )
        return summary(await play_sets(runner, sets, **how))

    with ThreadPoolExecutor(2) as threads:
        return asyncio.run(main()), sorted(asked, key=lambda each: each.sequence_uid), failures


def test_every_task_is_played_k_times_and_once_greedily():
    metrics, asked, _ = run(samples=2, greedy=True)
    draws = [uid(task, number) for task in range(3) for number in (0, 1, GREEDY)]
    assert [sampling.sequence_uid for sampling in asked] == draws
    assert [sampling.temperature for sampling in asked] == [0.7, 0.7, 0.0] * 3
    assert {sampling.seed for sampling in asked} == {5}
    assert metrics["eval/accuracy"] == metrics["eval/pass_at_k"] == 1 / 3
    assert metrics["eval/greedy_accuracy"] == 2 / 3
    assert (metrics["eval/tasks"], metrics["eval/failed"]) == (3, 0)


def test_more_samples_extend_fewer_ones():
    few, many = ({each.sequence_uid for each in run(samples=n, greedy=False)[1]} for n in (2, 5))
    assert few < many and len(many) == 15


def test_an_episode_that_was_lost_is_counted_and_not_called_wrong():
    lost = frozenset({uid(0, 0), uid(2, 1), uid(2, GREEDY)})
    metrics, _, failures = run(lost, samples=2, greedy=True)
    assert metrics["eval/failed"] == len(failures) == 3
    assert metrics["eval/accuracy"] == 1 / 3  # task 0 and task 2 have one sample left each
    assert metrics["eval/greedy_accuracy"] == 1.0  # of those that are left


def test_each_set_has_its_metrics_and_draws_that_do_not_depend_on_the_others():
    sets = (EvalSet("easy", TASKS[:1]), EvalSet("hard", TASKS[1:]))
    metrics, asked, _ = run(sets=sets, samples=1, greedy=False)
    assert metrics["eval/easy/accuracy"] == 1.0 and metrics["eval/hard/accuracy"] == 0.0
    assert metrics["eval/accuracy"] == 1 / 3 and "eval//accuracy" not in metrics
    _, alone, _ = run(sets=sets[1:], samples=1, greedy=False)
    ids = {each.sequence_uid // UIDS_PER_TASK for each in alone}
    assert ids == {group_id_of("hard", 0), group_id_of("hard", 1)}
    assert ids < {each.sequence_uid // UIDS_PER_TASK for each in asked}
