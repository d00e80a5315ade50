"""Mixture-of-experts checkpoints of Hugging Face Transformers whose experts live on volunteers' computers.

Needs the extra ``[transformers]``. Nothing here imports Transformers before it is used.
"""
