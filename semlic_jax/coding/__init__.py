# SPDX-License-Identifier: Apache-2.0
"""From integers to bytes and back: exact networks, entropy coding, the container.

May import: `semlic_jax.model`. Imported by: `semlic_jax.codec`.
"""
