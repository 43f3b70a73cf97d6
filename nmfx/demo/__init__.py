"""A tiny trained network and its data, so that everything can be tried offline in seconds."""
