"""Object stores, as a place for runs: the client, and bringing a run from there."""
