"""The numbers of a chapter, each written down with what it takes to trust it."""

import os
import time
from pathlib import Path

import pandas as pd

from hallulib.storage import store


class Ledger:
    """The numbers that a chapter measured, one JSON file each in a folder of the chapter's name.
    The ``settings`` are the parameters of the chapter that its numbers depend on.
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
        """Write down a number in a file of its name; the seconds it took run from the one before.
        It was measured on ``n`` things; ``low`` and ``high`` are the ends of its 95 % interval, if
        any, the ``settings`` are of this measurement alone. NaN becomes null, as JSON has none.
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
