"""A device other than the CPU, on a machine that has none.

It computes on the CPU. But, as on a GPU, an operation refuses to mix its tensors with those of the
CPU.

It uses the name of torch's device without memory, `meta`, which needs no driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

ELSEWHERE = torch.device("meta")
_TAKES_BOTH = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_"}
"""Operations for which a GPU also takes tensors of the CPU: copies, and indices."""


class _Remote(Tensor):
    """A tensor on the device. Its data is in `here`, which only the device reads."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> _Remote:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=ELSEWHERE,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor on another device has no array")


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _MadeOfNumbers(TorchFunctionMode):
    """Makes tensors of Python numbers on the CPU first: torch's own `meta` would drop the data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.new_tensor:
            return torch.tensor(*args[1:], dtype=args[0].dtype).to(args[0].device)
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            return func(args[0], torch.tensor(args[1]))
        if func is Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **kwargs)


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if torch.is_inference_mode_enabled():  # where a tensor subclass could not be viewed
        with torch.inference_mode(False), torch.no_grad():
            return _call(func, args, kwargs)
    given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    is_remote = [isinstance(each, _Remote) for each in given]
    name = func._schema.name.removeprefix("aten::")
    if any(is_remote) and name not in _TAKES_BOTH:
        alien = [each for each, far in zip(given, is_remote, strict=True) if not far and each.dim()]
        if alien:
            raise RuntimeError(
                f"{name} got tensors of two devices: {[each.shape for each in alien]}"
            )
    device = kwargs.get("device")
    goes_there = any(is_remote) if device is None else device == ELSEWHERE
    if name == "copy_":
        goes_there = is_remote[0]
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(_Remote, lambda each: each.here, (args, kwargs))
    result = func(*args, **kwargs)
    if name.endswith("_") and not name.startswith("_to"):
        return given[0]
    return tree_map_only(Tensor, _Remote, result) if goes_there else result


def moved(model: Any) -> Any:
    """A model on the device, with its tied weights tied as on a real device."""
    model = model.to(ELSEWHERE)
    model.tie_weights()
    return model


def begin() -> None:
    """Enable the device in this thread, until the thread ends."""
    _Device().__enter__()
    _MadeOfNumbers().__enter__()


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Enable the device in this thread while the block runs."""
    with _Device(), _MadeOfNumbers():
        yield ELSEWHERE
