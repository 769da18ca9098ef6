"""Names for the tensors that travel through the library, and initial weights from a seed."""

import operator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Images = Float[Tensor, "batch channels height width"]
Times = Float[Tensor, " batch"]
PerImage = Float[Tensor, " batch"]
Labels = Int[Tensor, " batch"]
Latents = Float[Tensor, "batch latent_channels latent_height latent_width"]
Shots = Float[Tensor, "n_way _shots channels height width"]
AnyImages = Float[Tensor, "_ _ _ _"]  # fewer or more than others beside them


class seeded(TorchDispatchMode):
    """Networks that are built within, on the CPU, start at weights that the seed alone decides.

    Within, layers of PyTorch that this thread builds draw from a generator of their own the
    numbers that they would get after ``torch.manual_seed(seed)``; no other generator moves.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.rng = torch.Generator().manual_seed(operator.index(seed))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            kwargs = kwargs | {"generator": self.rng}
            # some, as randn, take a generator under another name than without
            func = getattr(func.overloadpacket, "generator", func)
        return func(*args, **kwargs)
