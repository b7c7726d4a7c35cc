"""A gateway over a scripted engine, for tests with real clients."""

from contextlib import asynccontextmanager

from tests.agents.templates import Scripted, encoder
from tir_alp.agents.gateway import Gateway
from tir_alp.agents.session import Session, SessionSettings


@asynccontextmanager
async def serve(engine: Scripted, template: str = "hermes", calls="template", **settings):
    """Yield the endpoint of one episode."""
    async with gateway(template, calls) as (made, encodes):
        yield made.open(Session(engine.generate, encodes, SessionSettings(**settings)))


@asynccontextmanager
async def gateway(template: str = "hermes", calls="template", **how):
    encodes = encoder(template, calls=calls)
    made = Gateway(encodes, "tiny", **how)
    await made.start()
    try:
        yield made, encodes
    finally:
        await made.close()
