"""Dianjing: give a text-only LLM eyes."""

import os

__version__ = "0.1.0"

# Packs are of many sizes, and GPU memory in fixed pieces would be taken again for each: 93 GiB for 41 GiB of tensors.
# torch reads this when a GPU is first asked for anything, which bitsandbytes does while it is imported.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
