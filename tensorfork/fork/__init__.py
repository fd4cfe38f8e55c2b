"""One fork: match and cut (pure), the memory that is filled, the steps from hello to install, verification."""
