"""A folder of pictures like those that a department exports: drawn, for whoever has none at hand.

They are windows of 16 mm around prostate lesions, another draw than ``lesions`` and with classes
further apart, and some of glands without a lesion, which have no class.
"""

from pathlib import Path

from PIL import Image

from data_prep.drawn import prostate

SEPARATION = 2.0  # of the classes, see `data_prep.drawn.prostate.best_auroc`


def write(folder: Path, n_labelled: int = 600, n_unlabelled: int = 300, size: int = 64) -> None:
    """Write pictures as ``low/P00031_4.png``: the class, the patient, the slice.

    Args:
        folder: gets the folders ``low`` (ISUP grade group 2), ``high`` (3 to 5) and
            ``unlabelled``, and should not have them yet.
        n_labelled: pictures of lesions, about 4.5 per patient, half of them ``low``.
        n_unlabelled: pictures without a class.
        size: pixels per side, at least 16.
    """
    counts = dict(n_unlabelled=n_unlabelled, n_train=n_labelled, n_val=0, n_test=0)
    drawn, table, _ = prostate.lesions(size, seed=1, separation=SEPARATION, **counts)
    for picture, row in zip(drawn, table.itertuples(), strict=True):
        file = folder / (row.grade2 or "unlabelled") / f"{row.patient}_{row.slice}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[0]).save(file)
