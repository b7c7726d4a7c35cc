"""Evaluation plays every task k times, and greedily once, with draws of its own."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import gymnasium

from tir_alp.config import RolloutConfig
from tir_alp.engines.base import Completion, Sampling
from tir_alp.evaluate import evaluate
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.episode import EpisodeFailed, EpisodeRunner
from tir_alp.rollouts.renderer import Renderer
from tir_alp.types import StopReason

TASKS = [Task(f"t{index}", f"q{index}", "a") for index in range(3)]
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


def run(lost: frozenset[int] = frozenset(), **how):
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
        return await evaluate(runner, TASKS, **how)

    with ThreadPoolExecutor(2) as threads:
        return asyncio.run(main()), sorted(asked, key=lambda each: each.sequence_uid), failures


def test_every_task_is_played_k_times_and_once_greedily():
    metrics, asked, _ = run(samples=2, greedy=True)
    assert [sampling.sequence_uid for sampling in asked] == list(range(9))
    assert [sampling.temperature for sampling in asked] == [0.7] * 6 + [0.0] * 3
    assert {sampling.seed for sampling in asked} == {5}
    assert metrics["eval/accuracy"] == metrics["eval/pass_at_k"] == 1 / 3
    assert metrics["eval/greedy_accuracy"] == 2 / 3
    assert (metrics["eval/tasks"], metrics["eval/failed"]) == (3, 0)


def test_without_greedy_there_are_only_samples():
    metrics, asked, _ = run(samples=3, greedy=False)
    assert len(asked) == 9 and all(sampling.temperature == 0.7 for sampling in asked)
    assert "eval/greedy_accuracy" not in metrics


def test_an_episode_that_was_lost_is_counted_and_not_called_wrong():
    metrics, _, failures = run(frozenset({0, 5, 8}), samples=2, greedy=True)
    assert metrics["eval/failed"] == len(failures) == 3
    assert metrics["eval/accuracy"] == 1 / 3  # task 0 and task 2 have one sample left each
    assert metrics["eval/greedy_accuracy"] == 1.0  # of those that are left
