"""Strings: sizes and counts in words, terminal escapes, surrogates, partial matches."""
