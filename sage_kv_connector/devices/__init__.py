# SPDX-License-Identifier: Apache-2.0
"""What a vendor's device must do for the transport (``runtime``), and a thread that copies with it (``dma_lane``)."""
