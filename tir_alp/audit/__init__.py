"""Proves a saved run token by token: what was trained on is what was sampled, shown and graded.

No fact rests on a single source. The trajectories, written by the rollouts, are compared with the
ledger, written at the interfaces of engine, environment and trainer; with the renderer, which
encodes every prompt and observation again; and with the environment, which replays every episode
with the recorded tool results. No model, sandbox or GPU is needed.
"""

from tir_alp.audit.findings import Findings
from tir_alp.audit.run import audit_run

__all__ = ["Findings", "audit_run"]
