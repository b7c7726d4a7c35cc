"""Proves a saved run token by token: what was trained on is what was sampled, shown and graded.

Nothing is believed twice from one source. The trajectories, written by the rollouts, are held
against the ledger, written at the borders of engine, environment and trainer; against the renderer,
which encodes every prompt and observation again; and against the environment, which plays every
episode again with the recorded tool results. No model, no sandbox and no GPU are needed.
"""

from tir_alp.audit.findings import Findings
from tir_alp.audit.run import audit_run

__all__ = ["Findings", "audit_run"]
