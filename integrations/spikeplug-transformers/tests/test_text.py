"""Cutting texts into windows."""

from __future__ import annotations

import pytest
import torch

from spikeplug.errors import OptionError
from spikeplug_transformers.text import calibration, windows


def test_windows_do_not_overlap_and_drop_the_rest():
    ids = torch.arange(100)
    cut = windows(ids, 30, None)
    assert [tuple(window.shape) for window in cut] == [(1, 30)] * 3
    assert torch.cat(cut, dim=1).tolist() == [list(range(90))]
    assert [tuple(window.shape) for window in windows(ids, 512, 50)] == [(1, 50)]


def test_calibration_adds_short_windows_of_half_the_text():
    batches = calibration(torch.arange(2048), 512, 1024)
    assert [tuple(batch.shape) for batch in batches] == [(1, 512), (1, 512), (32, 16)]


@pytest.mark.parametrize(("tokens", "seqlen", "limit"), [(1, 8, None), (0, 8, None), (9, 1, None), (9, 8, 1)])
def test_too_few_tokens_are_refused(tokens, seqlen, limit):
    with pytest.raises(OptionError, match="at least 2"):
        windows(torch.arange(tokens), seqlen, limit)
