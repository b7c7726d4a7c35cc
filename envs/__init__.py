"""Gymnasium environments for language models: text only, never tokens, never torch.

Importing this package registers them:

    env = gymnasium.make("tir_alp.envs:PythonMath-v0")
"""

import gymnasium

gymnasium.register(id="PythonMath-v0", entry_point="tir_alp.envs.math_env:PythonMathEnv")
gymnasium.register(id="SingleTurnMath-v0", entry_point="tir_alp.envs.math_env:SingleTurnMathEnv")
gymnasium.register(id="MultiTool-v0", entry_point="tir_alp.envs.multi_tool_env:MultiToolEnv")
gymnasium.register(id="PythonCode-v0", entry_point="tir_alp.envs.code_env:PythonCodeEnv")
gymnasium.register(
    id="ReasoningGym-v0", entry_point="tir_alp.envs.reasoning_gym_env:ReasoningGymEnv"
)
