"""The gateway alone: serves a model to agents, and writes down what it captured.

Every name in the URL is an episode of its own: `http://127.0.0.1:8000/NAME` for Anthropic's
clients, `http://127.0.0.1:8000/NAME/v1` for OpenAI's.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tir_alp.agents.capture import Capture
from tir_alp.agents.dialogue_encoder import DialogueEncoder
from tir_alp.agents.gateway import Endpoint, Gateway
from tir_alp.agents.session import Session, SessionSettings
from tir_alp.agents.trajectories import Verdict, to_trajectory
from tir_alp.config import AgentsConfig, Config, TransformersConfig
from tir_alp.engines.open import open_engine
from tir_alp.records.trajectories import to_record
from tir_alp.training.policy import load_tokenizer
from tir_alp.training.structure import new_origin
from tir_alp.types import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `tir-alp agents serve` is told."""

    model: str
    port: int
    key: str
    calls: AgentsConfig
    max_context_tokens: int
    max_turn_tokens: int
    seed: int
    out: Path | None


async def serve(
    options: ServeOptions, say: Callable[[str], None], stop: asyncio.Event | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, or until `stop` is set; then write the captures.

    Raises:
        ValueError: For what a user can fix.
    """
    stop = stop or _on_signal()
    if options.out is not None and options.out.exists():
        raise ValueError(f"{options.out} exists already: name another file with --out")
    origin = new_origin(options.model)
    encoder = DialogueEncoder(
        load_tokenizer(options.model),
        calls=options.calls.calls,
        end_token_ids=origin.end_token_ids,
        clock=origin.created,
    )
    settings = SessionSettings(
        seed=options.seed,
        max_context_tokens=options.max_context_tokens,
        max_turn_tokens=options.max_turn_tokens,
    )
    config = Config(engine=TransformersConfig(), seed=options.seed)
    sessions: dict[str, Session] = {}
    async with open_engine(config, options.model, 0, None, say) as engine:

        def open_session(name: str) -> Endpoint:
            own = replace(settings, uid=len(sessions))
            sessions[name] = Session(engine.generate, encoder, own)
            return gateway.open(sessions[name], name=name, key=options.key)

        gateway = Gateway(
            encoder,
            options.model,
            port=options.port,
            open_key=options.key,
            open_episode=open_session,
        )
        await gateway.start()
        say(f"serving {options.model!r}; every NAME is an episode of its own")
        say(f"  OPENAI_BASE_URL={gateway.url}/NAME/v1 OPENAI_API_KEY={options.key}")
        say(f"  ANTHROPIC_BASE_URL={gateway.url}/NAME ANTHROPIC_API_KEY={options.key}")
        try:
            await stop.wait()
        finally:
            await gateway.close()
            if options.out is not None:
                write_captures(options.out, {name: s.capture for name, s in sessions.items()})
                say(f"wrote {options.out}")


def write_captures(path: Path, captures: dict[str, Capture]) -> None:
    """Write the episodes that have completions, one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for number, (name, capture) in enumerate(captures.items()):
            if capture.num_exchanges:
                record = to_record(ungraded(capture, name, number))
                file.write(json.dumps({"episode": name} | record) + "\n")


def ungraded(capture: Capture, name: str, number: int) -> Trajectory:
    """Return an episode that nothing has graded."""
    verdict = Verdict("", "", 0.0, terminated=True, truncated=False, info={})
    return to_trajectory(
        capture,
        verdict,
        task_id=name,
        group_id=number,
        sequence_uid=number,
        train_on="all",
        timing={},
    )


def _on_signal() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, stop.set)
    return stop
