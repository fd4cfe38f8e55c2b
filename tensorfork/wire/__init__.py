"""The conversation between a fork and a seed: messages, tables that travel in pages, and both of its ends."""
