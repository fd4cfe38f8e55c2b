"""A published model: the handle that `publish` returns, the service that answers forks, and its leases."""
