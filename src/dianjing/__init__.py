"""Dianjing: give a text-only LLM eyes."""

__version__ = "0.1.0"
