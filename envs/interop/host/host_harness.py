"""The program that plays a seat in verifiers: one request to the model per turn, and no tools.

It is a module of its own because verifiers finds such programs by module name.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import httpx
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harness import Harness
from verifiers.v1.runtimes import ProgramResult

__all__ = ["OneRequestHarness"]


class OneRequestHarness(Harness[HarnessConfig]):
    """Sends the conversation once and exits; verifiers resumes it after the other side's turn."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: Any,
        data: Any,
    ) -> ProgramResult:
        """Send one request. The endpoint that the request passes through records the reply."""
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        # Plain HTTP on this machine, so no certificates; the caller of the step has a deadline.
        async with httpx.AsyncClient(timeout=None, verify=False, trust_env=False) as client:
            reply = await client.post(
                f"{endpoint}/chat/completions",
                json={"model": ctx.model, "messages": messages},
                headers={"Authorization": f"Bearer {secret}"},
            )
        failed = reply.status_code >= 400
        return ProgramResult(int(failed), "", reply.text if failed else "")
