"""Images per second of the training loop against a bare loop over the same network, in one run.

python tests/benchmarks/bench_train.py [--size 32] [--width 32] [--batch 32] [--rounds 7]

On a GPU the bare loop is the step of the stock ``diffusers`` unconditional training example:
bf16 autocast, AdamW, host-side loss, images moved to the device at every step.
"""

import argparse
import statistics
import time

import torch
from diffusers import DDPMScheduler

from hallulib.diffusion import unet
from hallulib.diffusion.train import pretrain


def stock_steps(model, images, batch, device):
    """The stock example: a scheduler adds noise, the loss is read at every step."""
    network, scheduler = model.network, DDPMScheduler(1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    null = torch.full((batch,), model.null, device=device)
    while True:
        clean = images[torch.randint(len(images), (batch,))].to(device)
        noise = torch.randn_like(clean)
        t = torch.randint(1000, (batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            answer = network(scheduler.add_noise(clean, noise, t), t, null)
            loss = torch.nn.functional.mse_loss(answer.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def bare_steps(model, images, batch, device):
    """Forward, backward and Adam, nothing else: what the machine can do."""
    network = model.network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    null = torch.full((batch,), model.null, device=device)
    x, t = images[:batch].to(device), torch.rand(batch, device=device) * 999
    while True:
        (network(x, t, null) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def seconds(steps, n, device):
    start = time.perf_counter()
    for _ in range(n):
        next(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps per round")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.rand(4096, 1, options.size, options.size) * 2 - 1
    build = lambda: unet.build(size=options.size, width=options.width).to(device)
    reference = stock_steps if device.type == "cuda" else bare_steps
    ours = pretrain(build(), images.to(device), steps=10**6, batch_size=options.batch, folder=None)
    theirs = reference(build(), images, options.batch, device)
    for loop in (ours, theirs):  # compile, allocate, warm up
        seconds(loop, 5, device)
    ratios, rates = [], []
    for _ in range(options.rounds):  # in turn, so that a slow machine slows both
        a, b = (seconds(loop, options.steps, device) for loop in (ours, theirs))
        ratios.append(b / a)
        rates.append(options.batch * options.steps / a)
    print(f"{device.type}, {options.size} px, width {options.width}, batch {options.batch}")
    print(f"hallulib: {statistics.median(rates):.0f} images/s (median)")
    print(
        f"speed relative to {reference.__name__}: median {statistics.median(ratios):.3f},"
        f" range {min(ratios):.3f} to {max(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
