"""Likelihoods: error against evaluations, and the adaptive decision against the exact density.

python tests/benchmarks/bench_likelihood.py [--data FOLDER --model FOLDER] [--images 6]

Three tables from one run on one trained model (the shipped one of the phantom by default):

1. The standard recipe (probability flow in time, SciPy's RK45 with rtol = atol = 1e-5, one probe)
   and several solvers on the same images, classes and probe: evaluations, distance from a much
   finer solve, share of equal decisions.
2. Time and accuracy of `decide` and of the exact density on the same images, in turn, with a
   paired interval over patients; where to look was learnt from 60 validation images.
3. Peak memory and time against the number of images and of classes.
"""

import argparse
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.integrate import solve_ivp

from hallulib.data import imageset
from hallulib.diffusion import unet
from hallulib.diffusion.sde import per_image
from hallulib.evidence import metrics
from hallulib.likelihood.bound import (
    Noises,
    best_band,
    common_errors,
    decide,
    informative_levels,
    leads,
)
from hallulib.likelihood.density import LogDensity, dequantise, directions, log_density
from hallulib.storage.store import SHIPPED

sys.path.insert(0, str(Path(__file__).parents[1] / "likelihood"))
from test_density import by_torchdiffeq

CURVE = [("adams", n) for n in (8, 12, 16, 20, 24, 28, 32, 48, 64)]
# pairs, pairs before a class may be dropped, confidence, noise with both signs
RACES = [(1, 1, 1.0, False), (2, 2, 1.0, False), (1, 1, 1.0, True), (2, 2, 1.0, True)]
RACES += [(6, 2, 0.9, False), (3, 2, 0.9, True), (16, 4, 0.99, True), (32, 8, 0.99, False)]
CURVE += [("rk4", 6), ("rk4", 12), ("rk4", 24), ("heun2", 16), ("heun2", 32)]


def standard_recipe(model, x, y, probe):
    """Log-density as published: SciPy's adaptive Runge-Kutta in time; and its evaluations."""
    sde, shape, n = model.sde, x.shape, x[0].numel()

    def slope(t, state):
        now = torch.tensor(state[: x.numel()], dtype=torch.float32).view(shape)
        times = torch.full((len(x),), t, dtype=torch.float32)
        with torch.enable_grad():
            now.requires_grad_()
            score = -model(now, times, y) / per_image(sde.alpha_sigma(times)[1], now)
            velocity = sde.probability_flow(lambda *_: score, now, times)
            gradient = torch.autograd.grad((velocity * probe).sum(), now)[0]
        divergence = (gradient * probe).flatten(1).sum(1)
        return np.concatenate([velocity.detach().flatten().numpy(), divergence.numpy()])

    start = np.concatenate([x.flatten().numpy(), np.zeros(len(x))])
    found = solve_ivp(slope, (sde.t_train, 1.0), start, method="RK45", rtol=1e-5, atol=1e-5)
    end = torch.from_numpy(found.y[: len(x) * n, -1]).view(shape)
    return sde.prior_log_prob(end) + torch.from_numpy(found.y[len(x) * n :, -1]), found.nfev


def error_against_evaluations(model, x):
    """Table 1."""
    seconds, finest = _timed(log_density, model, x, steps=160)
    print(f"reference: 161 evaluations, {seconds:.0f} s; {len(x)} images")
    print("solver          evaluations  seconds  bits/dim: mean off, largest  same decision")
    for solver, steps in [("RK45 in t", 0), *CURVE]:
        if steps:
            by = None if solver == "adams" else by_torchdiffeq(solver)
            seconds, found = _timed(log_density, model, x, steps=steps, solver=by)
        else:
            seconds, found = _timed(by_standard_recipe, model, x)
        off = (found.value - finest.value) / (x[0].numel() * math.log(2))
        same = (found.value.argmax(1) == finest.value.argmax(1)).double().mean()
        print(
            f"{solver} {steps or '':<8}{found.evaluations:>11}{seconds:>9.1f}{off.mean():>18.4f}"
            f"{off.abs().max():>9.4f}{same:>15.2f}",
            flush=True,
        )


def by_standard_recipe(model, x):
    """All classes of all images in one solve, with the probe of `log_density`."""
    k = len(model.labels)
    y = torch.arange(k).repeat(len(x))
    probe = directions(x, 1)[0]
    value, evaluations = standard_recipe(model, x.repeat_interleave(k, 0), y, probe)
    return LogDensity(value.view(len(x), k, 1), evaluations)


def _timed(function, *args, **settings):
    start = time.perf_counter()
    found = function(*args, **settings)
    return time.perf_counter() - start, found


def decision_against_exact(model, x, y, patients, known, band):
    """Table 2. What all known images have in common is subtracted, as `ScoreClassifier` does."""
    exact_s, exact = _timed(log_density, model, dequantise(x), steps=28)
    exact = exact.value.argmax(1)
    print(
        f"exact, 29 evaluations: {exact_s / len(x):.3f} s an image, accuracy "
        f"{(exact == y).double().mean():.3f}, {len(x)} images"
    )
    levels = informative_levels(model, known)
    for pairs, first, confidence, both in RACES:
        # one band says most at once
        noises = Noises(pairs, band if pairs < 3 else levels, antithetic=both)
        offsets = common_errors(model, known, noises)
        told = dict(first=first, confidence=confidence, offsets=offsets)
        seconds, found = _timed(decide, model, x, noises, **told)
        right = [(d == y).numpy().astype(float) for d in (found.log_ratio.argmax(1), exact)]
        gap = metrics.bootstrap(lambda a, b: float((a - b).mean()), *right, groups=patients)
        signs = "both signs" if both else "one sign"
        print(
            f"decide, at most {pairs} pairs, {signs}, confidence {confidence}: "
            f"{seconds / len(x):.4f} s, {found.evaluations.double().mean():.1f} evaluations over "
            f"{len(model.labels)} classes, {exact_s / seconds:.1f} times faster, accuracy "
            f"{right[0].mean():.3f}, difference {gap}",
            flush=True,
        )


def growth(folder):
    """Table 3, each size in a process of its own."""
    for images, classes in ((8, 2), (32, 2), (128, 2), (32, 4)):
        command = [sys.executable, __file__, "--model", str(folder), "--grow"]
        told = subprocess.run(
            [*command, str(images), str(classes)], capture_output=True, text=True, check=True
        )
        print(f"{images} images, {classes} classes: {told.stdout.strip()}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="lesions")
    parser.add_argument("--model", default=str(SHIPPED / "score-lesions"))
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--decisions", type=int, default=100)
    parser.add_argument("--grow", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = unet.load(args.model).requires_grad_(False)
    model.to(memory_format=torch.channels_last)
    if args.grow:
        images, classes = args.grow
        x = torch.rand((images, *model.network.shape)) * 2 - 1
        seconds, _ = _timed(log_density, model, x, model.labels[:classes], steps=4, batch=16)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{seconds:.2f} s, peak {peak:.0f} MiB")
        return
    images = imageset.open(args.data, model.network.shape[1])
    scheme = next(s for s in images.schemes if set(images.classes(s)) >= set(model.labels))
    test = images.select("test", labelled=scheme)
    rows = np.sort(np.random.default_rng(0).choice(len(test), args.decisions, replace=False))
    x, y = test.tensor(rows), test.labels(scheme)[rows]
    known = images.select("val", labelled=scheme)
    seen = np.sort(np.random.default_rng(1).permutation(len(known))[:60])
    x_known = known.tensor(seen)
    band = best_band(model.sde, leads(model, x_known, known.labels(scheme)[seen]))
    if args.images:
        error_against_evaluations(model, dequantise(x[:: args.decisions // args.images]))
    patients = test.table["patient"].to_numpy()[rows]
    decision_against_exact(model, x, y, patients, x_known, band)
    growth(args.model)


if __name__ == "__main__":
    main()
