"""What the scikit-learn estimators share: images as rows of a table, and files without pickle."""

import json
from dataclasses import asdict
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from hallulib import UserError, artifacts, disk, prototypes, unet
from hallulib.levels import Levels
from hallulib.prototypes import PrototypeClassifier
from hallulib.score import ScoreModel
from hallulib.shapes import Images

Others = Float[Tensor, "_others channels height width"]  # fewer or more than the labelled ones
FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
STATE, TENSORS = "estimator.json", "estimator.safetensors"


class ImageEstimator(BaseEstimator):
    """An estimator whose rows are square images of ``self.channels`` channels.

    Images may come as rows ``(n, channels * side * side)``, as ``(n, side, side)`` or as
    ``(n, channels, side, side)``; in [-1, 1], or 8-bit integers.
    """

    def _first(self, X, y) -> tuple[Images, np.ndarray]:
        """Images and labels of a fit; their number of features is what all later ones need."""
        rows, y = validate_data(self, self._flat(X), y, dtype=np.float32)
        return self._images(rows), y

    def _further(self, X) -> Images:
        """Images of the same size as those of the fit."""
        check_is_fitted(self)
        return self._images(validate_data(self, self._flat(X), reset=False, dtype=np.float32))

    def _known(self, y) -> np.ndarray:
        """Labels of further images, all among those of the fit."""
        y = column_or_1d(y)
        strange = y[~np.isin(y, self.classes_)]
        if len(strange):
            known = ", ".join(map(str, self.classes_))
            raise UserError(
                f"label {str(strange[0])!r} was not among those of the training: {known}"
            )
        return y

    def _flat(self, X) -> object:
        """Images of any form as rows, 8-bit ones in [-1, 1]; what is no image goes on as it is."""
        if isinstance(X, Tensor):
            X = (X.float() if X.dtype == torch.bfloat16 else X).numpy(force=True)
        if not isinstance(X, np.ndarray):
            return X
        if X.ndim in (3, 4):
            # as many numbers in another order would be other images
            channels, height, width = X.shape[1:] if X.ndim == 4 else (1, *X.shape[1:])
            if channels != self.channels or height != width:
                raise UserError(
                    f"images of shape {X.shape[1:]} found; ({self.channels}, side, side) is needed"
                )
            X = X.reshape(len(X), channels * height * width)
        return X / np.float32(127.5) - 1 if X.dtype == np.uint8 else X

    def _images(self, rows: np.ndarray) -> Images:
        """Rows as images."""
        side = round((rows.shape[1] / self.channels) ** 0.5)
        if side**2 * self.channels != rows.shape[1]:
            raise UserError(
                f"rows have {rows.shape[1]} features; channels * side * side are needed, "
                f"with {self.channels} channels"
            )
        if not np.abs(rows).max() <= 1:
            raise UserError(
                f"images reach from {rows.min():.4g} to {rows.max():.4g}; values in [-1, 1], or "
                "8-bit integers, are needed"
            )
        rows = np.ascontiguousarray(rows)  # as tensors are: no steps backwards
        return torch.from_numpy(rows.reshape(len(rows), self.channels, side, side))

    @property
    def _seed(self) -> int:
        """``random_state`` as PyTorch takes it.

        Raises:
            UserError: no whole number, as scikit-learn's None would be.
        """
        if not isinstance(self.random_state, Integral) or isinstance(self.random_state, bool):
            raise UserError(f"random_state is {self.random_state!r}; a whole number is needed")
        return int(self.random_state)

    def _on(self) -> str:
        """The device to work on.

        Raises:
            UserError: a GPU is asked for and there is none.
        """
        if str(self.device).startswith("cuda") and not torch.cuda.is_available():
            raise UserError(
                f"device is {str(self.device)!r}, and PyTorch finds no GPU; 'cpu', or None, which "
                "takes what there is, is needed"
            )
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def save(self, folder: Path | str) -> None:
        """Write the fitted estimator: JSON, safetensors and folders of networks, no pickle.

        Args:
            folder: made if it is not there.

        Raises:
            NotFittedError: it is not fitted.
            UserError: a parameter of a kind that cannot be written.
        """
        check_is_fitted(self)
        folder, tensors = Path(folder), {}
        fitted = {k: v for k, v in vars(self).items() if k.endswith("_") and k[0] != "_"}
        parts = {"parameters": self.get_params(deep=False), "fitted": fitted}
        told = {
            part: {k: _told(v, f"{part}.{k}", folder, tensors) for k, v in held.items()}
            for part, held in parts.items()
        }
        with disk.whole(folder / TENSORS) as partial:
            save_file(tensors, partial)
        made_with = artifacts.provenance()
        artifacts.write_json(
            folder / STATE, told | {"estimator": type(self).__name__, "made_with": made_with}
        )

    @classmethod
    def load(cls, folder: Path | str, **parameters: object) -> "ImageEstimator":
        """Read what `save` wrote.

        Args:
            folder: of `save`.
            parameters: in place of those that were saved, as ``device="cpu"``.

        Raises:
            UserError: the folder is not such an estimator.
        """
        folder = Path(folder)
        try:
            told = json.loads((folder / STATE).read_text())
            if told["estimator"] != cls.__name__:
                raise UserError(f"it holds a {told['estimator']}, not a {cls.__name__}")
            tensors = load_file(folder / TENSORS)
            held = {
                part: {k: _read(v, f"{part}.{k}", folder, tensors) for k, v in told[part].items()}
                for part in ("parameters", "fitted")
            }
            estimator = cls(**held["parameters"] | parameters)
        except FAULTS as fault:
            raise UserError(
                f"{folder} is not a saved {cls.__name__} "
                f"({type(fault).__name__}: {str(fault).splitlines()[0]}); it needs {STATE} and "
                f"{TENSORS} as save wrote them"
            ) from fault
        for name, value in held["fitted"].items():
            if isinstance(value, torch.nn.Module):
                value.to(estimator._on())
            setattr(estimator, name, value)
        return estimator


def _told(value, name: str, folder: Path, tensors: dict[str, Tensor]):
    """A value as JSON; what JSON cannot hold goes to the tensors or into a folder."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return {"kind": "list", "items": [_told(v, name, folder, tensors) for v in value]}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Levels):
        return {"kind": "levels", **asdict(value)}
    if isinstance(value, pd.DataFrame):
        return {"kind": "table", "columns": value.to_dict("list")}
    if isinstance(value, ScoreModel):
        unet.save(value, folder / name)
        return {"kind": "score model"}
    if isinstance(value, PrototypeClassifier):
        tensors |= {f"{name}.{k}": v.contiguous() for k, v in value.state_dict().items()}
        return {"kind": "prototype classifier", "settings": value.settings}
    if isinstance(value, np.ndarray) and value.dtype.kind in "USOb":
        return {"kind": "array", "dtype": value.dtype.kind, "items": value.tolist()}
    if isinstance(value, np.ndarray | Tensor):
        tensors[name] = torch.as_tensor(value).contiguous().cpu()
        return {"kind": "tensor" if isinstance(value, Tensor) else "numbers"}
    raise UserError(f"{name} is a {type(value).__name__}, which cannot be saved")


def _read(told, name: str, folder: Path, tensors: dict[str, Tensor]):
    """The value that `_told` described."""
    if not isinstance(told, dict):
        return told
    kind = told["kind"]
    if kind == "list":
        return [_read(v, name, folder, tensors) for v in told["items"]]
    if kind == "levels":
        weights = told["weights"] and tuple(told["weights"])
        return Levels(told["first"], told["last"], tuple(told["shares"]), weights)
    if kind == "table":
        return pd.DataFrame(told["columns"])
    if kind == "score model":
        return unet.load(folder / name)
    if kind == "prototype classifier":
        classifier = prototypes.build(**told["settings"]).eval()
        start = name + "."
        state = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        classifier.load_state_dict(state)
        return classifier
    if kind == "array":
        return np.array(told["items"], dtype=bool if told["dtype"] == "b" else told["dtype"])
    return tensors[name] if kind == "tensor" else tensors[name].numpy()
