"""The SGLang adapter: plugin entry point, storage backend, and what they need to know of SGLang's versions.

No imports here: the plugin entry point must cost nothing until SGLang calls it.
"""
