"""Gymnasium environments for language models: text only, never tokens, never torch.

Importing this package registers them:

    env = gymnasium.make("tir_alp.envs:PythonMath-v0")
"""

import gymnasium

gymnasium.register(id="PythonMath-v0", entry_point="tir_alp.envs.math_env:PythonMathEnv")
gymnasium.register(id="SingleTurnMath-v0", entry_point="tir_alp.envs.math_env:SingleTurnMathEnv")
gymnasium.register(id="MultiTool-v0", entry_point="tir_alp.envs.multi_tool_env:MultiToolEnv")
gymnasium.register(id="PythonCode-v0", entry_point="tir_alp.envs.code_env:PythonCodeEnv")
gymnasium.register(id="Agent-v0", entry_point="tir_alp.envs.agent_env:AgentEnv")
gymnasium.register(
    id="ReasoningGym-v0", entry_point="tir_alp.envs.reasoning_gym_env:ReasoningGymEnv"
)

for _id, _library in (
    ("Hosted-v0", "gymnasium"),
    ("Gem-v0", "gem"),
    ("SkyRLGym-v0", "skyrl-gym"),
    ("OpenEnv-v0", "openenv"),
    ("Verifiers-v0", "verifiers"),
):
    gymnasium.register(
        id=_id,
        entry_point="tir_alp.envs.interop.hosted_env:HostedEnv",
        kwargs={"library": _library},
    )
