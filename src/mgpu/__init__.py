"""Serve one large language model on one machine with several GPUs.

The package holds four parts, each a folder at the root of the repository: ``protocol`` (what
crosses a process), ``orchestrator`` (the parent), ``worker`` (one per GPU) and ``launch`` (the
command line). Importing ``mgpu`` is light: neither torch nor tokenizers are loaded.
"""

__version__ = "0.1.0"
