"""The transports. `base` has the contract, `registry` the table of names; each other file is one transport."""
