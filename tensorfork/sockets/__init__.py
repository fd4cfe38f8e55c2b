"""ZeroMQ sockets with every limit set, TCP addresses, and a waker for threads that poll."""
