"""Checkpoint files are read without running code, or refused."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from published import (
    envelope,
    golden,
    refusal,
    write,
)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_code_in_a_pickle_is_named_and_not_run(tmp_path):
    """A pickle that asks for a function is refused with its name, and the function does not run."""
    target = tmp_path / "touched"
    content = envelope(golden("official-mini")) | {"epoch": Evil(target)}
    message = refusal(write(tmp_path, content))
    assert "its pickle asks for posix.system, and loading that could run code; nothing was run" in message
    assert "save its 'ema' state dict alone" in message
    assert not target.exists()
    message = refusal(write(tmp_path, envelope(golden("official-mini"), output_dir=Path("x"))))
    assert "its pickle asks for pathlib" in message
    # the Namespace is the one exception, and only here
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(write(tmp_path, {"args": argparse.Namespace()}), weights_only=True)


def test_other_files_are_refused_with_their_content(tmp_path):
    """Files that are no published checkpoint are refused with what they hold instead."""
    prefix = "base_tokenizer.vqgan."
    weights = golden("official-mini")
    base = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    message = refusal(write(tmp_path, {"model": base}))
    assert "must hold either base_tokenizer.vqgan.* or base_tokenizer.vae.* tensors, it has neither" in message
    both = weights | golden("official-mini-kl")
    assert "it has both" in refusal(write(tmp_path, both))
    message = refusal(write(tmp_path, {"weights": {}, "epoch": 1}))
    assert "it has the keys ['epoch', 'weights']; a published checkpoint holds a state dict under 'ema'" in message
    assert "it holds a list, expected a dictionary" in refusal(write(tmp_path, [1]))
    (tmp_path / "alit.pth").write_text("<html>not found</html>")
    assert "it is not a checkpoint: " in (message := refusal(tmp_path / "alit.pth"))
    assert "this one with b'<htm'; check the download" in message
    (tmp_path / "alit.pth").unlink()
    assert "it cannot be read (No such file or directory)" in refusal(tmp_path / "alit.pth")


def test_damaged_files_are_refused(tmp_path):
    """A file that is truncated, or a zip of something else, is refused with advice to download again."""
    checkpoint = write(tmp_path, envelope(golden("official-mini")))
    data = checkpoint.read_bytes()
    for keep in (4, 1000, len(data) // 2, len(data) - 1):
        checkpoint.write_bytes(data[:keep])
        assert "it is truncated or damaged (" in (message := refusal(checkpoint))
        assert message.endswith("; download it again")
    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("readme.txt", "a zip, but no checkpoint")
    assert "it is truncated or damaged (" in refusal(checkpoint)
