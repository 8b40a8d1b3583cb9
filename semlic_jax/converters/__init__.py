# SPDX-License-Identifier: Apache-2.0
"""Converters of published files into files of this package: `semlic convert`.

There is one module for each kind of source. They may import everything below the
command line; nothing but the command line imports them.
"""
