"""Latents against pixels, and a few-step solver against a thousand steps.

python tests/benchmarks/bench_latent.py [--data histology] [--size 64] [--steps 8] [--compare 0]
    [--samples 16]

1. Seconds per image of one training step and of one sampling run, for a score model of pixels and
   one of latents of the same width; with ``--compare N`` both are trained for N steps (the
   autoencoder for N / 2), and the Frechet distances of their samples from real images are told.
2. Share of steered samples that a selection admits, from 20 steps of DPM-Solver++ and from 1000
   ancestral steps, the same classes and networks in turn, with a paired interval over samples.
   It uses the runs of chapter 12's experiment (``--pretraining``, ``--training``, ``--factor``:
   PRETRAINING, STEPS and the setting there). ``--steps 0`` leaves table 1 out.
"""

import argparse
import time

import torch

from hallulib.augment import autoencoder, estimator, selection, steering
from hallulib.data import imageset
from hallulib.data.imageset import choose
from hallulib.diffusion import unet
from hallulib.diffusion.sample import draw
from hallulib.diffusion.train import pretrain
from hallulib.evidence import metrics, quality
from hallulib.evidence.resnet import train_resnet


def score_models(images, width, factor):
    """Fresh networks of the same width for pixels and for latents."""
    coder = autoencoder.build(size=images.size, channels=images.channels, width=16, factor=factor)
    channels, side, _ = coder.shape
    pixels = unet.build(size=images.size, channels=images.channels, width=width)
    return coder, {
        "pixels": pixels,
        "latents": unet.build(size=side, channels=channels, width=width),
    }


def per_image(model, x, steps):
    """Seconds per image of a training step, the first left out, and of 20 sampling steps."""
    loop = pretrain(model, x, steps=steps, batch_size=32)
    next(loop)
    start = time.perf_counter()
    for state in loop:
        last = state.ema
    training = (time.perf_counter() - start) / (steps - 1) / 32
    null = torch.full((16,), model.null)
    start = time.perf_counter()
    draw(last, null, steps=20, clip=False)
    return training, (time.perf_counter() - start) / len(null)


def speed(images, width, steps, compare):
    """Table 1."""
    x = images.unlabelled()
    coder, models = score_models(images, width, factor=4)
    seconds = {}
    for name, model in models.items():
        shape = model.network.shape
        noise = torch.randn((64, *shape), generator=torch.Generator().manual_seed(0))
        seconds[name] = per_image(model, noise, steps)
        print(
            f"{name} {shape}: {seconds[name][0]:.4f} s a training image, "
            f"{seconds[name][1]:.3f} s a sample",
            flush=True,
        )
    start = time.perf_counter()
    coder.eval().decode(torch.randn((16, *coder.shape)))
    decoding = (time.perf_counter() - start) / 16
    ratios = [a / b for a, b in zip(seconds["pixels"], seconds["latents"], strict=True)]
    whole = seconds["pixels"][1] / (seconds["latents"][1] + decoding)
    print(
        f"latents: training {ratios[0]:.1f} times faster, sampling {ratios[1]:.1f} times, "
        f"{whole:.1f} times with the decoding ({decoding:.4f} s)"
    )
    if compare:
        distances(images, x, width, compare)


def distances(images, x, width, steps):
    """Frechet distances after the same number of steps, beside that of other real images."""
    coder, models = score_models(images, width, factor=4)
    for _ in autoencoder.train(coder, x, steps=steps // 2):
        pass
    coder.eval().standardise(x[:500])
    real = quality.features(images.select("test").tensor()[:300])
    floor = quality.frechet_distance(real, quality.features(x[:300]))
    print(f"real images of the unlabelled split: {floor:.2f}")
    for name, model in models.items():
        shown = x if name == "pixels" else coder.encode(x)
        start = time.perf_counter()
        for state in pretrain(model, shown, steps=steps, batch_size=32, lr=4e-4):
            last = state.ema
        spent = time.perf_counter() - start
        made = draw(last, torch.full((300,), last.null), clip=name == "pixels")
        made = made if name == "pixels" else coder.decode(made)
        found = quality.frechet_distance(real, quality.features(made))
        print(f"{name}: {spent:.0f} s for {steps} steps, Frechet distance {found:.2f}", flush=True)


def admission(images, pretraining, training, n, factor):
    """Table 2."""
    scheme = images.schemes[0]
    trial = estimator.Trial(
        scheme,
        factor=factor,
        encoding=pretraining // 2,
        width=24,
        pretraining=pretraining,
        steering=training,
        resnet_steps=training,
    )
    found = estimator.pretrained(images, trial)
    known = images.select("train", labelled=scheme)
    labels = known.labels(scheme)
    rows = choose(labels, 0, 0, trial.share)
    x, y, names = known.tensor(rows), labels[rows], images.classes(scheme)
    judge = steering.NoisyClassifier(found.model, len(names))
    steering.train(judge, found.autoencoder.encode(x), y, steps=training)
    network = train_resnet(x, y, steps=training, width=trial.resnet_width)
    space = selection.FeatureSpace.fit(
        network, x, y, selection.copy_threshold(x, images.select("val").tensor())
    )
    wanted = torch.arange(len(names)).repeat_interleave(n)
    admitted, told = {}, dict(gradient_scale=trial.gradient_scale, clip=False, seed=0)
    for sampler, steps in (("dpm_solver", 20), ("ancestral", 1000)):
        start = time.perf_counter()
        z = steering.steered(found.model, judge, wanted, sampler=sampler, steps=steps, **told)
        seconds = time.perf_counter() - start
        verdicts = space.judge(found.autoencoder.decode(z), wanted, trial.confidence)
        admitted[sampler] = (verdicts["verdict"] == "admitted").to_numpy().astype(float)
        print(
            f"{sampler}: {steps} evaluations, {seconds:.1f} s, admitted "
            f"{metrics.mean_interval(admitted[sampler])}",
            flush=True,
        )
    print("difference", metrics.paired_difference(*admitted.values()))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="histology")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--compare", type=int, default=0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--pretraining", type=int, default=0)
    parser.add_argument("--training", type=int, default=300)
    parser.add_argument("--factor", type=int, default=4)
    args = parser.parse_args()
    images = imageset.open(args.data, args.size)
    if args.steps:
        speed(images, args.width, args.steps, args.compare)
    if args.pretraining:
        admission(images, args.pretraining, args.training, args.samples, args.factor)


if __name__ == "__main__":
    main()
