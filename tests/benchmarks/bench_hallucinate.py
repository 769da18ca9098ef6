"""A joint episode with the few-step solver against 1,000 ancestral steps, in one run.

python tests/benchmarks/bench_hallucinate.py [--pool 24] [--episodes 200] [--train 100]

4-way, two hallucinated supports per class, 32 x 32 pixels, the shipped score model. Timed is one
whole training episode: adaptation, generation, classifier. The AUROC of the same test episodes is
compared in pairs; for it each sampler makes a pool of images per class (``--pool``) once, because
1,000 steps for every episode would take a day.
"""

import argparse
import time

import numpy as np
import torch

from hallulib.data import imageset
from hallulib.evidence.metrics import mean_interval, paired_difference
from hallulib.oneshot import experiment, joint
from hallulib.oneshot.hallucinate import Pool, Source
from hallulib.oneshot.joint import Method
from hallulib.storage.settings import vary

SLOW = "sampler=ancestral sampler_steps=1000"


def seconds(source, learner, images, episode, repeats):
    """Median wall time of one joint episode."""
    support, query = joint.pictures(images, episode, learner.classifier.log_scale.device)
    answers = torch.as_tensor(episode.answers, device=query.device)
    times = []
    for seed in range(repeats):
        start = time.perf_counter()
        source.adapt(episode, support, seed)
        extra = source.make(episode, support, learner.n, seed)
        learner.learn(support, extra, query, answers)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main():
    """Print both times, their ratio, and the paired difference of the AUROCs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=int, default=24)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--train", type=int, default=100)
    options = parser.parse_args()
    images = imageset.open("phantom", 32)
    standard = experiment.Trial("isup", "isup", counts=(0, 2), n_episodes=options.episodes)
    found = {}
    for name, changes in {"few steps": "nothing", "ancestral": SLOW}.items():
        trial = vary(standard, changes)
        source, classifiers = experiment.start(images, trial)
        learner = joint.Learner(classifiers[2], 2, 4, trial.fit)
        episode, repeats = trial.episodes(images, "train")[0], 5 if name[0] == "f" else 1
        source.make(episode, joint.pictures(images, episode, torch.device("cpu"))[0], 1, 0)  # warm
        found[name] = seconds(source, learner, images, episode, repeats)
        print(f"{name}: {found[name]:.2f} s per joint episode", flush=True)
    print(f"ratio: {found['ancestral'] / found['few steps']:.0f}", flush=True)

    _, classifiers = experiment.start(images, standard)
    *_, state = joint.meta_train(
        Source(),
        {0: classifiers[0]},
        images,
        standard.episodes(images, "train"),
        steps=options.train,
    )
    method = Method(2, state.learners[0].classifier)
    scores = {}
    for name, changes in {
        "few steps": "adapt_steps=0",
        "ancestral": SLOW + " adapt_steps=0",
    }.items():
        pooled = Pool(experiment.start(images, vary(standard, changes))[0], options.pool)
        tasks = standard.episodes(images, "test")
        parts = joint.evaluate([method], pooled, images, tasks, options.episodes)
        scores[name] = np.concatenate(list(parts))[:, 0]
        print(f"{name}: AUROC {mean_interval(scores[name])}", flush=True)
    print(f"few steps minus ancestral: {paired_difference(*scores.values())}")


if __name__ == "__main__":
    main()
