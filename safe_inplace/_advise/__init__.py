"""Which sums and products of an unmodified program could be in place, or be one op instead of two.

docs/advise.md says what each file is for.
"""
