"""What a model holds: the walk over its tensors, selection, its description, installing meta tensors."""
