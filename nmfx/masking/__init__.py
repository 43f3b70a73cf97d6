"""One module: its weight read through a mask, and how that trains."""
