# SPDX-License-Identifier: Apache-2.0
"""Side-by-side benchmarks of patch loaders: ``python -m tests.benchmarks --help``."""
