# SPDX-License-Identifier: Apache-2.0
"""Other people's methods and the paper's ablations, to compare with; the trainer imports none of them."""
