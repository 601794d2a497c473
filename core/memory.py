"""The most memory that a step of learning takes, known before it is taken: the step itself, on tensors without content.

    need = weights + max over the step of Σ storages alive

`rehearsed` runs work as it stands, forward and backward, under PyTorch's FakeTensorMode: a tensor has a shape, a type
and a device there, costs nothing, and is kept for the way back exactly as long as the real one is. `Ledger` adds up
those that are alive. No number is fitted: what other blocks, types, casts of weights, kernels of attention, checkpoints
or resolutions change, the model's own code and PyTorch's choices for the device say.

Not counted is what a kernel uses inside of a single call and what an allocator holds for later: MARGIN is for those.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MARGIN = 1.15  # of a prediction: what is free has to be so much more
ASKS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__}


class Ledger(TorchDispatchMode):
    """While open, `now` is the bytes of the storages that were made and are alive, and `peak` the most that it was."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # two of three calls; nothing is made, and this is the short way
            return args[0].fake_device
        answer = func(*args, **kwargs or {})
        for tensor in tree_leaves(answer):
            if isinstance(tensor, FakeTensor):
                self.add(tensor, tensor.untyped_storage().nbytes())
        return answer

    def add(self, tensor: Tensor, size: int):
        """Count a tensor's storage as so many bytes from now until it is gone, unless it is counted already."""
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place not in self.seen:
            self.seen.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, place, size)

    def gone(self, place: int, size: int):
        self.seen.discard(place)
        self.now -= size


class Numbers(TorchFunctionMode):
    """While open, who asks what number is in a tensor without content hears 1."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in ASKS and isinstance(args[0], FakeTensor):
            ones = numpy.ones(args[0].shape, float if args[0].is_floating_point() else int)
            return getattr(ones, func.__name__)()
        return func(*args, **kwargs or {})


@contextmanager
def emptied(modules: Iterable[torch.nn.Module], twin: Callable[[Tensor], Tensor]):
    """While open, each weight and buffer of the modules is its twin."""
    places = [place for module in modules for m in module.modules() for place in (m._parameters, m._buffers)]
    own = [dict(place) for place in places]
    try:
        for place in places:
            place.update({name: twin(tensor) for name, tensor in place.items() if tensor is not None})
        yield
    finally:
        for place, tensors in zip(places, own):
            place.update(tensors)


def rehearsed(work: Callable[[], object], modules: Iterable[torch.nn.Module], device: torch.device) -> int:
    """The most bytes that `work` holds at once on a device, beside the weights of these modules that will be there.

    Nothing is computed. What `work` changes has to be its own. Raises what it raises.
    """
    # autograd counts devices on its first way back, and FakeTensorMode feigns one: a thread for that would run from
    # then on, and a fork could not learn
    torch.zeros(1, requires_grad=True).backward()
    ledger, fake = Ledger(), FakeTensorMode(allow_non_fake_inputs=True)

    def twin(tensor):
        with fake:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        ledger.add(made, 0)
        return made

    with emptied(modules, twin), fake, ledger, Numbers():
        work()
    return ledger.peak


def told(step: int, weights: int, free: int, tight: bool) -> str:
    """What is said before the first step: bytes of a step and of the weights, which have their place already, and of
    what is free beside them."""
    need, there = size(weights + step), size(weights + free)
    if step > free:
        return (f"Needs about {need} of memory even with blocks computed twice, and there are {there}: it is tried, "
                "and may run out. Lower the resolution, or close what else uses the card.")
    return f"Needs about {need} of memory{', with blocks computed twice' if tight else ''}, and there are {there}."


def size(memory: float) -> str:
    """Bytes in words: GB of 2^30 and MB of 2^20 bytes."""
    return f"{memory / 2**30:.1f} GB" if memory >= 2**30 else f"{memory / 2**20:.0f} MB"
