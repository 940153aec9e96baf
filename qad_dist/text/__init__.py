"""Strings, without torch: normalising, word errors, which pseudo-labels are kept, tables."""
