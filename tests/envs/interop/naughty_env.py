"""An environment that does what its action says, to be run in a process of its own."""

import asyncio
import os
import sys
import time

import gymnasium


class NaughtyEnv(gymnasium.Env):
    """Actions: "say TEXT", "end REWARD", "hang", "die", "raise", "cancel" and "print"."""

    def __init__(self, refuse: bool = False):
        if refuse:
            raise ValueError("not today")

    def reset(self, *, seed=None, options=None):
        task = (options or {}).get("task", {})
        if task.get("refuse"):
            raise KeyError("no such task")
        return f"seed {seed}, task {sorted(task)}", {}

    def step(self, action):
        verb, _, rest = action.partition(" ")
        match verb:
            case "say":
                return rest, 0.0, False, False, {"said": rest}
            case "end":
                return "", float(rest), True, True, {}
            case "hang":
                time.sleep(1000)
            case "die":
                print("my last words", file=sys.stderr, flush=True)
                os._exit(7)
            case "cancel":
                raise asyncio.CancelledError("what now?")
            case "raise":
                raise RuntimeError("what now?")
        print("noise on stdout")
        return "printed", 0.0, False, False, {}


gymnasium.register(id="Naughty-v0", entry_point=f"{__name__}:NaughtyEnv")
