"""Keys, signatures, statements and the log: what makes a checkpoint's story checkable by a stranger."""
