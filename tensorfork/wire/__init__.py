"""The protocol between a fork and a seed: its messages, tables that travel in pages, and both ends of a connection."""
