# SPDX-License-Identifier: Apache-2.0
"""Integers to bytes and back: entropy coding and the container. NumPy only, no JAX."""
