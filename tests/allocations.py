"""How many bytes of tensors a function holds at once."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that `function`, its backward passes included, has made and not given up."""
    with _Allocations() as allocations:
        function()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Counts each storage from the operation that made it to its end, whichever thread lets go of it last."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage._cdata not in given:  # a view of what there was makes nothing
                self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (tensor.untyped_storage() for tensor in tree_iter(values) if isinstance(tensor, torch.Tensor))
