"""Many answers of one model at the same time."""
