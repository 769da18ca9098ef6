"""What the features see, and what each measure costs, on the embedded prostate images.

python tests/benchmarks/bench_quality.py [--size 32] [--images 500]

For every fault of rising strength: the Frechet distance in units of its floor (two real halves,
random splits), and the kernel distance in units of its standard deviation over these splits.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from data_prep.drawn import prostate
from hallulib.evidence import quality
from hallulib.evidence.metrics import auroc, bootstrap

sys.path.insert(0, str(Path(__file__).parents[1] / "evidence"))
from test_quality import FAULTS


def halves(size, n):
    """Two sets of n images, each of another patient: slices of one patient are no new evidence."""
    images, table, _ = prostate.prostate(size, 0, 30 * n, 8, 8, 8)
    shuffled = np.random.default_rng(0).permutation(len(table))
    _, first = np.unique(table.patient.to_numpy()[shuffled], return_index=True)
    chosen = np.random.default_rng(1).permutation(shuffled[first])[: 2 * n]
    x = torch.from_numpy(images[chosen]).float() / 127.5 - 1
    return x[: len(x) // 2], x[len(x) // 2 :]


def sensitivity(real, other):
    f, g = quality.features(real), quality.features(other)
    both, n, rng = torch.cat([f, g]), len(f), torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(both), generator=rng) for _ in range(10)]
    splits = [(both[o[:n]], both[o[n:]]) for o in orders]
    floor = np.mean([quality.frechet_distance(*split) for split in splits])
    spread = np.std([quality.kernel_distance(*split) for split in splits])
    print(
        f"{n} images a set, floor {floor:.4f}, here {quality.frechet_distance(f, g) / floor:.2f}"
    )
    for name, (apply, strengths) in FAULTS.items():
        described = [quality.features(apply(other, s)) for s in strengths]
        frechet = [quality.frechet_distance(f, d) / floor for d in described]
        kernel = [quality.kernel_distance(f, d) for d in described]
        print(
            f"{name:13s}{str(strengths):18s} Frechet / floor",
            *(f"{v:8.2f}" for v in frechet),
            "  kernel / spread",
            *(f"{k / spread:6.1f}" for k in kernel),
        )


def costs(real, other):
    f, g = quality.features(real), quality.features(other)
    rng = np.random.default_rng(0)
    y, scores = (
        rng.permuted(np.tile(np.arange(20) % 4, (1000, 1)), axis=1),
        rng.random((1000, 20, 4)),
    )
    calls = {
        "features": lambda: quality.features(real),
        "frechet_distance": lambda: quality.frechet_distance(f, g),
        "kernel_distance": lambda: quality.kernel_distance(f, g),
        "coverage": lambda: quality.coverage(f, g),
        "nearest": lambda: quality.nearest(real, other),
        "auroc, 1000 episodes": lambda: auroc(y, scores),
        "bootstrap of an AUROC": lambda: bootstrap(
            auroc, y[:20].ravel() > 1, scores[:20, :, 0].ravel()
        ),
    }
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        print(f"{name:22s}{time.perf_counter() - start:8.3f} s for {len(real)} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images", type=int, default=500)
    given = parser.parse_args()
    sets = halves(given.size, given.images)
    sensitivity(*sets)
    costs(*sets)
