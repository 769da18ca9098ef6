"""A save that is cut off between any two of its files."""

import os

import torch

from hallulib import UserError


def save_cut_off(save, load, old, new, folder, monkeypatch):
    """How often a save of ``new`` over ``old``, cut off after each rename, left a model at all.

    What is left is whole: every weight is that of ``old``, or every weight is that of ``new``.
    """
    replace, left, renames, cut = os.replace, 0, 0, True

    def dying(*names):
        nonlocal renames
        if renames == 0:
            raise KeyboardInterrupt
        renames -= 1
        replace(*names)

    for allowed in range(20):
        save(old, folder)
        renames = allowed
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", dying)
                save(new, folder)
            cut = False
        except KeyboardInterrupt:
            pass
        try:
            found = load(folder).state_dict()
        except UserError:
            continue
        left += 1
        wholes = [model.state_dict() for model in (old, new)]
        assert any(all(torch.equal(found[k], whole[k]) for k in whole) for whole in wholes)
        if not cut:
            return left
    raise AssertionError("the save never came to its end")
