# SPDX-License-Identifier: Apache-2.0
"""Image to latents to probabilities: the networks and the order of coding."""
