"""What runs in the workers. Each public function takes the `WorkerState` first, and returns what JSON can carry."""
