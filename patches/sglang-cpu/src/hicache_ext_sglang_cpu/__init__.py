"""What lets the unmodified SGLang wheel run on a machine without an accelerator.

`boot` runs at interpreter start, `plugin` when SGLang loads its plugins. This file stays empty: it is
imported in every interpreter of the environment.
"""
