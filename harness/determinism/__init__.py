"""What a run does that need not come out the same twice: settings, ledger and step digests."""
