"""ZeroMQ sockets with every limit set, addresses, and what wakes a thread that polls."""
