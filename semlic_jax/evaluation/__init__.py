# SPDX-License-Identifier: Apache-2.0
"""Comparisons of this codec with others: classical codecs, the demo, benchmarks.

Sits on top of everything but the command line; nothing below may import it.
"""
