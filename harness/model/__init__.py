"""The decoder of the language task: `gpt`."""
