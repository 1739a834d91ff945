"""Appendices B, C and F, until they are joined with test_vqldm.py (then these lines leave)."""

import test_vqldm

globals().update({k: v for k, v in vars(test_vqldm).items() if not k.startswith(("test_", "__"))})
