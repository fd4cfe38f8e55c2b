"""The transports. `base` is their contract, `registry` the table of their names; each folder is one transport (`process_group`: two).

`checks` and `rate_limit` are what several of them share.
"""
