"""One episode by hallucinated prototypes against the same by the support alone, in one run.

python tests/benchmarks/bench_unseen.py META HELD_OUT [--encoder NAME --weights FILE]

META is a joined image set, as for book/grids/unseen.ipynb, whose functions are timed. An episode
embeds its images, makes prototypes and compares; with hallucination, the prototypes are regressed,
or diffused by four draws, in between. Trainings are short, since only the time matters here.
"""

import argparse
import time
from pathlib import Path

import nbformat
import numpy as np
import torch

from hallulib.oneshot import bdc

NOTEBOOK = Path(__file__).parents[2] / "book" / "grids" / "unseen.ipynb"
REPEATS = 30


def main():
    """Print the time of each encoder, and the ratios to it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("meta")
    parser.add_argument("held_out")
    parser.add_argument("--encoder", default="none")
    parser.add_argument("--weights", default="none")
    given = parser.parse_args()
    sources = [c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    exec(sources[0], space := {})
    space |= dict(META=given.meta, HELD_OUT=given.held_out, ENCODER=given.encoder)
    space |= dict(WEIGHTS=given.weights, N_EPISODES=24, STEPS=0, SCORE_STEPS=3)
    last = max(i for i, source in enumerate(sources) if "def prototypes(" in source)
    for source in sources[1 : last + 1]:
        exec(source, space)
    test, episode = space["test"], space["episodes"][0]
    ways = len(episode.classes)
    x = test.tensor(np.concatenate([episode.support.ravel(), episode.query]))
    classifier = bdc.build(channels=x.shape[1], width=12).eval().requires_grad_(False)
    encoders = space["encoders"] | {"BDC of a ResNet-18": classifier.embed}
    base = space["reduced"](*space["embeddings"]["filter bank"])[1]
    learnt = space["learnt_from"](base)  # the time does not depend on the embedding
    for name, encoder in encoders.items():
        axes = torch.randn(encoder(x).shape[1], base.shape[1])

        def episode_by(kind, encoder=encoder, axes=axes):
            v = (encoder(x) @ axes)[None]
            seen, queries = v[:, :ways], v[:, ways:]
            if kind == "alone":
                return bdc.similarity(queries, seen)
            centre = seen.mean(1, keepdim=True)
            if kind == "regressed":
                return bdc.similarity(queries - centre, (seen - centre) @ learnt[0])
            drawn = space["prototypes"](seen - centre, *learnt)[1]
            votes = bdc.similarity(queries - centre, drawn.flatten(1, 2))
            return votes.unflatten(-1, drawn.shape[1:3]).mean(-1)

        times = {"alone": [], "regressed": [], "diffused": []}
        for kind in [*times] * (REPEATS + 1):  # in turns, the first of each to warm up
            start = time.perf_counter()
            episode_by(kind)
            times[kind].append(time.perf_counter() - start)
        median = {kind: np.median(found[1:]) for kind, found in times.items()}
        told = [f"{kind} {t / median['alone']:.2f}" for kind, t in median.items()]
        print(f"{name}: {1000 * median['alone']:.1f} ms; ratios: {', '.join(told)}")


if __name__ == "__main__":
    main()
