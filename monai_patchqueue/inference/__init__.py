# SPDX-License-Identifier: Apache-2.0
"""Whole volumes out of the outputs for their patches."""

from .aggregator import PatchAggregator
from .evaluator import GridPatchEvaluator

__all__ = ["GridPatchEvaluator", "PatchAggregator"]
