"""Names for the tensors that travel through the library; tests check their axes."""

from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]
Times = Float[Tensor, " batch"]
PerImage = Float[Tensor, " batch"]
Labels = Int[Tensor, " batch"]
Latents = Float[Tensor, "batch latent_channels latent_height latent_width"]
