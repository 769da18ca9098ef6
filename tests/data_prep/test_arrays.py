"""Arrays of .npz, .npy and HDF5 whose damage the files themselves can tell are refused."""

import h5py
import numpy as np
import pytest

from data_prep import arrays
from hallulib import UserError

HELD = {".npz": "images", ".npy": "", ".h5": "images"}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (12, 9, 9)).astype(np.uint8)


def chunked(path, images, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, chunks=(4, 9, 9), **options)


WRITERS = {
    "stored.npz": lambda path, images: np.savez(path, images=images),
    "packed.npz": lambda path, images: np.savez_compressed(path, images=images),
    "plain.npy": np.save,
    "packed.h5": lambda path, images: chunked(path, images, compression="gzip"),
    "summed.h5": lambda path, images: chunked(path, images, fletcher32=True),
}


def read(path, n: int, kept: int) -> np.ndarray:
    arrays._opened.cache_clear()
    arrays.check(path, HELD[path.suffix], n, (32, 32) if n == 300 else (9, 9))
    return arrays.opened(str(path), HELD[path.suffix]).read(0, kept)


def flips(content: bytes, step: int):
    """A bit of every so many bytes that are not part of a long row of zeros."""
    for place in range(0, len(content), step):
        if any(content[max(0, place - 2) : place + 3]):
            yield place, 1 << place % 8


@pytest.mark.parametrize("name", WRITERS)
def test_a_flipped_bit_of_an_array_is_refused_or_changes_one_value_at_most(tmp_path, images, name):
    path = tmp_path / name
    WRITERS[name](path, images)
    content, wrong = path.read_bytes(), []
    for place, bit in flips(content, 1 if "h5" in name else 4):
        flipped = bytearray(content)
        flipped[place] ^= bit
        path.write_bytes(flipped)
        try:
            found = read(path, 12, 12)
        except UserError:
            continue
        if (found != images).sum() > (name == "plain.npy"):
            wrong.append(place)
    assert wrong == []


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_behind_the_images_to_keep_is_found(tmp_path, save):
    many = np.random.default_rng(0).integers(0, 256, (300, 32, 32)).astype(np.uint8)
    save(tmp_path / "x.npz", images=many)
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(whole)
    with pytest.raises(UserError, match=r"x.npz: array images is damaged"):
        read(tmp_path / "x.npz", 300, 10)


def test_what_follows_an_array_is_no_array(tmp_path, images):
    np.save(tmp_path / "x.npy", images)
    with (tmp_path / "x.npy").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="goes on after its array"):
        read(tmp_path / "x.npy", 12, 12)


def test_chunks_that_were_never_written_are_not_read_as_zeros(tmp_path, images):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        held = file.create_dataset("images", images.shape, "u1", chunks=(4, 9, 9))
        held[:8] = images[:8]
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path / "x.h5", 12, 12)
