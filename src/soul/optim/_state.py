"""Loading an optimizer's state as it was saved, where torch would round it to the dtype of the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch


@contextlib.contextmanager
def exact_state(
    rule: torch.optim.Optimizer, dtypes: Callable[[], Callable[[torch.Tensor, str], torch.dtype]] | None = None
) -> Iterator[None]:
    """Let the ``load_state_dict`` inside keep the dtype of all tensors.

    Or give them that of ``dtypes()(parameter, name)``, which is asked for when groups have been loaded.

    They are taken from the state dict as hooks before loading leave it, and before the hooks that follow.
    """
    source: dict[str, Any] = {}

    def restore(loaded: torch.optim.Optimizer) -> None:
        dtype_of = dtypes() if dtypes else None
        keys = chain.from_iterable(group["params"] for group in source["param_groups"])
        params = chain.from_iterable(group["params"] for group in loaded.param_groups)
        for key, p in zip(keys, params, strict=True):
            for name, value in source["state"].get(key, {}).items():
                if isinstance(value, torch.Tensor):
                    now = loaded.state[p][name]
                    dtype = dtype_of(p, name) if dtype_of else value.dtype
                    if dtype_of or now.dtype != dtype:
                        loaded.state[p][name] = value.to(now.device, dtype, copy=True)

    before = rule.register_load_state_dict_pre_hook(lambda _, state_dict: source.update(state_dict))
    after = rule.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
