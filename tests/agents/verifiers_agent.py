"""An agent of verifiers with its Bash harness, whole; run by an interpreter that has the library.

    python verifiers_agent.py QUESTION

Its interception server stands between the harness and the model. The harness has `uv` make an
environment for its program.
"""

import asyncio
import os
import sys

import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]


async def solve(question: str) -> str:
    config = vf.AgentConfig.model_validate(
        {
            "harness": {"id": "bash", "edit": False},  # the tiny model can call one tool only
            "runtime": {"type": "subprocess"},
            "model": "policy",
            "client": {
                "type": "eval",
                "base_url": os.environ["OPENAI_BASE_URL"],
                "api_key_var": "OPENAI_API_KEY",
            },
            "max_turns": 3,
        }
    )
    trace = await vf.make_agent(config).run(vf.Task(vf.TaskData(idx=0, prompt=question)))
    if not trace.ok:
        sys.exit(f"the rollout failed: {trace.errors}")
    return trace.root_reply or ""


if __name__ == "__main__":
    print(asyncio.run(solve(sys.argv[1])))
