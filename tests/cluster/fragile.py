"""An environment and a rank of the trainer that can kill their process.

They are apart from the tests because each actor imports them.
"""

import os
import signal
import threading

import gymnasium

from tir_alp.envs.spaces import TextSpace
from tir_alp.tools.sandbox import SandboxRefused
from tir_alp.training.ranks import RankFailed


class Fragile(gymnasium.Env[str, str]):
    """Echoes its actions; the task named "poison" kills its process.

    Args:
        sandbox: A file that stands for the sandbox hosts: they are lost while it is missing.
    """

    def __init__(self, sandbox="/"):
        if not os.path.exists(sandbox):
            raise SandboxRefused("no sandbox service can be used")
        self.observation_space = self.action_space = TextSpace()

    def reset(self, *, seed=None, options=None):
        assert options is not None
        self._task_id = options["task"]["task_id"]
        return "say", {}

    def step(self, action):
        if action == "wait":
            threading.Event().wait(60)
        if self._task_id == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        return action, 0.0, False, False, {"pid": os.getpid()}


class FragileRank:
    """Fail in the way that the scale chooses."""

    def perturb_weights(self, scale):
        if scale == 1:
            raise RankFailed("rank 0 stopped")
        if scale == 2:
            raise OSError("no space left")
        if scale == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait(60)


gymnasium.register("Fragile-v0", entry_point="tests.cluster.fragile:Fragile")
