"""Model files: found, downloaded, converted, checked."""
