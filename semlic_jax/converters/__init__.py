# SPDX-License-Identifier: Apache-2.0
"""What others have published, turned into files of ours: `semlic convert`.

One module for each source. May import everything below the command line; nothing but
the command line imports this.
"""
