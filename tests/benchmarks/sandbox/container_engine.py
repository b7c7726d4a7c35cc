"""A Docker engine with our image, at DOCKER_HOST while a benchmark runs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.benchmarks.sandbox.process_per_call import IMAGE


@contextmanager
def engine_with_image() -> Iterator[str]:
    """Start the engine of the tests and build the image; undo all of it at the end.

    Yields:
        "" if DOCKER_HOST leads to it, otherwise the reason why there is none.
    """
    with ExitStack() as stack:
        try:
            tests = importlib.import_module("tests.tools.sandbox.docker_engine")
        except ImportError as error:  # for example of the SDK
            yield f"no engine of its own: {error}"
            return
        try:
            engine = stack.enter_context(tests.docker_engine())
            tests.make_base_image(engine)
            built = tests.build_sandbox_image(engine)
        except tests.ContainerEngineUnavailable as error:
            yield f"no engine of its own: {error}"
            return
        engine.client().images.get(built).tag(IMAGE)
        stack.callback(os.environ.pop, "DOCKER_HOST", None)
        os.environ["DOCKER_HOST"] = engine.address
        yield ""
