"""Chooses what checks the episodes of a run: turns of an environment, or a whole agent."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium

from tir_alp.audit.findings import Findings
from tir_alp.audit.records import RecordedTrajectory
from tir_alp.audit.replay import grade_again, replay
from tir_alp.audit.trajectory import TrajectoryCheck
from tir_alp.config import Config
from tir_alp.records.ledger_rows import Attempt
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.environment import has_agents
from tir_alp.rollouts.renderer import Renderer

EpisodeCheck = Callable[[RecordedTrajectory, Attempt, Task], None]
"""Compares a trajectory with the ledger's attempt that became it, and with its task played again.
"""


def episode_check(
    config: Config, env: gymnasium.Env[str, str], renderer: Renderer, findings: Findings
) -> EpisodeCheck:
    """Return what checks the episodes of a run.

    Args:
        config: Config of the run.
        env: An environment of the run, in which episodes are replayed.
        renderer: Renderer of the run.
        findings: Where drifts are added.
    """
    if not has_agents(config):
        turns = TrajectoryCheck(renderer, config.rollout, findings)
        return lambda recorded, attempt, task: turns(
            recorded, attempt, replay(env, task, recorded.trajectory, renderer)
        )
    # Imported here because it needs the extra 'agents', which other runs do without.
    from tir_alp.agents.runner import encoder_of
    from tir_alp.audit.agent_episode import AgentEpisodeCheck

    encoder = encoder_of(config.agents, renderer)
    agent = AgentEpisodeCheck(encoder, config.rollout, config.agents, findings)
    return lambda recorded, attempt, task: agent(
        recorded, attempt, grade_again(env, task, recorded.trajectory)
    )
