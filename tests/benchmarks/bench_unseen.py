"""One episode by hallucinated prototypes against the same by the support alone, in one run.

python tests/benchmarks/bench_unseen.py META HELD_OUT [--encoder NAME --weights FILE]

META is a joined image set, as for book/grids/unseen.ipynb, whose functions are timed. An episode
embeds its images, makes prototypes and compares; with hallucination, the prototypes are moved by
four draws of the diffusion in between. Trainings are short, since only the time matters here.
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
    """Print both times for each frozen encoder, and their ratio."""
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
    for name, encoder in space["encoders"].items():
        base = space["reduced"](*space["embeddings"][name])[1]
        learnt, axes = space["learnt_from"](base), torch.randn(encoder(x).shape[1], base.shape[1])

        def episode_by(hallucinate, encoder=encoder, learnt=learnt, axes=axes):
            v = (encoder(x) @ axes)[None]
            seen, queries = v[:, :ways], v[:, ways:]
            if not hallucinate:
                return bdc.similarity(queries, seen)
            centre = seen.mean(1, keepdim=True)
            _, drawn = space["prototypes"](seen - centre, *learnt)
            votes = drawn.unbind(-2)
            return torch.stack([bdc.similarity(queries - centre, p) for p in votes]).mean(0)

        times = {False: [], True: []}
        for i in range(2 * REPEATS + 2):  # in turns, the first of each to warm up
            start = time.perf_counter()
            episode_by(bool(i % 2))
            times[bool(i % 2)].append(time.perf_counter() - start)
        alone, moved = (np.median(times[kind][1:]) for kind in (False, True))
        print(f"{name}: {1000 * alone:.1f} ms, {1000 * moved:.1f} ms with hallucination", end=", ")
        print(f"ratio {moved / alone:.2f}")


if __name__ == "__main__":
    main()
