"""The numbers of a chapter, each kept with what it takes to trust it, and its sentences."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Markdown, display

from hallulib import UserError
from hallulib.storage import store

MEASURED = "application/vnd.hallulib+json"  # what a grid takes from a chapter
FIELD = re.compile(r"\{([A-Za-z_][\w.+ ]*)(?::([^{}]*))?\}")


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
        value: Any,
        *,
        n: int = 0,
        low: float | None = None,
        high: float | None = None,
        **settings: object,
    ) -> None:
        """Write down a number in a file of its name; the seconds it took run from the one before.

        It was measured on ``n`` things; ``low`` and ``high`` are the ends of its 95 % interval, if
        any, the ``settings`` are of this measurement alone. NaN becomes null, as JSON has none.
        The value may be an `Interval`, which brings all of these, or None for what cannot be
        measured here.
        """
        if isinstance(value, tuple):
            value, low, high, n = value[:4]
        ends = {"value": value, "low": low, "high": high}
        number = {end: None if v is None or v != v else float(v) for end, v in ends.items()}
        self.measured[name] = number | {"n": n}
        now = time.monotonic()
        origin = {"seed": self.seed, "settings": self.settings | settings}
        origin |= {"seconds": round(now - self._since, 2), "made_with": store.provenance()}
        store.write_json(self.folder / f"{name}.json", self.measured[name] | origin)
        self._since = now

    def say(self, text: str, **more: object) -> None:
        """Show a text in Markdown with numbers of this page in it.

        ``{gain:.2f}`` is the number that was kept as gain, ``{gain:.2fi}`` the same with its
        interval, ``{gain:n}`` on how many things it was measured; ``more`` are texts and numbers
        that were not kept. Mathematics belongs in a cell of text, which braces do not disturb.

        Raises:
            UserError: a name that is neither kept nor given.

        Example:
            >>> ledger = Ledger("example", seed=0)
            >>> ledger.keep("gain", 0.031, low=0.012, high=0.05, n=40)
            >>> ledger.written("It gains {gain:.2fi} over {rival}.", rival="guessing")
            'It gains 0.03 [0.01, 0.05] over guessing.'
        """
        display(Markdown(self.written(text, **more)))

    def written(self, text: str, **more: object) -> str:
        """The text that `say` shows."""

        def put(field: re.Match) -> str:
            name, form = field[1], field[2] or ""
            if name in more:
                return format(more[name], form)
            if name not in self.measured:
                raise UserError(f"the text says {field[0]}, and no number is kept as {name}")
            number = self.measured[name]
            if form == "n":
                return f"{number['n']:,}"
            if number["value"] is None:
                return "(not measured here)"
            value, low, high = (
                None if number[end] is None else format(number[end], form.removesuffix("i"))
                for end in ("value", "low", "high")
            )
            return f"{value} [{low}, {high}]" if form.endswith("i") and low else f"{value}"

        return FIELD.sub(put, text)

    def side(self, name: str, above: str, below: str, neither: str, at: float = 0) -> str:
        """One of three texts: whether the interval of a number lies above, below or around
        ``at``.
        """
        low, high = (self.measured[name][end] for end in ("low", "high"))
        if low is None or low <= at <= high:
            return neither
        return above if low > at else below

    def publish(self, **series: object) -> None:
        """Hand the numbers to a grid that runs this chapter, with ``series`` of JSON."""
        held = {"measured": self.measured, "series": series}
        display({MEASURED: held, "text/plain": f"{len(self.measured)} numbers"}, raw=True)

    def values(self) -> dict[str, float]:
        """Name and value of every number."""
        return {name: number["value"] for name, number in self.measured.items()}

    def table(self) -> pd.DataFrame:
        """One row per number: value, ends of its interval, n."""
        return pd.DataFrame(self.measured).T.rename_axis("number").astype(float)
