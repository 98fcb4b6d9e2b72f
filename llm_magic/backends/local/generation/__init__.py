"""The decoding loop of one answer."""
