# SPDX-License-Identifier: Apache-2.0
"""From image to latents to probabilities: the networks and the coding order."""
