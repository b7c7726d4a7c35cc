"""The entry of a server's own process.

    python -m tir_alp.engines.servers.sglang_main SGLANG ARGUMENTS

It is `sglang.launch_server` with two things around it, and nothing of a trainer's process:

- The server dies with whoever started it, also by SIGKILL, and so does each process that it starts.
  SGLang sees to that once it is imported; until then, for many seconds, nothing would.
- On a machine without the CUDA kernels (`--device cpu`), stand-ins for two packages whose wheels
  are made for GPUs alone: `sgl_kernel` and `torchvision`. SGLang imports names of theirs and, for
  dense models on a CPU, calls none: its layers fall back to plain torch. A stand-in that is called
  after all raises NotImplementedError.

SGLang starts its processes by `spawn`, which imports this module again as `__mp_main__`. So both
are done at import, in those two roles only.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from types import ModuleType
from typing import Any

from tir_alp.engines.servers.lifetime import die_with_parent

KEY_VARIABLE = "TIR_ALP_SERVER_KEY"
"""What the server asks of its clients; a command line could be read by every user of the machine.
"""

_VISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def install_stand_ins() -> None:
    """Let SGLang be imported where its GPU kernels are not installed."""
    if importlib.util.find_spec("sgl_kernel") is None:
        sys.modules["sgl_kernel"] = _StandIn("sgl_kernel")
    if importlib.util.find_spec("torchvision") is None:
        importlib.import_module("transformers.processing_utils")  # replaces `transformers`: first
        from transformers.utils.import_utils import is_torchvision_available

        is_torchvision_available()  # it is remembered that there is none
        for name in _VISION:
            sys.modules[name] = _StandIn(name)
        # SGLang registers image processors at import; without torchvision there is no registry.
        setattr(sys.modules["transformers"], "AutoImageProcessor", _NoImages)  # noqa: B010


class _StandIn(ModuleType):
    """A module of which any name can be imported, and none can be called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.util.spec_from_loader(name, loader=None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"

        def refuse(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"{full_name} needs a GPU, or a build of SGLang's kernels")

        return refuse


class _NoImages:
    @staticmethod
    def register(*_: Any, **__: Any) -> None:
        """Forget about an image processor."""


if __name__ in ("__main__", "__mp_main__"):
    die_with_parent()
    if "cpu" in sys.argv:
        install_stand_ins()

if __name__ == "__main__":
    if key := os.environ.pop(KEY_VARIABLE, None):
        sys.argv.append(f"--api-key={key}")  # one word: a key may begin with a dash
    runpy.run_module("sglang.launch_server", run_name="__main__")
