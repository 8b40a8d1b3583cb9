# SPDX-License-Identifier: Apache-2.0
"""Training: data, stages, the loop. Needs the extra `train`."""
