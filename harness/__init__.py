"""Distributed training whose checkpoints can prove where they came from."""

__version__ = "0.1.0"
