"""The numbers of a chapter, each written down with what it takes to trust it."""

import os
import time
from pathlib import Path

import pandas as pd

from hallulib.storage import store


class Ledger:
    """The numbers that a chapter measured.

    Args:
        chapter: the name of its folder of one JSON file per number.
        seed: of the chapter.
        **settings: parameters of the chapter that its numbers depend on.
    """

    def __init__(self, chapter: str, *, seed: int, **settings: object):
        # each cell of a grid has a folder of its own
        results = os.environ.get("HALLULIB_RESULTS", store.runs_folder() / "results")
        self.folder, self.seed, self.settings = Path(results) / chapter, seed, settings
        self.measured: dict[str, dict] = {}
        self._since = time.monotonic()

    def keep(
        self,
        name: str,
        value: float,
        *,
        n: int,
        low: float | None = None,
        high: float | None = None,
        **settings: object,
    ) -> None:
        """Write down a number; the seconds it took run from the one before.

        Args:
            name: of its file.
            value: NaN becomes null in the file, as JSON has none.
            n: how many things it was measured on.
            low: end of its 95 % interval, where it has one.
            high: the other end.
            **settings: of this measurement alone.
        """
        ends = {"value": value, "low": low, "high": high}
        number = {end: None if v is None or v != v else float(v) for end, v in ends.items()}
        self.measured[name] = number | {"n": n}
        now = time.monotonic()
        origin = {"seed": self.seed, "settings": self.settings | settings}
        origin |= {"seconds": round(now - self._since, 2), "made_with": store.provenance()}
        store.write_json(self.folder / f"{name}.json", self.measured[name] | origin)
        self._since = now

    def values(self) -> dict[str, float]:
        """Name and value of every number, to be glued into the text."""
        return {name: number["value"] for name, number in self.measured.items()}

    def table(self) -> pd.DataFrame:
        """One row per number: value, ends of its interval, n."""
        return pd.DataFrame(self.measured).T.rename_axis("number").astype(float)
