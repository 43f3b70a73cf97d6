"""The scheme: which pattern each site gets."""

from nmfx.scheme.document import INFO
from nmfx.scheme.published import published_entries, published_keys
from nmfx.scheme.value import Scheme, Totals, fit, shapes_of

__all__ = ["INFO", "Scheme", "Totals", "fit", "published_entries", "published_keys", "shapes_of"]
