"""Documents, tokens and the order of samples. Only the loader needs torch."""
