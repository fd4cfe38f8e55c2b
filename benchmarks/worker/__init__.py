"""What runs in the workers. Each function takes the worker's `State` first, and returns what JSON can carry."""
