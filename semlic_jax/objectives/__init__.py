# SPDX-License-Identifier: Apache-2.0
"""Feature networks, losses and metrics: what makes a reconstruction good.

May import `semlic_jax.model` and `semlic_jax.arrays_file`; never `coding`,
`refinement`, `training` or `evaluation`.
"""
