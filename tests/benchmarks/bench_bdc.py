"""Forward and backward of the BDC matrix against its published formula, in one run.

python tests/benchmarks/bench_bdc.py [--rounds 9] [--positions 16]

The formula multiplies by matrices of ones where sums are meant (Xie et al. 2022). Both run in
turn on the same feature maps, so that a slow machine slows both; a second row adds the vector of
the upper triangle, as the layer does.
"""

import argparse
import statistics
import time

import torch

from hallulib.oneshot.bdc import bdc_matrix, to_vector

SIZES = {64: 64, 256: 32, 640: 16}  # channels: maps in a batch


def published_matrix(features, scale, eps=1e-5):
    """The equations as printed: distances and centring by products with all-ones matrices."""
    n, c, _ = features.shape
    identity = torch.eye(c, device=features.device).expand(n, c, c)
    ones = torch.ones(n, c, c, device=features.device)
    gram = features @ features.mT
    squared = (ones @ (gram * identity) + (gram * identity) @ ones - 2 * gram).clamp(min=0)
    distance = (scale * squared + eps).sqrt()
    rows, columns = distance @ ones / c, ones @ distance / c
    return distance - rows - columns + ones @ distance @ ones / c**2


def published_vector(matrices):
    """The upper triangle by a list of positions, without the factor of sqrt(2)."""
    c = matrices.shape[-1]
    positions = torch.ones(c, c, device=matrices.device).triu().flatten().nonzero().squeeze(1)
    return matrices.flatten(1)[:, positions]


def seconds(function, features, scale, weight):
    """Time of one forward and backward pass."""
    start = time.perf_counter()
    torch.autograd.grad(function(features, scale), [features, scale], weight)
    if features.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name, ours, published, features, scale, rounds):
    """Print the median time of each and the ratios of neighbours."""
    weight = torch.randn_like(ours(features, scale))
    pair = lambda: [seconds(f, features, scale, weight) for f in (ours, published)]
    pair()  # allocate, warm up
    times = [pair() for _ in range(rounds)]
    ratios = [theirs / mine for mine, theirs in times]
    mine, theirs = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"{features.shape[1]} channels, batch {len(features)}, {name}: {mine:.1f} ms, published "
        f"{theirs:.1f} ms; ratio median {statistics.median(ratios):.1f},"
        f" range {min(ratios):.1f} to {max(ratios):.1f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--positions", type=int, default=16)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    print(f"{device.type}, {torch.get_num_threads()} threads, {options.positions} positions")
    scale = torch.tensor(0.5 / options.positions, device=device, requires_grad=True)
    ours = lambda x, scale: to_vector(bdc_matrix(x, scale))
    published = lambda x, scale: published_vector(published_matrix(x, scale))
    for channels, batch in SIZES.items():
        shape = batch, channels, options.positions
        features = torch.randn(shape, device=device, requires_grad=True)
        torch.testing.assert_close(
            bdc_matrix(features, scale), published_matrix(features, scale), rtol=0, atol=1e-4
        )
        compare("matrix", bdc_matrix, published_matrix, features, scale, options.rounds)
        compare("vector", ours, published, features, scale, options.rounds)


if __name__ == "__main__":
    main()
