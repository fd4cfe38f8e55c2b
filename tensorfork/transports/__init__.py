"""The transports. `base` is their contract, `registry` the table of their names; each folder has one, or two of a kind.

`checks` and `rate_limit` are what several of them share.
"""
