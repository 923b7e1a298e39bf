"""Batches that the worker processes of a data loader make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info


def collate_and_share(collate: Callable[[Any], Any], items: Any) -> Any:
    """Return `collate(items)`. In a worker process, the tensors of the result are in shared memory.

    Otherwise torch would move them there in a thread of the worker. If that fails, the thread drops the batch, and the
    data loader waits for it forever.

    Args:
        collate: function that makes a batch: a tensor, or tuples, lists and dicts that hold tensors.
        items: its argument.

    Raises:
        OSError: if a worker cannot get shared memory for the batch.
    """
    batch = collate(items)
    if get_worker_info() is not None:
        try:
            for tensor in _tensors(batch):
                tensor.share_memory_()
        except RuntimeError as error:
            raise OSError(
                f"a worker process cannot pass its batch on through shared memory: {error}. Give /dev/shm more space "
                "(--shm-size of a container), use fewer workers, or none"
            ) from error
    return batch


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
