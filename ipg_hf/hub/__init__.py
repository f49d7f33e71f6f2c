# SPDX-License-Identifier: Apache-2.0
"""The model card, and the push to the Hugging Face Hub."""
