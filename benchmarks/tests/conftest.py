"""Suites of codes alone, which run in milliseconds."""

from __future__ import annotations

import pytest
import yaml

from spikeplug_bench.suite import Suite, parse_suite

CODES = """
format: 1
name: codes
title: Codes
grids:
  - task: {kind: reconstruction, encoder: [rate], distribution: [uniform, normal], limit: 1000}
    steps: [2, 4, 8]
"""


@pytest.fixture
def codes() -> Suite:
    """Six cells."""
    return parse_suite(yaml.safe_load(CODES))


@pytest.fixture
def codes_file(tmp_path):
    """The same in a file."""
    path = tmp_path / "codes.yaml"
    path.write_text(CODES)
    return path
