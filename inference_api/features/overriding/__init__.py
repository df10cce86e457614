"""Parts of the feature `overrides`."""
