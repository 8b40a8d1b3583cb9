# SPDX-License-Identifier: Apache-2.0
"""What "good" means: feature networks, losses and metrics.

May import `semlic_jax.model`; never `coding`, `refinement`, `training` or
`evaluation`.
"""
