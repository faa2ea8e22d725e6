# SPDX-License-Identifier: Apache-2.0
"""Figures that people can act on."""

from .advice import Advice
from .diagnosis import Diagnosis, diagnose

__all__ = ["Advice", "Diagnosis", "diagnose"]
