"""Another `forward` on modules for a while. Weights and state dict are never touched."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager

from torch import nn


@contextmanager
def swapped(pairs: Iterable[tuple[nn.Module, Callable]]):
    """While open, each module of the pairs has the forward that its function makes of the one before.

    What was there is put back, whatever happens inside, another extension's forward too.
    """
    done = []
    try:
        for module, forward_of in pairs:
            own, plain = "forward" in module.__dict__, module.forward
            module.forward = forward_of(plain)
            done.append((module, own, plain))
        yield
    finally:
        for module, own, plain in reversed(done):
            if own:
                module.forward = plain
            else:
                del module.forward
