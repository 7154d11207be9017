"""Storage backends: one module or package per store; `base` is the whole contract between them and the cascade.

Does not belong here: anything that knows an engine (SGLang, vLLM).
"""
