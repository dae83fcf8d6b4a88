"""Shipped run configs: each module is one experiment with a `get_config()`."""
