"""The checks of a run's start: in a run, where a failure stops it, and for the command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import gymnasium

from tir_alp.doctor.check_result import CheckResult
from tir_alp.doctor.conversation import check_fence
from tir_alp.doctor.environment import check_environment
from tir_alp.doctor.examine import (
    check_history,
    demand,
    examine_config,
    examine_engine,
    examine_model,
)
from tir_alp.doctor.sandbox import check_sandbox
from tir_alp.roles import Node
from tir_alp.run.launch import Launched
from tir_alp.run.open_evaluation import PreparedEvaluation
from tir_alp.run.open_run import Examined
from tir_alp.run.open_sft import PreparedSFT
from tir_alp.run.prepare import Prepared
from tir_alp.training.structure import load_outline

_NUM_CHECKED = 256  # tasks whose prompts are measured before a run begins


class Doctor:
    """The checks of a run, as `StartChecks`."""

    def before_launch(
        self,
        prepared: Prepared,
        make_env: Callable[[], gymnasium.Env[str, str]],
        nodes: Sequence[Node],
    ) -> Examined:
        """Check machine, environment, chat template and sandbox.

        Raises:
            Refused: A check failed that the config does not ignore.
        """
        report = examine_environment(prepared, make_env, _NUM_CHECKED)
        findings, prompts = examine_inputs(prepared, make_env, nodes)
        warnings = demand(findings, prepared.config.doctor.ignore)
        return Examined(report, warnings, prompts)

    def before_sft(
        self, prepared: PreparedSFT, env: gymnasium.Env[str, str], nodes: Sequence[Node]
    ) -> Sequence[str]:
        """Check machine and chat template, for supervised fine-tuning; returns warnings.

        Raises:
            Refused: A check failed that the config does not ignore.
        """
        config = prepared.config.as_run()
        findings = examine_model(
            config, prepared.model_path, prepared.tokenizer, prepared.renderer, env, nodes
        )
        return demand(findings, config.doctor.ignore)

    def before_evaluation(
        self,
        prepared: PreparedEvaluation,
        make_env: Callable[[], gymnasium.Env[str, str]],
    ) -> dict[str, Any]:
        """Check prompts, environment, template and sandbox; returns the environment's report.

        Raises:
            Refused: A check failed that the config does not ignore.
        """
        tasks = [task for each in prepared.sets for task in each.tasks]
        report = check_environment(prepared.config, prepared.renderer, tasks, make_env)
        with closing(make_env()) as env:
            findings = [
                check_history(prepared.tokenizer, prepared.config, prepared.renderer, env),
                check_fence(prepared.tokenizer, prepared.renderer),
                check_sandbox(env, tasks[0]),
            ]
        demand(findings, prepared.config.doctor.ignore)
        return report

    async def after_launch(
        self, prepared: Prepared, launched: Launched, prompts: Sequence[str]
    ) -> Sequence[str]:
        """Check engine and trainer against each other.

        Raises:
            Refused: A check failed that the config does not ignore.
        """
        findings = await examine_launched(prepared, launched, prompts)
        return demand(findings, prepared.config.doctor.ignore)


def examine_environment(
    prepared: Prepared, make_env: Callable[[], gymnasium.Env[str, str]], num_tasks: int
) -> dict[str, Any]:
    """Measure the prompts of the next tasks and take an action; see `check_environment`."""
    first = prepared.progress.position.group
    tasks = [prepared.tasks[first + offset] for offset in range(num_tasks)]
    tasks += [task for each in prepared.eval_sets for task in each.tasks]
    return check_environment(prepared.config, prepared.renderer, tasks, make_env)


def examine_inputs(
    prepared: Prepared,
    make_env: Callable[[], gymnasium.Env[str, str]],
    nodes: Sequence[Node],
) -> tuple[list[CheckResult], list[str]]:
    """Check what needs no weights; returns the findings, and the texts of the next two tasks."""
    first = prepared.progress.position.group
    with closing(make_env()) as env:
        findings = examine_config(
            prepared.config,
            prepared.model_path,
            prepared.tokenizer,
            prepared.renderer,
            env,
            prepared.tasks[first],
            nodes,
        )
        tasks = [prepared.tasks[first], prepared.tasks[first + 1]]
        texts = [env.reset(seed=each.seed, options=each.to_options())[0] for each in tasks]
    return findings, texts


async def examine_launched(
    prepared: Prepared, launched: Launched, prompts: Sequence[str]
) -> list[CheckResult]:
    """Check engine and trainer against each other; both are afterwards as they were before."""
    return await examine_engine(
        prepared.config,
        launched.engine,
        load_outline(prepared.model_path),
        launched.trainer,
        launched.trainer.weights,
        prepared.progress.position.step,
        prepared.tokenizer,
        prepared.renderer,
        prompts,
    )
