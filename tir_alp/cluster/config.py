"""The cluster section of a config: the processes over which a run is spread."""

from __future__ import annotations

from pydantic import Field, model_validator

from tir_alp.algorithm.presets import Section


class ActorsConfig(Section):
    """Actors of one kind, all alike. Each is one process on one node."""

    count: int = Field(default=1, ge=0)
    """Number of actors."""
    cpus: float = Field(default=1.0, gt=0.0)
    """CPU cores that Ray reserves for each actor."""
    gpus: float = Field(default=0.0, ge=0.0)
    """GPUs of each actor. Two actors with half a GPU each share one, e.g. an engine and a rank."""
    image: str | None = None
    """Docker image that each actor runs in; None: what is installed on its node."""


class ClusterConfig(Section):
    """The processes over which a run is spread, and when one of them counts as lost."""

    address: str = "none"
    """`none`: one process, no cluster, and all other keys of this section are ignored. `local`: a
    Ray cluster on this machine, for this run. Else the address of a running cluster: `auto`, or
    `ray://HOST:10001`."""
    trainer: ActorsConfig = ActorsConfig()
    """Ranks of the trainer."""
    engines: ActorsConfig = ActorsConfig()
    """Engines, which sample."""
    environments: ActorsConfig = ActorsConfig()
    """Runners of environments and graders."""
    sandboxes: ActorsConfig = ActorsConfig(count=0)
    """Hosts of the sandbox that `env.kwargs.sandbox` describes; 0: each environment runner has its
    own."""
    spread: bool = False
    """Put actors on as many nodes as there are; else on as few as possible."""
    heartbeat_s: float = Field(default=5.0, gt=0.0)
    """Time between two health checks of an actor."""
    patience_s: float = Field(default=30.0, gt=0.0)
    """An actor that does not answer a health check within this time is killed and replaced."""
    start_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of an actor's start: placing the process, loading the model."""
    step_timeout_s: float = Field(default=3600.0, gt=0.0)
    """Deadline of a training step, and of taking new weights."""

    @property
    def is_used(self) -> bool:
        """Whether the run has processes other than its own."""
        return self.address != "none"

    @property
    def actors(self) -> dict[str, ActorsConfig]:
        """The actors by kind, in the order in which they are placed."""
        return {
            "trainer": self.trainer,
            "engines": self.engines,
            "environments": self.environments,
            "sandboxes": self.sandboxes,
        }

    @model_validator(mode="after")
    def _check_counts(self) -> ClusterConfig:
        for kind in ("trainer", "engines", "environments"):
            if self.actors[kind].count < 1:
                raise ValueError(f"cluster.{kind}.count is 0: a run needs at least one")
        return self
