"""What the scikit-learn estimators share: images as rows of a table, and files without pickle."""

import itertools
import json
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from sklearn.base import BaseEstimator
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from hallulib import UserError
from hallulib.shapes import Images
from hallulib.storage import disk, store
from hallulib.storage.settings import Positive, Seed, check, needed

Others = Float[Tensor, "_others channels height width"]  # fewer or more than the labelled ones
STATE, TENSORS = "estimator.json", "estimator.safetensors"
PARTS = "parameters", "fitted"
FROM_0 = "and none is below 0; values in [-1, 1] are needed, which x * 2 - 1 makes of [0, 1]"


class OneClass(UserError, ValueError):
    """Labels of one class; scikit-learn's own tools expect a ValueError."""


@dataclass(eq=False, repr=False, kw_only=True)
class ImageEstimator(BaseEstimator):
    """An estimator whose rows are square images.

    Images may come as rows ``(n, channels * side * side)``, as ``(n, side, side)`` or as
    ``(n, channels, side, side)``, in an array, a tensor, a list or a table. Whole numbers of any
    type are grey levels, 0 black to 255 white; other numbers are in [-1, 1]. ``channels`` are
    those of images that come as rows, ``device`` is a GPU if there is one, and the
    ``random_state``, a whole number, seeds all.

    Attributes:
        keeps: what an estimator keeps besides numbers, tables and arrays: attribute -> its
            dataclass, or the functions that write it into a folder and read it again.
    """

    keeps = dict[str, Any]()
    # scikit-learn sets anything, and fit refuses what these are not
    channels: Positive = 1
    device: Annotated[torch.device | str | None, needed("'cpu', 'cuda' or None is needed")] = None
    random_state: Seed = 0

    def _first(self, X, y) -> tuple[Images, np.ndarray]:
        """Images of a fit, and the position of the class of each in ``classes_``."""
        check(self)
        rows, y = validate_data(self, self._flat(X), y)
        check_classification_targets(y)
        classes, position = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise OneClass(f"1 class found, {str(y[0])!r}; at least 2 classes are needed")
        images = self._images(rows)
        if _from_0(rows, images):
            raise UserError(f"{_reach(images)}, {FROM_0}")
        self.classes_, self.darkest_ = classes, float(images.min())
        return images, position

    def _further(self, X, learns: bool = False) -> Images:
        """Images of the same size as those of the fit, to answer for or to learn from."""
        check_is_fitted(self)
        check(self)
        rows = validate_data(self, self._flat(X), reset=False)
        images = self._images(rows)
        # an estimator that was saved by an older version does not know how dark its images were
        if _from_0(rows, images) and getattr(self, "darkest_", -1) < 0:
            told = f"{_reach(images)}, where images of the fit are below 0, {FROM_0}"
            if learns:
                raise UserError(told)
            warnings.warn(told, UserWarning, stacklevel=3)
        return images

    def _known(self, y) -> np.ndarray:
        """Labels of further images, all among those of the fit."""
        y = column_or_1d(y)
        strange = y[~np.isin(y, self.classes_)]
        if len(strange):
            told = f"label {str(strange[0])!r} was not among those of the training"
            raise UserError(f"{told}: {', '.join(map(str, self.classes_))}")
        return y

    def _flat(self, X) -> object:
        """Images of any form as rows; what is no image goes on as it is."""
        if isinstance(X, Tensor):
            X = (X.float() if X.dtype == torch.bfloat16 else X).numpy(force=True)
        if isinstance(X, list | tuple):
            X = np.asarray(X)
        if isinstance(X, np.ndarray) and X.ndim in (3, 4):
            # as many numbers in another order would be other images
            channels, height, width = X.shape[1:] if X.ndim == 4 else (1, *X.shape[1:])
            if channels != self.channels or height != width:
                raise UserError(
                    f"images of shape {X.shape[1:]} found; ({self.channels}, side, side) is needed"
                )
            X = X.reshape(len(X), channels * height * width)
        return X

    def _images(self, rows: np.ndarray) -> Images:
        """Rows as images in [-1, 1]."""
        side = round((rows.shape[1] / self.channels) ** 0.5)
        if side**2 * self.channels != rows.shape[1]:
            raise UserError(
                f"rows have {rows.shape[1]} features; channels * side * side are needed, "
                f"with {self.channels} channels"
            )
        rows = np.ascontiguousarray(_scaled(rows))  # as tensors are: no steps backwards
        return torch.from_numpy(rows.reshape(len(rows), self.channels, side, side))

    @property
    def _seed(self) -> int:
        """``random_state`` as PyTorch takes it."""
        return int(self.random_state)

    def _on(self) -> str:
        """The device to work on."""
        there = torch.cuda.is_available()
        device = str(self.device or ("cuda" if there else "cpu"))
        if not re.fullmatch(r"cpu|mps|xpu" + r"|cuda(:\d+)?" * there, device):
            known = "'cpu', 'cuda' or None" if there else "PyTorch finds no GPU: 'cpu' or None"
            raise UserError(f"device is {device!r}; {known} is needed")
        return device

    def save(self, folder: Path | str) -> None:
        """Write the fitted estimator: JSON, safetensors and folders of networks, no pickle. What
        the folder holds stays readable until it is replaced, in one step, as a whole.

        Raises:
            NotFittedError: it is not fitted.
            UserError: a parameter of a kind that cannot be written, or a full disk.
        """
        check_is_fitted(self)
        folder = Path(folder)
        # the files that STATE names stay until it names these
        place = next(f for n in itertools.count() if not (f := folder / f"files-{n}").exists())
        learnt = (name for name in vars(self) if name.endswith("_") and name[0] != "_")
        fitted = {name: getattr(self, name) for name in learnt}
        tensors: dict[str, Tensor] = {}
        with disk.whole_files(place) as files:
            state: dict[str, Any] = {
                part: {k: self._kept(v, f"{part}.{k}", files, tensors) for k, v in values.items()}
                for part, values in zip(PARTS, (self.get_params(deep=False), fitted), strict=True)
            }
            save_file(tensors, files / TENSORS)
        state |= {"estimator": type(self).__name__, "made_with": store.provenance()}
        state |= {"place": place.name, "sha256": disk.checksums(place)}
        store.write_json(folder / STATE, state | {"checksum": store.key(state)})
        for other in {*folder.glob("files-*")} - {place}:
            shutil.rmtree(other, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path | str, **parameters: object) -> "ImageEstimator":
        """Read what `save` wrote, but for ``parameters`` given here, such as ``device="cpu"``.

        Raises:
            UserError: there is no such estimator, or a file of it has changed.
        """
        folder = Path(folder)
        try:
            state = json.loads((folder / STATE).read_text())
            files = _intact(folder, state)
            if state["estimator"] != cls.__name__:
                raise ValueError(f"it holds a {state['estimator']}")
            tensors = load_file(files / TENSORS)
            given, fitted = (
                {k: cls._read(v, f"{part}.{k}", files, tensors) for k, v in state[part].items()}
                for part in PARTS
            )
            estimator = cls(**given | parameters)
        except Exception as fault:  # an impossible value makes the libraries throw anything
            what = (str(fault) or "nothing more is known").splitlines()[0]
            raise UserError(
                f"{folder} is not a saved {cls.__name__} ({type(fault).__name__}: {what}); it "
                f"needs {STATE} and the files that it names, as save wrote them"
            ) from fault
        for name, value in fitted.items():
            if isinstance(value, torch.nn.Module):
                value.to(estimator._on())
            setattr(estimator, name, value)
        return estimator

    def _kept(self, value: Any, name: str, folder: Path, tensors: dict[str, Tensor]) -> Any:
        """A value as JSON; what JSON cannot hold goes to the tensors or into a folder."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, list | tuple):
            items = [self._kept(v, name, folder, tensors) for v in value]
            return {"kind": "list", "items": items}
        if isinstance(value, pd.DataFrame):
            return {"kind": "table", "columns": value.to_dict("list")}
        if isinstance(value, np.ndarray) and value.dtype.kind in "USOb":
            return {"kind": "array", "dtype": value.dtype.kind, "items": value.tolist()}
        if isinstance(value, np.ndarray | Tensor):
            tensors[name] = torch.as_tensor(value).contiguous().cpu()
            return {"kind": "tensor" if isinstance(value, Tensor) else "numbers"}
        keeper = self.keeps.get(name.split(".")[1])
        if keeper is None:
            raise UserError(f"{name} is a {type(value).__name__}, which cannot be saved")
        if is_dataclass(value):
            return {"kind": "fields"} | vars(value)
        keeper[0](value, folder / name)
        return {"kind": "folder"}

    @classmethod
    def _read(cls, told: Any, name: str, folder: Path, tensors: dict[str, Tensor]) -> Any:
        """The value that `_kept` described."""
        if not isinstance(told, dict):
            return told
        kind, keeper = told.pop("kind"), cls.keeps.get(name.split(".")[1])
        if kind == "list":
            return [cls._read(v, name, folder, tensors) for v in told["items"]]
        if kind == "table":
            return pd.DataFrame(told["columns"])
        if kind == "array":
            return np.array(told["items"], dtype=bool if told["dtype"] == "b" else told["dtype"])
        if kind in ("tensor", "numbers"):
            return tensors[name] if kind == "tensor" else tensors[name].numpy()
        if kind == "fields" and keeper:
            return keeper(**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items()})
        if kind == "folder" and keeper:
            return keeper[1](folder / name)
        raise ValueError(f"its {kind} is of another version of hallulib: fit and save it again")


def must_suit(images: Images, shape: Sequence[int], what: str) -> None:
    """Refuse images of another ``(channels, height, width)``, in a sentence that ends in it."""
    found = tuple(images.shape[1:])
    if found != tuple(shape):
        raise UserError(f"images have (channels, height, width) {found}; {what} {tuple(shape)}")


def _from_0(rows: np.ndarray, images: Images) -> bool:
    """Whether images look like a scale from 0 to 1; grey levels are known by their type."""
    return rows.dtype.kind == "f" and float(images.min()) >= 0


def _reach(values: np.ndarray | Tensor) -> str:
    return f"images reach from {values.min():.4g} to {values.max():.4g}"


def _scaled(rows: np.ndarray) -> np.ndarray:
    """Images in [-1, 1], where whole numbers are grey levels from 0 to 255."""
    whole = rows.dtype.kind in "biu"
    if rows.dtype.kind == "b" or whole and rows.min() >= 0 and rows.max() == 1:
        raise UserError(
            "images hold nothing but 0 and 1, a mask or nearly black; grey levels from 0 to 255 "
            "are needed, which x * 255 makes of a mask"
        )
    rows = rows.astype(np.float32)
    low, high = (0, 255) if whole else (-1, 1)
    if not (low <= rows.min() and rows.max() <= high):
        raise UserError(
            f"{_reach(rows)}; values in [-1, 1], or whole numbers from 0 to 255, are needed"
        )
    return rows / np.float32(127.5) - 1 if whole else rows


def _intact(folder: Path, state: dict[str, Any]) -> Path:
    """Where the files of a saved estimator are, if all is as `save` wrote it."""
    checksum = state.pop("checksum", None)
    if store.key(state) != checksum:
        raise ValueError(f"{STATE} has changed")
    files = folder / state["place"]
    changed = disk.changed(files, state["sha256"])
    if changed:
        raise ValueError(f"{changed} is missing or has changed")
    return files
