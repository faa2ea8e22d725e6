# SPDX-License-Identifier: Apache-2.0
"""Figures that people can act on."""

from .diagnosis import Advice, Diagnosis, diagnose

__all__ = ["Advice", "Diagnosis", "diagnose"]
