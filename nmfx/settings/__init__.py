"""Every option, written once: a field with its type, default, limits and help. Imports no torch, so that `--help` is quick."""
