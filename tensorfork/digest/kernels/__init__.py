"""What runs on GPUs: source, and what `build` made of it, which is what is used."""
