"""Compiled models as files: what is written, what may stand in one, and how it becomes a compiled model again."""
