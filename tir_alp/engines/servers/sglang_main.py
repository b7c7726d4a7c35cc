"""Entry point of an SGLang server's own process.

    python -m tir_alp.engines.servers.sglang_main SGLANG ARGUMENTS

It runs `sglang.launch_server` with two additions, and imports nothing of a trainer's process:

- The server ends when the process that started it ends, even by SIGKILL, and so does each process
  that the server starts. SGLang sees to that once it is imported; until then, for many seconds,
  nothing would.
- On a machine without the CUDA kernels (`--device cpu`) there are stand-ins for two packages whose
  wheels are built for GPUs alone: `sgl_kernel` and `torchvision`. SGLang imports names from them
  and, for dense models on a CPU, calls none: its layers fall back to plain torch. Calling a
  stand-in raises NotImplementedError. With `--enable-lora`, requests for pinned memory, which only
  speeds up copies to a GPU, and which torch refuses without one, get ordinary memory. With
  `--enable-return-routed-experts`, so does what SGLang keeps for copies from a GPU.

SGLang starts its processes by `spawn`, which imports this module again as `__mp_main__`. Therefore
both are done at import, and only under those two names.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from tir_alp.engines.servers.lifetime import die_with_parent

KEY_VARIABLE = "TIR_ALP_SERVER_KEY"
"""Environment variable with the server's API key. Every user of the machine could read it in a
command line."""

_VISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def install_stand_ins() -> None:
    """Let SGLang be imported where its GPU kernels are not installed."""
    if importlib.util.find_spec("sgl_kernel") is None:
        sys.modules["sgl_kernel"] = _StandIn("sgl_kernel")
    if importlib.util.find_spec("torchvision") is None:
        importlib.import_module("transformers.processing_utils")  # replaces `transformers`: first
        from transformers.utils.import_utils import is_torchvision_available

        is_torchvision_available()  # the answer "no" is cached
        for name in _VISION:
            sys.modules[name] = _StandIn(name)
        # SGLang registers image processors at import; without torchvision there is no registry.
        setattr(sys.modules["transformers"], "AutoImageProcessor", _NoImages)  # noqa: B010


class _StandIn(ModuleType):
    """A module from which any name can be imported, and none can be called."""

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


def use_ordinary_memory() -> None:
    """Let this thread's calls of torch ask for pinned memory, and get ordinary memory."""
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    class OrdinaryMemory(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            if func is Tensor.pin_memory:
                return args[0]
            given = dict(kwargs or {})
            given.pop("pin_memory", None)
            return func(*args, **given)

    OrdinaryMemory().__enter__()  # for the life of the process


def keep_routing_in_ordinary_memory() -> None:
    """Let SGLang keep the experts of tokens in memory that is not registered with CUDA."""
    common = importlib.import_module("sglang.srt.mem_cache.pool_host.common")

    def allocate(dims: Any, dtype: Any, device: str, pin_memory: bool, allocator: Any) -> Any:
        return allocator.allocate(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate


class _NoImages:
    @staticmethod
    def register(*_: Any, **__: Any) -> None:
        """Ignore an image processor."""


if __name__ in ("__main__", "__mp_main__"):
    die_with_parent()
    if "cpu" in sys.argv:
        install_stand_ins()
        if "--enable-lora" in sys.argv:
            use_ordinary_memory()
        if "--enable-return-routed-experts" in sys.argv:
            keep_routing_in_ordinary_memory()

if __name__ == "__main__":
    if key := os.environ.pop(KEY_VARIABLE, None):
        sys.argv.append(f"--api-key={key}")  # one word: a key may begin with a dash
    runpy.run_module("sglang.launch_server", run_name="__main__")
