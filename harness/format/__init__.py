"""File formats of the run folder: bytes in, values out, errors that name the place."""
