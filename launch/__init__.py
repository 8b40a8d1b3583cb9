# SPDX-License-Identifier: Apache-2.0
"""Starts training, refinement and evaluation where machines are: see README.md."""
