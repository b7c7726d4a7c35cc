"""Gymnasium environments for language models: text only, never tokens, never torch.

Importing this package registers them:

    env = gymnasium.make("tir_alp.envs:PythonMath-v0")
"""

import gymnasium

gymnasium.register(id="PythonMath-v0", entry_point="tir_alp.envs.math_env:PythonMathEnv")
