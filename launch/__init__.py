# SPDX-License-Identifier: Apache-2.0
"""Starts training, refinement and evaluation where the machines are; see README.md."""
